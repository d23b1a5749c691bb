"""The stage of reward models, and what uses its directory: scoring, best-of-n, export."""

import copy
import io
import json
import sys

import pytest
import torch
from pipeline import chat_rows, failure, pair_rows, run_cli, run_script, short_run
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3ForSequenceClassification,
)

from minimind import MiniMindConfig, MiniMindForSequenceClassification, generation
from minimind.data.template_choice import set_chat_template
from minimind.evaluation import RewardModel, score_files
from minimind.generation import Reply
from minimind.stage_directory import read_stage
from minimind.training.starting_point import starting_point

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tokenizer):
    """Pairs, conversations, an SFT stage (of random weights), and from it a reward model and one
    as an adapter."""
    root = tmp_path_factory.mktemp("rewards")
    for name, rows in (("pairs", pair_rows()), ("chats", chat_rows())):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    config = MiniMindConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "sft")
    chat = copy.deepcopy(tokenizer)
    set_chat_template(chat, "chatml")
    chat.save_pretrained(root / "sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(root / "cache"))
        for name, more in (("reward", []), ("lora", ["--use_peft", "--lora_r", "4"])):
            run_script(
                patch,
                "train_reward",
                *short_run(
                    root / name,
                    max_prompt_length=32,
                    max_completion_length=32,
                    learning_rate=0.01,
                    max_steps=4,
                ),
                *("--train_files", root / "pairs.jsonl", "--eval_files", root / "pairs.jsonl"),
                *("--model_name_or_path", root / "sft", "--on_findings", "warn", *more),
            )
    return root


@pytest.mark.parametrize("name", ["reward", "lora"])
def test_the_stage_directory_is_complete_and_scores_as_its_record_says(world, name, capsys):
    names = {path.name for path in (world / name).iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"} if name == "lora" else {
        "config.json", "model.safetensors", "configuration_minimind.py", "kernels_minimind.py",
        "modeling_minimind.py",
    }  # fmt: skip
    told = {"train_log.jsonl", "loss.png", "report.html", "run.json", "mask_report.json"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == weights | told | tokenizer | {"training_args.bin", "stage.json", "README.md"}

    record = read_stage(world / name)
    assert record["stage"] == "reward"
    metrics = record["metrics"]["after"]
    assert metrics["pairs"] == len(pair_rows())
    assert metrics["loss"] < record["metrics"]["before"]["loss"]
    run_cli("score", world / name, world / "pairs.jsonl")
    said = capsys.readouterr()
    scores = [json.loads(line) for line in said.out.splitlines()]
    assert len(scores) == 16
    right = [score["chosen"] > score["rejected"] for score in scores]
    assert sum(right) / len(right) == pytest.approx(metrics["accuracy"])
    margins = [score["chosen"] - score["rejected"] for score in scores]
    assert sum(margins) / len(margins) == pytest.approx(metrics["margin"], abs=1e-4)
    assert f"{metrics['accuracy']:.1%} of 16 pairs are ranked as chosen" in said.err
    report = (world / name / "report.html").read_text()
    assert "pairs are ranked as chosen" in report
    assert "held-out accuracy" in report


def test_the_score_head_is_new_and_small_and_a_reward_stage_keeps_its_own(world):
    torch.manual_seed(3)
    fresh, *_ = starting_point(str(world / "sft"), scores=True)
    assert fresh.score.weight.shape == (1, 32)
    assert 0 < fresh.score.weight.std() < 0.04
    body = load_file(world / "sft" / "model.safetensors")
    torch.testing.assert_close(fresh.model.norm.weight, body["model.norm.weight"])
    torch.testing.assert_close(fresh.model.embed_tokens.weight, body["model.embed_tokens.weight"])
    assert all(parameter.requires_grad for parameter in fresh.parameters())
    again, *_ = starting_point(str(world / "reward"), scores=True)
    saved = load_file(world / "reward" / "model.safetensors")["score.weight"]
    torch.testing.assert_close(again.score.weight, saved)


def test_an_adapter_on_an_adapter_scores_as_in_its_own_evaluation(world, monkeypatch, tmp_path):
    words = ["--train_files", world / "pairs.jsonl", "--eval_files", world / "pairs.jsonl"]
    words += ["--model_name_or_path", world / "lora", "--use_peft", "--on_findings", "warn"]
    options = {"max_prompt_length": 32, "max_completion_length": 32, "max_steps": 1}
    run_script(monkeypatch, "train_reward", *short_run(tmp_path / "on", **options), *words)
    adapter = json.loads((tmp_path / "on" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(world / "lora")
    _, metrics = score_files(RewardModel.load(tmp_path / "on"), [str(world / "pairs.jsonl")])
    recorded = read_stage(tmp_path / "on")["metrics"]["after"]
    assert metrics["margin"] == pytest.approx(recorded["margin"], abs=1e-4)


def test_each_reply_of_a_conversation_is_scored_after_all_before_it(world, write_jsonl, tmp_path):
    turns = [
        {"role": "user", "content": "who runs?"},
        {"role": "assistant", "content": "the fox"},
        {"role": "user", "content": "who else?"},
        {"role": "assistant", "content": "the dog"},
    ]
    chats = write_jsonl("chats.jsonl", [{"messages": turns}, {"messages": turns[:2]}])
    run_cli("score", world / "reward", chats, "--out", tmp_path / "scores.jsonl")
    scores = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [row["where"] for row in scores] == [f"{chats}:1", f"{chats}:2"]
    first, second = RewardModel.load(world / "reward").score([turns[:2], turns])
    assert scores[0]["scores"] == pytest.approx([first, second], abs=1e-4)
    assert scores[1]["scores"] == pytest.approx([first], abs=1e-4)


# Best of n


@pytest.fixture
def candidates(monkeypatch, world):
    """Let the model write these replies; returns them from the best to the worst."""
    texts = ["the fox", "no", "the dog and the cat", "the owl runs home"]
    asked = []

    def generate_batch(model, tokenizer, prompts, *options):
        asked.append(tokenizer.decode(prompts[0]))
        return [Reply(text, [], True) for text in texts[: len(prompts)]]

    monkeypatch.setattr(generation, "generate_batch", generate_batch)
    reward = RewardModel.load(world / "reward")
    question = {"role": "user", "content": "who runs?"}
    rewards = reward.score([[question, {"role": "assistant", "content": t}] for t in texts])
    return [text for _, text in sorted(zip(rewards, texts, strict=True), reverse=True)], asked


def test_best_of_n_shows_the_reply_with_the_highest_reward(world, candidates, monkeypatch, capsys):
    (best, *_), asked = candidates
    options = ["--best_of", "4", "--reward_model", world / "reward", "--max_new_tokens", "32"]
    run_cli("generate", world / "sft", "--prompt", "who runs?", *options)
    said = capsys.readouterr()
    assert said.out == f"who runs?{best}\n"
    assert "best of 4: reward " in said.err

    monkeypatch.setattr(sys, "stdin", io.StringIO("who runs?\nand now?\n"))
    run_cli("chat", world / "sft", *options)
    assert capsys.readouterr().out.startswith(f"> who runs?\n{best}\n> and now?\n")
    assert best in asked[-1]  # the conversation continues with it


def test_best_of_n_samples_n_replies_with_a_model_of_its_own(world, capsys):
    options = ["--best_of", "3", "--reward_model", world / "lora", "--max_new_tokens", "4"]
    run_cli("generate", world / "sft", "--prompt", "the fox", *options)
    assert "best of 3: reward " in capsys.readouterr().err


# Mistakes


def test_each_mistake_is_one_clear_message(world, monkeypatch, capsys, tmp_path, write_jsonl):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    scores = "holds a reward model, which scores replies and writes none"
    writes = "holds a language model, which writes replies and scores none"
    text = write_jsonl("text.jsonl", [{"text": "a document"}])
    pairs = world / "pairs.jsonl"
    for words, expected in (
        (["chat", world / "reward"], scores),
        (["chat", world / "lora"], scores),
        (["generate", world / "reward", "--prompt", "x"], scores),
        (["evaluate", world / "reward", world / "chats.jsonl"], scores),
        (["score", world / "sft", pairs], writes),
        (["score", world / "none", pairs], "no such directory"),
        (["score", world / "reward", tmp_path / "none.jsonl"], "none.jsonl"),
        (["score", world / "reward", text], "found documents, expected conversations or"),
        (["score", world / "reward", pairs, "--out", world], "cannot be written"),
        (["generate", world / "sft", "--prompt", "x", "--best_of", "4"], "give --reward_model"),
        (
            ["generate", world / "sft", "--prompt", "x", "--reward_model", world / "reward"],
            "give --best_of",
        ),
        (
            ["chat", world / "sft", "--best_of", "4", "--reward_model", world / "sft"],
            writes,
        ),
        (
            ["chat", world / "sft", "--best_of", "4", "--reward_model", "x", "--temperature", "0"],
            "samples the same answer each time",
        ),
    ):
        assert expected in failure(capsys, run_cli, *words), words

    for script, parent, more, expected in (
        ("finetune_sft", "reward", [], scores),
        ("train_dpo", "lora", [], scores),
        ("train_reward", "none", [], "no such directory"),
        ("train_reward", "sft", ["--sample_steps", "5"], "a reward model writes no text"),
        ("train_reward", "sft", ["--center_rewards_coefficient", "-1"], "at least 0"),
        ("train_reward", "sft", ["--beta", "0.1"], "beta"),
    ):
        data = world / ("chats.jsonl" if script == "finetune_sft" else "pairs.jsonl")
        words = ["--train_files", data, "--model_name_or_path", world / parent, *more]
        words = [script, *short_run(tmp_path / "out"), *words]
        assert expected in failure(capsys, run_script, monkeypatch, *words), words
    assert not (tmp_path / "out").exists()


def test_a_model_with_another_tokenizer_or_more_outputs_is_no_reward_model(
    world, tokenizer, tmp_path, capsys
):
    config = MiniMindConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    AutoTokenizer.from_pretrained(world / "sft").save_pretrained(tmp_path / "stage")
    for size, expected in ((100, "has 300 tokens, the model 100"), (300, "has 2 outputs")):
        config.vocab_size = size
        MiniMindForSequenceClassification(config).save_pretrained(tmp_path / "stage")
        words = ["score", tmp_path / "stage", world / "pairs.jsonl"]
        assert expected in failure(capsys, run_cli, *words)


# Other tools


def test_the_export_and_the_merged_adapter_give_the_same_scores(world, tmp_path, capsys):
    chats = [[{"role": "user", "content": "who?"}, {"role": "assistant", "content": "the fox"}]]
    run_cli("merge", world / "lora", tmp_path / "merged")
    merged = RewardModel.load(tmp_path / "merged").score(chats)
    assert merged == pytest.approx(RewardModel.load(world / "lora").score(chats), abs=1e-5)

    run_cli("export", tmp_path / "merged", tmp_path / "qwen3", "--format", "qwen3")
    stock = Qwen3ForSequenceClassification.from_pretrained(tmp_path / "qwen3")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen3")
    (encoded,) = RewardModel(stock, tokenizer).encode(chats)
    with torch.no_grad():
        assert stock(torch.tensor([encoded])).logits[0].tolist() == pytest.approx(merged, abs=1e-4)

    words = ["export", world / "reward", tmp_path / "gguf", "--format", "gguf"]
    assert "it is a reward model" in failure(capsys, run_cli, *words)
