"""`minimind evaluate`: the score card of a model, its controls, and the comparison of cards."""

# ruff: noqa: F401 (the public names of this room)

from minimind.score_card.card import cards_json, check_model, make_card, write_cards
from minimind.score_card.choices import ChoicesTask, read_multiple_choice
from minimind.score_card.curve import curve_of, curve_picture, curve_table, curves_json
from minimind.score_card.differences import differences, differences_table
from minimind.score_card.finished import Finished
from minimind.score_card.harness import HarnessTask
from minimind.score_card.held_out import held_out_task
from minimind.score_card.minimal_pairs import MinimalPair, PairsTask, read_pairs
from minimind.score_card.own_set import own_pairs, write_pairs
from minimind.score_card.replies import RepliesTask, parse_decodings, read_referenced_prompts
from minimind.score_card.report import Table, card_table, picture, remarks
from minimind.score_card.rules import RulesTask, read_ruled_prompts
from minimind.score_card.tasks import Card, Task, TaskResult
