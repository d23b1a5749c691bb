"""One run of a stage: whether it resumes, its callbacks, what it reports, and the stage directory
that it writes."""

import math
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import align_special_tokens

from minimind.common.errors import UserError, decoration
from minimind.common.files import sync_files, write_json
from minimind.common.language import say, translated
from minimind.common.launch import (
    is_main_process,
    leave_process_group,
    release_shared_buffers,
)
from minimind.common.streams import keep_output_writable
from minimind.costs.parameters import active_parameters
from minimind.costs.units import amount, duration
from minimind.evaluation import bits_per_nat
from minimind.sharing import CARD, SCORE_CARD, write_model_card
from minimind.stage_directory import (
    library_versions,
    provenance,
    read_stage,
    weights_hash,
)
from minimind.tokenizer import tokenizer_hash
from minimind.training.callbacks import (
    Baseline,
    ChangeCallback,
    EarlyStopping,
    RouterLoadCallback,
)
from minimind.training.checkpointing_trainer import CheckpointingTrainer, DueCheckpointCallback
from minimind.training.definition import definition_of
from minimind.training.elastic import RemoveConvertedCallback, RowSplit, prepare_checkpoint
from minimind.training.guards import GuardCallback
from minimind.training.heartbeat import HeartbeatCallback
from minimind.training.memory_growth import MemoryCallback
from minimind.training.output_directory import unlock_directory
from minimind.training.plan_callback import PlanCallback, planned_speed
from minimind.training.plots import loss_unit, plot_loss, read_log
from minimind.training.preference_reading import read_curves, say_findings
from minimind.training.progress import ProgressCallback
from minimind.training.record import (
    best_evaluation,
    changed_options,
    git_commit,
    hardware,
    language_shares,
    token_loss,
)
from minimind.training.report import ReportCallback, title_of, write_report
from minimind.training.resumable_trainer import ResumeCallback
from minimind.training.resume import begin
from minimind.training.samples import SampleCallback, prepare_prompts
from minimind.training.saving import reports_disk_errors, save_model, weights_bytes
from minimind.training.signals import InterruptCallback

# An old name that accelerate 1.15 and DeepSpeed 0.19 still call, torch 2.13 has renamed the
# collective; nothing a user could fix.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)

# Makers of callbacks that are added after all others, for a program that runs a stage's script in
# its own process, such as planning/measuring.py.
ADDITIONAL: list[Callable[[Trainer], TrainerCallback]] = []


def check_same_data(data: dict) -> None:
    """Raise UserError, in all processes, where they have read different data: a file changed while
    they started."""
    if any(other != data for other in gather_object([data])):
        raise UserError(
            "the processes of this run have read different data: a file changed while they started,"
            " or their hosts have other files. Run the command again when nothing writes to the"
            " files."
        )


class Stage:
    """One run of a stage, from `begin` (a new run, or one that resumes?) to `finish` (its
    directory).

    `spec` is its row of the table of stages (minimind/stages.py). `data` is what the loaders
    return: `eval`, the held-out rows or None, and `facts`, what was counted. `options`: the other
    dataclasses of arguments that decide the result.
    """

    def __init__(
        self,
        spec,
        args: TrainingArguments,
        data,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        parent: Path | None = None,
        options: Iterable = (),
    ):
        self.spec, self.name, self.args = spec, spec.name, args
        self.data, self.facts = data, data.facts
        self.model, self.tokenizer, self.parent = model, tokenizer, parent
        self.options = list(options)
        self.output_dir = Path(args.output_dir)
        self.started = time.time()

    def begin(self) -> None:
        """Decide between a new run and one that resumes, and set `args.resume_from_checkpoint` to
        the checkpoint to resume from or None; all processes call it.

        Raises:
            UserError: the output directory is the parent or holds it, or see `resume.begin`.
            SystemExit: the stage is complete already.
        """
        args, parent, output_dir = self.args, self.parent, self.output_dir
        if parent and output_dir.resolve() in (parent.resolve(), *parent.resolve().parents):
            raise UserError(
                f"--output_dir {self.output_dir} is the stage this run starts from, or holds it."
                " Give another one."
            )
        if self.data.eval is None:
            if args.load_best_model_at_end or args.early_stopping_patience is not None:
                raise UserError(
                    "choosing the best model and stopping early need held-out rows, and there are"
                    " none. Give --eval_files, or a larger --eval_ratio."
                )
            if args.eval_pairs:
                raise UserError(
                    "--eval_pairs join the evaluation of held-out rows, and there are none. Give"
                    " --eval_files, or a larger --eval_ratio."
                )
            args.eval_strategy = IntervalStrategy.NO  # the Trainer refuses to evaluate on nothing
        # A chat template may have brought another end token
        align_special_tokens(self.model, self.tokenizer)
        self.definition = definition_of(
            self.spec.family, args, self.data, self.model, self.tokenizer, parent, self.options
        )
        check_same_data(self.definition["data"])
        if args.deepspeed:
            release_shared_buffers()
        pipeline = f"{output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.run, self.changes = begin(args, self.definition, pipeline)
        args.eval_on_start = self.data.eval is not None and args.resume_from_checkpoint is None

    @cached_property
    def lineage(self) -> dict:
        """Parent directory, its weights' hash, and the id that all stages of one pipeline share."""
        if self.parent is None:
            return {"parent": None, "pipeline": self.run["pipeline"]}
        pipeline = read_stage(self.parent).get("pipeline") or self.parent.name
        return {"parent": provenance(self.parent), "pipeline": pipeline}

    @cached_property
    def description(self) -> dict:
        """What is known of the run before training."""
        return {
            "stage": self.name,
            **self.lineage,
            "data": self.facts,
            "options": changed_options(self.args),
            "seed": self.args.seed,
            "git_commit": git_commit(),
            "command": " ".join(sys.argv),
            "python": sys.version.split()[0],
            "libraries": library_versions(),
            "hardware": hardware(self.args),
        }

    def attach(self, trainer: CheckpointingTrainer) -> None:
        """Give the trainer the run's callbacks, and what its checkpoints record; all processes call
        it.

        Raises:
            UserError: a checkpoint cannot be converted for this number of processes.
        """
        if self.args.deepspeed and not trainer.is_deepspeed_enabled:
            raise RuntimeError(
                "--deepspeed was given, but accelerate left DeepSpeed out: check ACCELERATE_*"
                " variables"
            )
        trainer.definition, trainer.changes = self.definition, self.changes
        trainer.started = self.started
        trainer.guard = GuardCallback(trainer) if self.args.max_nonfinite_steps else None
        trainer.callback_handler.callbacks = self.callbacks(trainer)

    def callbacks(self, trainer: CheckpointingTrainer) -> list[TrainerCallback]:
        """All callbacks of the run, in the order in which each event calls them."""
        args, config = self.args, trainer.model.config
        library = trainer.callback_handler.callbacks
        per_nat = bits_per_nat(self.facts["train"])
        self.progress = ProgressCallback(self.output_dir, trainer, per_nat)
        self.samples = None
        if args.sample_steps >= 0 and not self.spec.scores:
            tokenizer, positions = trainer.processing_class, config.max_position_embeddings
            prompts = prepare_prompts(args, not self.spec.reads_documents, tokenizer, positions)
            self.samples = SampleCallback(
                trainer, tokenizer, prompts, self.output_dir, args.sample_steps, args.sample_tokens
            )
        patience, threshold = args.early_stopping_patience, args.early_stopping_threshold
        converted = prepare_checkpoint(trainer)
        callbacks = [
            # Decides which step is the last.
            trainer.time_budget,
            # These add to the logs, and trackers report the logs as they find them.
            PlanCallback(trainer),
            RouterLoadCallback(trainer.model) if getattr(config, "num_experts", 0) else None,
            self.progress,
            # The library decides when to log, evaluate and save; its trackers; TRL's reference.
            *(each for each in library if not isinstance(each, PrinterCallback)),
            self.samples,
            EarlyStopping(patience, threshold) if patience is not None else None,
            Baseline() if args.metric_for_best_model else None,
            ReportCallback(self.output_dir, self.description),
            HeartbeatCallback(),
            # Ends the process in `on_save`: after those that look at a checkpoint.
            InterruptCallback(trainer),
            RemoveConvertedCallback(trainer, converted) if converted else None,
            # Restores the state of others: after their `on_train_begin`.
            ResumeCallback(trainer),
            # May postpone a checkpoint: after those that request one.
            DueCheckpointCallback(trainer),
            trainer.guard,
            MemoryCallback(),
            # Raises where no weight has changed: after the guard, which may know why.
            ChangeCallback(trainer),
            *(make(trainer) for make in ADDITIONAL),
        ]
        return [each for each in callbacks if each is not None]

    def announce(self, trainer: CheckpointingTrainer) -> None:
        """Print data, parameters and steps of the run to come."""
        if is_main_process():
            with decoration("describing the run"):
                self._describe(trainer)

    def _describe(self, trainer: Trainer) -> None:
        args, model, facts = self.args, trainer.model, self.facts
        world = args.world_size
        split = RowSplit(world, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        epoch = math.ceil(len(trainer.train_dataset) / split.rows)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(epoch * args.num_train_epochs)
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        start = args.resume_from_checkpoint or self.parent or "random weights"
        say(f"{self.name} -> {self.output_dir}  (from {start})")
        for part, title in (("train", "  train  "), ("eval", "  eval   ")):
            counts = ", ".join(
                f"{value:,} {key.replace('_', ' ')}"
                for key, value in facts[part].items()
                if key != "files" and isinstance(value, int)
            )
            default = "held out of the above" if part == "eval" else ""
            files = " ".join(facts[part]["files"]) or default
            say(f"{translated(title)}{counts}  {translated(files)}")
        active = active_parameters(model)
        shown = f"{parameters / 1e6:.2f} M"
        shown += translated(f" ({active / 1e6:.2f} M active)") if active < parameters else ""
        shown += translated(f", {trainable / 1e6:.2f} M trained") if trainable < parameters else ""
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "plain"
        say(f"  model  {shown} parameters, {precision}, {args.device.type} x {world}, {engine}")
        if not trainer.time_budget:
            say(
                f"  steps  {steps:,} of {split}, learning rate "
                f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), seed {args.seed}"
            )
            return
        whole, left = (seconds / 3600 for seconds in trainer.time_budget.whole_and_left())
        say(
            f"  time   {duration(whole)}, steps of {split}, learning rate "
            f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), seed {args.seed}"
        )
        seconds, tokens = planned_speed(trainer)
        steps = max(1, int(left * 3600 / seconds))
        trainer.time_budget.planned = steps
        if left:
            say(
                f"  plan   about {steps:,} steps and {amount(steps * tokens)} tokens in the"
                f" {duration(left)} that are left"
            )

    def finish(
        self,
        trainer: CheckpointingTrainer,
        tokenizer: PreTrainedTokenizerFast,
        measure: Callable[[Trainer], dict],
        report: dict | None = None,
    ) -> None:
        """Write the stage directory, each file complete: the model, then `stage.json` with the
        metrics of `measure`, and last what only reports on the run. All processes call it."""
        try:
            self._write(trainer, tokenizer, measure, report)
        finally:
            unlock_directory()
        leave_process_group(trainer)

    def _write(self, trainer, tokenizer, measure, report: dict | None) -> None:
        trainer.check_weights()
        try:
            with reports_disk_errors(self.output_dir, weights_bytes(trainer.model)):
                self._write_model(trainer, tokenizer)
        except UserError:
            shutil.rmtree(self.output_dir / ".partial", ignore_errors=True)
            raise
        metrics = measure(trainer)
        if is_main_process():
            record = self._record(trainer, tokenizer, metrics, report)
            with reports_disk_errors(self.output_dir):
                write_json(self.output_dir / "stage.json", record)
        if self.samples:
            self.samples.sample(trainer.state)
        if is_main_process():
            self._decorate(trainer, record, report)
            say(f"{self.name} is complete in {self.output_dir} after {record['seconds']:.0f} s")
            keep_output_writable()

    def _write_model(self, trainer, tokenizer) -> None:
        partial = self.output_dir / ".partial"
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        save_model(trainer, partial)
        if not is_main_process():
            return
        tokenizer.save_pretrained(partial)
        torch.save(self.args, partial / "training_args.bin")
        sync_files(partial)

        # Of the run before: first what declares it complete
        stale = ("stage.json", SCORE_CARD, "adapter_config.json", "adapter_model.safetensors")
        for name in (*stale, "config.json", "model.safetensors"):
            (self.output_dir / name).unlink(missing_ok=True)
        for file in partial.iterdir():
            file.replace(self.output_dir / file.name)
        partial.rmdir()

    def _record(self, trainer, tokenizer, metrics: dict, report: dict | None) -> dict:
        state = trainer.state
        return {
            **self.description,
            "weights": weights_hash(self.output_dir),
            "weights_step": trainer.weights_step,
            "tokenizer": tokenizer_hash(tokenizer),
            "steps": state.global_step,
            "extended": self.run["extended"],
            "tokens_seen": int(state.num_input_tokens_seen),
            "tokens_per_second": round(self.progress.tokens_per_second(state), 1),
            "trained_share_per_role": (
                report and {role: r["trained_share"] for role, r in report["roles"].items()}
            ),
            "metrics": metrics,
            "best": best_evaluation(trainer),
            "seconds": round(time.time() - trainer.started, 1),
        }

    def _decorate(self, trainer: Trainer, record: dict, report: dict | None) -> None:
        """Write what only reports on the complete run: an error is reported and ends nothing."""
        if report:
            with decoration("keeping the mask report"):
                write_json(self.output_dir / "mask_report.json", report)
        with decoration("reading the curves"):
            pairs = len(trainer.eval_dataset) if self.data.eval is not None else 0
            findings = read_curves(read_log(self.output_dir / "train_log.jsonl"), pairs)
            if findings is not None:
                record["reading"] = findings
                say_findings(findings)
        with decoration("the losses of single tokens"):
            is_of_tokens = loss_unit(self.name) == "nats per token"
            record["token_loss"] = token_loss(trainer) if is_of_tokens else None
        with decoration("counting languages"):
            record["languages"] = language_shares(trainer.train_dataset, trainer.processing_class)
        with decoration("keeping what was found"):
            write_json(self.output_dir / "stage.json", record)
        with decoration("loss.png"):
            log = read_log(self.output_dir / "train_log.jsonl")
            title = title_of(self.name, self.output_dir)
            plot_loss(log, self.output_dir / "loss.png", title, loss_unit(self.name))
        with decoration("the model card"):
            if not write_model_card(self.output_dir):
                say(
                    f"notice: {self.output_dir / CARD} is not as minimind wrote it, and is kept. It"
                    " may describe an earlier model; minimind card --overwrite writes it anew."
                )
        if written := write_report(self.output_dir):
            say(f"report: {written}")
