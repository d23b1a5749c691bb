"""`minimind merge`: a merged adapter answers as adapter and base together do."""

import json

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from pipeline import PAIR_LENGTHS, chat_rows, failure, pair_rows, run_cli, run_script, short_run
from transformers import AutoModelForCausalLM

from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.stage_directory import (
    load_adapter,
    load_model,
    read_stage,
    require_stage,
    weights_hash,
)

# peft's call
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS = {
    "every projection": {"target_modules": ATTENTION_AND_MLP},
    "all-linear": {"target_modules": "all-linear"},
    "attention, rank 1": {"target_modules": ["q_proj", "v_proj"], "r": 1},
    "rsLoRA": {"target_modules": ATTENTION_AND_MLP, "use_rslora": True},
    "DoRA": {"target_modules": ATTENTION_AND_MLP, "use_dora": True},
    "PiSSA": {"target_modules": ATTENTION_AND_MLP, "init_lora_weights": "pissa"},
    "OLoRA": {"target_modules": ATTENTION_AND_MLP, "init_lora_weights": "olora"},
    "LoHa": {"kind": LoHaConfig, "target_modules": ATTENTION_AND_MLP, "r": 4, "alpha": 8},
    "OFT": {"kind": OFTConfig, "target_modules": ATTENTION_AND_MLP, "oft_block_size": 8},
    "IA3": {
        "kind": IA3Config,
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}
MOE_ADAPTERS = {
    "attention and experts": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "target_parameters": EXPERTS,
    },
    "experts, rsLoRA": {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True},
    "shared experts": {"target_modules": "all-linear"},
}


def ids():
    return torch.randint(3, 300, (3, 23), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model.eval()(ids()).logits


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = MiniMindForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    return model


def write_base(directory, config, tokenizer):
    random_model(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_adapter(directory, base, tokenizer, kind=LoraConfig, **options):
    """An adapter whose matrices get noise, as if trained. Returns the logits of base and adapter
    together."""
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8} | options if kind is LoraConfig else options
    model = get_peft_model(load_model(base), kind(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return logits(model)


@pytest.fixture
def moe_config(config):
    return MiniMindConfig(**config.to_diff_dict() | {"num_experts": 4, "n_shared_experts": 1})


def check_merge(tmp_path, expected, base):
    assert (expected - logits(load_model(base))).abs().max() > 0.05, "the adapter changes nothing"
    run_cli("merge", tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(require_stage(tmp_path / "merged"))
    torch.testing.assert_close(
        logits(merged), expected, atol=1e-5 * expected.abs().max().item(), rtol=0
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_merged_adapter_gives_the_logits_of_adapter_and_base(kind, tmp_path, config, tokenizer):
    base = write_base(tmp_path / "base", config, tokenizer)
    check_merge(
        tmp_path, write_adapter(tmp_path / "adapter", base, tokenizer, **ADAPTERS[kind]), base
    )


@pytest.mark.parametrize("kind", MOE_ADAPTERS)
def test_a_merged_adapter_of_a_mixture_of_experts_gives_the_logits_of_adapter_and_base(
    kind, tmp_path, moe_config, tokenizer
):
    base = write_base(tmp_path / "base", moe_config, tokenizer)
    check_merge(
        tmp_path, write_adapter(tmp_path / "adapter", base, tokenizer, **MOE_ADAPTERS[kind]), base
    )


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["norm"]])
def test_modules_that_are_trained_whole_beside_lora_are_merged_too(
    saved, tmp_path, config, tokenizer
):
    base = write_base(tmp_path / "base", config, tokenizer)
    options = {"target_modules": ["q_proj"], "modules_to_save": saved}
    check_merge(tmp_path, write_adapter(tmp_path / "adapter", base, tokenizer, **options), base)


@pytest.mark.filterwarnings(
    "ignore:.*embedding layers:UserWarning", "ignore:.*tie_word_embeddings:UserWarning"
)
@pytest.mark.parametrize("tied_together", [True, False])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_a_tied_embedding_is_refused_since_peft_merges_it_wrongly(
    target, tied_together, tmp_path, config, tokenizer, capsys
):
    base = write_base(tmp_path / "base", config, tokenizer)
    options = {"target_modules": [target, "q_proj"], "ensure_weight_tying": tied_together}
    expected = write_adapter(tmp_path / "adapter", base, tokenizer, **options)
    wrong = PeftModel.from_pretrained(load_model(base), tmp_path / "adapter").merge_and_unload()
    assert (logits(wrong) - expected).abs().max() > 0.1, "peft merges it rightly now: allow it"
    message = failure(capsys, run_cli, "merge", tmp_path / "adapter", tmp_path / "merged")
    assert "embedding and output layer are one matrix" in message
    assert "--lora_modules_to_save" in message


def test_an_adapter_whose_base_cannot_be_computed_again_is_refused(
    tmp_path, config, tokenizer, capsys
):
    base = write_base(tmp_path / "base", config, tokenizer)
    write_adapter(
        tmp_path / "adapter",
        base,
        tokenizer,
        target_modules=["q_proj"],
        init_lora_weights="pissa_niter_4",
    )
    message = failure(capsys, run_cli, "merge", tmp_path / "adapter", tmp_path / "merged")
    assert "pissa_niter_4" in message
    assert "path_initial_model_for_weight_conversion" in message


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_and_prefix_tuning_learn_and_generate_through_peft(
    kind, num_experts, tmp_path, config, tokenizer
):
    config = MiniMindConfig(**config.to_diff_dict() | {"num_experts": num_experts})
    base = write_base(tmp_path / "base", config, tokenizer)
    model = get_peft_model(load_model(base), kind(task_type="CAUSAL_LM", num_virtual_tokens=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(8):
        losses.append(model(input_ids=ids(), labels=ids()).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.01
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_model(base), tmp_path / "adapter").eval()
    options = {"attention_mask": torch.ones_like(ids()), "do_sample": False, "max_new_tokens": 6}
    text = model.generate(input_ids=ids(), **options)
    assert torch.equal(again.generate(input_ids=ids(), **options), text)
    assert not torch.equal(load_model(base).eval().generate(ids(), **options), text), (
        "the learnt tokens do nothing"
    )


def test_prompt_tuning_cannot_be_merged_and_says_so(tmp_path, config, tokenizer, capsys):
    base = write_base(tmp_path / "base", config, tokenizer)
    model = get_peft_model(
        load_model(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    for command in (
        ["merge", tmp_path / "adapter", tmp_path / "out"],
        ["export", tmp_path / "adapter", tmp_path / "out", "--format", "minimind"],
    ):
        assert "holds prompt tuning" in failure(capsys, run_cli, *command)


@pytest.mark.parametrize(
    ("moe", "options"),
    [
        ({}, ["--use_dora", "--use_rslora"]),
        ({"num_experts": 4, "n_shared_experts": 1}, ["--lora_target_parameters", *EXPERTS]),
    ],
    ids=["DoRA and rsLoRA", "experts"],
)
def test_an_adapter_trained_from_the_command_line_merges_into_a_stage_directory(
    moe, options, tmp_path, config, tokenizer, write_jsonl, monkeypatch
):
    base = write_base(tmp_path / "base", MiniMindConfig(**config.to_diff_dict() | moe), tokenizer)
    chats, adapter, merged = (
        write_jsonl("chats.jsonl", chat_rows()),
        tmp_path / "adapter",
        tmp_path / "merged",
    )
    run = short_run(adapter, max_length=64, learning_rate=0.05)
    start = [
        "--model_name_or_path",
        base,
        "--train_files",
        chats,
        "--eval_ratio",
        "0.2",
        "--use_peft",
    ]
    run_script(monkeypatch, "finetune_sft", *run, *start, *options)
    expected = logits(load_adapter(adapter))
    check_merge(tmp_path, expected, base)

    names = {path.name for path in merged.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_minimind.py",
    }
    assert names >= {
        "configuration_minimind.py",
        "kernels_minimind.py",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    record = read_stage(merged)
    assert record["weights"] == weights_hash(merged)
    assert record["parent"]["weights"] == weights_hash(adapter)
    assert record["parent"]["base"]["weights"] == weights_hash(base)
    assert record["pipeline"] == read_stage(adapter)["pipeline"]
    assert json.loads((merged / "config.json").read_text())["use_cache"]
    pairs = write_jsonl("pairs.jsonl", pair_rows())
    run_script(
        monkeypatch,
        "train_dpo",
        *short_run(tmp_path / "dpo", **PAIR_LENGTHS),
        "--model_name_or_path",
        merged,
        "--train_files",
        pairs,
    )
    assert read_stage(tmp_path / "dpo")["parent"]["weights"] == weights_hash(merged)


@pytest.mark.parametrize("option", [["--use_dora"], ["--lora_dropout", "0.1"]])
def test_what_peft_cannot_do_with_experts_is_refused_before_training(
    option, tmp_path, monkeypatch, capsys
):
    options = [
        *short_run(tmp_path / "adapter"),
        "--use_peft",
        "--lora_target_parameters",
        *EXPERTS,
        *option,
    ]
    assert "--lora_target_parameters" in failure(
        capsys, run_script, monkeypatch, "finetune_sft", *options
    )


def test_a_merge_that_fails_its_verification_leaves_nothing(
    tmp_path, config, tokenizer, capsys, monkeypatch
):
    base = write_base(tmp_path / "base", config, tokenizer)
    write_adapter(tmp_path / "adapter", base, tokenizer, target_modules=["q_proj"])
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    before = sorted(tmp_path.iterdir())
    message = failure(capsys, run_cli, "merge", tmp_path / "adapter", tmp_path / "merged")
    assert "verification failed" in message
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_no_adapter_and_a_directory_in_use_are_refused(tmp_path, config, tokenizer, capsys):
    base = write_base(tmp_path / "base", config, tokenizer)
    assert "nothing to merge" in failure(capsys, run_cli, "merge", base, tmp_path / "merged")
    write_adapter(tmp_path / "adapter", base, tokenizer, target_modules=["q_proj"])
    for used, problem in {
        base: "exists and is not empty",
        base / "config.json": "is not a directory",
    }.items():
        assert problem in failure(capsys, run_cli, "merge", tmp_path / "adapter", used)
    (tmp_path / "empty").mkdir()
    run_cli("merge", tmp_path / "adapter", tmp_path / "empty")
    assert (tmp_path / "empty" / "stage.json").exists()
