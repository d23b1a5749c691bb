"""Which model a stage trains."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from transformers.hf_argparser import HfArg
from trl import ModelConfig

from minimind import MiniMindConfig
from minimind.common.bounds import check_numbers
from minimind.common.errors import UserError
from minimind.common.files import read_json
from minimind.common.options import suggestion
from minimind.training.adapters import ADAPTERS, VIRTUAL
from minimind.training.arguments import refuse_meaningless


@dataclass
class PretrainModelArguments:
    """Which model is pretrained."""

    model_config: str = HfArg(
        default="configs/model/tiny.json", help="JSON file with the fields of MiniMindConfig."
    )
    tokenizer: str | None = HfArg(
        default=None, help="Directory of a tokenizer. Default: the 6,400-token one of the package."
    )
    model_name_or_path: str | None = HfArg(
        default=None,
        help="Stage directory to continue from, with its tokenizer, instead of random weights.",
    )
    attn_implementation: str | None = HfArg(
        default=None,
        help="eager, sdpa, flex_attention, flash_attention_2. Default: the library's choice.",
    )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments, and peft's other adapters; LoRA reaches every linear layer by
    default."""

    peft_type: str = HfArg(
        default="lora",
        help="The adapter of --use_peft; see docs/adapters.md.",
        metadata={"choices": list(ADAPTERS)},
    )
    num_virtual_tokens: int = HfArg(
        default=16, help="Virtual tokens of prompt_tuning and prefix_tuning."
    )
    lora_target_modules: list[str] | None = HfArg(
        default_factory=lambda: ["all-linear"], help="LoRA target modules."
    )
    lora_dropout: float = HfArg(default=0.0, help="LoRA dropout.")

    def __post_init__(self):
        super().__post_init__()
        refuse_meaningless(
            self,
            lora_task_type="the models write texts",
            load_in_8bit="nothing is trained on quantised weights",
            load_in_4bit="nothing is trained on quantised weights",
        )
        self._check_adapter()
        if self.lora_target_parameters and (self.use_dora or self.lora_dropout):
            raise UserError(
                "--lora_target_parameters adapts stacked tensors, for which peft has neither DoRA"
                " nor dropout. Leave out --use_dora and --lora_dropout, or the target parameters."
            )

    def _check_adapter(self) -> None:
        """Raise UserError for options of another adapter than that of --peft_type."""
        kind = self.peft_type
        if kind != "lora" and not self.use_peft:
            raise UserError(f"--peft_type {kind} is about adapters: give --use_peft too.")
        defaults = {each.name: _default(each) for each in dataclasses.fields(self)}
        defaults["lora_target_modules"] = "all-linear"  # as TRL has shortened it
        owners = {"num_virtual_tokens": VIRTUAL}
        owners |= {name: ("lora",) for name in defaults if name.startswith(("lora_", "use_dora"))}
        owners |= {"use_rslora": ("lora",)}
        for name, kinds in owners.items():
            if getattr(self, name) != defaults[name] and kind not in kinds:
                raise UserError(
                    f"--{name} is an option of --peft_type {' and '.join(kinds)}, and this one is"
                    f" {kind}. Leave it out."
                )


def _default(field: dataclasses.Field) -> Any:
    has_factory = field.default_factory is not dataclasses.MISSING
    return field.default_factory() if has_factory else field.default


def load_model_config_file(path: str) -> dict[str, Any]:
    """The fields of a model JSON.

    Raises:
        UserError: the file is missing, is no JSON object, or has a field unknown to MiniMindConfig.
    """
    remedy = "--model_config needs the fields of MiniMindConfig; the sizes are in configs/model/."
    fields, known = read_json(path, remedy), set(MiniMindConfig.__dataclass_fields__)
    if unknown := sorted(set(fields) - known):
        raise UserError(f"{path}: unknown field {', '.join(unknown)}.{suggestion(unknown, known)}")
    check_numbers(path, fields)
    return fields
