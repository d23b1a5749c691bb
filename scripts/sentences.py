"""Documents and conversations -> their sentences, one a row, shuffled: en.jsonl and zh.jsonl.

    python scripts/sentences.py OUT corpus.jsonl chats.jsonl --weights poetry=0

Grammar is within the sentence: why a small model learns it faster so is in docs/language.md.
"""

import argparse
import random
import re
from itertools import pairwise
from pathlib import Path

from minimind.commands.tokenizer import domain_weight
from minimind.common.errors import reports_user_errors
from minimind.common.files import check_output, write_json_lines
from minimind.tokenizer_evaluation.texts import read_texts, script, weighted

# A sentence ends with its mark and the quotation marks behind it, or with the line. In English a
# capital follows, so that "Mr. 5" and "e.g. this" stay together.
QUOTES = "\"'”’」』）)"
END = re.compile(rf"(?<=[.!?])[{QUOTES}]*\s+(?=[\"'“‘(]?[A-Z])|(?<=[。！？])[{QUOTES}]*|\n+")
SHORTEST = {"en": 10, "zh": 5}  # characters; below are headings, numbers and cries


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    ends = [0, *(match.end() for match in END.finditer(text)), len(text)]
    parts = (text[start:end].strip() for start, end in pairwise(ends))
    return [part for part in parts if part]


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to write")
    parser.add_argument("files", nargs="+", help="documents and conversations")
    help_text = "how often the sentences of a source count; 0 leaves it out"
    parser.add_argument("--weights", nargs="+", default=[], type=domain_weight, help=help_text)
    args = parser.parse_args()
    check_output(args.output, directory=True)

    # Sort the sentences by language; Chinese with Latin names in it is Chinese
    found: dict[str, list[str]] = {"en": [], "zh": []}
    for text in weighted(read_texts(args.files, title="sentences"), dict(args.weights)):
        for sentence in sentences(text.text):
            language = script(sentence).language
            if len(sentence) >= SHORTEST.get(language, len(sentence) + 1):
                found[language].append(sentence)

    # Neighbours in a block are strangers
    args.output.mkdir(parents=True, exist_ok=True)
    for language, rows in found.items():
        random.Random(0).shuffle(rows)
        write_json_lines(args.output / f"{language}.jsonl", ({"text": row} for row in rows))
        print(f"{len(rows):,} sentences -> {args.output / f'{language}.jsonl'}")


if __name__ == "__main__":
    main()
