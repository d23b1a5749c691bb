"""Command line, recipes, and the DeepSpeed file beside them."""

import json
from pathlib import Path

import pytest

from minimind.common.errors import UserError
from minimind.data.chat_arguments import PreferenceArguments
from minimind.training.arguments import (
    DPOStageConfig,
    PretrainConfig,
    RewardStageConfig,
    SFTStageConfig,
)
from minimind.training.command_line import parse
from minimind.training.data_arguments import DataArguments
from minimind.training.model_arguments import (
    ModelArguments,
    PretrainModelArguments,
    load_model_config_file,
)

ROOT = Path(__file__).parent.parent
TYPES = {
    "pretrain": (DataArguments, PretrainModelArguments, PretrainConfig),
    "sft": (DataArguments, ModelArguments, SFTStageConfig),
    "lora": (DataArguments, ModelArguments, SFTStageConfig),
    "dpo": (DataArguments, PreferenceArguments, ModelArguments, DPOStageConfig),
    "reward": (DataArguments, PreferenceArguments, ModelArguments, RewardStageConfig),
}
RECIPES = sorted(path for name in TYPES for path in (ROOT / "configs" / name).glob("*.yaml"))


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_parses_and_starts_with_a_comment(path):
    *_, args = parse(*TYPES[path.parent.name], argv=["--config", str(path)])
    assert args.output_dir.startswith("runs/")
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("types", TYPES.values(), ids=TYPES)
def test_every_stage_parses_without_arguments(types):
    *_, args = parse(*types, argv=[])
    assert args.output_dir


def test_the_command_line_overrides_the_recipe_and_the_recipe_the_default(tmp_path):
    path = recipe(tmp_path, "learning_rate: 1.0e-3\nblock_size: 64\n")
    *_, args = parse(*TYPES["pretrain"], argv=["--config", path, "--block_size", "32"])
    assert (args.learning_rate, args.block_size, args.num_train_epochs) == (1e-3, 32, 1.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rat: 1.0e-3", ["unknown key learning_rat", "Did you mean learning_rate?"]),
        ("learning_rate: fast", ["learning_rate", "'fast'"]),
        ("- a list", ["expected 'name: value' lines", "list"]),
        ("a: [", ["not YAML"]),
        ("per_device_train_batch_size: 1.5", ["per_device_train_batch_size", "1.5"]),
    ],
)
def test_a_recipe_that_is_wrong_is_refused_with_its_name(tmp_path, text, words):
    with pytest.raises(UserError) as error:
        parse(*TYPES["pretrain"], argv=["--config", recipe(tmp_path, text)])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--config"], ["--config needs"]),
        (["--max_step", "3"], ["unknown option --max_step", "max_steps"]),
        (["--block_size", "many"], ["block_size", "many"]),
        (["--lr_scheduler_type", "sine"], ["sine"]),
        (
            ["--resume_from_checkpoint", "true", "--output_dir", "nowhere"],
            ["there is no checkpoint in nowhere"],
        ),
        (["--hub_token", "secret"], ["--hub_token would reach saved files", "HF_TOKEN"]),
        (
            ["--resume_from_checkpoint", "nowhere"],
            ["--resume_from_checkpoint nowhere: no such directory"],
        ),
    ],
)
def test_a_command_line_that_is_wrong_is_refused(argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a run in the default directory would decide otherwise
    with pytest.raises(UserError) as error:
        parse(*TYPES["pretrain"], argv=argv)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_muon_is_refused_where_it_is_not_used(stage):
    with pytest.raises(UserError, match=r"invalid choice: 'muon'"):
        parse(*TYPES[stage], argv=["--optim", "muon"])


@pytest.mark.parametrize(
    ("schedule", "kwargs"), [("cosine_with_min_lr", {"min_lr_rate": 0.1}), ("linear", None)]
)
def test_the_floor_of_the_learning_rate_belongs_to_its_schedule(schedule, kwargs):
    *_, args = parse(*TYPES["pretrain"], argv=["--lr_scheduler_type", schedule])
    assert (args.lr_scheduler_kwargs or None) == kwargs


def test_lora_reaches_every_linear_layer_by_default():
    _, model_args, _ = parse(*TYPES["sft"], argv=["--use_peft"])
    assert model_args.lora_target_modules == "all-linear"


def test_the_deepspeed_file_leaves_optimizer_and_schedule_to_the_recipe():
    config = json.loads((ROOT / "ds_config_zero2.json").read_text())
    assert config["zero_optimization"]["stage"] == 2
    assert not {"optimizer", "scheduler"} & set(config)


def test_a_misspelt_model_field_is_refused(tmp_path):
    path = tmp_path / "model.json"
    path.write_text('{"hiden_size": 64}')
    with pytest.raises(UserError, match=r"unknown field hiden_size\. Did you mean hidden_size\?"):
        load_model_config_file(str(path))


@pytest.mark.parametrize("script", ["pretrain.py", "finetune_sft.py", "train_dpo.py"])
def test_a_root_script_reads_like_a_recipe(script):
    assert len((ROOT / script).read_text(encoding="utf-8").splitlines()) <= 100
