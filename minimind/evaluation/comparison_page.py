"""A comparison of two models as one HTML page: the figures, and the replies side by side."""

from collections.abc import Sequence
from html import escape

from minimind.common.page import page, table
from minimind.data.conversations import Conversation
from minimind.evaluation.comparison import Compared, sentence, summary_rows
from minimind.evaluation.replies import Replies
from minimind.generation import Reply

STYLE = """
section { border-top: 1px solid #8886; padding: .6em 0; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.role { font-size: 80%; opacity: .7; }
.replies { display: grid; grid-template-columns: 1fr 1fr; gap: 1em; margin-top: .4em; }
.replies > div { border-left: 3px solid #8884; padding-left: .8em; }
.replies > .better { border-left-color: #2f9e6e; }
fieldset { border: 1px solid #8884; position: sticky; top: 0; background: Canvas; }
label { margin-right: 1rem; }
body:has(#only-a:checked) section:not(.a) { display: none; }
body:has(#only-b:checked) section:not(.b) { display: none; }
body:has(#only-tie:checked) section:not(.tie) { display: none; }
"""
FILTERS = {"all": "all", "only-b": "B won", "only-a": "A won", "only-tie": "ties"}


def comparison_page(
    report: dict,
    prompts: Sequence[Conversation],
    a: Replies,
    b: Replies,
    compared: Sequence[Compared],
) -> str:
    """The report of `minimind compare`, and for each of the prompts the replies of A and B with
    their scores, the better one marked."""
    warnings = "".join(f"<li>{escape(text)}</li>" for text in report["warnings"])
    boxes = "".join(
        f"<label><input type=radio name=shown id={key}{' checked' * (key == 'all')}> {text}</label>"
        for key, text in FILTERS.items()
    )
    sections = "".join(map(_section, prompts, a, b, compared))
    body = (
        f"<p>{escape(sentence(report['win_rate']))}</p>{warnings and f'<ul>{warnings}</ul>'}"
        f"{table(('', 'A', 'B'), summary_rows(report))}"
        f"<h2>Replies</h2><fieldset>{boxes}</fieldset>{sections}"
    )
    return page(f"A: {report['a']['directory']}, B: {report['b']['directory']}", body, STYLE)


def _section(
    prompt: Conversation, a: Sequence[Reply], b: Sequence[Reply], compared: Compared
) -> str:
    words = "".join(
        f"<div class=role>{escape(message['role'])}</div>"
        f"<div class=text>{escape(message['content'])}</div>"
        for message in prompt.messages
    )
    winner = "b" if compared.won > 0.5 else "a" if compared.won < 0.5 else "tie"
    rows = "".join(
        f"<div class=replies>{_reply('A', left, x, x > y)}{_reply('B', right, y, y > x)}</div>"
        for left, right, x, y in zip(a, b, *compared.scores, strict=True)
    )
    return f"<section class={winner}>{words}{rows}</section>"


def _reply(name: str, reply: Reply, score: float, better: bool) -> str:
    end = "" if reply.stopped else ", reached the limit"
    return (
        f"<div{' class=better' * better}><div class=role>{name}: score {score:.4g}{end}</div>"
        f"<div class=text>{escape(reply.text)}</div></div>"
    )
