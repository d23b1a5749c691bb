"""Preference pairs from a model's own replies: sampled, then ranked by a judge or by a person.

record.py    the file beside the pairs: replies and choices so far, so that nothing is lost
making.py    replies to a prompt -> a pair for train_dpo.py, or why there is none
choosing.py  a local web page on which a person chooses (choosing.html)
"""

# ruff: noqa: F401 (the public names of this room)

from minimind.pairs.choosing import ChoiceServer
from minimind.pairs.making import (
    Question,
    chosen_pairs,
    describe_pairs,
    questions,
    ranked_pairs,
)
from minimind.pairs.record import Record, replies_depend_on
