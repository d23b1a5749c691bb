"""Command line and YAML recipes -> typed arguments. Defaults here are the library's, except where a
field says why."""

import copy
import dataclasses
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available
from trl import DPOConfig, ModelConfig, SFTConfig

from minimind.common.bounds import check_numbers, shown
from minimind.common.cache import cache_directory, discard, lock, places, refusing
from minimind.common.errors import UserError
from minimind.common.files import read_json
from minimind.common.language import say
from minimind.common.launch import bf16_is_fast, is_main_process, prepare_launch
from minimind.common.options import suggestion
from minimind.common.recipes import read_deepspeed
from minimind.data.columns import NAMES, Columns
from minimind.data.files import TEXT_UNITS
from minimind.data.markers import POLICIES
from minimind.data.mixing import STOPPING
from minimind.data.packing import STRATEGIES
from minimind.data.sources import File, expand
from minimind.data.world import write_world
from minimind.training.optimizers import check_optimizer
from minimind.training.output_directory import RUN, check_output_directory, checkpoints
from minimind.training.parser import StageParser, read_options
from minimind.training.schedules import check_recomputation, check_schedule

# TRL refuses others in the first step alone.
LOSSES = [
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
]
LOSSES += ["apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]


@dataclass
class DataArguments:
    """Which data a stage reads."""

    train_files: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Files, directories or globs (jsonl, json, parquet, csv, txt ...), each perhaps"
                " with its share of an epoch (a.jsonl:0.7) or how often one takes it (b.jsonl:3x)."
                " Default: the embedded corpus."
            )
        },
    )
    eval_files: list[str] | None = field(
        default=None,
        metadata={
            "help": "Held-out files. Default: --eval_ratio of the training rows, chosen by content."
        },
    )
    eval_ratio: float = field(
        default=0.02,
        metadata={"help": "Share of the rows held out when there are no --eval_files."},
    )
    max_eval_rows: int = field(
        default=100, metadata={"help": "At most this many rows are held out or evaluated on."}
    )
    mixing_temperature: float | None = field(
        default=None,
        metadata={
            "help": (
                "Weigh the sources by size ** (1 / temperature): 1 by their size, high values all"
                " alike."
            )
        },
    )
    mixing_stop: str = field(
        default="first_exhausted",
        metadata={
            "help": (
                "Weighted sources: first_exhausted takes no row twice, all_exhausted takes every"
                " row."
            ),
            "choices": STOPPING,
        },
    )
    clean_recipe: str | None = field(
        default=None,
        metadata={
            "help": "Clean the training files first, as `minimind clean` does with this recipe."
        },
    )
    text_unit: str = field(
        default="file",
        metadata={
            "help": "What one document of a txt file is: the file, a paragraph or a line.",
            "choices": TEXT_UNITS,
        },
    )
    boundary_markers: str = field(
        default="split",
        metadata={
            "help": (
                "Boundaries spelled out in documents, such as <|im_end|>. split: cut there; keep:"
                " train them as text; error: refuse the row."
            ),
            "choices": POLICIES,
        },
    )
    on_bad_rows: str | None = field(
        default=None,
        metadata={
            "help": (
                "error: stop at the first; skip: leave out all. Default: leave out at most 0.1 % of"
                " the rows."
            ),
            "choices": ("error", "skip"),
        },
    )

    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "What columns with names of their own mean, as MEANING=COLUMN: prompt=问题"
                f" response=回答. Meanings: {', '.join(NAMES)}."
            )
        },
    )
    unread_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": (
                "Columns that are left out, or ignore: all that nothing reads. Default: a column"
                " with text that nothing reads is an error."
            )
        },
    )

    def __post_init__(self):
        self.reading()

    def reading(self) -> Columns:
        """How the columns of some rows are read; one object counts those of one reading. Raises
        UserError."""
        return Columns(self.columns, self.unread_columns, cleaned=self.clean_recipe is not None)

    def expand(self, paths: Sequence[str]) -> list[File]:
        """The files to train on: `paths`, or with a recipe their cleaned copy, which is made once
        and kept."""
        if self.clean_recipe is None:
            return expand(paths)
        directory, report = self._cleaned(paths)
        if is_main_process():
            kept, read = report["rows"]["out"], report["rows"]["in"]
            say(f"cleaned: {kept:,} of {read:,} rows kept; see {directory / 'report.html'}")
        return expand([str(directory / shard["file"]) for shard in report["shards"]])

    def _cleaned(self, paths: Sequence[str]) -> tuple[Path, dict]:
        """The directory of the cleaned copy of some files, and its report; one that is damaged is
        made again."""
        from minimind.cleaning import cache_key, clean, finished_report

        reading = {"text_unit": self.text_unit, "columns": self.columns}
        key = cache_key(paths, self.clean_recipe, **reading)
        for place in places("clean"):
            with suppress(UserError, OSError):
                if report := finished_report(place / key, key):
                    return place / key, report

        directory = cache_directory("clean") / key
        with refusing(directory), lock(f"{directory}.lock"):
            discard(directory, partial(finished_report, key=key, remedy=""))
            report = clean(
                paths, directory, self.clean_recipe, on_bad_rows=self.on_bad_rows, **reading
            )
        return directory, report

    def or_embedded(self, name: str) -> "DataArguments":
        """These arguments, with the embedded corpus' rows for stage `name` where no files were
        given."""
        if self.train_files:
            return self
        directory = cache_directory("world")
        with refusing(directory), lock(directory / ".lock"):
            paths = write_world(directory)
        return dataclasses.replace(
            self,
            train_files=[str(paths[name])],
            eval_files=self.eval_files or [str(paths[f"{name}_eval"])],
        )


@dataclass
class PretrainModelArguments:
    """Which model is pretrained."""

    model_config: str = field(
        default="configs/model/tiny.json",
        metadata={"help": "JSON file with the fields of MiniMindConfig."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Directory of a tokenizer. Default: the 6,400-token one of the package."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Stage directory to go on from, with its tokenizer, instead of random weights."
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "eager, sdpa, flex_attention, flash_attention_2. Default: the library's choice."
        },
    )


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments; LoRA reaches every linear layer by default."""

    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})

    def __post_init__(self):
        super().__post_init__()
        refuse_meaningless(
            self,
            lora_task_type="the models write texts",
            load_in_8bit="nothing is trained on quantised weights",
            load_in_4bit="nothing is trained on quantised weights",
        )
        if self.lora_target_parameters and (self.use_dora or self.lora_dropout):
            raise UserError(
                "--lora_target_parameters adapts stacked tensors, for which peft has neither DoRA"
                " nor dropout. Leave out --use_dora and --lora_dropout, or the target parameters."
            )


@dataclass
class StageConfig(TrainingArguments):
    """What all stages have in common."""

    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(
        default="cosine_with_min_lr",
        metadata={
            "help": "Learning-rate schedule.",
            "choices": [each.value for each in SchedulerType],
        },
    )
    lr_scheduler_kwargs: dict | str | None = field(
        default=None,
        metadata={
            "help": (
                'Arguments of the schedule. Default: {"min_lr_rate": 0.1} for cosine_with_min_lr, '
                '{"decay_type": "1-sqrt"} for warmup_stable_decay (Hägele et al., 2024).'
            )
        },
    )
    warmup_steps: float = field(
        default=0.05, metadata={"help": "Steps, or the share of all steps if below 1."}
    )
    lr_decay_steps: float = field(
        default=0.2,
        metadata={
            "help": (
                "Steps, or the share of all steps if below 1, in which warmup_stable_decay comes"
                " down at the end."
            )
        },
    )
    adam_beta2: float = field(default=0.95, metadata={"help": "Beta2 of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of AdamW."})
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "bf16 mixed precision. Default: yes where the device computes in bf16 natively."
        },
    )
    # TRL turns it on; at these sizes it costs time and saves little. The name in force is
    # activation_checkpointing.
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of activation_checkpointing."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every N steps, or a share of all steps if below 1."}
    )
    logging_first_step: bool = field(default=True, metadata={"help": "Log the first step too."})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Replace NaN and inf in the logged loss; off, since it hides a broken run."
        },
    )
    prediction_loss_only: bool = field(
        default=True,
        metadata={
            "help": "Evaluate the loss alone; keeping the logits of all rows fills the memory."
        },
    )
    save_strategy: str | None = field(
        default=None,
        metadata={
            "help": (
                "Checkpoints: no, steps, epoch or best. Default: steps; best with"
                " --load_best_model_at_end."
            ),
            "choices": [each.value for each in SaveStrategy],
        },
    )
    save_steps: float = field(
        default=0.1,
        metadata={
            "help": "A checkpoint every N steps, or so large a share of all steps if below 1."
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Whole checkpoints kept; broken ones do not count."}
    )
    resume_from_checkpoint: str | None = field(
        default="auto",
        metadata={
            "help": (
                "auto: go on from the last whole checkpoint in --output_dir, if there is one; true:"
                " there must be one; false: never; or the path of a checkpoint."
            )
        },
    )
    allow_changed_recipe: bool = field(
        default=False,
        metadata={
            "help": (
                "Go on from a checkpoint although options that decide the result changed; extends a"
                " complete run to more steps or epochs."
            )
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={
            "help": (
                "Delete the run in --output_dir and begin anew, unless it is this very one,"
                " interrupted."
            )
        },
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": (
                "Stop when so many evaluations in a row did not improve --metric_for_best_model"
                " (eval_loss)."
            )
        },
    )
    early_stopping_threshold: float = field(
        default=0.0,
        metadata={
            "help": "An evaluation improves if it is better than the best by more than this."
        },
    )
    sample_steps: int = field(
        default=0,
        metadata={"help": "Show what the model writes every N steps; 0 only at the end, -1 never."},
    )
    sample_prompts: str | None = field(
        default=None,
        metadata={
            "help": (
                "File with one prompt a line, text or JSON. Default: a few in Chinese and English."
            )
        },
    )
    sample_tokens: int = field(default=48, metadata={"help": "Tokens of one sample at most."})
    report_to: None | str | list[str] = field(  # noqa: RUF036 (the parser reads the parent's order)
        default="wandb",
        metadata={
            "help": (
                "Trackers: wandb (offline where no key is found), trackio, tensorboard, swanlab ..."
                " or none"
            )
        },
    )
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={
            "help": "Count tokens for the throughput: all, non_padding or no.",
            "choices": ("all", "non_padding", "no"),
        },
    )
    disable_tqdm: bool | None = field(
        default=True,
        metadata={"help": "The stages print their own progress lines, with tokens/s and ETA."},
    )
    on_findings: str = field(
        default="error",
        metadata={
            "help": (
                "What an error among the findings does, those of the doctor and of the inspection"
                " of the data. error: stops the run; warn: nothing."
            ),
            "choices": ("error", "warn"),
        },
    )
    max_nonfinite_steps: int = field(
        default=5,
        metadata={
            "help": (
                "Steps whose loss or gradient is not finite are skipped; after so many in a row the"
                " run stops and keeps the batch for 'minimind replay'. 0: nothing is skipped."
            )
        },
    )

    def __post_init__(self):
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            self.use_cpu = True
        if self.use_cpu:
            self.dataloader_pin_memory = False
        if getattr(self, "trust_remote_code", False):  # TRL's
            raise ValueError(
                "--trust_remote_code has no meaning here: no code of a model's directory is"
                " ever run"
            )
        if self.hub_token:
            raise ValueError(
                "--hub_token would reach saved files and trackers: set the variable HF_TOKEN"
                " instead"
            )
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        elif self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "warmup_stable_decay":
            self.lr_scheduler_kwargs = {"decay_type": "1-sqrt"}
        self._check_choice()
        self.save_strategy = self.save_strategy or "steps"
        if str(self.resume_from_checkpoint).lower() in ("auto", "true", "false", "none"):
            self.resume_from_checkpoint = (
                str(self.resume_from_checkpoint).lower().replace("none", "auto")
            )
            if self.resume_from_checkpoint == "true" and not checkpoints(Path(self.output_dir)):
                raise ValueError(
                    f"--resume_from_checkpoint true: there is no checkpoint in {self.output_dir}"
                )
        elif (
            not Path(self.resume_from_checkpoint).is_dir()
            and not (Path(self.output_dir) / RUN).exists()
        ):
            raise ValueError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: no such directory"
            )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast("cpu" if self.use_cpu else None)
        super().__post_init__()
        alone = ("dataloader_persistent_workers", "dataloader_multiprocessing_context")
        if not self.dataloader_num_workers and (
            given := [name for name in alone if getattr(self, name)]
        ):
            raise ValueError(f"--{given[0]} is about workers: give --dataloader_num_workers")
        if self.use_cpu and getattr(self, "activation_offloading", False):
            raise ValueError(
                "--activation_offloading moves what a device computed to the CPU, and the run is"
                " on it"
            )
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("--use_liger_kernel needs a package: pip install liger-kernel")
        check_optimizer(self)
        check_schedule(self)
        check_recomputation(self)

    def _check_choice(self) -> None:
        """What early stopping and the best model need: evaluations, and for the latter checkpoints
        of the best."""
        asked = "load_best_model_at_end" if self.load_best_model_at_end else None
        asked = "save_strategy best" if self.save_strategy == "best" else asked
        asked = asked if self.early_stopping_patience is None else "early_stopping_patience"
        if asked is None:
            return
        if IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            raise ValueError(
                f"--{asked} compares evaluations: give --eval_strategy epoch, or steps and"
                " --eval_steps"
            )
        self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        if self.greater_is_better is None and "bits_per_byte" in self.metric_for_best_model:
            self.greater_is_better = False  # the library takes everything but a loss for a score
        if (
            self.load_best_model_at_end
            and SaveStrategy(self.save_strategy or "no") == SaveStrategy.NO
        ):
            self.save_strategy = "best"


@dataclass
class PretrainConfig(StageConfig):
    """Arguments of pretrain.py."""

    output_dir: str | None = field(
        default="runs/pretrain", metadata={"help": "The stage directory to write."}
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "muon, or any of the library's optimizers; see its OptimizerNames.",
            "choices": ["muon", *(each.value for each in OptimizerNames)],
        },
    )
    block_size: int = field(default=512, metadata={"help": "Tokens per training row."})
    packing_strategy: str = field(
        default="wrapped",
        metadata={
            "help": (
                "wrapped: every row full; bfd_split: best-fit, only documents longer than a row are"
                " cut."
            ),
            "choices": list(STRATEGIES),
        },
    )
    document_mask: bool = field(
        default=False,
        metadata={
            "help": "Documents in one row cannot see each other, and their positions restart."
        },
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Rows per device and micro-batch."}
    )

    @property
    def packing(self) -> dict:
        """What `documents.load_blocks` has to know of a run."""
        return {
            name: getattr(self, name)
            for name in ("block_size", "packing_strategy", "document_mask", "seed")
        }

    def __post_init__(self):
        # See optimizers.build_optimizer; the library knows no such name
        self.use_muon = self.optim == "muon"
        if self.use_muon:
            self.optim = "adamw_torch_fused"
        super().__post_init__()


@dataclass
class SFTStageConfig(StageConfig, SFTConfig):
    """Arguments of finetune_sft.py."""

    output_dir: str | None = field(
        default="runs/sft", metadata={"help": "The stage directory to write."}
    )
    max_length: int | None = field(
        default=512, metadata={"help": "Tokens per row, and of the longest conversation."}
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Fill rows with whole conversations that cannot see each other."},
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})

    def __post_init__(self):
        refuse_meaningless(
            self,
            chat_template_path="give --chat_template",
            packing_strategy="whole conversations are packed by best-fit",
            truncation_mode="give --long_conversations",
            loss_type="the loss is the cross-entropy",
            assistant_only_loss="it is the only way here; see --train_turns",
            eos_token="the chat template decides",
            pad_token="the tokenizer has its own",
            dataset_text_field="see --columns",
            dataset_kwargs="rows are tokenised before TRL sees them",
            model_init_kwargs="the model is loaded before TRL sees it",
        )
        super().__post_init__()


@dataclass
class DPOStageConfig(StageConfig, DPOConfig):
    """Arguments of train_dpo.py."""

    output_dir: str | None = field(
        default="runs/dpo", metadata={"help": "The stage directory to write."}
    )
    # On the embedded corpus these took courteous answers to 97 %; beta 0.5 with 5e-6 left them at
    # 14 %.
    learning_rate: float = field(default=3e-5, metadata={"help": "Peak learning rate."})
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={
            "help": "Losses, summed with --loss_weights; see TRL's DPO guide.",
            "choices": LOSSES,
        },
    )
    beta: float = field(
        default=0.2, metadata={"help": "Strength of the pull towards the reference model."}
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Tokens of the longest prompt with its reply."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the data."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW."})

    def __post_init__(self):
        refuse_meaningless(
            self,
            pad_token="the tokenizer has its own",
            model_init_kwargs="the model is loaded before TRL sees it",
        )
        super().__post_init__()


def refuse_meaningless(arguments: Any, **answers: str) -> None:
    """Raises ValueError for a library's option that nothing here would obey; `answers`: what to do
    or to know."""
    for each in dataclasses.fields(arguments):
        if each.name in answers and getattr(arguments, each.name) != each.default:
            given = getattr(arguments, each.name)
            raise ValueError(f"--{each.name} {given} has no meaning here: {answers[each.name]}")


def parse(*dataclass_types: type, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Fill the dataclasses from `--config recipe.yaml`, overridden by the command line.

    A recipe's values take the same way as the command line's, so that they meet the same checks.

    Raises:
        UserError: an unknown key or option, a value of the wrong type, a recipe that cannot be
        read.
    """
    parser = StageParser(dataclass_types)
    options = vars(read_options(parser, sys.argv[1:] if argv is None else argv))
    deepspeed = options.get("deepspeed")
    if deepspeed is not None:
        read_deepspeed(deepspeed)  # which the library does with a traceback
    prepare_launch(uses_deepspeed=deepspeed is not None)
    try:
        parsed = _filled(dataclass_types, options)
    except UserError:
        raise
    except Exception as error:  # the libraries choke on a value in many ways
        raise UserError(_misfit(parser, options, error)) from error
    for arguments in parsed:
        if isinstance(arguments, StageConfig):
            check_output_directory(Path(arguments.output_dir))
    return parsed


def _filled(dataclass_types: Iterable[type], options: dict[str, Any]) -> tuple[Any, ...]:
    """The dataclasses with these options; raises what their checks raise."""
    options = copy.deepcopy(options)
    return tuple(
        kind(**{each.name: options[each.name] for each in dataclasses.fields(kind) if each.init})
        for kind in dataclass_types
    )


def _misfit(parser: StageParser, options: dict[str, Any], error: Exception) -> str:
    """What is wrong with options that make no dataclasses, with the name of the option that is to
    blame."""
    said = (
        str(error)
        if isinstance(error, ValueError) and str(error)
        else f"{type(error).__name__}: {error}"
    )
    message = f"the arguments do not fit together: {said}"
    if any(f"--{name}" in said for name in options):
        return message
    for name, value in options.items():
        if value != (default := parser.get_default(name)):
            with suppress(Exception):
                _filled(parser.dataclass_types, options | {name: default})
                return f"--{name} {shown(value)}: {message}"
    return message


def parse_options(*dataclass_types: type, argv: Sequence[str]) -> Namespace:
    """The same as one namespace, without making the dataclasses: no device is set up, nothing is
    checked together.

    Raises:
        UserError: an unknown key or option, a value of the wrong type, a recipe that cannot be
        read.
    """
    return read_options(StageParser(dataclass_types), argv)


def load_model_config_file(path: str) -> dict[str, Any]:
    """The fields of a model JSON.

    Raises:
        UserError: the file is missing, is not a JSON object, or names a field that MiniMindConfig
        has not.
    """
    from minimind import MiniMindConfig

    fields = read_json(
        path, "--model_config needs the fields of MiniMindConfig; the sizes are in configs/model/."
    )
    known = set(MiniMindConfig.__dataclass_fields__)
    unknown = sorted(set(fields) - known)
    if unknown:
        raise UserError(f"{path}: unknown field {', '.join(unknown)}.{suggestion(unknown, known)}")
    check_numbers(path, fields)
    return fields
