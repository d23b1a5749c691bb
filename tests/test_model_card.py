"""The model card: what it tells and does not tell, that its code runs, and whose text it keeps."""

import getpass
import json
import re
import socket

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from pipeline import failure, run_cli
from shared import make_stages

from minimind.evaluation.statistics import Measure, bootstrap_interval, estimate
from minimind.score_card.tasks import Card, TaskResult
from minimind.sharing import CARD, Choices, is_generated, write_model_card
from minimind.stage_directory import load_model
from minimind.training import record


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    return make_stages(tmp_path_factory.mktemp("cards"), tokenizer)


@pytest.fixture
def stages(tmp_path, tokenizer):
    """Stage directories that a test may change."""
    return make_stages(tmp_path, tokenizer)


def card_of(directory, **choices):
    assert write_model_card(directory, Choices(**choices), overwrite=True)
    return (directory / CARD).read_text()


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def rows(text):
    """The rows of all tables of two columns, name and value."""
    return re.findall(r"^\| ([^|]*[^| ]) \| (.*) \|$", text, re.MULTILINE)


def test_a_card_tells_every_stage_back_to_the_data(world):
    text = card_of(world / "reward")
    titles = re.findall(r"^### \d\. (.*)$", text, re.MULTILINE)
    assert titles == ["pretraining", "supervised fine-tuning", "training of a reward model"]
    assert [value for name, value in rows(text) if name == "seed"] == ["40", "41", "43"]
    seen = [value for name, value in rows(text) if name == "tokens seen"]
    assert seen == [
        "50,000 in 100 steps", "50,001 in 200 steps", "50,003 in 400 steps"
    ]  # fmt: skip
    data = [value for name, value in rows(text) if name == "data"]
    assert data == [
        r"`web\|text.jsonl`, `hf://datasets/owner/name@v1:zh:train`, 1,234 rows, xxh3 `feed0`",
        r"`&lt;b>'talk' \x1b[2J.jsonl`, 1,234 rows, xxh3 `feed1`",
        "`pairs.jsonl`, 1,234 rows, xxh3 `feed3`",
    ]
    recipe = next(value for name, value in rows(text) if name == "recipe")
    assert recipe == (
        "`optim: muon`, `learning_rate: 0.01`, `num_train_epochs: 2.0`, `block_size: 128`"
    )
    assert ("training", "3 x CPU, 2 threads, 90 s") in rows(text)
    assert text.count("xxh3") == text.count("feed") + 4
    assert "rows of the training files, 20 rows" in text


def test_a_card_names_no_directory_and_no_person_of_this_machine(world):
    for stage in ("pretrain", "sft", "lora", "reward"):
        text = card_of(world / stage)
        for word in ("alice", str(world), socket.gethostname(), "\x1b", "<b>"):
            assert word not in text.replace("<!--", "")
        if len(getpass.getuser()) > 4:
            assert getpass.getuser() not in text


def test_the_sizes_are_those_of_the_model(world):
    facts = dict(rows(card_of(world / "lora")))
    model = load_model(world / "sft")
    assert facts["parameters"] == f"{model.num_parameters():,}"
    assert facts["of these embedding"] == f"{300 * 32:,}"
    shapes = [m.weight.shape for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))]
    assert facts["of the adapter"] == f"{sum(2 * sum(shape) for shape in shapes):,}"
    assert facts["context"] == "256 tokens"
    assert "The longest training row of any stage had 128 tokens" in card_of(world / "sft")


def test_the_front_matter_is_the_hubs_metadata(world):
    data = front_matter(card_of(world / "reward", license="apache-2.0"))
    (results,) = data.pop("model-index")
    assert data == {
        "language": ["zh"],
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["minimind", "reward", "custom_code", "reward-model"],
        "datasets": ["owner/name"],
    }
    values = {each["type"]: each["value"] for each in results["results"][0]["metrics"]}
    assert values == {"loss": 0.4, "accuracy": 0.75}
    data = front_matter(card_of(world / "lora", base_model="me/base"))
    assert (data["library_name"], data["base_model"]) == ("peft", "me/base")
    assert "conversational" in data["tags"]
    assert "conversational" not in front_matter(card_of(world / "pretrain"))["tags"]


def test_a_licence_is_said_and_never_invented(world):
    text = card_of(world / "pretrain")
    assert "license" not in front_matter(text)
    assert "The author has not stated one" in text
    assert "作者未说明" in text
    text = card_of(world / "sft", license="cc-by-4.0")
    assert "`cc-by-4.0`, as the author" in text
    assert "许可证：cc-by-4.0" in text


def test_held_out_figures_have_the_interval_of_their_own_unit(world):
    text = card_of(world / "pretrain")
    assert "| loss (nats per token) | 3.0000 | 2.0000 | 1.9000 to 2.2000 |" in text
    assert "| bits per byte |  | 1.0000 | 0.9500 to 1.1000 |" in text
    assert "| perplexity per token |  | 7.3890 | 6.6859 to 9.0250 |" in text
    text = card_of(world / "reward")
    assert "| loss (nats per pair) | 3.0000 | 0.4000 |" in text
    assert "| pairs ranked as chosen |  | 0.7500 | 0.5300 to 0.8800 |" in text


def test_an_interval_of_some_rows_stands_beside_their_own_loss(stages):
    file = stages / "pretrain" / "stage.json"
    content = json.loads(file.read_text())
    content["token_loss"] |= {"held_out_rows": 1000, "mean": 2.05}
    file.write_text(json.dumps(content))
    text = card_of(stages / "pretrain")
    assert "| loss (nats per token) | 3.0000 | 2.0000 |  |" in text
    assert "| loss of 20 of the 1,000 rows |  | 2.0500 | 1.9000 to 2.2000 |" in text


def test_the_interval_of_a_run_is_over_its_rows(monkeypatch):
    """Tokens of a row are not independent draws."""
    losses = [torch.full((5,), 1.0), torch.tensor([3.0, float("nan")]), torch.full((2,), 2.0)]
    trainer = type("Trainer", (), {"eval_dataset": Dataset.from_dict({"x": [1, 2, 3, 4]})})
    monkeypatch.setattr(record, "token_losses", lambda trainer: [*losses, torch.empty(0)])
    found = record.token_loss(trainer)
    assert (found["tokens"], found["rows"], found["held_out_rows"]) == (8, 3, 4)
    assert found["mean"] == 1.5
    expected = bootstrap_interval(
        *map(torch.Tensor.numpy, map(torch.tensor, ([1.0, 3.0, 2.0], [5.0, 1.0, 2.0])))
    )
    assert found["interval"] == pytest.approx(expected, abs=1e-6)


def test_the_languages_of_the_rows_are_counted(tokenizer):
    texts = ["狐狸跑回家"] * 30 + ["the quick brown fox"] * 10
    rows = Dataset.from_dict({"prompt_ids": [tokenizer(text)["input_ids"] for text in texts]})
    assert record.language_shares(rows, tokenizer) == {"zh": 0.75, "en": 0.25}
    assert record.language_shares(Dataset.from_dict({"x": [1]}), tokenizer) == {}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")
@pytest.mark.parametrize("stage", ["pretrain", "sft", "lora", "reward"])
def test_the_code_of_a_card_runs(world, stage, capsys):
    text = card_of(world / stage)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("OWNER/NAME", str(world / stage))
    code = re.sub("OWNER/BASE|me/base", str(world / "sft"), code)
    exec(code.replace("tokens=100", "tokens=3"), {})
    assert capsys.readouterr().out


def test_the_code_of_an_exports_card_runs_and_needs_no_trust(world, tmp_path, capsys):
    card_of(world / "sft", license="mit")
    run_cli("export", world / "sft", tmp_path / "out", "--format", "qwen3")
    text = (tmp_path / "out" / CARD).read_text()
    assert front_matter(text)["license"] == "mit"
    assert "trust_remote_code" not in text
    assert "the largest difference of the logits" in text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = "\n".join(blocks).replace("OWNER/NAME", str(tmp_path / "out"))
    exec(code.replace("tokens=100", "tokens=3"), {})
    run_cli("card", tmp_path / "out", "--license", "apache-2.0")
    changed = (tmp_path / "out" / CARD).read_text()
    assert changed.replace("apache-2.0", "mit").splitlines()[:-1] == text.splitlines()[:-1]


# Whose text it is


def test_an_edited_card_is_kept_until_it_is_said(stages, capsys):
    card = stages / "sft" / CARD
    run_cli("card", stages / "sft", "--license", "mit")
    assert is_generated(card)
    text = card.read_text()
    card.write_text(text.replace("## Limits", "## My limits"))
    assert not is_generated(card)
    message = failure(capsys, run_cli, "card", stages / "sft")
    assert "was edited, and is kept as it is. --overwrite writes the card anew" in message
    assert "## My limits" in card.read_text()
    run_cli("card", stages / "sft", "--overwrite")
    assert card.read_text() == text  # with the licence that was given before
    card.write_text("Mine alone.")
    assert not write_model_card(stages / "sft")
    run_cli("card", stages / "sft", "--overwrite")
    assert "license" not in front_matter(card.read_text())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--license", "Apache 2"], "--license Apache 2: found no identifier of the Hub"),
        (["--language", "chinese"], "--language chinese: expected two or three letters"),
        (["--base_model", "sft"], "--base_model sft: it has no owner. Expected OWNER/NAME"),
        (["--score_card", "nowhere.json"], "nowhere.json: no such file. Give the card.json"),
    ],
)
def test_a_choice_that_the_hub_would_refuse_is_refused(stages, capsys, words, expected):
    assert expected in failure(capsys, run_cli, "card", stages / "sft", *words)
    assert not (stages / "sft" / CARD).exists()


def test_broken_front_matter_is_named(stages, capsys):
    (stages / "sft" / CARD).write_text("---\na: [\n---\ntext\n")
    message = failure(capsys, run_cli, "card", stages / "sft", "--overwrite")
    assert "README.md: the front matter between the lines --- is no metadata" in message


def test_a_directory_without_a_model_has_no_card(tmp_path, capsys):
    assert "no such directory" in failure(capsys, run_cli, "card", tmp_path / "none")
    assert "is not a complete stage directory" in failure(capsys, run_cli, "card", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_is_gone_is_said(stages):
    (stages / "pretrain").rename(stages / "elsewhere")
    text = card_of(stages / "sft")
    assert "Not known further: the directory is not there, or holds other weights now." in text
    assert "### 2. supervised fine-tuning" in text


# Score cards


def score_card(count=4):
    measure = Measure({str(index): float(index > 0) for index in range(count)}, chance=0.5)
    others = {f"pairs/{index}": measure for index in range(9)}
    return Card("x", {"pairs": TaskResult({"pairs/all": measure, **others}, {})}).entries()


def test_a_card_shows_the_first_scores_of_each_task_with_their_intervals(stages, tmp_path):
    (tmp_path / "card.json").write_text(json.dumps(score_card()))
    run_cli("card", stages / "sft", "--score_card", tmp_path)
    text = (stages / "sft" / CARD).read_text()
    low, high = estimate(Measure({"a": 0.0, "b": 1.0, "c": 1.0, "d": 1.0}))["interval"]
    assert f"| pairs | pairs/all | 4 | 0.7500 | {low:.4f} to {high:.4f} | 0.5000 |" in text
    assert text.count("| pairs | ") == 6
    (result,) = (
        each for each in ModelCard(text).data.eval_results if each.metric_name == "pairs/all"
    )
    assert (result.metric_value, result.dataset_name) == (0.75, "pairs")
    run_cli("card", stages / "sft", "--license", "mit")
    assert "| pairs | pairs/all | 4 |" in (stages / "sft" / CARD).read_text()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"models": [{}, {}]}, "found the score card of 2 models, expected that of one"),
        ({"directory": "x", "pairs": {}}, "found no measures, expected the card.json"),
        ({"measures": {"t": {"m": {"n": 1, "score": "?"}}}}, "found no measures"),
    ],
)
def test_another_file_is_no_score_card(stages, tmp_path, capsys, content, expected):
    (tmp_path / "card.json").write_text(json.dumps(content))
    message = failure(capsys, run_cli, "card", stages / "sft", "--score_card", tmp_path)
    assert expected in message
    assert not (stages / "sft" / "score_card.json").exists()


def test_a_refused_command_keeps_no_score_card(stages, tmp_path, capsys):
    (tmp_path / "card.json").write_text(json.dumps(score_card()))
    words = ("card", stages / "sft", "--score_card", tmp_path, "--license", "Apache 2")
    assert "found no identifier of the Hub" in failure(capsys, run_cli, *words)
    assert not (stages / "sft" / "score_card.json").exists()


def test_an_exports_card_shows_the_score_card_that_it_is_given(stages, tmp_path):
    (tmp_path / "card.json").write_text(json.dumps(score_card()))
    run_cli("export", stages / "sft", tmp_path / "out", "--format", "qwen3")
    run_cli("card", tmp_path / "out", "--score_card", tmp_path)
    assert (
        "Score card (`minimind evaluate`, of the model" in (tmp_path / "out/README.md").read_text()
    )
