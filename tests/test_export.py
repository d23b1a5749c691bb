"""`minimind export`: a stage directory in the layouts that other tools read, and what each layout
cannot say."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pipeline import failure, run_cli
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import minimind.export
from minimind import MiniMindConfig, MiniMindForCausalLM, MiniMindForSequenceClassification
from minimind.export.layouts import obstacles
from minimind.stage_directory import load_model, weights_hash
from minimind.tokenizer import CHAT_TEMPLATE, load_tokenizer

# peft's call
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*deprecated:FutureWarning")

SIZE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
PLAIN = {"qk_norm": False}
MOE = {"num_experts": 4, "moe_intermediate_size": 32}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FORMATS = ("qwen3", "qwen3-moe", "llama", "minimind", "gguf")
VARIANTS = {
    "qk_norm": {},
    "qk_norm, untied, head_dim 24": {"tie_word_embeddings": False, "head_dim": 24},
    "qk_norm, attention_bias": {"attention_bias": True},
    "qk_norm, GELU": {"hidden_act": "gelu"},
    "qk_norm, YaRN": {"rope_parameters": YARN},
    "qk_norm, YaRN, beta_fast 16": {"rope_parameters": YARN | {"beta_fast": 16.0}},
    "no qk_norm": PLAIN,
    "no qk_norm, untied": PLAIN | {"tie_word_embeddings": False},
    "no qk_norm, attention_bias": PLAIN | {"attention_bias": True},
    "no qk_norm, 6 heads in 64": PLAIN | {"num_attention_heads": 6, "head_dim": 16},
    "no qk_norm, YaRN": PLAIN | {"rope_parameters": YARN | {"attention_factor": 1.0}},
    "no qk_norm, linear RoPE": (
        PLAIN | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    ),
    "no qk_norm, llama3 RoPE": PLAIN | {"rope_parameters": LLAMA3},
    "no qk_norm, dynamic RoPE": (
        PLAIN | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    ),
    "MoE": MOE,
    "MoE, untied, YaRN": MOE | {"tie_word_embeddings": False, "rope_parameters": YARN},
    "MoE, top-1 not normalised": MOE | {"num_experts_per_tok": 1},
    "MoE, shared experts": MOE | {"n_shared_experts": 1},
    "MoE, no qk_norm": MOE | PLAIN,
}
DENSE_QWEN3 = {"qwen3-moe": "num_experts is 0", "llama": "qk_norm is true"}
DENSE_LLAMA = {"qwen3-moe": "num_experts is 0", "qwen3": "qk_norm is false"}
SPARSE = {"qwen3": "num_experts is 4", "llama": "num_experts is 4"}
REFUSED = {
    "qk_norm": DENSE_QWEN3,
    "qk_norm, untied, head_dim 24": DENSE_QWEN3,
    "qk_norm, attention_bias": DENSE_QWEN3 | {"gguf": "attention_bias is true"},
    "qk_norm, GELU": DENSE_QWEN3 | {"gguf": "hidden_act is 'gelu'"},
    "qk_norm, YaRN": DENSE_QWEN3,
    "qk_norm, YaRN, beta_fast 16": DENSE_QWEN3 | {"gguf": "beta_fast of YaRN is 16.0"},
    "no qk_norm": DENSE_LLAMA,
    "no qk_norm, untied": DENSE_LLAMA,
    "no qk_norm, attention_bias": DENSE_LLAMA,
    "no qk_norm, 6 heads in 64": (
        DENSE_LLAMA | {"llama": "not a multiple", "gguf": "not a multiple"}
    ),
    "no qk_norm, YaRN": DENSE_LLAMA,
    "no qk_norm, linear RoPE": DENSE_LLAMA,
    "no qk_norm, llama3 RoPE": DENSE_LLAMA | {"gguf": "rope_type is 'llama3'"},
    "no qk_norm, dynamic RoPE": DENSE_LLAMA | {"gguf": "rope_type is 'dynamic'"},
    "MoE": SPARSE,
    "MoE, untied, YaRN": SPARSE,
    "MoE, top-1 not normalised": SPARSE | {"gguf": "norm_topk_prob is false"},
    "MoE, shared experts": dict.fromkeys(
        ("qwen3", "qwen3-moe", "llama", "gguf"), "n_shared_experts is 1"
    ),
    "MoE, no qk_norm": (
        dict.fromkeys(("qwen3", "qwen3-moe", "llama", "gguf"), "qk_norm is false")
        | {"llama": "num_experts is 4"}
    ),
}

# Our own layout writes all variants in the same way: a few of them are enough.
OWN = ("qk_norm, attention_bias", "no qk_norm, YaRN", "MoE, shared experts", "MoE, no qk_norm")
ALLOWED = [
    (name, format)
    for name in VARIANTS
    for format in FORMATS
    if format not in REFUSED[name] and (format != "minimind" or name in OWN)
]


def ids(vocab_size=300):
    return torch.randint(3, vocab_size, (2, 90), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model.eval()(ids()).logits


def write_stages(root, tokenizer):
    """Write a stage directory of each variant, in which every weight matters, with a few ids more
    than its tokenizer has."""
    for number, (name, fields) in enumerate(VARIANTS.items()):
        torch.manual_seed(number)
        model = MiniMindForCausalLM(MiniMindConfig(**SIZE | fields, vocab_size=len(tokenizer) + 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tokenizer):
    return write_stages(tmp_path_factory.mktemp("stages"), tokenizer)


def reload_stock(out):
    """By the library's class and without the code of a checkpoint, as any tool would."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert type(model).__module__.startswith("transformers.models.")
    return model


@pytest.mark.parametrize(("variant", "format"), ALLOWED)
def test_an_export_gives_the_logits_of_its_source(variant, format, stages, tmp_path):
    out, source = tmp_path / "out", load_model(stages / variant)
    run_cli("export", stages / variant, out, "--format", format)
    record = json.loads((out / "export.json").read_text())
    assert record["verification"]["max_logit_difference"] <= record["verification"]["tolerance"]
    if format == "gguf":
        reloaded = read_gguf_by_hand(out / "model.gguf", source)
    elif format == "minimind":
        reloaded = load_model(out)
    else:
        reloaded = reload_stock(out)
        assert (
            AutoTokenizer.from_pretrained(out)("the fox 狐狸").input_ids
            == load_tokenizer(stages / variant)("the fox 狐狸").input_ids
        )
    expected = logits(source)
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("variant", "format"), [(name, format) for name in VARIANTS for format in REFUSED[name]]
)
def test_what_a_layout_cannot_express_is_refused_with_the_reason(
    variant, format, stages, tmp_path, capsys
):
    message = failure(
        capsys, run_cli, "export", stages / variant, tmp_path / "out", "--format", format
    )
    assert REFUSED[variant][format] in message
    possible = message.split("Possible: ")[1].rstrip(".").split(", ")
    assert possible == [name for name in FORMATS if name not in REFUSED[variant]]
    assert not list(tmp_path.glob("**/*out*"))


def read_gguf_by_hand(file, source):
    """The oracle for GGUF: the source's class, its config rebuilt from the file's keys and its
    weights from the file.

    What llama.cpp does with them is written out here: for llama, the inverse of its rotation of
    neighbouring rows.
    """
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    field = {name: value.contents() for name, value in reader.fields.items()}
    arch = field["general.architecture"]
    key = {name.removeprefix(f"{arch}."): value for name, value in field.items()}
    rope = {
        "rope_type": key.get("rope.scaling.type", "default"),
        "rope_theta": key["rope.freq_base"],
    }
    if rope["rope_type"] != "default":
        rope["factor"] = key["rope.scaling.factor"]
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = key["rope.scaling.original_context_length"]
        own_factor = 1 + 0.1 * torch.tensor(rope["factor"]).log().item()
        rope["attention_factor"] = key["rope.scaling.attn_factor"] * own_factor
    tensors = {
        t.name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for t in reader.tensors
    }
    config = MiniMindConfig(
        vocab_size=len(field["tokenizer.ggml.tokens"]),
        hidden_size=key["embedding_length"],
        intermediate_size=key["feed_forward_length"],
        num_hidden_layers=key["block_count"],
        num_attention_heads=key["attention.head_count"],
        num_key_value_heads=key["attention.head_count_kv"],
        head_dim=key["attention.key_length"],
        qk_norm=arch != "llama",
        attention_bias="blk.0.attn_q.bias" in tensors,
        max_position_embeddings=key["context_length"],
        rope_parameters=rope,
        rms_norm_eps=key["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings="output.weight" not in tensors,
        num_experts=key.get("expert_count", 0),
        num_experts_per_tok=key.get("expert_used_count", 2),
        moe_intermediate_size=key.get("expert_feed_forward_length"),
    )
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }
    names |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | {
        "attn_output": "self_attn.o_proj"
    }
    names |= {f"attn_{x}_norm": f"self_attn.{x}_norm" for x in "qk"}
    names |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    state = {}
    for name, tensor in tensors.items():
        layer, part, kind = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name).groups()
        prefix = f"model.layers.{layer}." if layer else ""
        if arch == "llama" and part in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
            rows = [tensor[h * config.head_dim : (h + 1) * config.head_dim] for h in range(heads)]
            tensor = torch.cat([half for head in rows for half in (head[0::2], head[1::2])])
        if part in ("ffn_gate_exps", "ffn_up_exps"):
            both = torch.cat(
                [tensors[f"blk.{layer}.ffn_{x}_exps.weight"] for x in ("gate", "up")], dim=1
            )
            state[f"{prefix}mlp.experts.gate_up_proj"] = both
        elif part == "ffn_down_exps":
            state[f"{prefix}mlp.experts.down_proj"] = tensor
        else:
            state[f"{prefix}{names[part]}.{kind}"] = tensor
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = MiniMindForCausalLM(config)
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("document", ["export.md", "export_zh.md"])
def test_the_table_in_the_documentation_is_what_the_command_does(document):
    text = (Path(__file__).parent.parent / "docs" / document).read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| `")
    ]
    table = {cells[0]: cells[1:] for cells in rows if len(cells) == len(FORMATS) + 1}
    expected = {}
    for name, fields in VARIANTS.items():
        config = MiniMindConfig(**SIZE | fields)
        expected[f"`{name}`"] = [not obstacles(config, format) for format in FORMATS]
    assert {
        name: [cell in ("yes", "是") for cell in cells] for name, cells in table.items()
    } == expected


# The files


def read(path):
    return json.loads(Path(path).read_text())


@pytest.mark.parametrize(
    ("variant", "format"),
    [("qk_norm, YaRN", "qwen3"), ("no qk_norm, untied", "llama"), ("MoE", "qwen3-moe")],
)
def test_config_and_tokenizer_have_the_keys_of_both_major_versions_of_the_library(
    variant, format, stages, tmp_path
):
    run_cli("export", stages / variant, tmp_path / "out", "--format", format)
    config, source = (
        read(tmp_path / "out/config.json"),
        MiniMindConfig.from_pretrained(stages / variant),
    )
    assert config["model_type"] == format.replace("-", "_")
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    assert config["use_cache"] is True
    assert config["head_dim"] == source.head_dim
    assert config.get("num_experts", 0) == config.get("num_local_experts", 0) == source.num_experts
    assert config["dtype"] == config["torch_dtype"] == "float32"
    rope = source.rope_parameters
    assert config["rope_theta"] == rope["rope_theta"] == config["rope_parameters"]["rope_theta"]
    old = {name: value for name, value in rope.items() if name != "rope_theta"}
    assert config["rope_scaling"] == (None if rope["rope_type"] == "default" else old)
    tokenizer = read(tmp_path / "out/tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    template = (tmp_path / "out/chat_template.jinja").read_text()
    assert tokenizer["chat_template"] == template == CHAT_TEMPLATE.read_text()
    assert read(tmp_path / "out/generation_config.json")["eos_token_id"] == source.eos_token_id
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == rope


def test_the_record_says_what_was_exported_and_how_it_was_verified(stages, tmp_path, capsys):
    run_cli(
        "export", stages / "qk_norm", tmp_path / "out", "--format", "qwen3", "--dtype", "bfloat16"
    )
    record, said = read(tmp_path / "out/export.json"), capsys.readouterr().out
    assert (record["format"], record["dtype"]) == ("qwen3", "bfloat16")
    assert record["source"]["weights"] == weights_hash(stages / "qk_norm")
    assert record["libraries"]["transformers"]
    verification = record["verification"]
    assert verification["read_back_by"] == "transformers.Qwen3ForCausalLM"
    assert verification["tensors_bitwise_equal"] == len(load_model(stages / "qk_norm").state_dict())
    assert verification["greedy_tokens_equal"] == 16 * verification["prompts"] > 0
    assert verification["texts_tokenised_equally"] > 15
    rounding = verification["max_logit_change_by_rounding"]
    assert rounding > 100 * verification["max_logit_difference"]
    assert f"{rounding:.2g}" in said
    assert "transformers.Qwen3ForCausalLM" in said


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_the_saved_data_type_is_kept_unless_another_is_asked_for(
    saved, stages, tmp_path, tokenizer
):
    model = load_model(stages / "qk_norm").to(getattr(torch, saved))
    model.save_pretrained(tmp_path / "stage")
    tokenizer.save_pretrained(tmp_path / "stage")
    run_cli("export", tmp_path / "stage", tmp_path / "kept", "--format", "qwen3")
    run_cli(
        "export", tmp_path / "stage", tmp_path / "asked", "--format", "qwen3", "--dtype", "float16"
    )
    for out, dtype in (("kept", saved), ("asked", "float16")):
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        assert exported.dtype == getattr(torch, dtype)
        for name, tensor in exported.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype)), name


def test_an_adapter_is_exported_with_its_base(stages, tmp_path, tokenizer):
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(stages / "qk_norm"),
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    adapted.peft_config["default"].base_model_name_or_path = str(stages / "qk_norm")
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    run_cli("export", tmp_path / "adapter", tmp_path / "out", "--format", "qwen3")
    expected = logits(adapted)
    assert (expected - logits(load_model(stages / "qk_norm"))).abs().max() > 0.5
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(
        logits(reload_stock(tmp_path / "out")), expected, atol=tolerance, rtol=0
    )
    source = read(tmp_path / "out/export.json")["source"]
    assert source["weights"] == weights_hash(tmp_path / "adapter")
    assert source["base"]["weights"] == weights_hash(stages / "qk_norm")


def test_our_own_layout_opens_in_a_process_without_the_package(stages, tmp_path):
    run_cli("export", stages / "MoE, shared experts", tmp_path / "out", "--format", "minimind")
    torch.save(logits(load_model(stages / "MoE, shared experts")), tmp_path / "expected.pt")
    torch.save(ids(), tmp_path / "ids.pt")
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('out', trust_remote_code=True).eval()\n"
        "with torch.no_grad(): logits = model(torch.load('ids.pt')).logits\n"
        "assert (logits - torch.load('expected.pt')).abs().max() < 1e-5\n"
        "assert 'minimind' not in sys.modules and model.config.use_cache\n"
        "print(AutoTokenizer.from_pretrained('out', trust_remote_code=True).decode([3, 4]))\n"
    )
    environment = {
        "PATH": "",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-I", "-c", program]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# What goes wrong


def test_a_file_that_is_not_its_source_fails_the_command_and_does_not_appear(
    tmp_path, capsys, monkeypatch
):
    # One that has learnt enough for the name of its splitting rule to matter
    real = load_tokenizer()
    MiniMindForCausalLM(MiniMindConfig(**SIZE, vocab_size=len(real))).save_pretrained(
        tmp_path / "stage"
    )
    real.save_pretrained(tmp_path / "stage")
    before = sorted(tmp_path.iterdir())

    def check(format, reason):
        message = failure(
            capsys, run_cli, "export", tmp_path / "stage", tmp_path / "out", "--format", format
        )
        monkeypatch.undo()
        assert "verification failed" in message
        assert reason in message
        assert sorted(tmp_path.iterdir()) == before

    def edit(name, change):
        """Change a JSON file after it has been written."""
        write = minimind.export.save_for_all_versions

        def changed(model, tokenizer, directory):
            write(model, tokenizer, directory)
            content = read(directory / name)
            change(content)
            (directory / name).write_text(json.dumps(content))

        monkeypatch.setattr(minimind.export, "save_for_all_versions", changed)

    edit("config.json", lambda content: content["rope_parameters"].update(rope_theta=10_000.0))
    check("qwen3", "logits differ")
    edit("tokenizer.json", lambda content: content["model"]["merges"].pop(0))
    check("qwen3", "the tokenizer splits")
    edit("tokenizer_config.json", lambda content: content.update(eos_token="<|im_start|>"))
    check("qwen3", "eos_token_id is 1 instead of 2")
    monkeypatch.setattr(minimind.export.gguf, "pre_tokenizer_name", lambda tokenizer: "gpt-2")
    check("gguf", "the tokenizer splits")
    rounding, nine = minimind.export.rounded, torch.tensor(9.0)
    monkeypatch.setattr(
        minimind.export, "rounded", lambda *given: torch.nextafter(rounding(*given), nine)
    )
    check("gguf", "has other values")


def test_wrong_arguments_are_refused_before_anything_is_written(
    stages, tmp_path, capsys, monkeypatch
):
    def refused(*arguments):
        before = sorted(tmp_path.iterdir())
        message = failure(capsys, run_cli, "export", *arguments)
        assert sorted(tmp_path.iterdir()) == before
        return message

    out = tmp_path / "out"
    assert "no such directory" in refused(tmp_path / "none", out, "--format", "qwen3")
    assert "--dtype q8_0" in refused(
        stages / "qk_norm", out, "--format", "qwen3", "--dtype", "q8_0"
    )
    assert "invalid choice: 'onnx'" in refused(stages / "qk_norm", out, "--format", "onnx")
    assert "--format" in refused(stages / "qk_norm", out)
    assert "exists and is not empty" in refused(
        stages / "qk_norm", stages / "no qk_norm", "--format", "qwen3"
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[gguf]'" in refused(stages / "qk_norm", out, "--format", "gguf")


def test_a_reward_model_is_refused_as_gguf(stages, tmp_path, tokenizer, capsys):
    MiniMindForSequenceClassification(MiniMindConfig(**SIZE, vocab_size=300)).save_pretrained(
        tmp_path / "stage"
    )
    tokenizer.save_pretrained(tmp_path / "stage")
    message = failure(
        capsys, run_cli, "export", tmp_path / "stage", tmp_path / "out", "--format", "gguf"
    )
    assert "it is a reward model" in message
