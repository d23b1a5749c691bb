"""`minimind web`: the chat page in a real browser, and the votes on it."""

import json

import httpx
import pytest
from browser import COMMAND, open_browser
from judged import write_talker
from pipeline import PATIENCE, assistant, failure, run_cli, user, wait_until
from serving import serving

from minimind import MiniMindConfig
from minimind.data.chats import load_preferences
from minimind.serving.app import Endpoint, build_app
from minimind.serving.models import Served
from minimind.serving.texts import TextStream
from minimind.serving.web import Votes, routes
from minimind.training.data_arguments import DataArguments

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def models(tokenizer, tmp_path_factory):
    root, config = tmp_path_factory.mktemp("served"), None
    config = MiniMindConfig(vocab_size=len(tokenizer), **SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(tmp_path_factory.mktemp("cache")))
        models = [
            Served(write_talker(root / name, config, tokenizer, seed), name, 8)
            for seed, name in enumerate(("fox", "dog"))
        ]
    yield models
    for served in models:
        served.batcher.stop()


@pytest.fixture
def web(models, tmp_path):
    """Serve the page for two models; yields its address and the file of pairs."""
    pairs = tmp_path / "pairs.jsonl"
    endpoint = Endpoint(models, 16)
    endpoint.stop = lambda: None  # the models are for all tests
    with serving(build_app(endpoint, routes=routes(Votes(pairs)))) as address:
        yield address, pairs


def vote(address, choice, left="a", right="b", finished=(True, True), prompt=None):
    replies = [
        {"model": model, "message": assistant(text), "finished": ended}
        for model, text, ended in zip(("fox", "dog"), (left, right), finished, strict=True)
    ]
    body = {"prompt": prompt or [user("who?")], "choice": choice}
    body |= {"left": replies[0], "right": replies[1]}
    return httpx.post(f"{address}/v1/votes", json=body, timeout=PATIENCE)


def test_votes_become_pairs_that_dpo_training_reads(web, tokenizer):
    address, pairs = web
    assert vote(address, "left").json() == {"is_pair": True, "pairs": 1}
    prompt = [{"role": "system", "content": "be kind"}, user("a"), assistant("b"), user("c")]
    assert vote(address, "right", prompt=prompt).json() == {"is_pair": True, "pairs": 2}
    for choice, options in (
        ("tie", {}),
        ("both_bad", {}),
        ("left", {"finished": (False, True)}),  # would be trained to end in the middle
        ("left", {"left": "b"}),  # equal
        ("right", {"left": " "}),  # empty
    ):
        assert vote(address, choice, **options).json() == {"is_pair": False, "pairs": 2}
    assert vote(address, "right", finished=(False, True)).json()["pairs"] == 3

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert rows[1] == {"prompt": prompt, "chosen": [assistant("b")], "rejected": [assistant("a")]}
    record = [
        json.loads(line) for line in (pairs.parent / "pairs.jsonl.votes").read_text().splitlines()
    ]
    assert [each["choice"] for each in record] == (
        ["left", "right", "tie", "both_bad", "left", "left", "right", "right"]
    )
    assert record[0]["left"]["model"] == "fox"
    read = load_preferences(DataArguments([str(pairs)], eval_ratio=0.0), tokenizer)
    assert len(read.train) == 3
    # A new start counts what is there
    assert Votes(pairs).count == 3


@pytest.mark.parametrize(
    "change",
    [
        {"choice": "none"},
        {"prompt": []},
        {"prompt": [assistant("a")]},
        {"left": {"model": "fox", "message": user("a"), "finished": True}},
        {"more": 1},
    ],
)
def test_a_vote_that_is_none_is_refused(web, change):
    address, pairs = web
    reply = {"model": "fox", "message": assistant("a"), "finished": True}
    body = {"prompt": [user("a")], "left": reply, "right": reply, "choice": "tie"} | change
    assert httpx.post(f"{address}/v1/votes", json=body, timeout=PATIENCE).status_code == 400
    assert not pairs.exists()


def test_the_page_may_run_its_own_script_only(web):
    answer = httpx.get(web[0])
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.split("script-src")[1]
    assert "http://" not in answer.text.replace("http://127", "")
    assert "https://" not in answer.text


@pytest.mark.skipif(COMMAND is None, reason="needs a browser")
def test_two_models_are_compared_in_a_real_browser(web, tmp_path, monkeypatch):
    address, pairs = web
    markup = "<img src=x onerror='document.title=1'>"

    # What the models write is markup, and ends by itself
    class Scripted(TextStream):
        def take(self, token):
            self.tokens += 1
            if self.tokens < 3:
                return f"{markup} {token}"
            self.finish = "stop"
            return ""

    monkeypatch.setattr("minimind.serving.app.TextStream", Scripted)
    with open_browser(tmp_path / "profile") as browser:

        def write(text):
            browser.evaluate("document.getElementById('text').focus()")
            browser.call("Input.insertText", text=text)
            for kind in ("rawKeyDown", "keyUp"):
                browser.call(
                    "Input.dispatchKeyEvent",
                    type=kind,
                    code="Enter",
                    key="Enter",
                    windowsVirtualKeyCode=13,
                )

        def boxes():
            return browser.evaluate(
                "[...document.querySelectorAll('.message:not(.user)')].map((box) => box.innerText)"
            )

        browser.open(address)
        browser.wait_for("send", "Send")
        write("who runs?")
        wait_until(lambda: browser.evaluate("!document.getElementById('votes').hidden"))
        left, right = boxes()
        assert left.startswith("Left")  # no names before the vote
        assert right.startswith("Right")
        assert left.count(markup) == right.count(markup) == 2  # the text, not its meaning
        assert browser.evaluate("document.getElementById('send').disabled")
        browser.evaluate("document.getElementById('vote_right').click()")
        browser.wait_for("status", "Preference pairs: 1")
        assert {box.split("\n")[0] for box in boxes()} == {"fox", "dog"}

        # The conversation goes on with the better reply
        browser.evaluate("document.getElementById('language').click()")
        browser.wait_for("send", "发送")
        write("再说一次")
        wait_until(lambda: browser.evaluate("!document.getElementById('votes').hidden"))
        browser.evaluate("document.getElementById('vote_left').click()")
        browser.wait_for("status", "偏好对：2")
        assert browser.complaints == []
    first, second = (json.loads(line) for line in pairs.read_text().splitlines())
    assert first["prompt"] == [user("who runs?")]
    assert first["chosen"][0]["content"].startswith(markup)
    assert second["prompt"] == [user("who runs?"), *first["chosen"], user("再说一次")]


def test_what_cannot_be_compared_is_refused(models, capsys, tmp_path):
    fox, dog = (str(served.directory) for served in models)
    refuse = failure(capsys, run_cli, "web", fox, dog, "--pairs", tmp_path / "pairs.txt")
    assert "expected a name that ends with .jsonl" in refuse
    (tmp_path / "base").mkdir()
    for file in models[0].path.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "base" / "stage.json").write_text(json.dumps({"stage": "pretrain"}))
    base = ["web", fox, tmp_path / "base", "--port", 0, "--pairs", tmp_path / "pairs.jsonl"]
    assert "is a base model" in failure(capsys, run_cli, *base)
