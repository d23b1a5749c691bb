"""The training arguments of each stage. Defaults are the libraries' unless a field says why."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import IntervalStrategy, SchedulerType, TrainingArguments
from transformers.hf_argparser import HfArg
from transformers.trainer_utils import SaveStrategy
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available
from trl import DPOConfig, KTOConfig, RewardConfig, SFTConfig

from minimind.common.bounds import seconds_of
from minimind.common.launch import bf16_is_fast
from minimind.data.packing import STRATEGIES
from minimind.score_card import MinimalPair
from minimind.training.eval_pairs import choose_pairs
from minimind.training.optimizers import check_optimizer
from minimind.training.output_directory import RUN, checkpoints
from minimind.training.preference_losses import LOSSES, OWN_LOSSES, check_kto, check_losses
from minimind.training.schedules import check_recomputation, check_schedule, check_time_budget

# Parts of the names of metrics that are better if lower, beside the losses
LOWER_IS_BETTER = ("bits_per_byte", "rewards/rejected", "logps/rejected", "kl/")
SCHEDULES = {"choices": [each.value for each in SchedulerType]}


@dataclass
class StageConfig(TrainingArguments):
    """What all stages have in common."""

    learning_rate: float = HfArg(default=5e-4, help="Peak learning rate.")
    lr_scheduler_type: str = HfArg(
        default="cosine_with_min_lr", help="Learning-rate schedule.", metadata=SCHEDULES
    )
    lr_scheduler_kwargs: dict | str | None = HfArg(
        default=None,
        help='Arguments of the schedule. Default: {"min_lr_rate": 0.1} for cosine_with_min_lr, '
        '{"decay_type": "1-sqrt"} for warmup_stable_decay (Hägele et al., 2024).',
    )
    time_budget: str | None = HfArg(
        default=None,
        help="Train for this long, as 90s, 30m or 1h30m, in place of max_steps and "
        "num_train_epochs: from the start of the command to the last evaluation. The learning rate "
        "follows the clock, and the data is repeated as needed.",
    )
    warmup_steps: float = HfArg(default=0.05, help="Steps, or the share of all steps if below 1.")
    lr_decay_steps: float = HfArg(
        default=0.2,
        help="Steps, or the share of all steps if below 1, in which warmup_stable_decay decays at "
        "the end.",
    )
    adam_beta2: float = HfArg(default=0.95, help="Beta2 of AdamW.")
    weight_decay: float = HfArg(default=0.1, help="Weight decay of AdamW.")
    bf16: bool | None = HfArg(
        default=None, help="bf16 mixed precision. Default: yes where the device has native bf16."
    )
    # TRL turns it on; at these sizes it costs time and saves little. The name in force is
    # activation_checkpointing.
    gradient_checkpointing: bool | None = HfArg(
        default=None, help="Old name of activation_checkpointing."
    )
    logging_steps: float = HfArg(
        default=10, help="Log every N steps, or a share of all if below 1."
    )
    logging_first_step: bool = HfArg(default=True, help="Log the first step too.")
    logging_nan_inf_filter: bool = HfArg(
        default=False, help="Replace NaN and inf in the logged loss; off, as it hides a broken run."
    )
    prediction_loss_only: bool = HfArg(
        default=True,
        help="Evaluate only the loss; keeping the logits of all rows fills the memory.",
    )
    save_strategy: str | None = HfArg(
        default=None,
        help="Checkpoints: no, steps, epoch or best. Default: steps; best with "
        "--load_best_model_at_end.",
        metadata={"choices": [each.value for each in SaveStrategy]},
    )
    save_steps: float = HfArg(
        default=0.1, help="A checkpoint every N steps, or a share of all steps if below 1."
    )
    save_total_limit: int | None = HfArg(default=2, help="Complete checkpoints to keep at most.")
    resume_from_checkpoint: str | None = HfArg(
        default="auto",
        help="auto: resume from the last complete checkpoint in --output_dir, if there is one; "
        "true: there must be one; false: never; or the path of a checkpoint.",
    )
    allow_changed_recipe: bool = HfArg(
        default=False,
        help="Resume although options that decide the result have changed; extends a complete run "
        "to more steps or epochs.",
    )
    overwrite_output_dir: bool = HfArg(
        default=False,
        help="Delete the run in --output_dir and start over, unless it is this very one, "
        "interrupted.",
    )
    early_stopping_patience: int | None = HfArg(
        default=None,
        help="Stop when this many evaluations in a row did not improve --metric_for_best_model "
        "(eval_loss).",
    )
    early_stopping_threshold: float = HfArg(
        default=0.0, help="An evaluation improves if it is better than the best by more than this."
    )
    eval_pairs: list[str] | None = HfArg(
        default=None,
        help="Files of minimal pairs (sentence_good, sentence_bad); the share of them that the "
        "model wins joins each evaluation as eval_pairs_sum and eval_pairs_mean.",
    )
    max_eval_pairs: int = HfArg(
        default=1000, help="Pairs of each such file to evaluate at most, as many of each paradigm."
    )
    sample_steps: int = HfArg(
        default=0, help="Show what the model writes every N steps; 0 only at the end, -1 never."
    )
    sample_prompts: str | None = HfArg(
        default=None,
        help="File with one prompt a line, text or JSON. Default: a few in Chinese and English.",
    )
    sample_tokens: int = HfArg(default=48, help="Tokens of one sample at most.")
    report_to: None | str | list[str] = HfArg(  # noqa: RUF036 (the parser reads the parent's order)
        default="wandb",
        help="Trackers: wandb (offline without a key), trackio, tensorboard, swanlab ... or none",
    )
    include_num_input_tokens_seen: str = HfArg(
        default="non_padding",
        help="Count tokens for the throughput: all, non_padding or no.",
        metadata={"choices": ("all", "non_padding", "no")},
    )
    disable_tqdm: bool | None = HfArg(
        default=True, help="The stages print their own progress lines, with tokens/s and ETA."
    )
    on_findings: str = HfArg(
        default="error",
        help="What an error that the doctor or the inspection of the data finds does. error: stops "
        "the run; warn: nothing.",
        metadata={"choices": ("error", "warn")},
    )
    max_nonfinite_steps: int = HfArg(
        default=5,
        help="Steps whose loss or gradient is not finite are skipped; after this many in a row the "
        "run stops and keeps the batch for 'minimind replay'. 0: nothing is skipped.",
    )

    def __post_init__(self):
        # The device
        if not torch.cuda.is_available() and not torch.backends.mps.is_available():
            self.use_cpu = True
        if self.use_cpu:
            self.dataloader_pin_memory = False
        if self.bf16 is None:
            self.bf16 = not self.fp16 and bf16_is_fast("cpu" if self.use_cpu else None)

        # Options of the libraries that nothing here obeys
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

        if isinstance(self.time_budget, str):
            self.time_budget = seconds_of("--time_budget", self.time_budget)

        # Defaults that depend on other options
        if self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "cosine_with_min_lr":
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        elif self.lr_scheduler_kwargs is None and self.lr_scheduler_type == "warmup_stable_decay":
            self.lr_scheduler_kwargs = {"decay_type": "1-sqrt"}
        self._prepare_choice()
        self.save_strategy = self.save_strategy or "steps"
        self._check_resume()
        super().__post_init__()
        self.held_out_pairs()

        # What the libraries would refuse only later, or ignore
        for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
            if getattr(self, name) and not self.dataloader_num_workers:
                raise ValueError(f"--{name} is about workers: give --dataloader_num_workers")
        if self.use_cpu and getattr(self, "activation_offloading", False):
            raise ValueError(
                "--activation_offloading moves what a device computed to the CPU, and the run is"
                " on it"
            )
        if self.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("--use_liger_kernel needs a package: pip install liger-kernel")
        check_optimizer(self)
        check_time_budget(self)
        check_schedule(self)
        check_recomputation(self)

    def held_out_pairs(self) -> dict[str, list[MinimalPair]]:
        """The pairs of each of `--eval_pairs`; raises UserError where a file cannot be used."""
        return choose_pairs(tuple(self.eval_pairs or ()), self.max_eval_pairs)

    def _check_resume(self) -> None:
        """Normalise --resume_from_checkpoint, and check that there is a checkpoint if one is
        required."""
        option = str(self.resume_from_checkpoint)
        if option.lower() in ("auto", "true", "false", "none"):
            self.resume_from_checkpoint = option.lower().replace("none", "auto")
            if option.lower() == "true" and not checkpoints(Path(self.output_dir)):
                raise ValueError(
                    f"--resume_from_checkpoint true: there is no checkpoint in {self.output_dir}"
                )
        elif not Path(option).is_dir() and not (Path(self.output_dir) / RUN).exists():
            raise ValueError(f"--resume_from_checkpoint {option}: no such directory")

    def _prepare_choice(self) -> None:
        """Set what early stopping and the choice of the best model need: evaluations, and for the
        latter checkpoints of the best."""
        options = {
            "early_stopping_patience": self.early_stopping_patience is not None,
            "save_strategy best": self.save_strategy == "best",
            "load_best_model_at_end": self.load_best_model_at_end,
        }
        option = next((name for name, is_set in options.items() if is_set), None)
        if option is None:
            return
        if IntervalStrategy(self.eval_strategy) == IntervalStrategy.NO:
            raise ValueError(
                f"--{option} compares evaluations: give --eval_strategy epoch, or steps and"
                " --eval_steps"
            )
        self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        name = self.metric_for_best_model.removeprefix("eval_")
        if self.greater_is_better is None and name.startswith("pairs_"):
            self.greater_is_better = True  # also of a file named loss
        elif self.greater_is_better is None and any(part in name for part in LOWER_IS_BETTER):
            self.greater_is_better = False  # the library maximises everything but a loss
        strategy = SaveStrategy(self.save_strategy or "no")
        if self.load_best_model_at_end and strategy == SaveStrategy.NO:
            self.save_strategy = "best"


@dataclass
class PretrainConfig(StageConfig):
    """Arguments of pretrain.py."""

    output_dir: str | None = HfArg(default="runs/pretrain", help="The stage directory to write.")
    optim: str = HfArg(
        default="adamw_torch_fused",
        help="muon, or any of the library's optimizers; see its OptimizerNames.",
        metadata={"choices": ["muon", *(each.value for each in OptimizerNames)]},
    )
    block_size: int = HfArg(default=512, help="Tokens per training row.")
    packing_strategy: str = HfArg(
        default="wrapped",
        help="wrapped: every row full; bfd_split: best-fit, only documents longer than a row are "
        "cut.",
        metadata={"choices": list(STRATEGIES)},
    )
    document_mask: bool = HfArg(
        default=False, help="Documents in one row cannot see each other, and positions restart."
    )
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data.")
    per_device_train_batch_size: int = HfArg(default=8, help="Rows per device and micro-batch.")

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

    output_dir: str | None = HfArg(default="runs/sft", help="The stage directory to write.")
    max_length: int | None = HfArg(
        default=512, help="Tokens per row and of a conversation at most."
    )
    packing: bool = HfArg(
        default=True, help="Fill rows with complete conversations that cannot see each other."
    )
    weight_decay: float = HfArg(default=0.01, help="Weight decay of AdamW.")

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

    output_dir: str | None = HfArg(default="runs/dpo", help="The stage directory to write.")
    # On the embedded corpus these took courteous answers to 97 %; beta 0.5 with 5e-6 left them at
    # 14 %.
    learning_rate: float = HfArg(default=3e-5, help="Peak learning rate.")
    loss_type: list[str] = HfArg(
        default_factory=lambda: ["sigmoid"],
        help="Losses, summed with --loss_weights; see docs/preference.md.",
        metadata={"choices": [*LOSSES, *OWN_LOSSES]},
    )
    beta: float = HfArg(
        default=0.2,
        help="Strength of the pull towards the reference model; ORPO's lambda, IPO's tau.",
    )
    simpo_gamma: float = HfArg(
        default=0.5, help="SimPO's margin between the rewards of chosen and rejected replies."
    )
    # Not options: the rows are within the limits of PreferenceArguments
    max_length: int | None = dataclasses.field(default=None, init=False)
    truncation_mode: str = dataclasses.field(default="keep_start", init=False)
    precompute_ref_log_probs: bool = HfArg(
        default=True,
        help="Compute the reference's log-probabilities once, before training, and keep them; with "
        "false a frozen copy of the model computes them in every step, for --sync_ref_model.",
    )
    ref_model_on_cpu: bool = HfArg(
        default=False,
        help="With --precompute_ref_log_probs false: the frozen copy stays in the memory of the "
        "CPU and computes there.",
    )
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data.")
    weight_decay: float = HfArg(default=0.01, help="Weight decay of AdamW.")

    def __post_init__(self):
        refuse_meaningless(
            self,
            pad_token="the tokenizer has its own",
            model_init_kwargs="the model is loaded before TRL sees it",
        )
        super().__post_init__()
        check_losses(self)


@dataclass
class KTOStageConfig(StageConfig, KTOConfig):
    """Arguments of train_kto.py."""

    output_dir: str | None = HfArg(default="runs/kto", help="The stage directory to write.")
    learning_rate: float = HfArg(default=3e-5, help="Peak learning rate.")
    loss_type: str = HfArg(
        default="kto",
        help="kto, or apo_zero_unpaired, which has no estimate of the KL divergence.",
        metadata={"choices": ["kto", "apo_zero_unpaired"]},
    )
    beta: float = HfArg(default=0.1, help="Strength of the pull towards the reference model.")
    max_length: int | None = HfArg(
        default=2048, help="Tokens of a conversation with its rated reply at most."
    )
    precompute_ref_log_probs: bool = HfArg(
        default=True,
        help="Compute the reference's log-probabilities once, before training, and keep them; with "
        "false a frozen copy of the model computes them in every step, for --sync_ref_model.",
    )
    per_device_train_batch_size: int = HfArg(
        default=8, help="Rows per device and micro-batch, at least 2."
    )
    train_sampling_strategy: str = HfArg(
        default="sequential",
        help="Order of the rows, which are shuffled once before; kto needs sequential.",
        metadata={"choices": ["random", "sequential", "group_by_length"]},
    )
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data.")
    weight_decay: float = HfArg(default=0.01, help="Weight decay of AdamW.")

    def __post_init__(self):
        refuse_meaningless(self, model_init_kwargs="the model is loaded before TRL sees it")
        super().__post_init__()
        check_kto(self)


@dataclass
class RewardStageConfig(StageConfig, RewardConfig):
    """Arguments of train_reward.py."""

    output_dir: str | None = HfArg(default="runs/reward", help="The stage directory to write.")
    learning_rate: float = HfArg(default=1e-4, help="Peak learning rate.")
    # Not an option: the rows are within the limits of PreferenceArguments
    max_length: int | None = dataclasses.field(default=None, init=False)
    num_train_epochs: float = HfArg(default=1.0, help="Passes over the data.")
    weight_decay: float = HfArg(default=0.01, help="Weight decay of AdamW.")

    def __post_init__(self):
        refuse_meaningless(
            self,
            chat_template_path="give --chat_template",
            eos_token="the chat template decides",
            pad_token="the tokenizer has its own",
            model_init_kwargs="the model is loaded before TRL sees it",
            sample_prompts="a reward model writes no text",
            eval_pairs="a reward model gives no probabilities",
        )
        if self.sample_steps > 0:
            raise ValueError(
                f"--sample_steps {self.sample_steps} has no meaning here: a reward model writes no"
                " text"
            )
        super().__post_init__()


def refuse_meaningless(arguments: Any, **answers: str) -> None:
    """Raise ValueError for a library's option that nothing here obeys; `answers`: what to do
    instead."""
    for each in dataclasses.fields(arguments):
        if each.name in answers and (value := getattr(arguments, each.name)) != each.default:
            raise ValueError(f"--{each.name} {value} has no meaning here: {answers[each.name]}")
