"""Published checkpoints in: the imported model's logits are those of the published code or of the
library's class."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from pipeline import failure, run_cli
from safetensors.torch import load_file, save_file
from torch.nn.functional import silu, softmax
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from minimind import MiniMindForCausalLM
from minimind.cli import build_parser
from minimind.data.chats import tokenize_conversation
from minimind.importing import import_checkpoint
from minimind.importing.layouts import MINIMIND_1, MINIMIND_2, MINIMIND_2_OLD, MINIMIND_3
from minimind.stage_directory import check_vocabulary, read_stage, require_stage
from minimind.tokenizer import load_tokenizer

VOCAB, HIDDEN, LAYERS, WIDTH, EXPERTS = 300, 64, 2, 48, 3
IDS = torch.randint(3, VOCAB, (2, 19), generator=torch.Generator().manual_seed(1))

OLD = {  # MiniMind-1, and MiniMind-2 until April 2025
    "embed": "tok_embeddings",
    "head": "output",
    "norm": "norm",
    **{letter: f"layers.{{}}.attention.w{letter}" for letter in "qkvo"},
    "before": "layers.{}.attention_norm",
    "after": "layers.{}.ffn_norm",
    "mlp": "layers.{}.feed_forward",
    "gate": "w1",
    "down": "w2",
    "up": "w3",
}
NEW = {  # MiniMind-2 since, and MiniMind-3
    "embed": "model.embed_tokens",
    "head": "lm_head",
    "norm": "model.norm",
    **{letter: f"model.layers.{{}}.self_attn.{letter}_proj" for letter in "qkvo"},
    "before": "model.layers.{}.input_layernorm",
    "after": "model.layers.{}.post_attention_layernorm",
    "mlp": "model.layers.{}.mlp",
    "gate": "gate_proj",
    "down": "down_proj",
    "up": "up_proj",
    "q_norm": "model.layers.{}.self_attn.q_norm",
    "k_norm": "model.layers.{}.self_attn.k_norm",
}


class Published:
    """A random checkpoint of one generation of MiniMind, and what its published code computes,
    written out plainly.

    The defaults of heads, theta, eps and experts per token are those of the published models.
    """

    def __init__(self, generation, moe=False, **options):
        self.generation, self.moe = generation, moe
        self.interleaved = generation in ("1", "2old")
        self.names = OLD if self.interleaved else NEW
        self.heads, self.kv_heads = {"1": (16, 8), "2old": (8, 2), "2": (8, 2), "3": (8, 4)}[
            generation
        ]
        self.theta, self.eps = (
            1e4 if generation == "1" else 1e6,
            (1e-6 if generation == "3" else 1e-5),
        )
        self.top_k = 1 if generation == "3" else 2
        self.shared = (
            {"1": [""], "2old": [""], "2": [".0", ".1"], "3": []}[generation] if moe else []
        )
        self.extra = {}
        for name, value in options.items():
            setattr(self, name, value)
        self.head_dim = HIDDEN // self.heads
        self.tensors = self.random_tensors()

    def random_tensors(self):
        generator = torch.Generator().manual_seed(0)
        tensors = {}

        def put(name, *shape):
            mean, std = (1.0, 0.2) if len(shape) == 1 else (0.0, 0.15)
            tensors[f"{name}.weight"] = torch.normal(mean, std, shape, generator=generator)

        def put_swiglu(prefix):
            for part in ("gate", "up"):
                put(f"{prefix}.{self.names[part]}", WIDTH, HIDDEN)
            put(f"{prefix}.{self.names['down']}", HIDDEN, WIDTH)

        put(self.names["embed"], VOCAB, HIDDEN)
        for layer in range(LAYERS):
            for part, rows in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                put(self.names[part].format(layer), rows * self.head_dim, HIDDEN)
            put(self.names["o"].format(layer), HIDDEN, HIDDEN)
            put(self.names["before"].format(layer), HIDDEN)
            put(self.names["after"].format(layer), HIDDEN)
            if self.generation == "3":
                put(self.names["q_norm"].format(layer), self.head_dim)
                put(self.names["k_norm"].format(layer), self.head_dim)
            mlp = self.names["mlp"].format(layer)
            if self.moe:
                put(f"{mlp}.gate", EXPERTS, HIDDEN)
                for expert in [f"experts.{i}" for i in range(EXPERTS)] + [
                    f"shared_experts{i}" for i in self.shared
                ]:
                    put_swiglu(f"{mlp}.{expert}")
            else:
                put_swiglu(mlp)
        put(self.names["norm"], HIDDEN)
        # tied, written twice
        tensors[f"{self.names['head']}.weight"] = tensors[f"{self.names['embed']}.weight"]
        return tensors

    def config(self):
        """The config.json that this generation's code saves."""
        routing = {"use_moe": self.moe, "num_experts_per_tok": self.top_k, "norm_topk_prob": True}
        if self.interleaved:
            sizes = {
                "dim": HIDDEN,
                "n_layers": LAYERS,
                "n_heads": self.heads,
                "n_kv_heads": self.kv_heads,
            }
            sizes |= {
                "hidden_dim": None,
                "multiple_of": 64,
                "max_seq_len": 512,
                "norm_eps": self.eps,
            }
        else:
            sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": WIDTH}
            sizes |= {"num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads}
            sizes |= {
                "max_position_embeddings": 32768,
                "rms_norm_eps": self.eps,
                "hidden_act": "silu",
            }
            sizes |= {
                "inference_rope_scaling": False,
                "rope_scaling": None,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
        if self.generation == "3":
            routing |= {
                "num_experts": EXPERTS,
                "moe_intermediate_size": WIDTH,
                "router_aux_loss_coef": 5e-4,
            }
            routing |= {"head_dim": self.head_dim}
        else:
            routing |= {
                "n_routed_experts": EXPERTS,
                "scoring_func": "softmax",
                "seq_aux": True,
                "aux_loss_alpha": 0.1,
            }
            routing |= {"n_shared_experts": True if self.interleaved else len(self.shared)}
        theta = {} if self.generation == "1" else {"rope_theta": self.theta}
        code = {
            "AutoConfig": "model_minimind.MiniMindConfig",
            "AutoModelForCausalLM": "model_minimind.MiniMindLM",
        }
        return {
            "model_type": "minimind",
            "vocab_size": VOCAB,
            "dropout": 0.0,
            "flash_attn": True,
            "auto_map": code,
            "architectures": ["MiniMindLM"],
            "transformers_version": "4.48.0",
            "torch_dtype": "float32",
            **sizes,
            **routing,
            **theta,
            **self.extra,
        }

    def folder(self, path, tokenizer_dir=None, **config):
        """Write the folder as `save_pretrained` of that time did, with code that must not run."""
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.config() | config))
        (path / "model_minimind.py").write_text(
            "raise RuntimeError('the code of a checkpoint was run')"
        )
        torch.save(self.tensors, path / "pytorch_model.bin")
        for file in Path(tokenizer_dir).iterdir() if tokenizer_dir else ():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    def frequencies(self):
        return self.theta ** -(torch.arange(0, self.head_dim, 2) / self.head_dim)

    def logits(self, ids=IDS, **other):
        """(B, S) -> (B, S, V), one sequence, head and token at a time; `other` computes with
        another attribute."""
        self.__dict__.update(other)
        return torch.stack([self.sequence(row) for row in ids])

    def weight(self, name, layer=None):
        return self.tensors[f"{self.names[name].format(layer)}.weight"]

    def norm(self, x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * weight

    def sequence(self, ids):
        x = self.weight("embed")[ids]
        for layer in range(LAYERS):
            x = x + self.attention(self.norm(x, self.weight("before", layer)), layer)
            normed = self.norm(x, self.weight("after", layer))
            x = x + torch.stack([self.feed_forward(token, layer) for token in normed])
        return self.norm(x, self.weight("norm")) @ self.weight("head").T

    def rotate(self, x):
        """Turn each pair of a (S, D) head, as one complex number, by its position times its
        frequency."""
        angles = torch.outer(torch.arange(len(x)).float(), self.frequencies())
        turn = torch.polar(torch.ones_like(angles), angles)
        if self.interleaved:
            return torch.view_as_real(
                torch.view_as_complex(x.reshape(len(x), -1, 2)) * turn
            ).flatten(1)
        turned = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def attention(self, x, layer):
        heads = []
        for head in range(self.heads):
            group = head // (self.heads // self.kv_heads)
            q, k, v = (
                x @ self.weight(part, layer)[index * self.head_dim : (index + 1) * self.head_dim].T
                for part, index in (("q", head), ("k", group), ("v", group))
            )
            if self.generation == "3":
                q, k = (
                    self.norm(q, self.weight("q_norm", layer)),
                    self.norm(k, self.weight("k_norm", layer)),
                )
            scores = self.rotate(q) @ self.rotate(k).T / math.sqrt(self.head_dim)
            future = torch.ones_like(scores).triu(1).bool()
            heads.append(softmax(scores.masked_fill(future, -torch.inf), -1) @ v)
        return torch.cat(heads, -1) @ self.weight("o", layer).T

    def swiglu(self, token, prefix):
        gate, up, down = (
            self.tensors[f"{prefix}.{self.names[part]}.weight"] for part in ("gate", "up", "down")
        )
        return down @ (silu(gate @ token) * (up @ token))

    def feed_forward(self, token, layer):
        mlp = self.names["mlp"].format(layer)
        if not self.moe:
            return self.swiglu(token, mlp)
        weights, chosen = softmax(self.tensors[f"{mlp}.gate.weight"] @ token, -1).topk(self.top_k)
        # Earlier code leaves the weight of a single expert as it is
        if self.generation == "3" or self.top_k > 1:
            weights = weights / weights.sum()
        routed = sum(
            weight * self.swiglu(token, f"{mlp}.experts.{index}")
            for weight, index in zip(weights, chosen.tolist(), strict=True)
        )
        return routed + sum(
            self.swiglu(token, f"{mlp}.shared_experts{index}") for index in self.shared
        )


class WithYarn(Published):
    """MiniMind's YaRN: frequencies below one turn in the trained length are divided by 16, a ramp
    in between."""

    def frequencies(self):
        def dimension(turns):
            return (
                self.head_dim * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(self.theta))
            )

        low, high = (
            max(math.floor(dimension(32)), 0),
            min(math.ceil(dimension(1)), self.head_dim // 2 - 1),
        )
        ramp = ((torch.arange(self.head_dim // 2) - low) / max(high - low, 0.001)).clamp(0, 1)
        assert 0 < ramp[1] < 1
        return super().frequencies() * (1 - ramp + ramp / 16)


def logits_of(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    assert type(model) is MiniMindForCausalLM
    with torch.no_grad():
        return model(IDS).logits


def assert_imported(source, expected, destination, **options):
    _, report = import_checkpoint(source, destination, **options)
    assert expected.std() > 0.3
    torch.testing.assert_close(logits_of(destination), expected, atol=2e-5, rtol=0)
    return report


GENERATIONS = ["1", "2old", "2", "3"]


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_folder_of_each_generation_keeps_its_logits_without_its_code(
    tmp_path, tokenizer_dir, generation, moe
):
    published = Published(generation, moe)
    source = published.folder(tmp_path / "source", tokenizer_dir)
    report = assert_imported(source, published.logits(), tmp_path / "out")
    assert report.assumed == ({"rope_theta": 1e4} if generation == "1" else {})
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {
        "modeling_minimind.py",
        "kernels_minimind.py",
        "configuration_minimind.py",
        "model.safetensors",
        "chat_template.jinja",
    } <= names
    assert "model_minimind.py" not in names


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_state_dict_of_each_generation_keeps_its_logits_without_a_configuration(
    tmp_path, generation, moe
):
    published = Published(generation, moe)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in published.tensors.items()}
    buffers = {name: torch.zeros(4, 4) for name in ("pos_cis", "freqs_cos", "model.freqs_sin")}
    buffers["layers.0.attention.mask"] = torch.zeros(1, 1, 4, 4)
    torch.save(wrapped | buffers, tmp_path / "full_sft_64.pth")
    report = assert_imported(tmp_path / "full_sft_64.pth", published.logits(), tmp_path / "out")
    assert report.inferred["intermediate_size"] == WIDTH
    assert report.inferred["num_key_value_heads"] == published.kv_heads
    assert report.assumed["rope_theta"] == published.theta
    # The width of its norms tells
    assert ("num_attention_heads" in report.assumed) == (generation != "3")
    assert ("num_experts_per_tok" in report.assumed) == moe


@pytest.mark.parametrize("generation", ["1", "2old"])
def test_the_order_of_rotary_pairs_makes_a_difference(tmp_path, generation):
    published = Published(generation)
    torch.save(published.tensors, tmp_path / "a.pth")
    import_checkpoint(tmp_path / "a.pth", tmp_path / "out")
    halved = published.logits(interleaved=False)
    assert (logits_of(tmp_path / "out") - halved).abs().max() > 0.3


@pytest.mark.parametrize("generation", ["2old", "2", "3"])
def test_one_expert_per_token_is_weighed_as_the_published_code_weighs_it(tmp_path, generation):
    published = Published(generation, moe=True, top_k=1)
    assert_imported(published.folder(tmp_path / "source"), published.logits(), tmp_path / "out")
    ours = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ours["norm_topk_prob"] == (generation == "3")


@pytest.mark.parametrize("generation", ["2", "3"])
def test_the_router_is_trained_as_strongly_as_by_the_published_code(tmp_path, generation):
    published = Published(generation, moe=True, top_k=2)
    import_checkpoint(published.folder(tmp_path / "source"), tmp_path / "out")
    model = MiniMindForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        output = model(IDS, labels=IDS, output_router_logits=True)
    theirs = 0.0
    for router_logits in output.router_logits:
        scores = router_logits.softmax(-1).view(*IDS.shape, EXPERTS)
        chosen = torch.nn.functional.one_hot(scores.topk(2).indices, EXPERTS).float()
        if generation == "3":  # over the batch, visits per token
            theirs += 5e-4 * EXPERTS * (chosen.mean((0, 1)).sum(0) * scores.mean((0, 1))).sum()
        else:  # in each sequence, shares of the visits
            shares = chosen.sum((1, 2)) / (IDS.shape[1] * 2 / EXPERTS)
            theirs += 0.1 * (shares * scores.mean(1)).sum(1).mean()
    torch.testing.assert_close(model.config.router_aux_loss_coef * output.aux_loss, theirs)


def test_the_scaling_for_longer_texts_is_kept(tmp_path):
    yarn = {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 2048,
        "beta_fast": 32,
        "beta_slow": 1,
    }
    saved = {"inference_rope_scaling": True, "rope_scaling": yarn | {"attention_factor": 1.0}}
    published = WithYarn("3", extra=saved)
    expected = published.logits()
    assert (expected - Published("3").logits()).abs().max() > 1e-3
    assert_imported(published.folder(tmp_path / "source"), expected, tmp_path / "out")
    torch.save(published.tensors, tmp_path / "a.pth")
    (tmp_path / "config.json").write_text('{"inference_rope_scaling": true}')
    assert_imported(
        tmp_path / "a.pth", expected, tmp_path / "again", config=tmp_path / "config.json"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"inference_rope_scaling": True, "max_position_embeddings": 2048},
    ],
    ids=["not switched on", "not longer than in training"],
)
def test_a_scaling_that_the_published_code_ignores_is_ignored(tmp_path, config):
    published = Published("3", extra=config)
    assert_imported(published.folder(tmp_path / "source"), published.logits(), tmp_path / "out")


def test_a_minimind_1_with_other_heads_is_known_by_its_configuration(tmp_path):
    published = Published("1", heads=8, kv_heads=2)
    assert_imported(published.folder(tmp_path / "source"), published.logits(), tmp_path / "out")


def test_dropout_is_kept_and_the_cache_switched_on(tmp_path):
    model, _ = import_checkpoint(
        Published("2").folder(tmp_path / "source", dropout=0.1, use_cache=False), tmp_path / "out"
    )
    assert (
        model.config.attention_dropout,
        model.config.hidden_dropout,
        model.config.use_cache,
    ) == (0.1, 0.1, True)


def test_what_a_file_does_not_tell_can_be_given(tmp_path):
    published = Published("2", heads=4, kv_heads=1, theta=500.0, eps=1e-2)
    torch.save(published.tensors, tmp_path / "a.pth")
    (tmp_path / "ours.json").write_text('{"num_attention_heads": 4, "rms_norm_eps": 1e-2}')
    (tmp_path / "theirs.json").write_text(json.dumps(published.config()))
    expected, source = published.logits(), tmp_path / "a.pth"
    report = assert_imported(
        source, expected, tmp_path / "1", config=tmp_path / "ours.json", rope_theta=500.0
    )
    assert set(report.assumed) == {"max_position_embeddings"}
    assert_imported(source, expected, tmp_path / "2", config=tmp_path / "theirs.json")


def test_an_imported_directory_imports_again_unchanged(tmp_path):
    published = Published("2", moe=True)
    import_checkpoint(published.folder(tmp_path / "source"), tmp_path / "out")
    assert_imported(tmp_path / "out", published.logits(), tmp_path / "again")
    configs = [
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "again")
    ]
    assert configs[0] == configs[1]


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LIBRARY = {
    "Llama": (LlamaConfig, LlamaForCausalLM, {}),
    "Llama, tied, biases": (
        LlamaConfig,
        LlamaForCausalLM,
        {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "Llama 3": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "rms_norm_eps": 1e-3}),
    "Qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    "Qwen3, tied, YaRN": (
        Qwen3Config,
        Qwen3ForCausalLM,
        {"tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "Qwen3-MoE": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**MOE, "norm_topk_prob": True}),
    "Qwen3-MoE, not normalised": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**MOE, "norm_topk_prob": False},
    ),
}


def library_model(name):
    config_class, model_class, fields = LIBRARY[name]
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": WIDTH,
    }
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = model_class(
        config_class(**{**sizes, "bos_token_id": None, "eos_token_id": None, **fields})
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
        return model, model(IDS).logits


@pytest.mark.parametrize("name", LIBRARY)
def test_a_folder_of_the_library_keeps_its_logits(tmp_path, name):
    model, expected = library_model(name)
    model.save_pretrained(tmp_path / "source")
    assert_imported(tmp_path / "source", expected, tmp_path / "out")


@pytest.mark.parametrize("name", ["Llama 3", "Qwen3-MoE, not normalised"])
def test_a_state_dict_of_the_library_keeps_its_logits_with_its_configuration(tmp_path, name):
    model, expected = library_model(name)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    model.config.to_json_file(tmp_path / "config.json")
    report = assert_imported(
        tmp_path / "a.pth", expected, tmp_path / "out", config=tmp_path / "config.json"
    )
    assert report.assumed == {}


def test_a_configuration_of_the_librarys_fourth_version_is_read(tmp_path):
    model, expected = library_model("Qwen3, tied, YaRN")
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": rope,
        "sliding_window": 4096,
        "torch_dtype": "x",
    }
    file.write_text(json.dumps(config))
    assert_imported(tmp_path / "source", expected, tmp_path / "out")


def test_stacked_experts_are_read(tmp_path):
    model, expected = library_model("Qwen3-MoE")
    model.save_pretrained(tmp_path / "source", save_original_format=False)
    assert any(
        "gate_up_proj" in name for name in load_file(tmp_path / "source" / "model.safetensors")
    )
    assert_imported(tmp_path / "source", expected, tmp_path / "out")


def test_weights_are_found_as_one_file_or_as_shards_of_either_kind(tmp_path):
    published = Published("3")
    expected = published.logits()
    tensors = {name: t for name, t in published.tensors.items() if name != "lm_head.weight"}
    names = sorted(tensors)
    for kind, save in {"model.safetensors": save_file, "pytorch_model.bin": torch.save}.items():
        one, shards = (
            published.folder(tmp_path / f"one-{kind}"),
            published.folder(tmp_path / f"shards-{kind}"),
        )
        for folder in (one, shards):
            (folder / "pytorch_model.bin").unlink()
        save(tensors, one / kind)
        parts = {f"part{i}.{kind.split('.')[1]}": names[i::2] for i in range(2)}
        for file, part in parts.items():
            save({name: tensors[name] for name in part}, shards / file)
        index = {name: file for file, part in parts.items() for name in part}
        (shards / f"{kind}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": index})
        )
        assert_imported(one, expected, tmp_path / f"out-one-{kind}")
        assert_imported(shards, expected, tmp_path / f"out-shards-{kind}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_weights_keep_their_precision(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in Published("3", moe=True).tensors.items()}
    torch.save(tensors, tmp_path / "a.pth")
    import_checkpoint(tmp_path / "a.pth", tmp_path / "out")
    del tensors["lm_head.weight"]
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert set(saved) == set(tensors)
    assert all(
        torch.equal(saved[name], tensor) and saved[name].dtype == dtype
        for name, tensor in tensors.items()
    )


def test_a_training_checkpoint_holds_the_state_dict_under_model(tmp_path):
    published = Published("3")
    optimizer = {
        "state": {0: {"step": torch.tensor(3.0)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    }
    torch.save(
        {"model": published.tensors, "optimizer": optimizer, "epoch": 1, "wandb_id": None},
        tmp_path / "a.pth",
    )
    assert_imported(tmp_path / "a.pth", published.logits(), tmp_path / "out")


def test_the_language_model_of_minimind_v_is_imported_without_its_vision_tensors(tmp_path):
    published = Published(
        "3", extra={"model_type": "minimind-v", "image_ids": [12], "image_special_token": "@"}
    )
    published.tensors |= {
        name: torch.ones(2, 2) for name in ("vision_proj.mlp.0.weight", "vision_encoder.a.weight")
    }
    report = assert_imported(
        published.folder(tmp_path / "source"), published.logits(), tmp_path / "out"
    )
    assert "left out 2 tensors of the vision encoder and its projector" in report.notes


def test_the_output_is_a_stage_directory_with_a_record(tmp_path, tokenizer_dir):
    source = Published("2").folder(tmp_path / "source", tokenizer_dir, eos_token_id=7)
    GenerationConfig(temperature=0.5, do_sample=True, max_new_tokens=9).save_pretrained(source)
    model, report = import_checkpoint(source, tmp_path / "out")
    path = require_stage(tmp_path / "out")
    tokenizer = load_tokenizer(path)
    # The tokenizer's, which ends every reply
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    check_vocabulary(model, tokenizer, path)
    record = read_stage(path)
    assert (record["stage"], record["source"], record["layout"]) == (
        "import",
        str(source),
        report.layout,
    )
    settings = GenerationConfig.from_pretrained(path)
    assert (settings.temperature, settings.max_new_tokens, settings.pad_token_id) == (0.5, 9, 0)


def test_generation_settings_that_contradict_each_other_are_left_out(tmp_path):
    source = Published("2").folder(tmp_path / "source")
    (source / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    _, report = import_checkpoint(source, tmp_path / "out")
    assert any("left out generation_config.json" in note for note in report.notes)
    assert GenerationConfig.from_pretrained(tmp_path / "out").temperature is None


# The assistant's branch of the published templates, in a frame of ours.
TURN = "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
TOOLS = (
    '{{- \'<|im_end|>\\n\' }}\n    {%- elif message.role == "tool" %}{{- "tool" }}{%- endif %}{%-'
    " endfor %}"
)
ROLES = (
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role !="
    " 'assistant' %}"
)
PROMPT = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
TEMPLATES = {
    "2024": (
        "{% for message in messages %}{% set content = message['content'] %}{% if message['role']"
        " == 'user' %}{{ '<|im_start|>user\\n' + content + '<|im_end|>\\n<|im_start|>assistant\\n'"
        " }}{% elif message['role'] == 'assistant' %}{{ content + '<|im_end|>' + '\\n' }}{% endif"
        " %}{% endfor %}"
    ),
    "2025": (
        ROLES
        + TURN
        + "{%- elif message.role == 'assistant' %}\n   {{- '<|im_start|>' + message.role + '\\n' +"
        " content }}\n"
        + "  {%- if message.tool_calls %}{{- 'call' }}{%- endif %}\n        "
        + TOOLS
        + PROMPT
    ),
    "2026": (
        ROLES
        + TURN
        + "{%- elif message.role == 'assistant' %}{%- set reasoning_content = '' %}\n        {%- if"
        " true %}\n            "
        + "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content +"
        " '\\n</think>\\n\\n' + content }}\n" + "        {%- endif %}\n        " + TOOLS + PROMPT
    ),
}


@pytest.mark.parametrize("year", TEMPLATES)
def test_a_published_chat_template_is_kept_and_its_replies_are_trained(
    tmp_path, tokenizer_dir, year
):
    source = Published("2").folder(tmp_path / "source", tokenizer_dir)
    (source / "chat_template.jinja").write_text(TEMPLATES[year])
    import_checkpoint(source, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATES[year]
    chat = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "who"),
            ("assistant", "the fox"),
            ("user", "runs"),
            ("assistant", "the dog"),
        )
    ]
    tokenizer = load_tokenizer(tmp_path / "out")
    row = tokenize_conversation(chat, tokenizer, 200)
    assert tokenizer.decode(row["input_ids"]) == tokenizer.apply_chat_template(chat, tokenize=False)
    thought = "<think>\n\n</think>\n\n" if year == "2026" else ""
    trained = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert trained == f"{thought}the fox<|im_end|>{thought}the dog<|im_end|>"


def test_a_tokenizer_without_padding_pads_with_its_unknown_token(tmp_path, tokenizer):
    source = Published("2").folder(tmp_path / "source")
    tokenizer.save_pretrained(source)
    file = source / "tokenizer_config.json"
    names = json.loads(file.read_text()) | {"unk_token": "<|endoftext|>", "pad_token": None}
    file.write_text(json.dumps(names))
    _, report = import_checkpoint(source, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").pad_token == "<|endoftext|>"
    assert any("no padding token" in note for note in report.notes)


def test_the_command_says_what_it_inferred_and_what_it_assumed(tmp_path, capsys, tokenizer_dir):
    torch.save(Published("2", heads=4, kv_heads=2).tensors, tmp_path / "a.pth")
    out = tmp_path / "out"
    run_cli(
        "import", tmp_path / "a.pth", out, "--num_attention_heads", 4, "--tokenizer", tokenizer_dir
    )
    said = capsys.readouterr().out
    shapes, assumed = (
        next(line for line in said.splitlines() if title in line)
        for title in ("shapes:", "ASSUMED:")
    )
    assert "hidden_size 64" in shapes
    assert "num_key_value_heads 2" in shapes
    assert "rope_theta 1000000.0" in assumed
    assert "num_attention_heads" not in assumed
    assert require_stage(out)


class Code:
    """Unpickled, it would make a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def refused(tmp_path, capsys):
    """Import what must be refused: return the message, and see that nothing was written."""

    def run(source, *options, out=None):
        message = failure(capsys, run_cli, "import", source, out or tmp_path / "out", *options)
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".*partial"))
        return message

    return run


@pytest.fixture
def saved(tmp_path):
    """Save any object as a .pth file."""

    def save(value):
        torch.save(value, tmp_path / "a.pth")
        return tmp_path / "a.pth"

    return save


def said(message, *words):
    for word in words:
        assert str(word) in message, message


def test_all_tensors_that_do_not_fit_are_named(refused, tmp_path):
    published = Published("3")
    del published.tensors["model.layers.1.self_attn.v_proj.weight"]
    published.tensors["model.layers.0.mlp.extra.weight"] = torch.ones(2, 2)
    published.tensors["model.norm.weight"] = torch.ones(3)
    said(
        refused(published.folder(tmp_path / "source")),
        *(
            "1 missing: model.layers.1.self_attn.v_proj.weight",
            "1 unexpected: model.layers.0.mlp.extra.weight",
        ),
        "1 of another shape: model.norm.weight (3,) instead of (64,)",
    )


def test_a_missing_expert_is_named(refused, saved):
    tensors = Published("2", moe=True).tensors
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    said(refused(saved(tensors)), "1 missing: model.layers.1.mlp.experts.2.up_proj.weight")


def test_long_lists_are_cut_with_their_number(refused, saved):
    tensors = Published("3").tensors
    short = {
        name: tensor
        for name, tensor in tensors.items()
        if "layers.1" not in name or "q_proj" in name
    }
    said(refused(saved(short)), "10 missing", "and 4 more")


def test_a_configuration_of_another_size_is_refused(refused, tmp_path):
    message = refused(
        Published("3").folder(tmp_path / "source", num_hidden_layers=3, intermediate_size=96)
    )
    said(message, "11 missing: model.layers.2", "mlp.down_proj.weight (64, 48) instead of (64, 96)")


def test_code_in_a_pickle_is_refused_and_not_run(refused, saved, tmp_path):
    message = refused(saved({"model.norm.weight": Code(tmp_path / "made")}))
    said(message, "a.pth", "mkdir", "never run", "torch.save(model.state_dict()")
    assert "weights_only" not in message
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([torch.ones(2)], ["holds a list", "expected a state dict"]),
        ({}, ["expected a state dict"]),
        ({"epoch": 3}, ["'epoch' is a int"]),
        (
            {"a.weight": torch.ones(2)},
            ["unknown layout", "self_attn.q_proj", "found a.weight"],
        ),
        (
            {"model.layers.0.self_attn.q_proj.weight": torch.ones(2).char()},
            ["no floating-point numbers"],
        ),
    ],
    ids=["list", "empty", "number", "names", "quantised"],
)
def test_a_file_that_is_no_state_dict_of_a_known_layout(refused, saved, value, words):
    said(refused(saved(value)), "a.pth", *words)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1"], ids=["empty", "pointer"]
)
def test_a_damaged_file(refused, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    said(refused(tmp_path / name), name)


def test_paths_that_hold_no_checkpoint(refused, tmp_path):
    said(refused(tmp_path / "nowhere"), "nowhere does not exist")
    (tmp_path / "folder").mkdir()
    said(refused(tmp_path / "folder"), "has no config.json", ".pth file itself")
    source = Published("3").folder(tmp_path / "source")
    (source / "pytorch_model.bin").unlink()
    said(refused(source), "has no weights", "model.safetensors or pytorch_model.bin")
    (source / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "part1.safetensors"}}'
    )
    said(refused(source), "part1.safetensors: no such file")
    (source / "config.json").write_text("{")
    said(refused(source), "config.json: not JSON")


def test_a_destination_that_is_not_empty_is_left_as_it_is(refused, tmp_path, saved):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    said(refused(saved({}), out=tmp_path / "full"), "full exists and is not empty")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("generation", "field", "value", "words"),
    [
        ("2", "model_type", "gpt2", ["'gpt2'", "minimind, minimind-v, llama, qwen3, qwen3_moe"]),
        ("2", "scoring_func", "sigmoid", ["'sigmoid'", "softmax"]),
        ("2", "routed_scaling_factor", 2.5, ["2.5", "not scaled"]),
        ("2", "n_group", 4, ["4", "among all experts"]),
        ("2", "hidden_act", "maxout", ["'maxout'", "activation"]),
        ("2", "use_memory", True, ["True", "no published MiniMind has"]),
        ("2", "hidden_size", "64", ["expected int"]),
        (
            "2",
            "inference_rope_scaling",
            True,
            ["rope_scaling", "autumn 2025", "inference_rope_scaling to false"],
        ),
        ("2", "quantization_config", {"bits": 4}, ["not quantised"]),
        ("2", "num_attention_heads", 7, ["num_attention_heads (7)"]),
    ],
)
def test_a_minimind_that_cannot_be_expressed(refused, tmp_path, generation, field, value, words):
    config = {field: value}
    if field == "inference_rope_scaling":
        config["rope_scaling"] = {"type": "yarn", "factor": 4, "beta_fast": 4}
    message = refused(Published(generation).folder(tmp_path / "source", **config))
    said(message, "config.json", *words)
    assert field in message or field in ("hidden_size", "inference_rope_scaling")


@pytest.mark.parametrize(
    ("name", "config", "words"),
    [
        ("Llama", {"mlp_bias": True}, ["mlp_bias is True", "no biases"]),
        ("Llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, ["longrope"]),
        ("Llama", {"hidden_act": "maxout"}, ["maxout"]),
        (
            "Qwen3",
            {"use_sliding_window": True, "sliding_window": 8},
            ["sliding_window is True", "whole sequence"],
        ),
        (
            "Qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types has sliding_attention"],
        ),
        ("Qwen3-MoE", {"decoder_sparse_step": 2}, ["decoder_sparse_step is 2", "every layer"]),
        ("Qwen3-MoE", {"mlp_only_layers": [0]}, ["mlp_only_layers is [0]", "every layer"]),
        (
            "Qwen3",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor"],
        ),
        ("Qwen3", {"num_hidden_layers": "two"}, ["num_hidden_layers"]),
    ],
)
def test_a_library_model_that_cannot_be_expressed(refused, tmp_path, name, config, words):
    model, _ = library_model(name)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    said(refused(tmp_path / "source"), "config.json", *words)


def test_a_head_that_is_not_the_embedding_contradicts_tied_embeddings(refused, tmp_path):
    published = Published("3", extra={"tie_word_embeddings": True})
    published.tensors["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN)
    said(
        refused(published.folder(tmp_path / "source")),
        "tie_word_embeddings is true",
        "lm_head.weight is not",
    )


def test_options_that_do_not_fit(refused, saved, tmp_path, tokenizer_dir):
    source = saved(
        {name: t[:200] if len(t) == VOCAB else t for name, t in Published("2").tensors.items()}
    )
    said(refused(source, "--num_attention_heads", 5), "num_attention_heads (5)")
    said(
        refused(source, "--tokenizer", tokenizer_dir), "the tokenizer has", "tokens, the model 200"
    )
    said(refused(source, "--tokenizer", tmp_path), "holds no tokenizer")
    said(refused(source, "--config", tmp_path / "no.json"), "no.json: no such file")


def test_both_languages_of_the_guide_have_the_same_commands_and_figures():
    pages = [
        (Path(__file__).parent.parent / "docs" / name).read_text("utf-8")
        for name in ("import.md", "import_zh.md")
    ]
    blocks = [re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for page in pages]
    assert blocks[0] == blocks[1] != []
    for line in blocks[0][0].splitlines():
        assert build_parser().parse_args(line.split()[1:]).run
    rows = [
        [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| `")]
        for page in pages
    ]
    assert [row[1:4] for row in rows[0]] == [row[1:4] for row in rows[1]]
    columns = zip(*([cell.strip() for cell in row] for row in rows[0]), strict=True)
    names, *generations = ([cell.split()[0].strip("`") for cell in column] for column in columns)
    for values, generation in zip(
        generations, (MINIMIND_1, MINIMIND_2_OLD, MINIMIND_2, MINIMIND_3), strict=True
    ):
        for name, value in zip(names, values, strict=True):
            assert value == "from" or float(value) == generation.assumed[name]
