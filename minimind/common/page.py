"""The shell of every HTML page that is written: one file that loads nothing and runs no script; and
the policy of the pages that a server of ours shows, which run their own script.

Texts that come from data are escaped: here in titles and tables, elsewhere with `html.escape`.
"""

import base64
import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", sans-serif; }
body { max-width: 1340px; margin: 2em auto; padding: 0 1em; }
h2 { margin-top: 1.6em; }
table { border-collapse: collapse; margin: .6em 0; }
th, td { padding: .25em .8em; text-align: left; vertical-align: top; }
th, td { border-bottom: 1px solid #8884; } td { overflow-wrap: anywhere; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.text { white-space: pre-wrap; }
figure { margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; max-width: 100%; height: auto; }
svg text { fill: currentColor; font-family: inherit !important; }
summary { cursor: pointer; } small { opacity: .75; overflow-wrap: anywhere; }
"""
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?%?")


def page(title: str, body: str, style: str = "") -> str:
    """A complete page: its title, the HTML of its body, and its style beyond that of all pages."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>
<style>{STYLE}{style}</style></head><body>
<h1>{escape(title)}</h1>
{body}</body></html>
"""


def script_policy(content: str) -> str:
    """The Content-Security-Policy of a page with a script that talks to its own server: it runs
    this script and nothing else, whatever texts it shows, and loads nothing from elsewhere."""
    script = re.search(r"<script>(.*)</script>", content, re.DOTALL)[1].encode()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; connect-src 'self'; script-src"
        f" 'sha256-{digest}'"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], texts: Collection[int] = ()) -> str:
    """An HTML table, or nothing without rows.

    Numbers, and strings such as "1,024" or "3.1%", are aligned to the right; `texts` are the
    columns whose line breaks are kept.
    """

    def cell(column: int, value: Any) -> str:
        kind = "text" if column in texts else "number" if _is_number(value) else ""
        return f"<td{kind and f' class={kind}'}>{escape(_shown(value))}</td>"

    lines = ["".join(cell(*place) for place in enumerate(row)) for row in rows]
    headings = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table>" * bool(lines)


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return bool(NUMBER.fullmatch(value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
