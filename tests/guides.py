"""The code blocks of the guides: README.md and the pages below docs/.

Bash and Python blocks are run one after the other by `test_guides.py`, in a `Sandbox`. A block with
`title="NAME"` behind its language is the file NAME for all of its page.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
LANGUAGES = ("bash", "python", "json", "yaml", "text", "")  # the last two: what a command prints
PROGRAMS = ("minimind", "python", "bash", "deepspeed", "torchrun", "accelerate", "sbatch", "pip")
PROGRAMS += ("transformers", "vllm", "llama-cli", "llama-server", "llama-quantize", "ollama")
SHELL = ("awk", "cd", "curl", "source")  # run by the shell as they are

# Commands that are only checked: their options are parsed, where they are ours. Pattern -> why.
ONLY_CHECKED = {
    r"pip ": "would change the environment, from the network",
    r"bash scripts/(test|conformance)\.sh": "would run these tests",
    r"python benchmarks/": "takes minutes",
    r"minimind evaluate .*--lm_eval": "needs a package and data sets from the network",
    r"minimind export .*--format web": "needs a package of npm; see test_export_web.py",
    r"minimind push (?!.*--dry_run)": "needs the Hub; see test_push.py",
    r"minimind pairs .*--human": "waits for a person; see test_pairs.py",
    r"minimind doctor sick\.yaml": "is about a recipe and a DeepSpeed JSON with many faults",
    r"minimind replay |.*runs/again": "needs a run with a bad batch; see test_replay.py",
    r"sbatch |(deepspeed|torchrun) .*(--hostfile|--nnodes)": "needs hosts; see test_multinode.py",
    r".* (PEER|SPLIT)": "needs another project's tokenizer, or hours",
    r"python -m onnxruntime_genai|transformers |vllm |llama-\w+ |ollama ": "is not ours",
}


class Block(NamedTuple):
    """A code block, and where it is.

    Of a block that shows output: the command that printed it, where a comment before it names one;
    and whether it directly follows the block before.
    """

    guide: str
    line: int
    language: str
    title: str
    text: str
    printed_by: str
    follows: bool

    @property
    def place(self):
        return f"{self.guide}:{self.line}"


def guides():
    """The English guides, as paths from the root."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [str(page.relative_to(ROOT)) for page in pages if not page.stem.endswith("_zh")]


def blocks(guide):
    """The code blocks of a guide, in order."""
    text = (ROOT / guide).read_text(encoding="utf-8")
    pattern = r'^```(\w*)(?: title="([^"\n]+)")?\n(.*?)^```$'
    matches = list(re.finditer(pattern, text, re.DOTALL | re.MULTILINE))
    assert 2 * len(matches) == len(re.findall(r"^ *```", text, re.M)), (
        f"{guide}: a code block that cannot be read"
    )
    found, end = [], 0
    for match in matches:
        before = text[end : match.start()]
        comment = re.search(r"<!-- (.*) -->\n$", before)
        printed_by = comment[1] if comment and comment[1].split()[0] in PROGRAMS else ""
        follows = not re.sub("<!--.*?-->", "", before).strip()
        line = text[: match.start()].count("\n") + 1
        found.append(Block(guide, line, match[1], match[2] or "", match[3], printed_by, follows))
        end = match.end()
    return found


def commands(text):
    """The words of each command in a bash block, without variables and redirections."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command = []
        for word in [*lexer, ";"]:
            if word in (";", "&&", "|", "&"):
                if command:
                    yield command[: command.index(">")] if ">" in command else command
                command = []
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def why_only_checked(words):
    """The reason why a command is not run, or None."""
    line = " ".join(words)
    return next((why for pattern, why in ONLY_CHECKED.items() if re.match(pattern, line)), None)


def check_options(argv):
    """Parse the options of a command of minimind; raises UserError."""
    from minimind.cli import build_parser

    args, others = build_parser().parse_known_args(argv)
    assert not others or args.takes_stage_options, f"not options of minimind {argv[0]}: {others}"
