"""`minimind pairs`: the best and the worst of a model's replies become a pair, and nothing is
sampled twice."""

import json
from collections import Counter

import pytest
from judged import PROMPTS, RULES, write_talker
from pipeline import assistant, failure, run_cli, user

from minimind.data.chats import load_preferences
from minimind.data.conversations import Conversation
from minimind.evaluation import replies as sampling
from minimind.evaluation.judges import Judge
from minimind.generation import Reply
from minimind.pairs import ranked_pairs
from minimind.training.data_arguments import DataArguments

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
    read = load_preferences(DataArguments([str(path)], eval_ratio=0.0), default, 512)
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
