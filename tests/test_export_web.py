"""`minimind export --format web`: a page that runs the model in a browser's tab."""

import base64
import functools
import gzip
import hashlib
import http.server
import io
import json
import re
import tarfile
import threading
from contextlib import contextmanager

import pytest
import torch
from browser import COMMAND, open_browser
from pipeline import failure, run_cli, wait_until
from talking import CHATS, write_learned

import minimind.export
from minimind.common.cache import configured_directory
from minimind.data.chat_encoder import ChatEncoder, encode_prompts
from minimind.export import prompts, web
from minimind.export.instructions import ollama_template
from minimind.stage_directory import load_model

# The developer's own cache, not that of a test
PACKAGE = configured_directory() / "wllama" / f"wllama-{web.VERSION}.tgz"
SYSTEM = "You are a fox.\n只说真话。"
WORDS = ["你好", " It is\nquick. \n", "and <b>then</b>?", "<think>\nWhy?\n</think>\n\n因为。", "好"]
PROGRAM = {web.CODE: b"export class Wllama {}", web.WASM: b"\0asm", web.LICENCE: b"MIT License"}


def chat(system, words):
    """Questions and replies by turns as messages."""
    roles = ("user", "assistant")
    turns = [{"role": roles[index % 2], "content": word} for index, word in enumerate(words)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def rendered(tokenizer, system, words):
    return tokenizer.apply_chat_template(
        chat(system, words), add_generation_prompt=True, tokenize=False
    )


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tokenizer):
    return write_learned(tmp_path_factory.mktemp("learned") / "sft", tokenizer)


# Prompts without Jinja


@pytest.mark.parametrize("template", ["chatml", "llama2"])
@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("turns", [1, 3, 5])
def test_the_pieces_of_a_shipped_template_make_its_prompts(
    template, system, turns, default, llama2
):
    tokenizer = {"chatml": default, "llama2": llama2}[template]
    pieces = prompts.prompt_pieces(tokenizer)
    words = WORDS[:turns]
    assert pieces.render(system, words) == rendered(tokenizer, system, words)
    assert (pieces.drops_reasoning, pieces.strips_replies) == (
        template == "chatml",
        template == "llama2",
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | length }}{% for m in messages %}{{ m.content }}|{% endfor %}",  # a count
        "{% for m in messages %}{{ m.content | upper }}|{% endfor %}",
        "{% for m in messages %}{% if loop.last %}{{ m.content }}{% endif %}{% endfor %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_template_that_is_more_than_pieces_is_known_as_such(template, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert prompts.prompt_pieces(tokenizer) is None


def test_a_template_that_refuses_system_prompts_has_none(tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    pieces = prompts.prompt_pieces(tokenizer)
    assert pieces.system is None
    assert pieces.render(SYSTEM, WORDS[:3]) == rendered(tokenizer, "", WORDS[:3])


def go(template, system, words):
    """The oracle for ollama: what Go's text/template makes of the actions that we write, each of
    which is translated into one of Python."""
    actions = {
        "if .System": "if system:",
        ".System": "write(system)",
        "range $i, $message := .Messages": "for i, (role, content) in enumerate(messages):",
        "$last := eq (len (slice $.Messages $i)) 1": "last = len(messages[i:]) == 1",
        'if eq .Role "user"': "if role == 'user':",
        'else if eq .Role "assistant"': "elif role == 'assistant':",
        "if $last": "if last:",
        "if not $last": "if not last:",
        ".Content": "write(content)",
        "else": "else:",
    }
    lines, depth = [], 0
    for index, part in enumerate(re.split(r"{{ (.*?) }}", template)):
        if index % 2 == 0:
            lines.append(" " * depth + f"write({part!r})")
        elif part == "end":
            depth -= 1
        else:
            lines.append(" " * (depth - part.startswith("else")) + actions[part])
            depth += actions[part].endswith(":") and not part.startswith("else")
    text = []
    messages = [(each["role"], each["content"]) for each in chat(system, words)]
    exec("\n".join(lines), {"write": text.append, "system": system, "messages": messages})
    return "".join(text)


@pytest.mark.parametrize("template", ["chatml", "llama2"])
@pytest.mark.parametrize("system", ["", SYSTEM])
def test_ollama_makes_the_same_prompts_of_the_modelfile(template, system, default, llama2):
    tokenizer = {"chatml": default, "llama2": llama2}[template]
    text = ollama_template(prompts.prompt_pieces(tokenizer))
    for words in (["你好"], ["hi", "yes", "and\n\nthen?"], ["a", "b", "c", "d", "e"]):
        assert go(text, system, words) == rendered(tokenizer, system, words)


def test_a_gguf_file_has_a_modelfile_and_commands_beside_it(learned, tmp_path, tokenizer):
    run_cli("export", learned, tmp_path / "out", "--format", "gguf")
    text = (tmp_path / "out/Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\n")
    template = re.search('TEMPLATE """(.*?)"""\n', text, re.DOTALL)[1]
    assert go(template, SYSTEM, WORDS[:1]) == rendered(tokenizer, SYSTEM, WORDS[:1])
    assert 'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 512\n' in text
    assert "llama-server -m model.gguf" in (tmp_path / "out/README.md").read_text()


def test_a_base_model_continues_texts_and_another_template_has_no_modelfile(
    learned, tmp_path, tokenizer, monkeypatch
):
    model = load_model(learned)
    base = prompts.speaker(model, tokenizer, "pretrain")
    assert (base.chats, base.pieces, base.start) == (False, None, "<|im_end|>")
    commands = minimind.export.write_modelfile(tmp_path, base, "float32")
    assert 'llama-completion -m model.gguf -no-cnv -p "<|im_end|>The text begins"' in commands
    assert 'TEMPLATE """<|im_end|>{{ .Prompt }}"""\n' in (tmp_path / "Modelfile").read_text()

    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(tokenizer, "chat_template", "{{ messages | length }}")
    commands = minimind.export.write_modelfile(
        other, prompts.speaker(model, tokenizer, "sft"), "q8_0"
    )
    assert "ollama" not in commands
    assert list(other.iterdir()) == []


# The page


def unpacked(page, name):
    """A file that a page holds."""
    blocks = re.findall(f'<script type="text/plain" data-file="{re.escape(name)}">(.*?)<', page)
    return gzip.decompress(b"".join(map(base64.b64decode, blocks)))


def test_the_page_holds_the_model_and_forbids_connections(learned, tmp_path, monkeypatch):
    monkeypatch.setattr(minimind.export, "wllama", lambda: PROGRAM)
    monkeypatch.setattr(web, "BLOCK", 3 * 5000)  # so that there are several
    run_cli("export", learned, tmp_path / "out", "--format", "web")
    run_cli("export", learned, tmp_path / "gguf", "--format", "gguf", "--dtype", "q8_0")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["LICENSE.wllama", "README.md", "export.json", "index.html"]
    page = (tmp_path / "out/index.html").read_text()
    assert unpacked(page, "model.gguf") == (tmp_path / "gguf/model.gguf").read_bytes()
    assert unpacked(page, "wllama.wasm") == PROGRAM[web.WASM]
    assert "MIT License" in page
    assert "$" not in re.sub(r"\$\{|data-file.*", "", page.split("<script>")[0])
    script = re.search("<script>(.*?)</script>", page, re.DOTALL)[1].encode()
    policy = re.search('Security-Policy" content="(.*?)"', page)[1]
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert policy.startswith("default-src 'none'; ")
    assert f"script-src 'sha256-{digest}' blob: 'wasm-unsafe-eval';" in policy
    assert "connect-src data:;" in policy
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page.split("<script type")[0])


@pytest.mark.parametrize(
    ("constant", "value", "reason"),
    [("LARGEST", 1000, "Use --dtype q8_0"), ("prompt_pieces", None, "cannot render it")],
)
def test_what_a_page_cannot_hold_is_refused(
    constant, value, reason, learned, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(minimind.export, "wllama", lambda: PROGRAM)
    if value is None:
        monkeypatch.setattr(prompts, "prompt_pieces", lambda tokenizer: None)
    else:
        monkeypatch.setattr(web, constant, value)
    words = ("export", learned, tmp_path / "out", "--format", "web")
    assert reason in failure(capsys, run_cli, *words)
    assert not list(tmp_path.glob("*out*"))


# wllama's package


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry on this machine with a package of its own making; the paths that were asked."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in PROGRAM.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    monkeypatch.setattr(web, "INTEGRITY", digest)
    monkeypatch.setattr(web.constants, "HF_HUB_OFFLINE", False)
    root = tmp_path / "registry"
    (root / "@wllama/wllama/-").mkdir(parents=True)
    (root / "@wllama/wllama/-" / PACKAGE.name).write_bytes(buffer.getvalue())
    with serve(root) as (address, asked):
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        yield asked


@contextmanager
def serve(directory):
    """A plain file server of a directory: its address, and the paths that were asked."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=directory)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    server.server_close()


def test_the_package_is_downloaded_once(registry, tmp_path, monkeypatch):
    assert web.wllama() == PROGRAM
    assert web.wllama() == PROGRAM
    assert registry == [f"/@wllama/wllama/-/{PACKAGE.name}"]
    monkeypatch.setattr(web.constants, "HF_HUB_OFFLINE", True)  # what is there needs no network
    assert web.wllama() == PROGRAM


def test_without_the_published_package_nothing_is_written(
    registry, learned, tmp_path, monkeypatch, capsys
):
    words = ("export", learned, tmp_path / "out", "--format", "web")
    monkeypatch.setattr(web, "INTEGRITY", "another")
    assert "not the file that npm publishes" in failure(capsys, run_cli, *words)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", "http://127.0.0.1:1")
    assert "npm pack @wllama/wllama@" in failure(capsys, run_cli, *words)
    monkeypatch.setattr(web.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in failure(capsys, run_cli, *words)
    assert not list(tmp_path.glob("*out*"))
    assert not list((tmp_path / "cache").rglob("*.tgz"))


# In a real browser


@pytest.fixture(scope="module")
def page(learned, tmp_path_factory):
    """The page of the learned model, in fp32, with the real program."""
    if COMMAND is None or not PACKAGE.exists():
        pytest.skip(f"needs chromium and {PACKAGE}, which --format web downloads")
    out = tmp_path_factory.mktemp("page") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minimind.export, "wllama", lambda: web.unpack(PACKAGE.read_bytes()))
        minimind.export.export(learned, out, "web", "float32")
    return out


@pytest.fixture
def browser(tmp_path):
    """A browser whose network is this machine alone."""
    cut = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
    with open_browser(tmp_path / "profile", cut) as browser:
        yield browser
        assert browser.complaints == []


def ask(browser, text, **settings):
    wait_until(lambda: browser.evaluate("!stopping"))
    for name, value in settings.items():
        browser.evaluate(f"element({name!r}).value = {json.dumps(value)}")
    browser.evaluate(f"element('input').value = {json.dumps(text)}")
    browser.evaluate("element('form').requestSubmit()")


GENERATE = """(async () => {
    turns = %s; element("system").value = %s; cached = [];
    const tokens = [], texts = [], ids = await prompt(400);
    const write = (text, token) => { texts.push(text); tokens.push(token); };
    const { end } = await generate(ids, 30, 0, { aborted: false }, write);
    turns = [];
    await wllama.kvClear();
    await wllama.decode(ids, {});
    const [{ p }] = await wllama.getLogits(1);
    return { ids, tokens, texts, end, p };
})()"""


def test_the_tab_gives_the_tokens_of_transformers(page, learned, browser, tokenizer):
    """From a plain file server: prompt ids, greedy tokens and whole characters, in both
    languages."""
    model = load_model(learned).eval()
    encoder = ChatEncoder(tokenizer)
    with serve(page) as (address, asked):
        browser.open(address)
        browser.wait_for("status", "Ready.")
        for system, words in (
            *(("", [question]) for question in CHATS),
            ("", ["从前有座山"]),
            ("", ["The quick <|im_end|>\n<|im_start|>system\nbrown"]),
            (SYSTEM, WORDS),
        ):
            pairs = zip(words[::2], [*words[1::2], ""], strict=True)
            turns = [{"user": question, "assistant": reply} for question, reply in pairs]
            done = browser.evaluate(GENERATE % (json.dumps(turns), json.dumps(system)))
            (ids,) = encode_prompts([chat(system, words)], encoder)
            assert done["ids"] == list(ids)
            out = model.generate(torch.tensor([done["ids"]]), do_sample=False, max_new_tokens=30)
            expected = out[0, len(ids) :].tolist()
            likeliest = model(torch.tensor([done["ids"]])).logits[0, -1].softmax(-1).max().item()
            assert done["p"] == pytest.approx(likeliest, rel=1e-4)
            assert done["end"] == ("end" if expected[-1] == 2 else "full")
            expected = [token for token in expected if token > 2]
            assert done["tokens"] == expected
            text = tokenizer.decode(expected)
            if words[0] in CHATS and not system:
                assert text == CHATS[words[0]]
                assert [text.startswith(part) for part in done["texts"]] == [True] * len(expected)
        assert [path for path in asked if "favicon" not in path] == ["/"]


def test_a_double_click_opens_a_chat(page, browser):
    """Opened as a file: a conversation, as text; stop, new chat, both languages."""
    browser.open((page / "index.html").as_uri())
    browser.wait_for("status", "Ready.")
    ask(browser, "who runs home?", temperature="0")
    browser.wait_for("log", "You\nwho runs home?\nModel\n" + CHATS["who runs home?"])
    ask(browser, "<img src=x onerror=alert(1)>", max="8")
    browser.wait_for("notice", "The reply ended at its longest length. You can change it below.")
    assert "You\n<img src=x onerror=alert(1)>\nModel" in browser.text("log")
    assert browser.evaluate("document.querySelector('#log img')") is None
    assert re.fullmatch(r"\d tokens, \d+ tokens/s", browser.text("status"))

    browser.evaluate("element('new').click()")
    assert (browser.text("log"), browser.text("notice")) == ("", "")
    browser.evaluate("element('language').click()")
    ask(browser, "你好", max="100")
    browser.wait_for("log", "您\n你好\n模型\n" + CHATS["你好"])

    # A stop keeps what is there; another message can follow
    browser.evaluate("facts.ends = []; element('new').click()")
    ask(browser, "你好", max="400")
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    browser.evaluate("element('stop').click()")
    wait_until(lambda: browser.evaluate("!stopping"))
    assert browser.evaluate("cached.length") < 400
    assert browser.evaluate("element('send').disabled") is False

    # What does not fit is left out from the left, and that is said
    browser.evaluate("turns = []")
    ask(browser, "狐狸 " * 200, max="16")
    browser.wait_for("notice", "这条消息超出了模型能读的长度，开头部分没有读入。")
    ask(browser, "再来")
    browser.wait_for("notice", "对话超出了模型能读的长度，最前面的 1 轮没有读入。")
