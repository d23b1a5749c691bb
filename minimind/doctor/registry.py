"""What a check examines (`Case`), what it returns (`Finding`), and how a function becomes one."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minimind.common.errors import UserError
from minimind.data.chat_arguments import TemplateArguments
from minimind.stages import STAGES, StageSpec

SAMPLED_ROWS = 256
# Why a check was skipped, by what the case lacks.
LACKING = {
    "deepspeed": "no --deepspeed",
    "model": "the model is not there",
    "weights": "the weights are not there",
    **dict.fromkeys(("train", "facts", "rows", "steps", "collator"), "the data is not there"),
}


@dataclass(frozen=True)
class Finding:
    """The result of one check: what it `found`, and if that is wrong what was `expected` and how to
    `fix` it."""

    name: str
    severity: str
    found: str
    expected: str = ""
    fix: str = ""


@dataclass
class Case:
    """A run as far as it is known: what is None was not given or does not exist yet.

    `rows` is what the loader returns, `train` its rows as the trainer takes them, `facts` its
    counts, `deepspeed` the JSON, `parent` the stage the run starts from, `world` the number of
    processes, `recipe` what the planner reads. `missing` are inputs that do not exist, `notes` what
    replaces them; `stand_in`: the model has only the shape of one of them. `inspection`, `plan` and
    `step_seconds` are kept by the first check that needs them.
    """

    stage: str
    args: Any = None
    model: PreTrainedModel | PeftModel | None = None
    tokenizer: PreTrainedTokenizerFast | None = None
    train: Any = None
    facts: dict | None = None
    collator: Callable | None = None
    deepspeed: dict | None = None
    parent: Path | None = None
    lora: Any = None
    world: int = 1
    data_args: Any = None
    chat_args: TemplateArguments | None = None
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rows: Any = None
    inspection: Any = None
    recipe: Any = None
    plan: Any = None
    step_seconds: float | None = None
    stand_in: bool = False

    @property
    def spec(self) -> StageSpec:
        """The row of its stage in the table of stages."""
        return STAGES[self.stage]

    @property
    def weights(self) -> PreTrainedModel | PeftModel | None:
        """The model, if its weights are those that the run starts from."""
        return None if self.stand_in else self.model

    @property
    def base(self) -> PreTrainedModel | None:
        """The model without its adapter."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def rows_per_step(self) -> int:
        """Rows of all micro-batches and processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.world

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run; None where the data or a time budget leaves them unknown."""
        if self.args.time_budget:
            return None
        if self.args.max_steps > 0:
            return self.args.max_steps
        if self.train is None:
            return None
        per_epoch = math.ceil(len(self.train) / self.rows_per_step)
        return math.ceil(per_epoch * self.args.num_train_epochs)

    def sampled_ids(self) -> list[np.ndarray]:
        """The ids of some training rows; none without rows of ids."""
        if self.train is None or "input_ids" not in self.train.column_names:
            return []
        return [np.asarray(self.train[i]["input_ids"]) for i in sample(len(self.train))]


@dataclass(frozen=True)
class Check:
    """A named function of a case, and what it needs."""

    name: str
    function: Callable[[Case], tuple]
    needs: tuple[str, ...]
    quick: bool

    def __call__(self, case: Case) -> Finding:
        lacking = next((name for name in self.needs if getattr(case, name) is None), None)
        if lacking:
            reason = LACKING.get(lacking, f"no {lacking}")
            if lacking == "steps" and case.train is not None:
                reason = "the time budget decides how many steps there are"
            return Finding(self.name, "skipped", reason)
        try:
            severity, *texts = self.function(case)
        except UserError as error:  # another check reports it
            return Finding(self.name, "skipped", str(error))
        except Exception as error:  # a fault of the check is no fault of the run
            found = f"the check itself failed ({type(error).__name__}: {error})"
            return Finding(self.name, "warning", found, fix="This says nothing about the run.")
        return Finding(self.name, severity, *texts)


def check(*needs: str, quick: bool = True) -> Callable[[Callable[[Case], tuple]], Check]:
    """Make a check of a function that returns severity, found and, if that is wrong, expected and
    fix; `quick` ones run at the start of every run."""
    return lambda function: Check(function.__name__, function, needs, quick)


def sample(rows: int, size: int = SAMPLED_ROWS) -> list[int]:
    """Up to `size` row numbers, evenly spread."""
    return np.linspace(0, rows - 1, min(rows, size)).astype(int).tolist()


def value_of(choice: Any) -> str:
    """The word of one of the library's enumerations."""
    return str(getattr(choice, "value", choice))
