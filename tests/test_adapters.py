"""The adapters of --use_peft: each is trained, saved, resumed and generated with, its loss is
peft's, and it is merged or refused."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from pipeline import chat_rows, failure, pair_rows, run_cli, run_script, short_run
from torch.nn.functional import cross_entropy

from minimind.common.errors import UserError
from minimind.data.packing import IGNORED, PaddedCollator
from minimind.doctor.rates import learning_rate, updates
from minimind.evaluation.losses import label_losses
from minimind.generation import complete, load_for_generation
from minimind.stage_directory import virtual_tokens, weights_hash
from minimind.training.adapters import VIRTUAL, fit_virtual_tokens, peft_config
from minimind.training.model_arguments import ModelArguments
from minimind.training.trainers import weighted_causal_lm_loss

# peft's calls
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]
RATES = {"ia3": 0.03, "prompt_tuning": 0.3, "prefix_tuning": 0.1}


@pytest.fixture
def base(model, tokenizer, tmp_path):
    """A stage directory whose model is far from random start, so that adapters matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.1)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def train(base, monkeypatch, tmp_path, write_jsonl):
    """Train an adapter on a few conversations; returns the losses of the log and the stage
    directory."""
    chats = write_jsonl("chats.jsonl", chat_rows())

    def train(kind, name="adapter", **options):
        output = tmp_path / name
        common = {"max_steps": 4, "max_length": 64, "logging_steps": 1, "sample_steps": -1}
        common |= {"learning_rate": RATES[kind], "per_device_train_batch_size": 4}
        words = short_run(output, **common | {"on_findings": "warn"} | options)
        words += ["--use_peft", "--peft_type", kind, "--train_files", chats]
        run_script(monkeypatch, "finetune_sft", *words, "--model_name_or_path", base)
        lines = map(json.loads, (output / "train_log.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line], output

    return train


@pytest.mark.parametrize("kind", RATES)
def test_an_adapter_is_trained_saved_resumed_and_generated_with(kind, train, capsys):
    losses, stage = train(kind, save_strategy="steps", save_steps=2)
    said = capsys.readouterr()
    assert losses[-1] < losses[0]
    assert ("packing is off" in said.out) == (kind in VIRTUAL)
    assert "failed" not in said.out + said.err  # no report, no plan
    assert (stage / "adapter_model.safetensors").exists()
    assert not (stage / "model.safetensors").exists()

    # Interrupted and resumed, it is the same
    expected = weights_hash(stage)
    (stage / "stage.json").unlink()
    shutil.rmtree(stage / "checkpoint-4")
    train(kind, save_strategy="steps", save_steps=2)
    assert "checkpoint-2" in capsys.readouterr().out
    assert weights_hash(stage) == expected

    # Commands
    run_cli("generate", stage, "--prompt", "the fox", "--max_new_tokens", 4, "--temperature", 0)
    assert capsys.readouterr().out.startswith("the fox")
    out = stage.with_name("out")
    if kind == "ia3":
        run_cli("merge", stage, out)
        assert (out / "model.safetensors").exists()
        return
    for command in (["merge", stage, out], ["export", stage, out, "--format", "minimind"]):
        assert "which no weights can express" in failure(capsys, run_cli, *command)
        assert not out.exists()


# The loss


def adapted(model, kind):
    """The model with an adapter that changes what it computes."""
    torch.manual_seed(0)
    config = peft_config(ModelArguments(use_peft=True, peft_type=kind))
    adapter = get_peft_model(copy.deepcopy(model), config)
    for parameter in adapter.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return adapter.eval()


def rows_of(*lengths):
    numbers = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 300, (length,), generator=numbers).tolist() for length in lengths]
    return [
        {
            "input_ids": ids,
            "labels": [IGNORED] * 2 + ids[2:],
            "loss_weights": [0.0] * 2 + [0.5 + 0.1 * place for place in range(len(ids) - 2)],
        }
        for ids in rows
    ]


@torch.no_grad()
def losses_alone(model, rows):
    """The loss of each trained token, row by row: from peft's forward of its ids alone."""
    losses = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        logits = model(input_ids=ids, use_cache=False).logits[0, -len(labels) :]
        losses.append(cross_entropy(logits[:-1], labels[1:], reduction="none")[labels[1:] >= 0])
    return torch.cat(losses)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", VIRTUAL)
def test_the_loss_of_a_batch_is_that_of_its_rows_alone(kind, weighted, model):
    adapter, rows = adapted(model, kind), rows_of(9, 21, 14)
    expected = losses_alone(adapter, rows)
    assert (expected - losses_alone(model, rows)).abs().max() > 0.01, "it changes nothing"

    weights = torch.cat([torch.tensor(row["loss_weights"][2:]) for row in rows])
    if weighted:
        adapter.get_base_model().loss_function = weighted_causal_lm_loss
    else:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    batch = PaddedCollator(0, 8, virtual_tokens(adapter, embedded=True))(rows)
    with torch.no_grad():
        loss = adapter(**batch, use_cache=False, num_items_in_batch=7).loss
    total = (expected * weights if weighted else expected).sum() / 7
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(label_losses(adapter, batch), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_a_continuation_in_a_batch_is_that_of_forward_passes(kind, model):
    adapter = adapted(model, kind)
    adapter.generation_config.eos_token_id = None
    prompts = [row["input_ids"] for row in rows_of(5, 9, 7)]
    decoder = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: ids)
    found = complete(adapter, decoder, prompts, max_new_tokens=6)
    for prompt, reply in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(6):
                logits = adapter(input_ids=ids, use_cache=False).logits[:, -1:]
                ids = torch.cat([ids, logits.argmax(dim=-1)], dim=1)
        assert reply == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", VIRTUAL)
def test_a_loaded_adapter_computes_what_the_saved_one_did(kind, base, model, tokenizer, tmp_path):
    adapter = adapted(model, kind)
    adapter.peft_config["default"].base_model_name_or_path = str(base)
    adapter.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_for_generation(str(tmp_path / "adapter"))
    ids = torch.tensor([rows_of(12)[0]["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, adapter(input_ids=ids).logits)


# What does not go together


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"peft_type": "ia3"}, "--peft_type ia3 is about adapters: give --use_peft too"),
        ({"use_peft": True, "peft_type": "ia3", "lora_r": 8}, "--lora_r is an option of --peft_ty"),
        (
            {"use_peft": True, "num_virtual_tokens": 8},
            "option of --peft_type prompt_tuning and pre",
        ),
        (
            {"use_peft": True, "peft_type": "prefix_tuning", "lora_target_modules": ["q_proj"]},
            "--lora_target_modules is an option of --peft_type lora",
        ),
    ],
)
def test_options_of_another_adapter_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ModelArguments(**options)


def training(**options):
    defaults = {"activation_checkpointing": False, "gradient_checkpointing": None, "packing": True}
    return SimpleNamespace(**defaults | options)


def test_rows_beyond_the_positions_and_recomputation_are_refused(config):
    args = ModelArguments(use_peft=True, peft_type="prefix_tuning", num_virtual_tokens=8)
    room = config.max_position_embeddings - 8
    assert "packing is off" in fit_virtual_tokens(args, training(), {"max_length": room}, config)
    with pytest.raises(UserError, match="8 virtual tokens are beyond the model's max_position"):
        fit_virtual_tokens(args, training(), {"max_length": room + 1}, config)
    with pytest.raises(UserError, match="drops the keys and values that prefix tuning trains"):
        fit_virtual_tokens(
            args, training(activation_checkpointing=True), {"max_length": room}, config
        )


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_adapters_of_weights_leave_packing_on(kind, config):
    options, args = training(), ModelArguments(use_peft=True, peft_type=kind)
    assert fit_virtual_tokens(args, options, {"max_length": 64}, config) is None
    assert options.packing


@pytest.mark.parametrize("kind", ["ia3", "prompt_tuning"])
def test_preference_training_takes_ia3_and_refuses_virtual_tokens(
    kind, base, monkeypatch, tmp_path, write_jsonl, capsys
):
    words = short_run(
        tmp_path / "dpo",
        max_prompt_length=64,
        max_completion_length=64,
        sample_steps=-1,
        on_findings="warn",
    )
    words += ["--use_peft", "--peft_type", kind, "--model_name_or_path", base]
    words += ["--train_files", write_jsonl("pairs.jsonl", pair_rows())]
    if kind == "ia3":
        run_script(monkeypatch, "train_dpo", *words)
        assert (tmp_path / "dpo" / "adapter_model.safetensors").exists()
        return
    said = failure(capsys, run_script, monkeypatch, "train_dpo", *words)
    assert "virtual tokens have no place. Train LoRA or IA3" in said
    assert not (tmp_path / "dpo").exists()


def test_the_doctor_knows_no_rates_of_other_adapters(model):
    args = SimpleNamespace(learning_rate=0.01, optim="adamw_torch")
    case = SimpleNamespace(stage="sft", args=args, model=adapted(model, "ia3"), lora=None, steps=9)
    assert [check.function(case)[0] for check in (learning_rate, updates)] == ["ok", "ok"]
