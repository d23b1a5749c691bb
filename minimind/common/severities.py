"""The severities of findings, of the doctor and of an inspection, and their colours."""

SEVERITIES = ("error", "warning", "ok", "skipped")  # the doctor's; an inspection has "info" too
# rich's style of each, the worst first
COLOURS = {
    "error": "bold red",
    "warning": "yellow",
    "info": "cyan",
    "ok": "green",
    "skipped": "dim",
}
