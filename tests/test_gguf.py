"""GGUF files: their content, the tokenizers they can express, and how llama.cpp reads them."""

import importlib.util

import pytest
import torch
from pipeline import failure, run_cli
from talking import CHATS, write_learned
from test_export import SIZE, read_gguf_by_hand, write_stages
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import minimind.export
from minimind import MiniMindConfig, MiniMindForCausalLM
from minimind.export.gguf import pre_tokenizer_name
from minimind.stage_directory import load_model
from minimind.tokenizer import CHAT_TEMPLATE, PRE_TOKENIZERS, SPLIT_PATTERN, load_tokenizer


@pytest.fixture(scope="module")
def stages(tmp_path_factory, tokenizer):
    return write_stages(tmp_path_factory.mktemp("stages"), tokenizer)


def as_stored(tensor, dtype):
    """The oracle of rounding: Q8_0 is 32 signed bytes with one fp16 scale, the largest magnitude
    being 127."""
    if dtype != "q8_0":
        return tensor.to(getattr(torch, dtype)).float()
    blocks = tensor.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    steps = blocks * torch.where(scale == 0, 0, 1 / scale)
    return (steps.sign() * (steps.abs() + 0.5).floor() * scale.half().float()).flatten(-2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
def test_a_gguf_file_holds_matrices_in_the_data_type_asked_for_and_the_rest_in_fp32(
    dtype, stages, tmp_path
):
    from gguf import GGUFReader

    run_cli("export", stages / "MoE", tmp_path / "out", "--format", "gguf", "--dtype", dtype)
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    source = load_model(stages / "MoE")
    held = read_gguf_by_hand(tmp_path / "out/model.gguf", source).state_dict()
    for name, tensor in source.state_dict().items():
        exact = "norm" in name or name.endswith("mlp.gate.weight")
        assert torch.equal(held[name], tensor if exact else as_stored(tensor, dtype)), name
    for tensor in GGUFReader(tmp_path / "out/model.gguf").tensors:
        exact = "norm" in tensor.name or "gate_inp" in tensor.name
        assert tensor.tensor_type.name == ("F32" if exact else names[dtype]), tensor.name


def test_a_gguf_file_holds_the_tokenizer_and_the_chat_template(stages, tmp_path, tokenizer):
    from gguf import GGUFReader, TokenType

    run_cli("export", stages / "qk_norm", tmp_path / "out", "--format", "gguf")
    field = {
        name: value.contents()
        for name, value in GGUFReader(tmp_path / "out/model.gguf").fields.items()
    }
    assert field["tokenizer.ggml.model"] == "gpt2"
    assert field["tokenizer.ggml.pre"] == "qwen2"
    assert field["tokenizer.chat_template"] == tokenizer.chat_template
    assert field["tokenizer.ggml.add_bos_token"] is False
    assert field["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert field["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert field["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    tokens, types = field["tokenizer.ggml.tokens"], field["tokenizer.ggml.token_type"]
    assert {token: index for index, token in enumerate(tokens[:-5])} == tokenizer.get_vocab()
    assert (
        types
        == [TokenType.CONTROL] * 3
        + [TokenType.NORMAL] * (len(tokenizer) - 3)
        + [TokenType.UNUSED] * 5
    )


def byte_level_tokenizer(*steps):
    """A tokenizer of bytes and two merges that splits as told."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "th", "Ġth"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("Ġ", "th")]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    backend.decoder = decoders.ByteLevel()
    specials = {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=CHAT_TEMPLATE.read_text(), **specials
    )


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def test_the_pre_tokenizers_of_this_project_and_of_gpt_2_are_known_by_their_rule(tokenizer):
    assert pre_tokenizer_name(tokenizer) == "qwen2"
    assert pre_tokenizer_name(load_tokenizer()) == "qwen2"
    assert pre_tokenizer_name(byte_level_tokenizer(GPT2)) == "gpt-2"
    names = {
        rule: pre_tokenizer_name(byte_level_tokenizer(steps))
        for rule, steps in PRE_TOKENIZERS.items()
    }
    assert names == {"qwen2": "qwen2", "qwen35": "qwen35", "smollm": "smollm", "gpt-2": "gpt-2"}


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([split(r"\p{N}{1,3}|" + SPLIT_PATTERN), BYTES], "splits text"),
        ([split(SPLIT_PATTERN, "removed"), BYTES], "splits text"),
        ([split(SPLIT_PATTERN), GPT2], "splits text"),
        ([pre_tokenizers.ByteLevel(add_prefix_space=True)], "splits text"),
        ([pre_tokenizers.Whitespace()], "splits text"),
        ([BYTES], "splits text"),
    ],
)
def test_a_splitting_rule_that_llama_cpp_does_not_name_is_refused(
    steps, reason, stages, tmp_path, capsys
):
    with pytest.raises(minimind.common.errors.UserError, match=reason):
        pre_tokenizer_name(byte_level_tokenizer(*steps))


def test_a_tokenizer_that_does_more_than_merge_bytes_is_refused(tokenizer):
    from tokenizers import normalizers, processors

    def changed(change):
        other = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        )
        change(other.backend_tokenizer)
        return other

    bos = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    for change, reason in (
        (lambda backend: setattr(backend, "normalizer", normalizers.NFC()), "a normalizer"),
        (lambda backend: setattr(backend, "post_processor", bos), "tokens added to every text"),
        (lambda backend: setattr(backend.model, "ignore_merges", True), "ignore_merges"),
    ):
        with pytest.raises(minimind.common.errors.UserError, match=reason):
            pre_tokenizer_name(changed(change))


@pytest.mark.parametrize("rule", PRE_TOKENIZERS)
def test_a_tokenizer_of_every_known_rule_is_exported(rule, tmp_path, stages):
    other = byte_level_tokenizer(PRE_TOKENIZERS[rule])
    other.add_tokens(["<think>"])  # not special, and never cut
    torch.manual_seed(0)
    special = {
        "pad_token_id": other.pad_token_id,
        "bos_token_id": other.bos_token_id,
        "eos_token_id": other.eos_token_id,
    }
    MiniMindForCausalLM(MiniMindConfig(**SIZE, vocab_size=len(other), **special)).save_pretrained(
        tmp_path / "stage"
    )
    other.save_pretrained(tmp_path / "stage")
    run_cli("export", tmp_path / "stage", tmp_path / "out", "--format", "gguf")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for text in ("It's 1234 狐狸  \n\n x<|im_end|>", "<|im_start|>user\n<think>hi"):
        assert again(text).input_ids == other(text).input_ids


needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@needs_llama_cpp
def test_llama_cpp_chats_as_transformers_does(tmp_path, tokenizer):
    """Both languages, through the chat template in the file, up to the end token."""
    import llama_cpp

    model = load_model(write_learned(tmp_path / "sft", tokenizer)).eval()
    minimind.export.export(tmp_path / "sft", tmp_path / "out", "gguf", "float32")
    llama = llama_cpp.Llama(str(tmp_path / "out/model.gguf"), n_ctx=256, verbose=False)
    for question, answer in CHATS.items():
        messages = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, do_sample=False, max_new_tokens=60)[0]
        reply = tokenizer.decode(out[inputs.input_ids.shape[1] :])
        assert reply == f"{answer}<|im_end|>"
        said = llama.create_chat_completion(messages, temperature=0, max_tokens=60)["choices"][0]
        assert (said["message"]["content"], said["finish_reason"]) == (answer, "stop")
    llama.close()


@needs_llama_cpp
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q8_0"])
@pytest.mark.parametrize(
    "variant",
    [
        "qk_norm",
        "qk_norm, YaRN",
        "no qk_norm, attention_bias",
        "no qk_norm, YaRN",
        "no qk_norm, linear RoPE",
        "MoE",
        "MoE, untied, YaRN",
    ],
)
def test_llama_cpp_gives_the_logits_and_the_token_ids_of_the_source(
    variant, dtype, stages, tmp_path
):
    record = minimind.export.export(stages / variant, tmp_path / "out", "gguf", dtype)
    compared = record["verification"]["llama.cpp"]
    assert compared["median_logit_difference"] <= compared["tolerance"]
    assert compared["texts_tokenised_equally"] > 15


def test_rows_that_q8_0_cannot_hold_are_refused(tmp_path, tokenizer, capsys):
    MiniMindForCausalLM(
        MiniMindConfig(**SIZE | {"intermediate_size": 80}, vocab_size=300)
    ).save_pretrained(tmp_path / "stage")
    tokenizer.save_pretrained(tmp_path / "stage")
    message = failure(
        capsys,
        run_cli,
        "export",
        tmp_path / "stage",
        tmp_path / "out",
        "--format",
        "gguf",
        "--dtype",
        "q8_0",
    )
    assert "down_proj" in message
    assert "multiple of 32" in message
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []
