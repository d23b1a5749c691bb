"""A report of what a loss mask trains, made from the finished ids and labels, without looking at the template, so that
it shows what the loss will see."""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from minimind.data.chats import IGNORED
from minimind.errors import UserError
from minimind.tokenizer import BOS_TOKEN


def mask_report(rows: Iterable[dict], tokenizer: PreTrainedTokenizerFast) -> dict:
    """Count what rows of input_ids and labels train, by role.

    `replies` are the assistant messages, `replies_with_end_trained` those whose end token has a loss. Tokens outside
    ChatML messages (another template's) count under the role "other".

    Raises:
        UserError: nothing is trained, no reply's end is trained, or words of another role than the assistant are.
    """
    start_id, eos_id = tokenizer.convert_tokens_to_ids(BOS_TOKEN), tokenizer.eos_token_id
    tokens, trained = Counter(), Counter()
    report = {"rows": 0, "rows_without_trained_token": 0, "replies": 0, "replies_with_end_trained": 0}
    for row in rows:
        role = "other"
        row_trained = 0
        for position, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            if token == start_id:
                header = tokenizer.decode(row["input_ids"][position + 1 : position + 12])
                role = header.split("\n")[0]
            tokens[role] += 1
            trained[role] += label != IGNORED
            row_trained += label != IGNORED
            if token == eos_id and role in ("assistant", "other"):
                report["replies"] += role == "assistant"
                report["replies_with_end_trained"] += label == eos_id
        report["rows"] += 1
        report["rows_without_trained_token"] += not row_trained
    report["tokens"], report["trained_tokens"] = tokens.total(), trained.total()
    report["trained_share"] = round(trained.total() / max(tokens.total(), 1), 4)
    report["roles"] = {
        role: {"tokens": n, "trained_tokens": trained[role], "trained_share": round(trained[role] / n, 4)}
        for role, n in sorted(tokens.items())
    }
    foreign = [role for role in trained if trained[role] and role not in ("assistant", "other")]
    if not report["trained_tokens"]:
        problem = "no token has a loss, so nothing would be learnt"
    elif not report["replies_with_end_trained"]:
        problem = f"no reply's end token {tokenizer.eos_token!r} has a loss, so the model would never learn to stop"
    elif foreign:
        problem = f"words of {', '.join(foreign)} have a loss; only the assistant's may"
    else:
        return report
    raise UserError(f"the loss mask is wrong: {problem}. Check the generation tags of the chat template.")


def print_mask_report(report: dict, example: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    """Show the report and one row, its trained tokens in green."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"loss mask: {report['trained_tokens']:,} of {report['tokens']:,} tokens trained "
        f"({report['trained_share']:.1%}); the end token of {report['replies_with_end_trained']:,} of "
        f"{report['replies']:,} replies; {report['rows_without_trained_token']:,} rows without a trained token"
    )
    for role, counts in report["roles"].items():
        console.print(f"  {role:<10} {counts['trained_tokens']:>10,} of {counts['tokens']:>10,} trained")
    text = Text("  for example ")
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))[:120]
    for trained, run in groupby(
        pairs, key=lambda pair: pair[1] != IGNORED
    ):  # whole runs: a token may be half a character
        text.append(tokenizer.decode([token for token, _ in run]).replace("\n", "\\n"), "green" if trained else "dim")
    console.print(text)
