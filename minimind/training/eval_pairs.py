"""Minimal pairs during training: `--eval_pairs`."""

import random
from collections import defaultdict
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean

from accelerate.utils import gather_object
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from minimind.common.errors import UserError
from minimind.evaluation.scoring import ModelSubject
from minimind.score_card import MinimalPair, PairsTask, read_pairs

FORMS = ("sum", "mean")  # of the log-probabilities of a sentence's tokens
SEED = 0  # of the choice of pairs, which is the same in every run


@cache
def choose_pairs(files: tuple[str, ...], most: int) -> dict[str, list[MinimalPair]]:
    """At most so many pairs of each file, by its name in the log: as many of each paradigm as there
    are, the others by chance.

    Raises:
        UserError: a file cannot be used, see `read_pairs`, or two have the same name.
    """
    chosen: dict[str, list[MinimalPair]] = {}
    for file in files:
        name = Path(file).stem
        if name in chosen:
            raise UserError(
                f"--eval_pairs {file}: found two files named {name}, expected names that the log"
                " can tell apart. Rename one of them."
            )
        paradigms = defaultdict(list)
        try:
            pairs = read_pairs([file])
        except UserError as problem:
            raise UserError(f"--eval_pairs: {problem}") from problem
        for pair in pairs:
            paradigms[pair.paradigm].append(pair)
        generator = random.Random(SEED)
        for group in paradigms.values():
            generator.shuffle(group)
        in_turn = chain.from_iterable(zip_longest(*paradigms.values()))
        chosen[name] = [pair for pair in in_turn if pair is not None][:most]
    return chosen


def pair_metrics(trainer: Trainer) -> dict[str, float]:
    """The shares of the pairs of `--eval_pairs` that a trainer's model wins, ties half: by the sum
    of the log-probabilities (`eval_pairs_sum`) and by their mean, and of several files also each
    one's (`eval_pairs_sum/NAME`). No random number is drawn.

    All processes call it. Each scores a part of the pairs, but under ZeRO-3, where they have to
    compute the same steps, all of them.
    """
    args, files = trainer.args, trainer.args.held_out_pairs()
    model = trainer.accelerator.unwrap_model(trainer.model)
    training, wins = model.training, []
    part = slice(args.process_index, None, args.world_size)
    if is_deepspeed_zero3_enabled():
        part = slice(None)  # each pair counts several times, which changes no mean
    try:
        subject = ModelSubject(model, trainer.processing_class)
        for name, pairs in files.items():
            if own := pairs[part]:
                measures = PairsTask(own).run(subject).measures
                sides = (measures[f"pairs/all/{form}"].values.values() for form in FORMS)
                wins += [(name, *each) for each in zip(*sides, strict=True)]
    finally:
        model.train(training)

    metrics, wins = {}, gather_object(wins)
    for name in (None, *(files if len(files) > 1 else ())):
        for column, form in enumerate(FORMS, 1):
            chosen = [each[column] for each in wins if name in (None, each[0])]
            metrics[f"eval_pairs_{form}" + (f"/{name}" if name else "")] = fmean(chosen)
    return metrics
