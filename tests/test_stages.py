"""The stage contract: each stage's directory is complete, and the only thing the next one needs."""

import copy
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipeline import (
    PAIR_LENGTHS,
    chat_rows,
    document_rows,
    failure,
    pair_rows,
    run_cli,
    run_script,
    short_run,
    write_model,
)
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind.commands.chat import check_chattable
from minimind.common.cache import content_hash
from minimind.common.errors import UserError
from minimind.generation import Reply
from minimind.stage_directory import load_model, read_stage, require_stage, weights_hash
from minimind.tokenizer import DEFAULT_TOKENIZER, save_tokenizer, train_tokenizer
from minimind.training.checkpointing_trainer import CheckpointingTrainer

STAGES = ("pretrain", "sft", "lora", "dpo")

# transformers' own call of torch's former name of a collective, until it moves to all_gather_single
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer_dir):
    """All stages, one after another: pretrain -> sft -> lora -> dpo (from the adapter)."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMIND_CACHE", str(root / "cache"))
        for name, rows in (
            ("docs", document_rows()),
            ("chats", chat_rows()),
            ("pairs", pair_rows()),
        ):
            (root / f"{name}.jsonl").write_text(
                "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            )
        model = write_model(root / "model.json")
        held_out = ["--eval_ratio", "0.2"]
        run_script(
            patch,
            "pretrain",
            *short_run(root / "pretrain", block_size=32, logging_steps=1),
            *held_out,
            "--train_files",
            root / "docs.jsonl",
            "--model_config",
            model,
            "--tokenizer",
            tokenizer_dir,
        )
        chats = ["--train_files", root / "chats.jsonl", *held_out]
        start = ["--model_name_or_path", root / "pretrain"]
        run_script(patch, "finetune_sft", *short_run(root / "sft", max_length=64), *chats, *start)
        start = ["--model_name_or_path", root / "sft", "--use_peft", "--lora_r", "4"]
        run_script(
            patch,
            "finetune_sft",
            *short_run(root / "lora", max_length=64, learning_rate=0.01),
            *chats,
            *start,
        )
        start = [
            "--model_name_or_path",
            root / "lora",
            "--train_files",
            root / "pairs.jsonl",
            *held_out,
        ]
        run_script(patch, "train_dpo", *short_run(root / "dpo", **PAIR_LENGTHS), *start)
    return root


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_directory_is_complete(runs, stage):
    names = {path.name for path in (runs / stage).iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"} if stage == "lora" else {
        "config.json", "generation_config.json", "model.safetensors",
        "configuration_minimind.py", "kernels_minimind.py", "modeling_minimind.py",
    }  # fmt: skip
    common = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "training_args.bin",
        "stage.json",
    }
    report = set() if stage == "pretrain" else {"mask_report.json"}
    told = {"train_log.jsonl", "loss.png", "samples.jsonl", "report.html", "run.json", "README.md"}
    assert names == weights | common | report | told


@pytest.mark.parametrize("stage", STAGES)
def test_stage_json_tells_the_lineage_back_to_the_raw_text(runs, stage):
    record = read_stage(runs / stage)
    assert record["stage"] == stage
    assert not [name for name in record["options"] if name.endswith("_token")]
    assert record["weights"] == weights_hash(runs / stage)
    parent = {"pretrain": None, "sft": "pretrain", "lora": "sft", "dpo": "lora"}[stage]
    if parent:
        assert record["parent"]["directory"] == str(runs / parent)
        assert record["parent"]["weights"] == weights_hash(runs / parent)
    assert record["pipeline"] == read_stage(runs / "pretrain")["pipeline"]
    assert record["steps"] == 2
    assert record["tokens_seen"] > 0
    files = record["data"]["train"]["files"]
    assert record["data"]["train"]["hash"] == content_hash([Path(file) for file in files])
    assert record["tokenizer"] == read_stage(runs / "pretrain")["tokenizer"]
    assert set(record["metrics"]) == {"before", "after"}
    assert record["metrics"]["after"]["loss"] > 0
    assert record["libraries"]["transformers"]


def test_pretraining_reports_bits_per_byte(runs):
    metrics = read_stage(runs / "pretrain")["metrics"]
    assert metrics["after"]["bits_per_byte"] < metrics["before"]["bits_per_byte"]


def test_the_first_loss_of_dpo_is_ln_2(runs):
    first = json.loads((runs / "dpo" / "train_log.jsonl").read_text().splitlines()[0])
    assert first["eval_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_every_log_line_has_step_and_the_training_ones_speed_and_eta(runs):
    entries = [
        json.loads(line)
        for line in (runs / "pretrain" / "train_log.jsonl").read_text().splitlines()
    ]
    training = [entry for entry in entries if "loss" in entry]
    assert [entry["step"] for entry in training] == [1, 2]
    for entry in training:
        assert {"learning_rate", "grad_norm", "tokens_per_second", "elapsed", "eta"} <= set(entry)


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
def test_the_mask_report_trains_the_assistant_alone(runs, stage):
    report = json.loads((runs / stage / "mask_report.json").read_text())
    assert report["roles"]["user"]["trained_tokens"] == 0
    assert report["replies"] == report["replies_with_end_trained"] > 0


def test_tied_weights_are_written_once(runs):
    with safe_open(runs / "sft" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (no mapping)
        assert "model.embed_tokens.weight" in file.keys()  # noqa: SIM118


def test_a_trained_model_uses_its_cache_again(runs):
    assert json.loads((runs / "sft" / "config.json").read_text())["use_cache"] is True


def test_generation_stops_at_the_end_token(runs):
    generation = json.loads((runs / "sft" / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(runs / "sft")
    ends = generation["eos_token_id"]
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert generation["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_stage_directory_opens_where_the_package_is_missing(runs):
    code = (
        "import sys; sys.modules['minimind'] = None\nimport torch\nfrom transformers import"
        " AutoModelForCausalLM, AutoTokenizer\nmodel ="
        f" AutoModelForCausalLM.from_pretrained({str(runs / 'dpo')!r},"
        " trust_remote_code=True)\ntokenizer ="
        f" AutoTokenizer.from_pretrained({str(runs / 'dpo')!r},"
        " trust_remote_code=True)\nprint(type(model).__module__, model(torch.tensor([[5,"
        " 6]])).logits.double().sum().item())\nassert tokenizer.chat_template\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=runs, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    module, value = done.stdout.split()
    assert module.startswith("transformers_modules.")
    here = AutoModelForCausalLM.from_pretrained(runs / "dpo")
    assert float(value) == pytest.approx(
        here(torch.tensor([[5, 6]])).logits.double().sum().item(), abs=1e-4
    )


def test_an_adapter_loads_merged_and_can_be_trained_on(runs):
    base, merged = load_model(runs / "sft"), load_model(runs / "lora")
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.equal(base(ids).logits, merged(ids).logits)
    assert all(parameter.requires_grad for parameter in merged.parameters())


def test_a_stage_without_a_parent_starts_from_a_random_tiny_model(
    runs, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parent.parent / "configs")
    run_script(
        monkeypatch,
        "finetune_sft",
        *short_run(tmp_path / "out", max_steps=1),
        "--train_files",
        runs / "chats.jsonl",
    )
    assert "RANDOM weights" in capsys.readouterr().out
    assert read_stage(tmp_path / "out")["parent"] is None


@pytest.mark.parametrize("stage", STAGES)
def test_generate_works_on_every_stage_directory(runs, stage, capsys):
    run_cli("generate", runs / stage, "--prompt", "the fox", "--max_new_tokens", "4")
    assert capsys.readouterr().out.startswith("the fox")


@pytest.mark.parametrize("stage", ["dpo", "lora"])
def test_chat_answers_each_line_of_its_input(runs, stage, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("who runs?\n\n/new\nagain\n"))
    run_cli("chat", runs / stage, "--max_new_tokens", "4", "--temperature", "0")
    said = capsys.readouterr().out
    assert said.index("> who runs?") < said.index("> again")


def test_chat_obeys_commands_and_sends_the_model_nothing_of_them(runs, capsys, monkeypatch):
    sent = []

    def decode(_, tokenizer, ids, *__):
        sent.append(tokenizer.decode(ids[0]))
        return Reply("(reply)", [], True)

    monkeypatch.setattr("minimind.generation.decode", decode)
    lines = "/help\n/nothing\n /home is it\n/etc/passwd?\n/new\nlast\n/exit\nnot read\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    run_cli("chat", runs / "sft", "--max_new_tokens", "4")
    said = capsys.readouterr()
    assert said.out.startswith("Enter sends a message;")
    assert "\n/nothing: no such command. See /help.\n> /home is it\n" in said.out
    assert ["/home is it" in sent[0], "/etc/passwd?" in sent[1], "last" in sent[2]] == [True] * 3
    assert not re.search("/nothing|/new|/exit|not read", "".join(sent))
    assert "(reply)" in sent[1]
    assert "(reply)" not in sent[2]
    assert len(sent) == 3
    assert not said.err


def test_chat_continues_the_texts_of_a_base_model_and_says_so(runs, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\n"))
    run_cli("chat", runs / "pretrain", "--max_new_tokens", "4")
    said = capsys.readouterr()
    assert re.match(r"notice: .*pretrain is a base model: it continues the texts", said.err)
    assert said.out.startswith("> the fox\n")


def test_chat_refuses_a_system_prompt_for_a_base_model(runs, capsys):
    message = failure(capsys, run_cli, "chat", runs / "pretrain", "--system", "be brief")
    assert "is a base model, which continues texts" in message


def test_chat_refuses_a_model_without_a_chat_template(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(
        UserError, match=r"has no chat template.*minimind generate.*--chat_template chatml"
    ):
        check_chattable("runs/x", bare)


def test_evaluate_counts_exact_answers(runs, capsys):
    run_cli("evaluate", runs / "sft", runs / "chats.jsonl", "--max_new_tokens", "4")
    assert json.loads(capsys.readouterr().out)["questions"] == 16


def test_the_same_seed_gives_the_same_weights(runs, monkeypatch, tmp_path):
    run_script(
        monkeypatch,
        "finetune_sft",
        *short_run(tmp_path / "again", max_length=64),
        "--eval_ratio",
        "0.2",
        "--train_files",
        runs / "chats.jsonl",
        "--model_name_or_path",
        runs / "pretrain",
    )
    assert weights_hash(tmp_path / "again") == weights_hash(runs / "sft")


def test_the_chat_template_that_was_asked_for_is_trained_with_and_lands_in_the_stage(
    runs, monkeypatch, tmp_path
):
    template = (
        "{% for m in messages %}{{ bos_token + m.role + '\\n' }}{% if m.role == 'assistant' %}{%"
        " generation %}{{ m.content + eos_token }}{% endgeneration %}{% else %}{{ m.content +"
        " eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ bos_token +"
        " 'assistant\\n' }}{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(template)
    data = ["--train_files", runs / "chats.jsonl", "--model_name_or_path", runs / "pretrain"]
    words = [
        *short_run(tmp_path / "out", max_length=64),
        *data,
        "--chat_template",
        tmp_path / "own.jinja",
    ]
    run_script(monkeypatch, "finetune_sft", *words)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == template
    assert weights_hash(tmp_path / "out") != weights_hash(runs / "sft")


def test_options_of_trl_that_would_mean_nothing_are_refused(runs, monkeypatch, tmp_path, capsys):
    for option, word in (
        ("--packing_strategy", "wrapped"),
        ("--loss_type", "dft"),
        ("--chat_template_path", "x"),
    ):
        message = failure(
            capsys,
            run_script,
            monkeypatch,
            "finetune_sft",
            *short_run(tmp_path / "out"),
            option,
            word,
        )
        assert f"{option} {word} has no meaning here" in message


def test_a_run_that_was_cut_off_and_resumed_ends_with_the_weights_of_one_that_was_not(
    runs, monkeypatch, tmp_path, tokenizer_dir, capsys
):
    def pretrain(name, *argv):
        options = {
            "block_size": 32,
            "max_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
        }
        data = ["--train_files", runs / "docs.jsonl", "--tokenizer", tokenizer_dir]
        words = [
            *short_run(tmp_path / name, **options),
            "--model_config",
            runs / "model.json",
            *data,
            *argv,
        ]
        run_script(monkeypatch, "pretrain", *words)
        return tmp_path / name

    whole = pretrain("whole")
    cut = pretrain("cut")
    shutil.rmtree(cut / "checkpoint-4")
    for name in ("model.safetensors", "stage.json"):
        (cut / name).unlink()
    capsys.readouterr()
    pretrain("cut", "--resume_from_checkpoint", "true")
    assert f"(from {cut / 'checkpoint-2'})" in capsys.readouterr().out
    assert weights_hash(cut) == weights_hash(whole)
    assert read_stage(cut)["steps"] == 4


def test_without_a_word_a_run_keeps_the_last_two_of_a_checkpoint_every_tenth_of_it(
    runs, monkeypatch, tmp_path, tokenizer_dir
):
    options = {"block_size": 32, "max_steps": 20, "num_train_epochs": 9, "save_strategy": None}
    words = [*short_run(tmp_path / "run", **options), "--train_files", runs / "docs.jsonl"]
    words += [
        "--tokenizer",
        tokenizer_dir,
        "--model_config",
        runs / "model.json",
        "--sample_steps",
        -1,
    ]
    saved, save = [], CheckpointingTrainer._save_checkpoint

    def watched(trainer, *rest):
        saved.append(trainer.state.global_step)
        save(trainer, *rest)

    monkeypatch.setattr(CheckpointingTrainer, "_save_checkpoint", watched)
    run_script(monkeypatch, "pretrain", *words)
    assert saved == list(range(2, 21, 2))
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-18",
        "checkpoint-20",
    ]


def one_step(runs, monkeypatch, stage, output, *words):
    """Run a stage for one step, on what a stage before it wrote."""
    script, rows, parent, length = {
        "pretrain": ("pretrain", "docs", "pretrain", {"block_size": 64}),
        "sft": ("finetune_sft", "chats", "pretrain", {"max_length": 64}),
        "lora": ("finetune_sft", "chats", "sft", {"max_length": 64}),
        "dpo": ("train_dpo", "pairs", "sft", PAIR_LENGTHS),
    }[stage]
    words = [*words, "--use_peft"] if stage == "lora" else words
    data = ["--train_files", runs / f"{rows}.jsonl", "--model_name_or_path", runs / parent]
    run_script(monkeypatch, script, *short_run(output, max_steps=1, **length), *data, *words)


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_a_run_of_one_step_changes_the_weights(runs, monkeypatch, tmp_path, stage):
    one_step(runs, monkeypatch, stage, tmp_path / "out")
    before, after = (
        load_model(path).state_dict()
        for path in (read_stage(tmp_path / "out")["parent"]["directory"], tmp_path / "out")
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_of_one_step_changes_an_adapter(runs, monkeypatch, tmp_path):
    one_step(runs, monkeypatch, "lora", tmp_path / "out")
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # They begin as zeros
    assert all(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_a_run_that_changes_no_weight_is_an_error_also_where_it_is_resumed(
    runs, monkeypatch, tmp_path, capsys
):
    # So small a rate is lost in the rounding of every weight.
    words = ["--learning_rate", "1e-30", "--weight_decay", "0", "--save_strategy", "steps"]
    for _ in range(2):
        message = failure(capsys, one_step, runs, monkeypatch, "sft", tmp_path / "out", *words)
        assert message.startswith("this run trained nothing: after 1 steps no weight has changed")
        assert not (tmp_path / "out" / "stage.json").exists()
    assert (tmp_path / "out" / "checkpoint-1" / "manifest.json").exists()


def test_a_directory_that_is_no_stage_is_refused(runs, tmp_path, capsys):
    message = failure(capsys, run_cli, "chat", tmp_path)
    assert str(tmp_path) in message
    assert "config.json, tokenizer.json, model.safetensors not found" in message
    assert "no such directory" in failure(capsys, run_cli, "chat", tmp_path / "nowhere")


def test_an_adapter_whose_base_is_gone_is_refused(runs, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (runs / "lora").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "moved away")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    message = failure(capsys, run_cli, "generate", adapter, "--prompt", "x")
    assert "its base" in message
    assert "moved away is gone" in message


def test_a_tokenizer_of_another_model_is_refused(runs, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in (runs / "sft").iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    (mixed / "tokenizer.json").write_bytes((DEFAULT_TOKENIZER / "tokenizer.json").read_bytes())
    message = failure(capsys, run_cli, "chat", mixed)
    assert "the tokenizer has 6,400 tokens, the model 300" in message


def test_a_tokenizer_exchanged_for_one_of_the_same_size_is_refused(runs, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in (runs / "sft").iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    save_tokenizer(
        train_tokenizer(["other words for another vocabulary, all of them new"] * 9, 300), mixed
    )
    message = failure(capsys, run_cli, "chat", mixed)
    assert "the tokenizer is not the one this stage was trained with" in message


def test_going_on_from_a_stage_with_another_tokenizer_is_refused(
    runs, monkeypatch, tmp_path, capsys
):
    argv = [
        *short_run(tmp_path / "out"),
        "--model_name_or_path",
        runs / "sft",
        "--tokenizer",
        DEFAULT_TOKENIZER,
    ]
    message = failure(capsys, run_script, monkeypatch, "pretrain", *argv)
    assert "is not the tokenizer of the model to continue from" in message


def test_a_complete_stage_is_accepted(runs):
    for stage in STAGES:
        assert require_stage(runs / stage) == runs / stage


def test_a_base_models_tokenizer_goes_through_all_stages_and_ends_replies_as_its_template_does(
    runs, monkeypatch, tmp_path, capsys
):
    """As GPT-2's and Qwen's base models come: no template, no padding, the end of a document as the
    end token."""
    base = train_tokenizer(["the fox runs home"], vocab_size=270)
    base.eos_token, base.pad_token, base.chat_template = "<|endoftext|>", None, None
    save_tokenizer(base, tmp_path / "base")
    rows = ("--train_files", runs / "docs.jsonl", "--tokenizer", tmp_path / "base")
    size = ("--model_config", runs / "model.json")
    run_script(
        monkeypatch, "pretrain", *short_run(tmp_path / "pretrain", block_size=32), *rows, *size
    )
    run_cli("generate", tmp_path / "pretrain", "--prompt", "the", "--max_new_tokens", 2)
    run_cli("export", tmp_path / "pretrain", tmp_path / "exported", "--format", "qwen3")
    parent = load_model(tmp_path / "pretrain")
    assert parent.config.eos_token_id == parent.config.pad_token_id == 0
    assert parent.get_input_embeddings().padding_idx is None, (
        "or the end token would get no gradient"
    )

    chats = ("--model_name_or_path", tmp_path / "pretrain", "--train_files", runs / "chats.jsonl")
    said = failure(
        capsys,
        run_script,
        monkeypatch,
        "finetune_sft",
        *short_run(tmp_path / "sft", max_length=64),
        *chats,
    )
    assert "the tokenizer has no chat template" in said
    assert "--chat_template chatml" in said
    run_script(
        monkeypatch,
        "finetune_sft",
        *short_run(tmp_path / "sft", max_length=64),
        *chats,
        *("--chat_template", "chatml"),
    )
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path / "sft"), load_model(tmp_path / "sft")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.eos_token_id == 2
    assert 2 in model.generation_config.eos_token_id
    run_cli("evaluate", tmp_path / "sft", runs / "chats.jsonl", "--max_new_tokens", 2)
    assert '"questions": 16' in capsys.readouterr().out
