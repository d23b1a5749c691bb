"""The docs as a site: each command and option has its page, each page both languages; what is
missing stops the build."""

import json
import re
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import browser
import pytest
from pipeline import wait_until
from test_help import COMMANDS, SCRIPTS

from minimind.cli import build_parser
from minimind.common.errors import UserError
from minimind.training.parser import StageParser

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts/docs"))

import build_docs
from command_pages import pages
from notebook_pages import notebook_page

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def command_pages():
    return pages("en", []), pages("zh", [])


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_page_of_a_command_has_all_that_its_help_lists(command_pages, capsys, words):
    with pytest.raises(SystemExit):
        build_parser().parse_args([*words, "--help"])
    # Options and arguments, and deeper the commands of a group
    lines = re.findall(r"^ {2}(?: {2})?(-{0,2}\w+)", capsys.readouterr().out, re.MULTILINE)
    for texts in command_pages:
        page = texts[f"commands/{'-'.join(words)}.md"]
        shown = re.findall(r"^\| \[?`(?:minimind tokenizer )?(-?-?\w+)", page, re.MULTILINE)
        assert sorted(shown) == sorted(set(lines) - {"command"})


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_page_of_a_script_has_every_option_and_its_default(command_pages, script):
    parser = StageParser(SCRIPTS[script])
    options = {each.dest: each for each in parser._actions if each.option_strings}
    for texts in command_pages:
        rows = re.findall(r"^\| `--(\w+).*?` \| (.*?) \| ", texts[f"commands/{script}.md"], re.M)
        assert sorted(name for name, _ in rows) == sorted(options)
        assert dict(rows)["seed"] == f"`{options['seed'].default}`"


def test_every_page_is_listed_and_in_both_languages():
    build_docs.check_contents()


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A project with two pages of its own, in both languages."""
    monkeypatch.setattr(build_docs, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/p.png").write_bytes(b"png")
    for end, switch, section in (
        ("", "[中文]({}_zh.md)", "Commands"),
        ("_zh", "[English]({}.md)", "命令"),
    ):
        listed = (f"[M](../README{end}.md)", f"[C](README{end}.md)", f"[G](guide{end}.md)")
        contents = "\n- ".join(["## A", *listed])
        for name, text in {
            "README": f"See [G](docs/guide{end}.md#g).",
            "docs/README": f"{contents}\n\n## {section}",
            "docs/guide": "`minimind chat DIR`, $x_1$, ![](p.png)",
        }.items():
            head = f"# T\n\n{switch.format(Path(name).name)}\n\n"
            (tmp_path / f"{name}{end}.md").write_text(f"{head}{text}\n", encoding="utf-8")
    return tmp_path / "docs"


def test_links_commands_formulas_and_pictures_are_those_of_the_site(docs):
    build_docs.check_contents()
    made = build_docs.Pages(build_docs.CHINESE)
    assert made.texts["index.md"] == "# T\n\nSee [G](guide.md#g).\n"
    chat, formula, picture = made.texts["guide.md"].removeprefix("# T\n\n").split(", ")
    assert chat == "[`minimind chat DIR`](commands/chat.md)"
    assert formula.startswith("<math") and "<mi>x</mi>" in formula
    assert (picture, made.pictures) == ("![](p.png)\n", {"p.png": b"png"})
    assert made.navigation[0] == {"A": [{"M": "index.md"}, {"C": "contents.md"}, {"G": "guide.md"}]}


def remove(docs):
    (docs / "guide_zh.md").unlink()


def add(docs):
    (docs / "other.md").touch()


def swap(docs):
    file = docs / "README_zh.md"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[-4], lines[-3] = lines[-3], lines[-4]
    file.write_text("\n".join(lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (remove, "docs/README_zh.md lists docs/guide_zh.md: there is no such page"),
        (add, "do not list docs/other.md"),
        (swap, "in another order"),
    ],
)
def test_a_page_that_is_missing_unlisted_or_elsewhere_is_an_error(docs, change, said):
    change(docs)
    with pytest.raises(UserError, match=re.escape(said)):
        build_docs.check_contents()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "[中文](guide_zh.md)\n\n[a](nothing.md)",
            "docs/guide.md links to nothing.md: there is no",
        ),
        ("[中文](guide_zh.md)\n\n![](nothing.png)", "links to nothing.png: there is no such file"),
        (
            "[中文](guide_zh.md)\n\n[a](README_zh.md)",
            "links to README_zh.md, of the other language",
        ),
        ("no switch", "docs/guide.md has 0 links to its page in the other language"),
    ],
)
def test_a_link_to_nothing_or_to_the_other_language_is_an_error(docs, text, said):
    (docs / "guide.md").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(said)):
        build_docs.Pages(build_docs.ENGLISH)


def test_a_notebook_is_shown_with_what_it_printed_and_drew(tmp_path):
    outputs = [
        {"output_type": "stream", "text": ["loss ", "1.5\n"]},
        {"output_type": "display_data", "data": {"image/png": "cG5n", "text/plain": "<Figure>"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": ["# Title"]},
        {"cell_type": "code", "source": ["%%bash\n", "ls"], "outputs": outputs},
    ]
    (tmp_path / "t.ipynb").write_text(json.dumps({"cells": cells}))
    pictures = {}
    page = notebook_page(tmp_path / "t.ipynb", pictures)
    assert page.split("\n\n") == [
        "# Title",
        "````bash\nls\n````",
        "````text\nloss 1.5\n````",
        "![](t-0.png)",
    ]
    assert pictures == {"t-0.png": b"png"}


def test_the_colours_of_a_printed_text_are_shown(tmp_path):
    output = {"output_type": "stream", "text": ["<a>\n", "\n", "\x1b[30;42mloss\x1b[0m\n"]}
    cells = [{"cell_type": "code", "source": ["print()"], "outputs": [output]}]
    (tmp_path / "t.ipynb").write_text(json.dumps({"cells": cells}))
    page = notebook_page(tmp_path / "t.ipynb", {})
    assert "\x1b" not in page
    assert "<pre>&lt;a&gt;\n\n<span " in page
    assert re.search(r'<span style="[^"]*background-color: #008000">loss</span>', page)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The project's site, as scripts/docs.sh builds it."""
    out = tmp_path_factory.mktemp("site") / "site"
    subprocess.run([sys.executable, ROOT / "scripts/docs/build_docs.py", out], check=True)
    return out


@pytest.mark.slow
def test_the_switch_leads_to_the_same_page_in_the_other_language_and_back(site):
    pages = [file for file in site.rglob("*.html") if file.name != "404.html"]
    assert len(pages) > 100
    for page in pages:
        links = re.findall(
            r'site-language" href="(.*?)"\s+hreflang="(\w+)"', page.read_text(encoding="utf-8")
        )
        is_chinese = page.is_relative_to(site / "zh")
        name = page.relative_to(site / "zh" if is_chinese else site)
        (link, language) = links[0]
        assert (page.parent / link).resolve() == site / ("" if is_chinese else "zh") / name
        assert (len(links), language) == (1, "en" if is_chinese else "zh")
        assert (page.parent / link).is_file()


@pytest.mark.slow
def test_no_page_or_style_loads_anything_from_another_host(site):
    loading = r"<(?:script|link|img|iframe|source)[^>]*?\s(?:src|href)=\"?(?:https?:)?//[^ >]*"
    for page in site.rglob("*.html"):
        assert re.findall(loading, page.read_text(encoding="utf-8")) == []
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()) == []


@pytest.mark.slow
@pytest.mark.skipif(browser.COMMAND is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("page", "query", "found"),
    [
        ("zh/index.html", "中断的训练", "zh/resume.html"),
        ("index.html", "reward model", "reward.html"),
    ],
)
def test_the_search_finds_the_guide_with_no_other_host_in_reach(site, tmp_path, page, query, found):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        only = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        with browser.open_browser(tmp_path, only) as chromium:
            address = f"http://127.0.0.1:{server.server_port}/"
            chromium.open(address + page)
            wait_until(lambda: chromium.evaluate("document.readyState") == "complete")
            chromium.evaluate("document.querySelector('.md-header label[for=__search]').click()")
            # The search is in an element with its own root, and the one with the focus
            root = "document.activeElement.shadowRoot"
            wait_until(lambda: chromium.evaluate(f"{root}?.activeElement?.tagName") == "INPUT")
            chromium.call("Input.insertText", text=query)
            link = f"{root}.querySelector('a')?.href.split('?')[0]"
            wait_until(
                lambda: chromium.evaluate(link) == address + found, lambda: chromium.evaluate(link)
            )
            assert chromium.complaints == []
        server.shutdown()
