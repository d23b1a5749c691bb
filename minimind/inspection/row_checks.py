"""Checks of rows beside one another: those left out, cut, copied, and the pairs."""

from collections.abc import Sequence

import numpy as np

from minimind.data.bad_rows import BAD_ROW_SHARE
from minimind.data.chat_summary import Reading
from minimind.inspection.findings import Findings
from minimind.inspection.tokens import Tokens, ratio

CUT_SHARE = 0.01  # of the rows: more than this cut is worth a warning
LOST_SHARE = 0.2  # of the rows: more than this left out stops a run
# Of the pairs: where chosen is longer, or shorter, this often, length alone tells it from rejected.
LONGER_SHARE = 0.7
FEWEST_PAIRS = 20  # by which that is judged
BAD_ROWS = (  # part of a bad row's problem, name of the finding, advice
    (
        "found chosen equal to rejected",
        "identical_pairs",
        "They have no preference to learn. Remove them.",
    ),
    ("an empty reply", "empty_replies", "The model would learn to say nothing. Remove them."),
    ("", "bad_rows", "Fix them."),
)
LEFT_OUT = {"too_long_rows", "rows_without_trained_token", *(name for _, name, _ in BAD_ROWS)}


def check_left_out(findings: Findings, reading: Reading, on_bad_rows: str | None) -> None:
    """Find rows that were read and are not trained on. `on_bad_rows` is the policy of the run."""
    counts, total = reading.counts, sum(bad.total for bad in reading.bad)

    # Bad rows, by their problem.
    allowed = 0 if on_bad_rows == "error" else BAD_ROW_SHARE
    for bad in reading.bad:
        is_refused = bad.count > allowed * bad.total and on_bad_rows != "skip"
        for count, problem, places in bad.reasons.values():
            name, advice = next(
                (name, advice) for part, name, advice in BAD_ROWS if part in problem
            )
            example = f"in the first {problem}" if count > 1 else problem
            text = f"{count:,} of {bad.total:,} rows are left out: {example}"
            if is_refused:
                advice = f"{advice} A run would stop at them without --on_bad_rows skip."
            severity = "error" if is_refused else "warning"
            findings.add(name, severity, count, text, advice, places)
    for columns in reading.columns:
        for name, count, text, advice, places in columns.findings():
            findings.add("unread_columns", "error", count, text, advice, places)
            findings[-1]["column"] = name

    # What does not fit, pairs whose replies are equal once they are cut, and what has nothing to
    # train.
    dropped, identical = counts["dropped"], counts["identical"]
    untrained, split = counts["untrained"], counts["split"]
    problems = [problem for bad in reading.too_long for _, problem, _ in bad.reasons.values()]
    equal = [problem for problem in problems if BAD_ROWS[0][0] in problem]
    too_long, advice = (
        [each for each in problems if each not in equal],
        "Raise it, or shorten them.",
    )
    text, places = left_out(dropped, total, too_long), reading.places.get("dropped", ())
    findings.add("too_long_rows", "warning", dropped, text, advice, places)
    text, places = left_out(identical, total, equal), reading.places.get("identical", ())
    findings.add("identical_pairs", "warning", identical, text, advice, places)

    text = f"{untrained:,} of {total:,} rows have no reply to train and are left out"
    advice = "Their flags, weights or the options leave all of their replies out."
    places = reading.places.get("untrained", ())
    findings.add("rows_without_trained_token", "warning", untrained, text, advice, places)

    text = f"{split:,} of {total:,} rows are longer than --max_length and split into several"
    places = reading.places.get("split", ())
    findings.add("split_rows", "info", split, text, "Nothing to do.", places)

    lost = sum(bad.count for bad in reading.bad) + dropped + identical + untrained
    if lost > LOST_SHARE * total:
        text = f"{lost:,} of {total:,} rows ({ratio(lost, total):.1%}) are left out"
        advice = (
            f"More than {LOST_SHARE:.0%} are a mistake more often than not. Their reasons are"
            " findings of their own."
        )
        findings.add("rows_lost", "error", lost, text, advice)


def left_out(count: int, total: int, problems: Sequence[str]) -> str:
    """The text of a finding about rows that a limit leaves out, with the first of the problems."""
    problem = next(iter(problems), "")
    example = f"in the first {problem}" if count > 1 else problem
    return f"{count:,} of {total:,} rows ({ratio(count, total):.1%}) are left out: {example}"


def check_pair_cuts(findings: Findings, reading: Reading) -> None:
    """Find pairs of which a prompt or a reply was cut."""
    total, places = len(reading.lengths), reading.places
    cut = reading.counts["prompts_cut"]
    share = ratio(cut, total)
    severity = "warning" if share > CUT_SHARE else "info"
    text = (
        f"{cut:,} of {total:,} pairs ({share:.1%}) have a prompt longer than --max_prompt_length,"
        " of which only the end is used"
    )
    advice = "Raise it if the beginnings matter."
    findings.add("prompts_cut", severity, cut, text, advice, places.get("prompts_cut", ()))

    cut = reading.counts["replies_cut"]
    share = ratio(cut, total)
    severity = "warning" if share > CUT_SHARE else "info"
    text = (
        f"{cut:,} of {total:,} pairs ({share:.1%}) have a reply longer than"
        " --max_completion_length, which is cut"
    )
    advice = (
        "They teach nothing about where a reply ends. Raise it, or leave them out with"
        " --long_completions drop."
    )
    findings.add("replies_cut", severity, cut, text, advice, places.get("replies_cut", ()))


def check_cuts(
    findings: Findings, tokens: Tokens, lengths_before: np.ndarray, size: int = 1
) -> tuple[int, int]:
    """Find conversations of which a part was cut off; returns their number and that of the tokens
    lost.

    `lengths_before` (rows,) are the lengths of the conversations before any cut; the rows of one
    conversation are neighbours. Of pairs (`size` 2), which have findings of their own, the side
    counts that lost more.
    """
    lengths, before = tokens.lengths.reshape(-1, size), lengths_before.reshape(-1, size)
    where = np.array(tokens.where[::size], object)
    first = np.flatnonzero(np.append(True, where[1:] != where[:-1]))
    lost = np.maximum(before[first] - np.add.reduceat(lengths, first), 0).max(1)
    cut, lost_tokens = int((lost > 0).sum()), int(lost.sum())
    if size > 1:
        return cut, lost_tokens
    share = ratio(cut, len(first))
    text = (
        f"{cut:,} of {len(first):,} rows ({share:.1%}) were cut to --max_length, and with that"
        f" {lost_tokens:,} tokens ({ratio(lost_tokens, before[first].sum()):.1%}) lost"
    )
    severity = "warning" if share > CUT_SHARE else "info"
    places, advice = where[first[lost > 0]], "Raise --max_length if they matter."
    findings.add("truncated_rows", severity, cut, text, advice, places)
    return cut, lost_tokens


def check_copies(
    findings: Findings, tokens: Tokens, held_out: Tokens | None, size: int = 1
) -> None:
    """Find rows (of pairs: `size` 2 rows at a time) that occur more than once, or are held out and
    trained on."""

    def keys(part: Tokens) -> list[tuple[int, ...]]:
        return list(zip(*(part.hashes[start::size] for start in range(size)), strict=True))

    first: dict[tuple[int, ...], int] = {}
    copies, where = [], tokens.where[::size]
    for number, key in enumerate(keys(tokens)):
        # A row that a mixture repeats is no copy.
        if where[first.setdefault(key, number)] != where[number]:
            copies.append((where[number], where[first[key]]))
    share = ratio(len(copies), len(where))
    text = f"{len(copies):,} of {len(where):,} rows ({share:.1%}) are copies of an earlier one"
    add_copies(findings, copies, text)
    if held_out is not None and len(held_out):
        held_where = held_out.where[::size]
        both = [
            (place, where[first[key]])
            for place, key in zip(held_where, keys(held_out), strict=True)
            if key in first
        ]
        text = f"{len(both):,} of {len(held_where):,} held-out rows are trained on too"
        add_overlap(findings, both, text)


def add_copies(findings: Findings, copies: Sequence[tuple[str, str]], text: str) -> None:
    """Add the finding of (place, earlier place) pairs that hold the same."""
    places = (f"{where} (as {original})" for where, original in copies)
    advice = "Remove them, or they weigh more than others."
    findings.add("duplicate_rows", "warning", len(copies), text, advice, places)


def add_overlap(findings: Findings, both: Sequence[tuple[str, str]], text: str) -> None:
    """Add the finding of (held-out place, training place) pairs that hold the same."""
    places = (f"{where} (as {original})" for where, original in both)
    advice = "The held-out loss would flatter. Remove them from one side."
    findings.add("held_out_rows_trained", "warning", len(both), text, advice, places)


def check_pairs(findings: Findings, tokens: Tokens) -> None:
    """Find pairs that teach nothing, contradict others, or teach length.

    Rows are chosen, rejected, chosen, ...
    """
    where = tokens.where[::2]
    pairs = list(zip(tokens.hashes[::2], tokens.hashes[1::2], strict=True))
    known = set(pairs)
    same = [place for place, (a, b) in zip(where, pairs, strict=True) if a == b]
    text = f"in {len(same):,} of {len(pairs):,} pairs chosen and rejected are the same tokens"
    advice = "They have no preference to learn. Remove them."
    findings.add("identical_pairs", "warning", len(same), text, advice, same)

    opposite = [
        place for place, (a, b) in zip(where, pairs, strict=True) if a != b and (b, a) in known
    ]
    text = f"{len(opposite):,} pairs stand in the data the other way round too"
    advice = "Keep one of each two."
    findings.add("contradicting_pairs", "warning", len(opposite), text, advice, opposite)

    trained = np.diff(tokens.trained_before[tokens.starts])
    chosen, rejected = trained[::2], trained[1::2]
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    share = max(longer, shorter) / max(longer + shorter, 1)
    if share > LONGER_SHARE and longer + shorter >= FEWEST_PAIRS:
        text = (
            f"chosen is longer than rejected in {ratio(longer, len(chosen)):.0%} of the pairs and"
            f" shorter in {ratio(shorter, len(chosen)):.0%} (mean {chosen.mean():.0f} and"
            f" {rejected.mean():.0f} tokens)"
        )
        advice = (
            "Length alone tells them apart: the model may learn to be long or short. Compare its"
            " replies' lengths."
        )
        findings.add("length_bias", "warning", max(longer, shorter), text, advice)
