"""Checkpoints as they are published: of MiniMind's generations, written out plainly, and of the
library."""

import json
import math
from pathlib import Path

import torch
from torch.nn.functional import silu, softmax
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

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
