"""`minimind pairs`: the best and the worst of a model's replies become a pair, and nothing is
sampled twice."""

import json
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest
from browser import COMMAND, open_browser
from judged import PROMPTS, RULES, write_scorer, write_talker
from pipeline import PATIENCE, assistant, failure, run_cli, user

from minimind.cli import build_parser
from minimind.common.errors import UserError
from minimind.data.chat_encoder import ChatEncoder
from minimind.data.chats import load_preferences
from minimind.data.conversations import Conversation
from minimind.data.prompts import read_prompts, to_prompt
from minimind.evaluation import RewardModel
from minimind.evaluation import replies as sampling
from minimind.evaluation.judges import Judge
from minimind.generation import Reply
from minimind.pairs import ChoiceServer, chosen_pairs, questions, ranked_pairs
from minimind.training.data_arguments import DataArguments

ROOT = Path(__file__).parent.parent
PROMPT = Conversation([user("hi")])
SHORT = ["--max_new_tokens", 12, "--batch_size", 8]


def replies(*texts, stopped=True):
    return [Reply(text, [], stopped) for text in texts]


def ranked(*of_prompts, score=lambda messages, reply: float(len(reply)), prompt=PROMPT):
    """The pairs made of the replies to some prompts, as texts, and what was counted."""
    counts = Counter()
    rows = ranked_pairs([prompt] * len(of_prompts), [(0, list(of_prompts))], Judge(score), counts)
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows], counts


def test_the_best_and_the_worst_reply_become_a_pair():
    rows, counts = ranked(replies("aa", "a", "aaaa", "aaa"), replies("b", "bb"))
    assert rows == [("aaaa", "a"), ("bb", "b")]
    assert not counts


def test_a_reply_that_reached_the_limit_is_rejected_but_never_chosen():
    cut = replies("aaaaaa", "a", stopped=False)
    assert ranked(replies("aa", "aaa") + cut)[0] == [("aaa", "a")]
    assert ranked(cut) == ([], Counter(unfinished=1))
    # The only one that ended is the worst
    assert ranked([*cut[:1], *replies("aa")]) == ([], Counter(tie=1))
    # Of two equal ones, the one that ended counts
    assert ranked([*replies("aaa", stopped=False), *replies("aaa", "a")])[0] == [("aaa", "a")]


def test_ties_equal_replies_and_unusable_ones_are_dropped_and_counted():
    of_prompts = (
        replies("aa", "bb"),
        replies("a", "a"),
        replies("", " \n", "a"),
        replies("a\0", "b\ufffd", "c"),
    )
    assert ranked(*of_prompts) == ([], Counter(tie=1, equal=3, unusable=4))


def test_the_pairs_are_rows_that_training_reads_as_they_are(default, tmp_path):
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    prompts = [
        PROMPT,
        Conversation(
            [{"role": "system", "content": "be brief"}, *[user("1"), assistant("2")] * 2, user("3")]
        ),
        Conversation([user("add 1 and 2")], [tool]),
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    given = [
        replies("<think>\nhm\n</think>\n\nhello", "no"),
        replies("\n\nfour", "5"),
        replies(call, "12"),
    ]
    counts = Counter()
    rows = ranked_pairs(prompts, [(0, given)], Judge(lambda messages, reply: len(reply)), counts)
    assert rows[0]["chosen"] == [assistant("hello", reasoning_content="hm")]
    assert rows[2]["chosen"][0]["tool_calls"][0]["function"]["name"] == "add"
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = load_preferences(DataArguments([str(path)], eval_ratio=0.0), default)
    assert len(read.train) == 3
    assert "hello" in default.decode(read.train[0]["chosen_ids"])
    assert not any(columns.counts for columns in read.reading.columns)


@pytest.fixture
def talker(tmp_path, config, tokenizer):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "rules.py").write_text(RULES)
    return write_talker(tmp_path / "talker", config, tokenizer)


@pytest.fixture
def make(talker, tmp_path):
    """Run the command on the talker; returns the file's text."""

    def run(out, *words):
        run_cli("pairs", talker, tmp_path / "prompts.txt", tmp_path / out, *SHORT, *words)
        return (tmp_path / out).read_text()

    return run


def test_an_interrupted_command_continues_and_samples_no_prompt_twice(make, tmp_path, monkeypatch):
    complete = make("complete.jsonl", "--by_length", "longer")
    assert len(complete.splitlines()) >= 2
    generate, batches = sampling.generate_batch, []

    def interrupted(*args, **options):
        batches.append(len(args[2]))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr(sampling, "generate_batch", interrupted)
    with pytest.raises(SystemExit):
        make("pairs.jsonl", "--by_length", "longer")
    assert not (tmp_path / "pairs.jsonl").exists()

    # As if it had been killed while it wrote the next line
    with (tmp_path / "pairs.jsonl.samples").open("a") as file:
        file.write('{"first": 4, "repl')
    assert make("pairs.jsonl", "--by_length", "longer") == complete
    assert batches == [8] * 4  # three steps of two prompts with four replies, one of them twice


def test_a_complete_command_does_nothing_and_one_of_another_judge_is_refused(
    make, capsys, tmp_path
):
    first = make("pairs.jsonl", "--by_length", "longer")
    (tmp_path / "pairs.jsonl.samples").chmod(0o444)
    capsys.readouterr()
    assert make("pairs.jsonl", "--by_length", "longer", "--json") == first
    result = json.loads(capsys.readouterr().out)
    assert result["pairs"] == len(first.splitlines())
    assert result["chosen_characters"] > result["rejected_characters"]
    assert "holds other pairs" in failure(capsys, make, "pairs.jsonl", "--by_length", "shorter")
    assert (tmp_path / "pairs.jsonl").read_text() == first


def test_replies_of_another_model_or_of_other_options_are_not_continued(
    make, capsys, tmp_path, config, tokenizer
):
    make("pairs.jsonl", "--by_length", "longer")
    (tmp_path / "pairs.jsonl").unlink()
    message = failure(
        capsys, make, "pairs.jsonl", "--by_length", "longer", "--seed", 1, "--top_p", 1
    )
    assert "other values (top_p, seed)" in message
    write_talker(tmp_path / "talker", config, tokenizer, seed=1)
    assert "other values (model)" in failure(capsys, make, "pairs.jsonl", "--by_length", "longer")
    (tmp_path / "prompts.txt").write_text("\n".join(reversed(PROMPTS)) + "\n")
    assert "other values (model, prompts)" in failure(
        capsys, make, "pairs.jsonl", "--by_length", "longer"
    )
    (tmp_path / "other.jsonl.samples").write_text("my own notes\n")
    assert "is in the way" in failure(capsys, make, "other.jsonl", "--by_length", "longer")
    assert not (tmp_path / "pairs.jsonl").exists()


BAD = [
    ([], "found none, expected one of --reward_model, --rule"),
    (["--human", "--by_length", "longer"], "found --by_length, --human, expected one of"),
    (["--rule_regex", "(a"], '--rule_regex "(a": not a regular expression'),
    (["--rule", "rules.py"], "expected module.py:function"),
    (["--rule", "nowhere.py:long"], "no such file nowhere.py"),
    (["--rule", "{rules}:nothing"], "has no function nothing"),
    (["--rule", "{rules}:number"], "has no function number"),
    (["--rule", "{rules}:first"], "cannot be called with (messages, reply)"),
    (["--rule", "{rules}:broken"], "line 19: ZeroDivisionError: division by zero for the reply"),
    (["--rule", "{rules}:text"], 'it returned "good" for the reply'),
    (["--by_length", "longer", "--samples", 1], "--samples 1: expected at least 2"),
    (["--by_length", "longer", "--max_new_tokens", 250], "all prompts are too long"),
]


@pytest.mark.parametrize(("words", "expected"), BAD, ids=lambda value: str(value)[:40])
def test_bad_options_are_one_message_and_leave_no_file_of_pairs(
    words, expected, make, capsys, tmp_path
):
    words = [str(word).format(rules=tmp_path / "rules.py") for word in words]
    assert expected in failure(capsys, make, "pairs.jsonl", *words)
    assert not (tmp_path / "pairs.jsonl").exists()


def test_a_reward_model_with_a_tokenizer_of_its_own_chooses_by_its_scores(
    make, config, bytewise, tmp_path
):
    config.vocab_size = len(bytewise)
    scorer = write_scorer(tmp_path / "scorer", config, bytewise)
    rows = list(map(json.loads, make("pairs.jsonl", "--reward_model", scorer).splitlines()))
    judge = RewardModel.load(scorer)
    for side in ("chosen", "rejected"):
        expected = judge.score([row["prompt"] + row[side] for row in rows])
        assert [row[f"{side}_score"] for row in rows] == pytest.approx(expected, abs=1e-4)
    assert all(row["chosen_score"] > row["rejected_score"] for row in rows)


def test_a_model_that_cannot_chat_is_refused(talker, tmp_path, capsys, config, tokenizer):
    def refused(directory):
        files = [directory, tmp_path / "prompts.txt", tmp_path / "pairs.jsonl"]
        message = failure(capsys, run_cli, "pairs", *files, *SHORT, "--by_length", "longer")
        assert not list(tmp_path.glob("*.jsonl*"))
        return message

    (tmp_path / "talker" / "chat_template.jinja").unlink()
    assert "has no chat template" in refused(talker)
    scorer = write_scorer(tmp_path / "scorer", config, tokenizer)
    assert "scores replies and writes none" in refused(scorer)


PROMPT_ROWS = [
    {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]},
    {"messages": [user("a"), assistant("b"), user("c")]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
                       {"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]},
    {"prompt": [user("a"), assistant("b"), user("c")], "completion": "d"},
    {"prompt": "c", "history": [["a", "b"]]},
    {"instruction": "c", "output": "d", "history": [["a", "b"]]},
    {"prompt": [user("a"), assistant("b"), user("c")], "chosen": "d", "rejected": "e"},
]  # fmt: skip


@pytest.mark.parametrize("row", PROMPT_ROWS, ids=str)
def test_a_row_of_any_format_is_read_up_to_its_last_question(row):
    assert to_prompt(row).messages == [user("a"), assistant("b"), user("c")]


def test_the_system_prompt_and_the_tools_of_a_row_are_kept():
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    prompt = to_prompt({"prompt": "a", "system": "be brief", "tools": [tool]})
    assert prompt.messages == [{"role": "system", "content": "be brief"}, user("a")]
    assert prompt.tools == [tool]


def test_lines_of_text_are_prompts_and_bad_rows_are_named(write_jsonl, tmp_path, default):
    encoder = ChatEncoder(default)
    (tmp_path / "prompts.txt").write_text("one\n\n two \n")
    prompts = read_prompts([str(tmp_path / "prompts.txt")], encoder)
    assert [prompt.messages for prompt in prompts] == [[user("one")], [user(" two ")]]
    bad = write_jsonl("bad.jsonl", [{"prompt": "a"}, {"text": "a document"}])
    with pytest.raises(UserError, match=r"bad.jsonl:2: found keys .*expected 'messages'"):
        read_prompts([bad], encoder)
    assert len(read_prompts([bad], encoder, "skip")) == 1


# A person


QUESTIONS = [
    (0, [replies("a", "b"), replies("<b>c</b>", "d"), replies("e", "f"), replies("g", "h")])
]


def test_a_person_is_asked_about_two_different_replies_that_ended_and_the_choices_are_pairs():
    counts = Counter()
    given = [[*replies("a", "a", "b", "c", "d"), *replies("x", stopped=False)], replies("e", "e")]
    asked = questions([PROMPT] * 2, [(0, given)], counts)
    assert [(each.left.text, each.right.text) for each in asked] == [("a", "b"), ("c", "d")]
    assert counts == Counter(equal=1)
    asked = questions([PROMPT] * 4, QUESTIONS, counts := Counter())
    rows = chosen_pairs(asked, {0: "right", 1: "tie", 2: "left"}, counts)
    texts = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert texts == [("b", "a"), ("e", "f")]
    assert +counts == Counter(tie=1, open=1)


@pytest.fixture
def serve():
    """Serve the page; returns the server and its thread."""
    servers = []

    def start(choices, keep=None):
        asked = questions([PROMPT] * 4, QUESTIONS, Counter())
        server = ChoiceServer(asked, choices, keep or choices.__setitem__)
        thread = threading.Thread(target=server.serve_forever, args=[0.01], daemon=True)
        thread.start()
        servers.append(server)
        return server, thread

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.skipif(COMMAND is None, reason="no chromium is installed")
def test_keys_in_a_real_browser_choose_and_a_new_command_continues(serve, tmp_path):
    choices = {}
    server, _ = serve(choices)
    with open_browser(tmp_path / "profile") as browser:
        browser.open(server.address)
        browser.wait_for("left", "a")
        assert (browser.text("title"), browser.text("count")) == (
            "Which reply is better?",
            "0 of 4",
        )
        browser.press("ArrowRight")
        browser.wait_for("left", "<b>c</b>")  # the text, not its meaning
        browser.press("ArrowDown")
        browser.wait_for("left", "e")
        assert choices == {0: "right", 1: "tie"}
        browser.press("ArrowUp")  # back, and another choice
        browser.wait_for("left", "<b>c</b>")
        browser.press("KeyS")
        browser.wait_for("left", "e")
        assert choices == {0: "right", 1: "skip"}

        # The command ends, and the page says so; a new one continues with what is open
        again = dict(choices)
        server.shutdown()
        server.server_close()
        browser.press("ArrowLeft")
        browser.wait_for(
            "problem",
            "This choice was not saved: the command has ended. Start it again and open its new"
            " address.",
        )
        server, thread = serve(again)
        browser.open(server.address)
        browser.wait_for("left", "e")
        browser.evaluate("document.getElementById('language').click()")
        browser.wait_for("title", "哪个回复更好？")
        browser.evaluate("document.getElementById('left').click()")
        browser.wait_for("left", "g")
        browser.press("KeyT")
        browser.wait_for("done", "所有问题都已回答，偏好对已写入文件，可以关闭此页。")
        thread.join(PATIENCE)
        assert again == {0: "right", 1: "skip", 2: "left", 3: "tie"}
        (complaint,) = browser.complaints  # about the choice that was not saved
        assert "ERR_CONNECTION_REFUSED" in complaint["entry"]["text"]


def requested(address, value=None):
    """The status of a request, and the content of its answer."""
    data = None if value is None else json.dumps(value).encode()
    try:
        with urllib.request.urlopen(address, data, timeout=PATIENCE) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_only_who_knows_the_address_can_choose_and_only_what_is_asked(serve):
    choices = {}
    server, _ = serve(choices)
    status, content = requested(f"{server.address}questions")
    assert (status, len(json.loads(content)["questions"])) == (200, 4)
    foreign = server.address.replace(server.secret, "guess")
    assert requested(foreign)[0] == requested(server.address[:-1])[0] == 404
    right = {"question": 0, "choice": "left"}
    assert requested(f"{foreign}choice", right)[0] == 400
    wrong = [
        {"question": 4},
        {"question": True},
        {"question": -1},
        {"choice": "best"},
        {"choice": []},
    ]
    assert {requested(f"{server.address}choice", right | each)[0] for each in wrong} == {400}
    assert requested(f"{server.address}choice", [])[0] == 400
    assert choices == {}
    assert requested(f"{server.address}choice", right)[0] == 200
    assert choices == {0: "left"}


def test_a_choice_that_cannot_be_kept_ends_the_serving(serve):
    def full(question, choice):
        raise OSError(28, "No space left on device")

    server, thread = serve({}, full)
    right = {"question": 0, "choice": "left"}
    assert requested(f"{server.address}choice", right)[0] == 500
    thread.join(PATIENCE)
    assert server.failure.errno == 28
    with pytest.raises(UserError, match=r"--port \d+: cannot be used"):
        ChoiceServer([], {}, full, server.server_port)


def test_a_person_may_stop_and_continue_with_the_same_command(make, tmp_path, monkeypatch, capsys):
    def answer(number):
        """Answer so many questions, then press Ctrl-C."""

        def serve_forever(server):
            for question in [
                each for each in range(len(server.asked)) if each not in server.choices
            ]:
                if len(server.choices) == number:
                    raise KeyboardInterrupt
                server.keep(question, "right")

        monkeypatch.setattr(ChoiceServer, "serve_forever", serve_forever)
        return make("pairs.jsonl", "--human").splitlines()

    assert len(answer(2)) == 2
    assert "not chosen yet: " in capsys.readouterr().out
    rows = answer(1000)
    assert len(rows) > 2
    assert "not chosen yet: " not in capsys.readouterr().out
    monkeypatch.setattr(ChoiceServer, "serve_forever", None)  # everything is chosen
    assert make("pairs.jsonl", "--human").splitlines() == rows


def test_the_options_that_the_guides_explain_exist():
    known = set()
    for command in ("pairs", "compare"):
        parser = build_parser().parse_args([command, "a", "b", "c"]).parser
        known |= {f"--{action.dest}" for action in parser._actions}
    for guide in ("pairs.md", "pairs_zh.md"):
        text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
        assert set(re.findall(r"`(--\w+)", text)) <= known
