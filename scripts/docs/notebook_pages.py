"""An executed notebook as Markdown: its texts, its code and what that printed and drew."""

import base64
import io
import json
from pathlib import Path

from rich.console import Console
from rich.text import Text


def notebook_page(notebook: Path, pictures: dict[str, bytes]) -> str:
    """The page of a notebook; its pictures are added to `pictures` by the names of their files.

    Raises:
        ValueError: an output that a page cannot show.
    """
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            language = "bash" if source.startswith("%%bash\n") else "python"
            parts.append(_fence(language, source.removeprefix("%%bash\n")))
            printed, drawn = "", []
            for output in cell["outputs"]:
                data = output.get("data", {})
                if picture := data.get("image/png"):
                    name = f"{notebook.stem}-{len(pictures)}.png"
                    pictures[name] = base64.b64decode("".join(picture))
                    drawn.append(f"![]({name})")
                elif output["output_type"] == "stream":
                    printed += "".join(output["text"])
                elif "text/plain" in data:
                    printed += "".join(data["text/plain"]) + "\n"
                else:
                    raise ValueError(
                        f"{notebook}: an output of {output['output_type']}, {list(data)}"
                    )
            if "\x1b[" in printed:
                parts.append(_coloured(printed))
            elif printed.strip():
                parts.append(_fence("text", printed))
            parts += drawn
    return "\n\n".join(parts)


def _coloured(text: str) -> str:
    """Text with a terminal's colours as HTML."""
    console = Console(record=True, file=io.StringIO())
    console.print(Text.from_ansi(text.rstrip()), soft_wrap=True)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def _fence(language: str, text: str) -> str:
    return f"````{language}\n{text.rstrip()}\n````"
