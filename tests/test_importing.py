"""Published checkpoints in: the imported model's logits are those of the published code or of the
library's class."""

import json
import re
from pathlib import Path

import pytest
import torch
from example_chats import tokenize_conversation
from pipeline import run_cli
from published import EXPERTS, IDS, LIBRARY, WIDTH, Published, WithYarn, library_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from minimind import MiniMindForCausalLM
from minimind.cli import build_parser
from minimind.importing import import_checkpoint
from minimind.importing.layouts import MINIMIND_1, MINIMIND_2, MINIMIND_2_OLD, MINIMIND_3
from minimind.stage_directory import check_vocabulary, read_stage, require_stage
from minimind.tokenizer import load_tokenizer


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
