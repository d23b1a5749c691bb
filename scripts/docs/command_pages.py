"""A page of Markdown for each command and each training script, from their parsers."""

import argparse
import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path

from minimind.cli import build_parser
from minimind.common.options import OptionFormatter, default_text, description
from minimind.stages import STAGES
from minimind.training.parser import StageParser, grouped

ROOT = Path(__file__).parents[2]
EXAMPLES = 5  # of a command, from the guides
GUIDES = 3  # linked from a command's page: those that speak of it most
FEW = 12  # values of an option that its row lists one by one

WORDS = {
    "en": {
        "commands": "Commands",
        "scripts": "Training scripts",
        "intro": "Each page is made from the command's own `--help`.",
        "usage": "Usage",
        "examples": "Examples",
        "guides": "Guides: ",
        "arguments": "Arguments",
        "options": "Options",
        "argument": "argument",
        "option": "option",
        "command": "command",
        "meaning": "meaning",
        "default": "default",
        "required": "required",
        "one of": "one of",
        "stage": "The stage's own options are taken too: {}.",
        "recipe": "The options are the keys of a recipe too; those on the command line override "
        "it. `--no_NAME` is `--NAME false`.",
    },
    "zh": {
        "commands": "命令",
        "scripts": "训练脚本",
        "intro": "每一页都由命令自己的 `--help` 生成，选项的说明因此是英文。",
        "usage": "用法",
        "examples": "示例",
        "guides": "相关指南：",
        "arguments": "参数",
        "options": "选项",
        "argument": "参数",
        "option": "选项",
        "command": "命令",
        "meaning": "说明",
        "default": "默认值",
        "required": "必填",
        "one of": "可选",
        "stage": "还接受阶段自己的选项：{}。",
        "recipe": "这些选项也是配方里的键，命令行上的优先。`--no_NAME` 等于 `--NAME false`。",
        "data": "数据",
        "model": "模型",
        "training": "训练",
        "evaluation": "评估",
        "saving": "保存",
        "tracking": "跟踪",
        "help": "帮助",
        "everything else, of transformers and TRL": "其他：transformers 和 TRL 的全部选项",
    },
}


@dataclass(frozen=True)
class Guide:
    """A page that people wrote: its title and text, and the page's file in the site."""

    title: str
    page: str
    text: str


@dataclass(frozen=True)
class Command:
    """What is typed, its summary and description, and its options by heading; `examples` are its
    own, `members` the commands of a group."""

    name: str
    summary: str
    description: str
    parser: argparse.ArgumentParser
    options: Mapping[str, list[argparse.Action]]
    examples: str = ""
    members: list["Command"] = field(default_factory=list)

    @property
    def page(self) -> str:
        """The page's file in the site."""
        words = self.name.removeprefix("minimind ").removesuffix(".py")
        return f"commands/{words.replace(' ', '-')}.md"

    @property
    def is_script(self) -> bool:
        """Whether it is a training script of the project's root."""
        return self.name.endswith(".py")


@cache
def commands() -> list[Command]:
    """The training scripts and the commands, in the order of a pipeline and of the help."""
    return [*_scripts(), *_members(build_parser())]


def _scripts() -> Iterator[Command]:
    for spec in {spec.script: spec for spec in STAGES.values()}.values():
        # The docstring: a summary, examples, what the script reads and what it writes
        source = (ROOT / spec.script).read_text(encoding="utf-8")
        summary, examples, files = ast.get_docstring(ast.parse(source)).split("\n\n")
        files = re.sub(r"(?<!\.)\n(?=\w)", ". ", re.sub(r"\n? +", " ", files))
        parser = StageParser(spec.arguments)
        every, brief = (grouped(parser, each) for each in (True, False))
        yield Command(spec.script, summary, files, parser, every | brief, examples)


def _members(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """The commands of a parser, a group before its own."""
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            continue
        summaries = {each.dest: each.help or "" for each in action._choices_actions}
        for name, member in action.choices.items():
            members = list(_members(member))
            options = [each for each in member._actions if each.option_strings]
            yield Command(
                member.prog,
                summaries[name],
                member.description or "",
                member,
                {"options": options},
                members=members,
            )
            yield from members


def pages(language: str, guides: list[Guide]) -> dict[str, str]:
    """The text of each command's page and of their list, by the page's file."""
    words, found = WORDS[language], commands()
    texts = {each.page: _page(each, words, guides) for each in found}
    rows = {
        words["scripts"]: [each for each in found if each.is_script],
        "minimind": [each for each in found if not each.is_script],
    }
    lists = (f"## {title}\n\n{_list(each, words)}" for title, each in rows.items())
    index = "\n\n".join([f"# {words['commands']}", words["intro"], *lists])
    return {"commands/index.md": index} | texts


def _list(members: list[Command], words: Mapping[str, str]) -> str:
    rows = [
        [f"[`{each.name}`]({each.page.removeprefix('commands/')})", _prose(each.summary)]
        for each in members
    ]
    return _table([words["command"], words["meaning"]], rows)


def _page(command: Command, words: Mapping[str, str], guides: list[Guide]) -> str:
    parser = command.parser
    parts = [f"# {command.name}", _sentence(command.summary)]
    if command.description:
        parts.append(_sentence(command.description))
    if related := _related(command, guides):
        parts.append(words["guides"] + related)

    # Usage and examples
    parts += [f"## {words['usage']}", f"```text\n{_usage(command)}\n```"]
    if command.members:
        parts.append(_list(command.members, words))
    if examples := _examples(command, guides):
        lines = "\n".join(examples)
        parts += [f"## {words['examples']}", f"```bash\n{lines}\n```"]

    # Arguments and options
    arguments = [each for each in parser._actions if _is_argument(each)]
    if arguments:
        rows = [[f"`{_value(each)}`", _meaning(each, words)] for each in arguments]
        head = [words["argument"], words["meaning"]]
        parts += [f"## {words['arguments']}", _table(head, rows)]
    if command.is_script:
        parts += [f"## {words['options']}", words["recipe"]]
    elif parser.get_default("takes_stage_options"):
        scripts = (f"[`{each.name}`](../{each.page})" for each in commands() if each.is_script)
        parts.append(words["stage"].format(", ".join(scripts)))
    for heading, actions in command.options.items():
        if actions:
            level = "###" if command.is_script else "##"
            parts += [f"{level} {words.get(heading, heading)}", _options(actions, words)]
    return "\n\n".join(parts)


def _options(actions: list[argparse.Action], words: Mapping[str, str]) -> str:
    rows = []
    for action in actions:
        option = next(each for each in action.option_strings if each.startswith("--"))
        default = words["required"] if action.required else _code(default_text(action))
        name = f"{option} {_value(action)}".strip()
        rows.append([f"`{name}`", default, _meaning(action, words)])
    return _table([words["option"], words["default"], words["meaning"]], rows)


def _is_argument(action: argparse.Action) -> bool:
    is_group = isinstance(action, argparse._SubParsersAction)
    return not action.option_strings and not is_group


def _value(action: argparse.Action) -> str:
    """What stands for an argument, or for an option's value."""
    if action.nargs == 0 or (action.option_strings and action.nargs == "?"):
        return ""
    value = action.metavar or ("VALUE" if action.option_strings else action.dest)
    return f"{value} ..." if action.nargs in ("+", "*") else str(value)


def _meaning(action: argparse.Action, words: Mapping[str, str]) -> str:
    text = _prose(description(action))
    choices = [str(getattr(each, "value", each)) for each in action.choices or ()]
    if choices:
        listed = ", ".join(_code(each) for each in choices[:FEW])
        listed += " ..." if len(choices) > FEW else ""
        text += f" ({words['one of']} {listed})"
    return text


def _usage(command: Command) -> str:
    """What has to be typed; an option that may be left out is not named."""
    if command.is_script:
        return f"python {command.name} [--config RECIPE.yaml] [--OPTION VALUE ...]"
    actions = [each for each in command.parser._actions if each.required or _is_argument(each)]
    formatter = OptionFormatter(command.name)
    formatter.add_usage(None, actions, [])
    usage = " ".join(formatter.format_help().split()).removeprefix("usage: ")
    return usage if command.members else f"{usage} [--OPTION VALUE ...]"


def _related(command: Command, guides: list[Guide]) -> str:
    """Links to the guide of the same name, and to those that speak of a command most."""
    pattern = _pattern(command)
    counts = {guide.page: len(pattern.findall(guide.text)) for guide in guides}
    own = command.page.removeprefix("commands/")
    most = sorted(guides, key=lambda guide: (guide.page != own, -counts[guide.page]))[:GUIDES]
    return ", ".join(f"[{each.title}](../{each.page})" for each in most if counts[each.page])


def _examples(command: Command, guides: list[Guide]) -> list[str]:
    """The first commands of this name, its own and in the guides' blocks, each with other
    options."""
    pattern, found = _pattern(command), {}
    fences = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
    blocks = (fences.findall(guide.text) for guide in guides)
    for block in (command.examples, *chain.from_iterable(blocks)):
        for line in re.sub(r" *\\\n *", " ", block).splitlines():
            if pattern.match(line.strip().removeprefix("python ")):
                example = re.sub(r"\s+", " ", line.split(" #")[0]).strip()
                options = tuple(sorted(re.findall(r"--\w+", example)))
                found.setdefault(options, example)
    return list(found.values())[:EXAMPLES]


def _pattern(command: Command) -> re.Pattern:
    return re.compile(rf"(?<![\w/]){re.escape(command.name)}(?![\w.])")


def _sentence(text: str) -> str:
    end = "" if text.endswith(".") else "."
    return _prose(text[:1].upper() + text[1:]) + end


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _prose(text: str) -> str:
    """A description as Markdown: options as code, and every other sign for itself."""
    parts = re.split(r"(`[^`]+`|(?<![\w-])--[A-Za-z]\w+)", " ".join(text.split()))
    for index, part in enumerate(parts):
        if index % 2:
            parts[index] = f"`{part.strip('`')}`"
        else:
            parts[index] = re.sub(r"([\\*_\[\]#|`])", r"\\\1", part.replace("<", "&lt;"))
    return "".join(parts)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
