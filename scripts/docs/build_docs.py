"""Build the docs as a site in two languages, with a page for each command: see scripts/docs.sh.

docs/README.md and docs/README_zh.md are the table of contents. A page that they do not list, that
one language lacks, or that links to something that is not there stops the build.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from string import Template

from command_pages import Guide, commands, pages
from latex2mathml.converter import convert
from notebook_pages import notebook_page

from minimind.common.errors import UserError, reports_user_errors

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Blocks of code; what is between them is text
FENCES = re.compile(r"^(`{3,}).*?^\1\n?", re.DOTALL | re.MULTILINE)
# In a text: code, a link or picture, a formula
SPANS = re.compile(
    r"(?P<code>`+[^`]+`+)"
    r"|(?P<link>!?\[(?P<text>(?:`[^`]*`|[^\[\]`])*)\]\((?P<target>[^)\s]+)\))"
    r"|\$\$(?P<block>.+?)\$\$|\$(?P<formula>[^$\n]+)\$"
)


@dataclass(frozen=True)
class Language:
    """One of the site's languages: its code and name, the ends of its files' names, the section of
    the commands, where its pages are in the site, and how to get from there to the others'."""

    code: str
    name: str
    suffix: str
    section: str
    folder: str
    path_to_other: str
    light: str
    dark: str


ENGLISH = Language("en", "English", "", "Commands", "", "zh/", "Light", "Dark")
CHINESE = Language("zh", "中文", "_zh", "命令", "zh", "../", "浅色", "深色")
OTHER = {ENGLISH: CHINESE, CHINESE: ENGLISH}


def contents(language: Language) -> dict[str, dict[Path, str]]:
    """The sections of the table of contents, each with its files and their titles in order."""
    sections: dict[str, dict[Path, str]] = {}
    table = ROOT / f"docs/README{language.suffix}.md"
    for line in table.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            sections[line.removeprefix("## ")] = {}
        elif entry := re.match(r"- \[(.+?)\]\((.+?)\)", line):
            list(sections.values())[-1][(table.parent / entry[2]).resolve()] = entry[1]
    return sections


def check_contents() -> None:
    """Raise UserError where a page is not in the table of contents, or not in both languages."""
    listed = {language: _files(language) for language in OTHER}
    written = [ROOT / "README.md", ROOT / "README_zh.md"]
    written += [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    for language, files in listed.items():
        table = f"docs/README{language.suffix}.md"
        if wrong := [each for each in files if each not in written]:
            raise UserError(f"{table} lists {_names(wrong)}: there is no such page")
    if rest := set(written) - {each for files in listed.values() for each in files}:
        raise UserError(
            f"docs/README.md and docs/README_zh.md do not list {_names(rest)}: add each page"
            " to its section"
        )
    translated = [page_name(each, CHINESE) for each in listed[CHINESE]]
    if [page_name(each, ENGLISH) for each in listed[ENGLISH]] != translated:
        raise UserError(
            "docs/README.md and docs/README_zh.md list other pages, or in another order: each"
            " page is in both languages, as NAME and NAME_zh"
        )


def _files(language: Language) -> dict[Path, str]:
    return {file: title for part in contents(language).values() for file, title in part.items()}


def _names(files: Iterable[Path]) -> str:
    return ", ".join(sorted(os.path.relpath(each, ROOT) for each in files))


def page_name(file: Path, language: Language) -> str:
    """The file of a page in the site, which is the same in both languages."""
    stem = file.stem.removesuffix(language.suffix)
    if stem == "README":
        return "index.md" if file.parent == ROOT else "contents.md"
    return f"{stem}.md"


class Pages:
    """The pages of one language, as the generator of the site reads them, and their pictures."""

    def __init__(self, language: Language):
        self.language = language
        self.files = {file: page_name(file, language) for file in _files(language)}
        self.commands = {each.name: each.page for each in commands()}
        self.pictures: dict[str, bytes] = {}
        texts = {file: self._text(file) for file in self.files}
        guides = [
            Guide(title, self.files[file], texts[file])
            for file, title in _files(language).items()
            if self.files[file] != "contents.md"
        ]
        self.texts = {self.files[file]: self._page(file, text) for file, text in texts.items()}
        self.texts |= pages(language.code, guides)

    def _text(self, file: Path) -> str:
        """What is written in a file, without the link to the other language: the site's header has
        it."""
        if file.suffix == ".ipynb":
            text = notebook_page(file, self.pictures)
        else:
            text = file.read_text(encoding="utf-8")
        other = re.escape(OTHER[self.language].name)
        text, count = re.subn(rf"^\[{other}\]\(\w[\w.-]*\)\n+", "", text, flags=re.MULTILINE)
        if count != 1:
            raise UserError(f"{_names([file])} has {count} links to its page in the other language")
        return text

    def _page(self, file: Path, text: str) -> str:
        """The text of a file with the site's links."""
        parts, end = [], 0
        for fence in FENCES.finditer(text):
            parts += [self._linked(file, text[end : fence.start()]), fence.group()]
            end = fence.end()
        return "".join([*parts, self._linked(file, text[end:])])

    def _linked(self, file: Path, text: str) -> str:
        def replaced(span: re.Match) -> str:
            if span["code"]:
                line = text[text.rfind("\n", 0, span.start()) + 1 : span.start()]
                # GitHub's tables need the backslash, Python-Markdown's do not
                if line.startswith("|"):
                    return self._code(span["code"].replace("\\|", "|"))
                return span[0] if line.startswith("#") else self._code(span["code"])
            if span["link"]:
                return self._link(file, span)
            display = "block" if span["block"] else "inline"
            return convert(span["block"] or span["formula"], display=display)

        return SPANS.sub(replaced, text)

    def _code(self, code: str) -> str:
        """Code, as a link to its page if it is a command."""
        words = code.strip("`").removeprefix("python ").split()
        names = (" ".join(words[:count]) for count in (3, 2, 1))
        page = next((self.commands[name] for name in names if name in self.commands), None)
        return f"[{code}]({page})" if page else code

    def _link(self, file: Path, span: re.Match) -> str:
        """A link to a page or a picture of the site; the text alone of one to another file."""
        address, mark, anchor = span["target"].partition("#")
        if not address or re.match(r"[a-z]+:", address) or address in self.pictures:
            return span[0]
        target = (file.parent / address).resolve()
        if not target.exists():
            raise UserError(f"{_names([file])} links to {span['target']}: there is no such file")
        if target in self.files:
            return f"[{span['text']}]({self.files[target]}{mark}{anchor})"
        if target.suffix == ".png":
            self.pictures[target.name] = target.read_bytes()
            return f"{'!' * span[0].startswith('!')}[{span['text']}]({target.name})"
        if target.parent == ROOT / "docs":
            raise UserError(f"{_names([file])} links to {span['target']}, of the other language")
        return span["text"]

    @property
    def navigation(self) -> list:
        """The sections of the site with the titles and files of their pages."""
        sections = [
            {title: [{name: self.files[file]} for file, name in part.items()]}
            for title, part in contents(self.language).items()
            if title != self.language.section
        ]
        names = [{name.removeprefix("minimind "): page} for name, page in self.commands.items()]
        place = list(contents(self.language)).index(self.language.section)
        sections.insert(place, {self.language.section: ["commands/index.md", *names]})
        return sections


def write_sources(language: Language, folder: Path) -> None:
    """Write what the generator reads for one language: the pages, the theme, the settings."""
    made = Pages(language)
    for name, text in made.texts.items():
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "docs" / name).write_text(text, encoding="utf-8")
    for name, picture in made.pictures.items():
        (folder / "docs" / name).write_bytes(picture)
    shutil.copytree(HERE / "theme", folder / "theme")
    shutil.copy(HERE / "site.css", folder / "docs")
    other = OTHER[language]
    settings = {
        "language": language.code,
        "light": language.light,
        "dark": language.dark,
        "other_language": other.code,
        "other_name": other.name,
        "path_to_other": language.path_to_other,
        # A table of TOML within a line is JSON's object with another mark
        "navigation": json.dumps(made.navigation, ensure_ascii=False, separators=(", ", " = ")),
    }
    template = Template((HERE / "zensical.toml").read_text(encoding="utf-8"))
    (folder / "zensical.toml").write_text(template.substitute(settings), encoding="utf-8")


def generate(folder: Path) -> Path:
    """Let zensical build a folder of sources; raises UserError with what it found."""
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file"]
    done = subprocess.run(
        [*command, folder / "zensical.toml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or "Warning" in done.stdout:
        found = re.sub(r"\x1b\[[\d;]*m", "", done.stdout.partition("Traceback")[0])  # its colours
        raise UserError(f"zensical refuses the pages:\n{found}")
    return folder / "site"


@reports_user_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="directory to write; an earlier site is replaced")
    output = parser.parse_args().output.absolute()
    if output.exists() and not (output / "sitemap.xml").exists():
        raise UserError(f"{output} exists and is no site: give another directory")
    check_contents()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".docs-", dir=output.parent) as work:
        for language in OTHER:
            write_sources(language, Path(work, language.code))
        site, chinese = (generate(Path(work, language.code)) for language in OTHER)
        chinese.rename(site / CHINESE.folder)
        shutil.rmtree(output, ignore_errors=True)
        site.rename(output)
    print(f"{sum(1 for _ in output.rglob('*.html'))} pages -> {output / 'index.html'}")


if __name__ == "__main__":
    main()
