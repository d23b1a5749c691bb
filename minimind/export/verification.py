"""Compare a written model with its source: tensors, logits, greedy tokens and token ids.

The reference is the source with its weights rounded as the file rounds them, so that only the order
of additions differs, in half precision and quantised too.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import BadRowError, UserError
from minimind.data.templates import bounded
from minimind.stage_directory import is_reward_config

# Relative to the largest logit, or to 1: the same fp32 arithmetic in another order
LOGIT_TOLERANCE = 1e-5
# Of the median difference, in standard deviations of the logits: llama.cpp also rounds the
# activations to the type of the matrix, in q8_0 to 8 bits, and a single token that goes to another
# expert makes the largest difference large.
LLAMA_CPP_TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.03, "q8_0": 0.1}
NEW_TOKENS = 16
PROMPTS = (
    "Once upon a time there was",
    "The three primary colours are red,",
    "从前有座山，山里有座庙，",
    "中国的首都是",
)
CHATS = (
    [{"role": "user", "content": "你好！请用一句话介绍你自己。"}],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is 17 + 25?"},
        {"role": "assistant", "content": "42."},
        {"role": "user", "content": "And in words? 用中文回答"},
    ],
)
CODE = """def f(x: int) -> str:
    return f"{x!r}"  # 返回


if __name__ == '__main__':
\tprint(f(0x1F))"""
# fmt: off
TEXTS = (
    *PROMPTS, CODE, "", " ", "a", "  two  spaces\t\ttabs \n\n\nlines\r\nend ",
    "It's I'LL we've DON'T", "3.14159 1,000,000 2026年", "😀👍🏽👨‍👩‍👧🇨🇳",
    "naïve café e\u0301 ﬁ Ω ß ½", "日本語のテキスト、한국어 Русский عربى",
    "“引号”，（括号）；——", "\x00\x7f\ufeff\u200b\u3000", "https://example.org/a?b=c&d=%20",
    "<|im_start|>user\nhi<|im_end|><|endoftext|>",
)
# fmt: on


@dataclass
class Probes:
    """Inputs for every model, and the outputs of the source with rounded weights."""

    prompts: list[torch.Tensor]  # (1, S) each
    sequences: list[torch.Tensor]  # (1, S + N) each: prompt and greedy continuation
    logits: list[torch.Tensor]  # (S + N, V) each, of the sequences; of a reward model (1,)


def make_probes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Probes:
    """Prompts in Chinese and English, raw and as chats, cut so that the model's window has room to
    continue."""
    room = max(1, model.config.max_position_embeddings - NEW_TOKENS)
    prompts = [
        torch.tensor([tokenizer.encode(text, add_special_tokens=False)[:room]])
        for text in [*PROMPTS, *chats_of(tokenizer)]
    ]
    sequences = continuations(model, prompts)
    return Probes(prompts, sequences, logits_of(model, sequences))


def continuations(model: PreTrainedModel, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Each prompt with the NEW_TOKENS of greedy decoding, which an end token does not stop; in one
    batch with padding on the left. A reward model continues nothing."""
    if is_reward_config(model.config):
        return prompts
    width = max(ids.shape[1] for ids in prompts)
    ids = torch.cat([pad(row, (width - row.shape[1], 0)) for row in prompts])
    mask = torch.cat([pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in prompts])
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    rows = model.generate(ids, attention_mask=mask, do_sample=False, **length)
    return [row[None, width - prompt.shape[1] :] for row, prompt in zip(rows, prompts, strict=True)]


@torch.no_grad()
def logits_of(model: PreTrainedModel, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    """(S, V) for each sequence (1, S), in fp32; of a reward model (1,)."""
    return [model(ids, use_cache=False).logits[0].float() for ids in sequences]


def tokenisations(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """The ids of the probe texts and of the rendered chats."""
    chats = [tokenizer(text, add_special_tokens=False).input_ids for text in chats_of(tokenizer)]
    return [*(tokenizer(text).input_ids for text in TEXTS), *chats]


def chats_of(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The probe chats in the tokenizer's template, if it has one, except those it refuses."""
    texts = []
    for chat in CHATS if tokenizer.chat_template else ():
        try:
            with bounded():
                text = tokenizer.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=False
                )
        except BadRowError:  # such as a system prompt
            continue
        texts.append(text)
    return texts


def fail(problem: str) -> NoReturn:
    """Raises UserError: the written model is not the source."""
    raise UserError(
        f"the verification failed, so nothing was written: {problem}. Please report it with the"
        " config.json."
    )


def largest_difference(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """The largest difference between two lists of logits; NaN if one of them is."""
    return torch.stack([(a - b).abs().max() for a, b in zip(left, right, strict=True)]).max().item()


def check_tensors(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> None:
    """Raises UserError unless both have the same names with bitwise equal values."""
    if different := sorted(expected.keys() ^ actual.keys()):
        fail(f"{', '.join(different[:3])} on one side only")
    for name, tensor in expected.items():
        if not torch.equal(tensor, actual[name].to(tensor)):
            fail(f"{name} has other values than the source's, rounded to the data type")


def check_model(probes: Probes, model: PreTrainedModel) -> dict:
    """Raises UserError unless `model` computes what the source does; returns the figures."""
    difference = largest_difference(probes.logits, logits_of(model, probes.sequences))
    tolerance = LOGIT_TOLERANCE * max(1.0, *(logits.abs().max().item() for logits in probes.logits))
    if not difference <= tolerance:
        fail(f"logits differ by up to {difference:.2g}, where {tolerance:g} is tolerated")
    if not all(map(torch.equal, continuations(model, probes.prompts), probes.sequences)):
        fail("the greedy continuations of the probe prompts differ")
    return {
        "max_logit_difference": difference,
        "tolerance": tolerance,
        "prompts": len(probes.prompts),
        "greedy_tokens_equal": sum(
            sequence.shape[1] - prompt.shape[1]
            for sequence, prompt in zip(probes.sequences, probes.prompts, strict=True)
        ),
    }


def check_tokenizer(source: PreTrainedTokenizerFast, exported: PreTrainedTokenizerFast) -> dict:
    """Raises UserError unless both return the same ids and have the same special tokens."""
    texts = [*TEXTS, *chats_of(source)]
    both = tokenisations(source), tokenisations(exported)
    for text, left, right in zip(texts, *both, strict=True):
        if left != right:
            fail(f"the tokenizer splits {text[:40]!r} in another way")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(source, name) != getattr(exported, name):
            fail(f"{name} is {getattr(exported, name)} instead of {getattr(source, name)}")
    return {"texts_tokenised_equally": len(texts)}


def check_llama_cpp(
    probes: Probes, tokenizer: PreTrainedTokenizerFast, file: Path, dtype: str
) -> dict | None:
    """Raises UserError unless llama.cpp computes from `file` what the source does; returns the
    figures, or None if it is not installed.

    Greedy tokens are compared only in fp32: otherwise its precision is lower than the source's.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        return None
    import llama_cpp

    longest = max(ids.shape[1] for ids in probes.sequences)
    fp32 = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    sizes = {"n_ctx": longest, "n_batch": longest}
    llama = llama_cpp.Llama(str(file), logits_all=True, verbose=False, **sizes, **fp32)
    for text in TEXTS:
        if llama.tokenize(text.encode(), add_bos=False, special=True) != tokenizer(text).input_ids:
            fail(f"llama.cpp splits {text[:40]!r} in another way")
    logits = []
    for ids in probes.sequences:
        llama.reset()
        llama.eval(ids[0].tolist())
        logits.append(torch.from_numpy(llama.scores[: ids.shape[1]].copy()))
    llama.close()
    expected, actual = torch.cat(probes.logits), torch.cat(logits)
    difference = ((expected - actual).abs().median() / expected.std()).item()
    if not difference <= LLAMA_CPP_TOLERANCE[dtype]:
        fail(f"llama.cpp's logits differ by {difference:.2g} standard deviations (median)")
    agreed = [
        (left.argmax(-1) == right.argmax(-1))[-NEW_TOKENS - 1 : -1].sum().item()
        for left, right in zip(probes.logits, logits, strict=True)
    ]
    if dtype == "float32" and sum(agreed) < NEW_TOKENS * len(agreed):
        fail("llama.cpp's greedy continuations of the probe prompts differ")
    return {
        "median_logit_difference": difference,
        "tolerance": LLAMA_CPP_TOLERANCE[dtype],
        "max_logit_difference": (expected - actual).abs().max().item(),
        "greedy_tokens_equal": sum(agreed),
        "texts_tokenised_equally": len(TEXTS),
        "version": llama_cpp.__version__,
    }


def report(compared: dict) -> str:
    """The figures of a comparison, in a few lines."""
    lines = [
        "verified: logits of {prompts} prompts differ by up to {max_logit_difference:.2g}"
        " ({tolerance:.2g} tolerated)",
        "  {greedy_tokens_equal} greedy tokens are equal",
    ]
    if "read_back_by" in compared:
        lines += [
            "  {tensors_bitwise_equal} tensors are bitwise equal, read back by {read_back_by}",
            "  {texts_tokenised_equally} texts are tokenised equally",
            "  rounding to the data type moves logits by up to {max_logit_change_by_rounding:.2g}",
        ]
    lines = [line.format(**compared) for line in lines]
    if figures := compared.get("llama.cpp"):
        median, equal = figures["median_logit_difference"], figures["greedy_tokens_equal"]
        lines.append(
            f"  llama.cpp {figures['version']}: logits differ by {median:.2g} standard deviations"
            f" (median), {equal} greedy tokens are equal"
        )
    elif "llama.cpp" in compared:
        lines.append("  llama.cpp: not installed (pip install llama-cpp-python), so not compared")
    return "\n".join(lines)
