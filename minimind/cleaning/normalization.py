"""Steps that repair and tidy text: Unicode, markup, control characters, whitespace.

All are conservative: what may be meant (code, formulas, Chinese punctuation, emoji) stays as it is.
"""

import html
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from minimind.cleaning.extras import require
from minimind.cleaning.steps import Transform

# Markdown code: a fenced block up to its end or the end of the text, or a span within a line.
FENCE = r"(?ms:^[ \t]*(?P<fence>```|~~~)[^\n]*$.*?(?:^[ \t]*(?P=fence)[ \t]*$|\Z))"
CODE = rf"(?P<code>{FENCE}|`[^`\n]+`)"


@cache
def _outside_code(pattern: str) -> re.Pattern:
    return re.compile(f"{CODE}|{pattern}")


def sub_outside_code(pattern: str, replacement, text: str) -> str:
    """`re.sub` that leaves Markdown code alone; `replacement` is a function of the match."""
    if "`" not in text and "~~~" not in text:
        return re.sub(pattern, replacement, text)
    return _outside_code(pattern).sub(
        lambda m: m[0] if m["code"] is not None else replacement(m), text
    )


# Unicode


@dataclass(frozen=True)
class FixUnicode(Transform):
    """Mojibake repaired by ftfy ("schÃ¶n" -> "schön"), ligatures and full-width forms left alone,
    then NFC.

    ftfy's defaults would rewrite Chinese punctuation ("，（）" to ",()") and curly quotes, so those
    fixes are off.
    """

    name: ClassVar[str] = "fix_unicode"
    packages: ClassVar[tuple[str, ...]] = ("ftfy",)
    fix_encoding: bool = True
    normalization: str | None = "NFC"

    def __post_init__(self):
        if self.normalization not in (None, "NFC", "NFD", "NFKC", "NFKD"):
            raise ValueError(
                f"normalization: found {self.normalization!r}, expected NFC, NFD, NFKC, NFKD or"
                " null"
            )

    def prepare(self) -> None:
        require("ftfy")

    def __call__(self, text: str) -> str:
        import ftfy
        from ftfy.badness import is_bad

        # ftfy's own test of the whole text, which spares clean text its line by line attempts.
        if "\x1b" in text or (self.fix_encoding and is_bad(text)):
            text = ftfy.fix_text(text, _ftfy_config(self.fix_encoding))
        return unicodedata.normalize(self.normalization, text) if self.normalization else text


@cache
def _ftfy_config(fix_encoding: bool):
    import ftfy

    return ftfy.TextFixerConfig(
        unescape_html=False,  # remove_markup does it, outside of code
        remove_terminal_escapes=True,
        fix_encoding=fix_encoding,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=True,
        remove_control_chars=False,  # control_characters does it
        normalization=None,
        explain=False,
    )


# Markup


def _words(names: str) -> frozenset[str]:
    return frozenset(names.split())


ELEMENTS = _words(
    "a abbr acronym address article aside audio b base big blockquote body br button caption center"
    " cite code col colgroup dd del details dfn dir div dl dt em embed fieldset figcaption figure"
    " font footer form frame frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html i iframe img"
    " input ins kbd label legend li link main map mark menu meta nav nobr noscript nowiki object ol"
    " optgroup option p param picture pre q s samp script section select small source span strike"
    " strong style sub summary sup svg table tbody td template textarea tfoot th thead time title"
    " tr tt u ul var video wbr"
)
BLOCKS = _words(
    "address article aside blockquote body br button caption center dd details dir div dl dt"
    " fieldset figcaption figure footer form frameset h1 h2 h3 h4 h5 h6 head header hgroup hr html"
    " legend li main menu nav ol optgroup option p pre section select summary table tbody tfoot"
    " thead title tr ul"
)
CELLS = _words("td th")
# Need neither a partner nor attributes to be HTML
BARE = _words("br hr wbr p li tr td th dd dt img")
# With all that is inside
DROPPED = ("script", "style", "noscript", "svg", "iframe", "template", "ref")
UNQUOTED = r"(?<!['\"“‘「『])"  # what is quoted is talked about
TAG = (
    UNQUOTED + r"<(?P<slash>/?)(?P<name>[A-Za-z][A-Za-z0-9]*+)"
    r"(?P<attributes>(?>\s++[\w:@.-]++(?>\s*+=\s*+(?>\"[^\"<>]*+\"|'[^'<>]*+'|[^\s\"'=<>`]++))?+)*+)\s*+/?>"
)
ENTITY = r"&(?>[A-Za-z][A-Za-z0-9]{1,31}|#[0-9]{1,7}|#[xX][0-9A-Fa-f]{1,6});"
DECLARATION = r"<!(?i:doctype)\b[^<>]*+>|<\?xml\b[^<>]*+\?>"
OPENING = re.compile(
    rf"{CODE}|{UNQUOTED}<!--|{UNQUOTED}<(?P<name>{'|'.join(DROPPED)})\b[^<>]*+>", re.IGNORECASE
)


def _without_dropped(text: str) -> str:
    """Cut comments, scripts, styles and the like with their contents; linear in the length of any
    text."""
    parts, position, unclosed = [], 0, set()
    while match := OPENING.search(text, position):
        name = "--" if match[0] == "<!--" else (match["name"] or "").lower()
        end = None
        if match["code"] is None and match[0].endswith("/>"):
            end = match.end()
        elif match["code"] is None and name not in unclosed:
            closing = "-->" if name == "--" else rf"</{name}\s*+>"
            close = re.compile(closing, re.IGNORECASE).search(text, match.end())
            end = close.end() if close else None
            if end is None:
                unclosed.add(name)
        parts.append(text[position : match.end() if end is None else match.start()])
        position = match.end() if end is None else end
    return "".join([*parts, text[position:]])


# A word for it beside a tag, a tag alone in brackets, a fragment, or an attribute in braces: it is
# written about.
ABOUT = re.compile(
    r"标签|標籤|标记|元素|属性|组件|HTML|JSX|\b(?:tags?(?!:)|elements?|attributes?|components?)\b"
)
MENTION = re.compile(r"[(（]</?[A-Za-z][^<>]*>[)）]|</?>|<[A-Za-z][^<>]*=\{")


def is_about_markup(text: str) -> bool:
    """Whether the tags in a text are what it is about, as in the documentation of HTML or React.

    Signs: a word such as 标签 or element next to a tag, a component (`<Link />`), an opening tag
    that nothing closes (`<div>` in a sentence), and what `MENTION` finds.
    """
    if MENTION.search(text):
        return True
    tags = [match for match in _outside_code(TAG).finditer(text) if match["code"] is None]
    pairs = {(bool(match["slash"]), match["name"].lower()) for match in tags}
    for match in tags:
        start, end, name = match.start(), match.end(), match["name"].lower()
        if not match["name"].islower() and not match["name"].isupper():
            # Java's and TypeScript's generics are no components: they follow a word.
            if not (start and text[start - 1].isascii() and text[start - 1].isalnum()):
                return True
        elif name in ELEMENTS:
            is_closed = match["slash"] or (True, name) in pairs or name in BARE
            around = text[max(start - 12, 0) : start] + "\n" + text[end : end + 12]
            if not (is_closed or "=" in match["attributes"]) or ABOUT.search(around):
                return True
    return False


def strip_html(text: str) -> str:
    """Remove the HTML elements of a text, unless it is a text about markup.

    `List<int>`, `a < b`, `<name>` and anything in Markdown code or directly behind a quote stay in
    any case.
    """
    if is_about_markup(text):
        return text
    text = _without_dropped(text)

    def replace(match: re.Match) -> str:
        if match["name"] is None:  # a declaration
            return ""
        name = match["name"].lower()
        if name not in ELEMENTS or not (match["name"].islower() or match["name"].isupper()):
            return match[0]
        if name in BLOCKS:
            return "\n"
        return " " if name in CELLS else ""

    return sub_outside_code(f"{TAG}|{DECLARATION}", replace, text)


def decode_entities(text: str) -> str:
    """`&amp;` -> `&`, `&#20013;` -> 中; unknown names stay, and what stands in quotes or Markdown
    code."""
    return sub_outside_code(
        f"{UNQUOTED}{ENTITY}|{ENTITY}(?!['\"”’」』])", lambda match: html.unescape(match[0]), text
    )


WIKI_EVIDENCE = re.compile(
    r"\[\[[^\[\]{}|\n]{1,200}\|[^\[\]{}\n]{1,400}\]\]|^(={2,6})[ \t]*\w[^=\n]*\1[ \t]*$",
    re.MULTILINE,
)
WIKI_FILE = (
    r"\[\[(?i:file|image|category|文件|图像|檔案|分类|分類):"
    r"(?>[^\[\]\n]|\[\[[^\[\]\n]*\]\]|\[[^\[\]\n]*\])*+\]\]"
)
WIKI_LINK = r"\[\[(?:[^\[\]{}|\n]{1,200}\|)?(?P<wiki>[^\W\d][^\[\]{}|\n]{0,200})\]\]"
WIKI_HEADING = r"(?m:^(?P<level>={2,6})[ \t]*(?P<heading>\w[^=\n]*?)[ \t]*(?P=level)[ \t]*$)"
WIKI_BOLD = r"(?P<quotes>'{2,5})(?P<bold>[^'\n]+)(?P=quotes)"
WIKI_TEMPLATE = r"\{\{[^{}]*+\}\}"
WIKI_EDIT = r"\[(?:编辑|編輯|edit|来源请求|citation needed)\]"


def strip_wiki(text: str) -> str:
    """MediaWiki links, headings, bold, templates and categories -> plain text, in texts that show
    wiki markup.

    The evidence is a link with a label or a `== heading ==`: `[[a, b]]`, quotes and braces alone
    are code.
    """
    text = re.sub(WIKI_EDIT, "", text) if "[" in text else text
    if ("[[" not in text and "==" not in text) or not WIKI_EVIDENCE.search(text):
        return text
    for pattern in (WIKI_TEMPLATE, WIKI_TEMPLATE, WIKI_FILE):  # twice, for templates in templates
        text = sub_outside_code(pattern, lambda match: "", text)
    for pattern, group in ((WIKI_LINK, "wiki"), (WIKI_HEADING, "heading"), (WIKI_BOLD, "bold")):
        text = sub_outside_code(pattern, lambda match, group=group: match[group], text)
    return text


MARKDOWN_IMAGE = r"!\[[^\[\]\n]*+\]\([^()\s]*+(?:[ \t]++\"[^\"\n]*+\")?\)"
MARKDOWN_LINK = (
    r"\[(?P<label>[^\[\]\n]++)\]\((?:https?://|mailto:|[/#.])[^()\s]*+(?:[ \t]++\"[^\"\n]*+\")?\)"
)


def strip_markdown(text: str) -> str:
    """Markdown images are removed and links become their label; headings, lists, emphasis and code
    stay."""
    if "](" not in text:
        return text
    text = sub_outside_code(MARKDOWN_IMAGE, lambda match: "", text)
    return sub_outside_code(MARKDOWN_LINK, lambda match: match["label"], text)


@dataclass(frozen=True)
class RemoveMarkup(Transform):
    """HTML tags, scripts, comments and entities, wiki markup, Markdown links and images; code
    survives."""

    name: ClassVar[str] = "remove_markup"
    html: bool = True
    entities: bool = True
    wiki: bool = True
    markdown: bool = True

    def __call__(self, text: str) -> str:
        if self.html and "<" in text:
            text = strip_html(text)
        if self.entities and "&" in text:
            text = decode_entities(text)
        if self.wiki:
            text = strip_wiki(text)
        return strip_markdown(text) if self.markdown else text


# Control characters and whitespace

LINE_BREAKS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# A flag such as England's is a black flag followed by tag characters; elsewhere these only hide
# text.
FLAG = "\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f"
CONTROL = re.compile(
    f"(?P<flag>{FLAG})|"
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufdd0-\ufdef"
    "\ufeff\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


@dataclass(frozen=True)
class ControlCharacters(Transform):
    r"""Control, invisible and directional characters removed, other line breaks -> \n; \n and \t
    stay.

    The zero-width joiners and variation selectors that emoji are made of stay too.
    """

    name: ClassVar[str] = "control_characters"

    def __call__(self, text: str) -> str:
        # A quick way out for most; characters to remove are not printable
        if text.replace("\n", "").isprintable():
            return text
        return CONTROL.sub(lambda match: match["flag"] or "", LINE_BREAKS.sub("\n", text))


SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
TRAILING = re.compile(r"(?<![ \t\u3000])[ \t\u3000]++$", re.MULTILINE)
INDENT = re.compile("^[ \t]*\u3000[ \t\u3000]*", re.MULTILINE)
RUN = r"(?<=[^\s])([ \t\u3000])[ \t\u3000]+(?=[^\s])"


@dataclass(frozen=True)
class Whitespace(Transform):
    """Runs of spaces inside a line -> one, trailing ones and ideographic indents removed, blank
    lines limited.

    Indentation and fenced code stay.
    """

    name: ClassVar[str] = "whitespace"
    max_blank_lines: int = 1

    def __post_init__(self):
        if self.max_blank_lines < 0:
            raise ValueError(f"max_blank_lines: found {self.max_blank_lines}, expected at least 0")

    def __call__(self, text: str) -> str:
        text = LINE_BREAKS.sub("\n", SPACES.sub(" ", text))
        text = TRAILING.sub("", INDENT.sub("", text))
        if "  " in text or "\t" in text or "\u3000" in text:
            text = sub_outside_code(RUN, lambda match: match[match.lastindex], text)
        allowed = "\n" * (self.max_blank_lines + 1)
        if allowed + "\n" in text:
            text = re.sub(rf"\n{{{len(allowed) + 1},}}", allowed, text)
        # The indent of a first line means something only among other indented lines.
        is_indented = "\n " in text or "\n\t" in text
        return text.strip("\n").rstrip() if is_indented else text.strip()
