"""One run of a stage: where it starts, what it says, and the stage directory it writes (see
checkpoints.py)."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cached_property
from pathlib import Path

import torch
import transformers
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import align_special_tokens

from minimind.common.errors import UserError, decoration
from minimind.common.files import sync_files, write_json
from minimind.common.language import say, translated
from minimind.common.launch import is_main_process, leave_process_group
from minimind.common.streams import keep_output_writable
from minimind.costs.parameters import active_parameters
from minimind.evaluation import bits_per_nat, token_loss_distribution, token_losses
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
    ProgressCallback,
    RouterLoadCallback,
)
from minimind.training.definition import definition_of
from minimind.training.elastic import Batch, prepare_checkpoint, share_last_rows
from minimind.training.guards import install_guards
from minimind.training.heartbeat import HeartbeatCallback
from minimind.training.output_directory import unlock_directory
from minimind.training.plots import loss_unit, read_log
from minimind.training.report import ReportCallback, title_of, write_report
from minimind.training.resumable_trainer import ResumableTrainer, ResumeCallback
from minimind.training.resume import begin
from minimind.training.samples import SampleCallback, prepare_prompts
from minimind.training.saving import reports_disk_errors, save_model, weights_bytes
from minimind.training.signals import InterruptCallback

# An old name that accelerate 1.15 and DeepSpeed 0.19 still call, torch 2.13 has renamed the
# collective; nothing a user could mend.
warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)


def check_same_data(data: dict) -> None:
    """Raises UserError in all processes where they have read different data: a file changed while
    they started."""
    if any(other != data for other in gather_object([data])):
        raise UserError(
            "the processes of this run have read different data: a file changed while they started,"
            " or their hosts have other files. Run the command again when nothing writes to the"
            " files."
        )


class Stage:
    """One run of a stage: says what it will do, keeps its record, writes its directory.

    `data` is what the loaders return: `eval`, the held-out rows or None, and `facts`, what was
    counted. `options`: the other dataclasses of arguments that decide the result. After it
    `args.resume_from_checkpoint` is the checkpoint to go on from, or None; see starting.py.

    Raises:
        UserError: the output directory is the parent or holds it, or see `resume.begin`.
        SystemExit: the stage is complete already.
    """

    def __init__(
        self,
        name: str,
        args: transformers.TrainingArguments,
        data,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        parent: Path | None = None,
        options: Iterable = (),
    ):
        options = list(options)
        adapter = any(getattr(each, "use_peft", False) for each in options)
        self.name = name
        # What it calls itself, as recipes and plans do
        self.kind = "lora" if adapter and name == "sft" else name
        self.args = args
        self.facts = data.facts
        self.output_dir = Path(args.output_dir)
        self.parent = parent
        self.started = time.time()
        if parent and self.output_dir.resolve() in (parent.resolve(), *parent.resolve().parents):
            raise UserError(
                f"--output_dir {self.output_dir} is the stage this run starts from, or holds it."
                " Give another one."
            )
        if data.eval is None:
            if args.load_best_model_at_end or args.early_stopping_patience is not None:
                raise UserError(
                    "choosing the best model and stopping early need held-out rows, and there are"
                    " none. Give --eval_files, or a larger --eval_ratio."
                )
            args.eval_strategy = IntervalStrategy.NO  # the Trainer refuses to evaluate on nothing
        align_special_tokens(model, tokenizer)  # a chat template may have brought another end token
        self.definition = definition_of(name, args, data, model, tokenizer, parent, options)
        check_same_data(self.definition["data"])
        pipeline = f"{self.output_dir.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.run, self.changes = begin(args, self.definition, pipeline)
        args.eval_on_start = data.eval is not None and args.resume_from_checkpoint is None

    @cached_property
    def lineage(self) -> dict:
        """Parent directory, its weights' hash, and the id that all stages of one pipeline share."""
        if self.parent is None:
            return {"parent": None, "pipeline": self.run["pipeline"]}
        record = read_stage(self.parent)
        return {
            "parent": provenance(self.parent),
            "pipeline": record.get("pipeline") or self.parent.name,
        }

    @cached_property
    def description(self) -> dict:
        """What is known of the run before it begins."""
        return {
            "stage": self.kind,
            **self.lineage,
            "data": self.facts,
            "options": changed_options(self.args),
            "seed": self.args.seed,
            "git_commit": git_commit(),
            "command": " ".join(sys.argv),
            "python": sys.version.split()[0],
            "libraries": library_versions(),
        }

    def watch(self, trainer: Trainer) -> None:
        """Progress lines, samples, the report, early stopping."""
        args, tokenizer = self.args, trainer.processing_class
        trainer.remove_callback(PrinterCallback)
        self.progress = ProgressCallback(
            self.output_dir, trainer, bits_per_nat(self.facts["train"])
        )
        trainer.callback_handler.callbacks.insert(0, self.progress)
        self.samples = None
        if args.sample_steps >= 0:
            positions = trainer.model.config.max_position_embeddings
            prompts = prepare_prompts(args, self.name != "pretrain", tokenizer, positions)
            self.samples = SampleCallback(
                trainer, tokenizer, prompts, self.output_dir, args.sample_steps, args.sample_tokens
            )
            trainer.add_callback(self.samples)
        if args.early_stopping_patience is not None:
            trainer.add_callback(
                EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold)
            )
        if args.metric_for_best_model:
            trainer.add_callback(Baseline())
        trainer.add_callback(ReportCallback(self.output_dir, self.description))

    def announce(self, trainer: Trainer) -> None:
        """Print data, parameters and steps of the run to come, and let `trainer` report its
        progress in our lines."""
        if self.args.deepspeed and not trainer.is_deepspeed_enabled:
            raise RuntimeError(
                "--deepspeed was given, but accelerate left DeepSpeed out: check ACCELERATE_*"
                " variables"
            )
        self.watch(trainer)
        if getattr(trainer.model.config, "num_experts", 0):
            trainer.callback_handler.callbacks.insert(0, RouterLoadCallback(trainer.model))
        from minimind.training.plan_callback import PlanCallback

        trainer.callback_handler.callbacks.insert(0, PlanCallback(trainer))
        trainer.stage = self
        trainer.add_callback(HeartbeatCallback())
        trainer.add_callback(InterruptCallback(trainer))
        # TRL gathers the rewards of a micro-batch, which needs as many on every process
        if self.name != "dpo":
            share_last_rows(trainer)
        prepare_checkpoint(trainer)
        trainer.add_callback(ResumeCallback(trainer))
        decorations = (
            ProgressCallback,
            SampleCallback,
            ReportCallback,
            PlanCallback,
            RouterLoadCallback,
        )
        install_guards(trainer, self.output_dir, *decorations, HeartbeatCallback)
        trainer.add_callback(ChangeCallback(trainer))
        from minimind.doctor import examine_run  # it reads recipes too, and so needs this module

        examine_run(self.name, trainer, self.facts, self.parent)
        if is_main_process():
            with decoration("describing the run"):
                self._describe(trainer)

    def _describe(self, trainer: Trainer) -> None:
        """Print data, parameters and steps."""
        args, model, facts = self.args, trainer.model, self.facts
        world = args.world_size
        batch = Batch(world, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        epoch = math.ceil(len(trainer.train_dataset) / batch.rows)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(epoch * args.num_train_epochs)
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        start = args.resume_from_checkpoint or self.parent or "random weights"
        say(f"{self.kind} -> {self.output_dir}  (from {start})")
        for part, title in (("train", "  train  "), ("eval", "  eval   ")):
            counts = {
                key: value
                for key, value in facts[part].items()
                if key != "files" and isinstance(value, int)
            }
            listed = ", ".join(
                f"{value:,} {key.replace('_', ' ')}" for key, value in counts.items()
            )
            files = " ".join(facts[part]["files"]) or (
                "held out of the above" if part == "eval" else ""
            )
            say(f"{translated(title)}{listed}  {translated(files)}")
        active = active_parameters(model)
        shown = f"{parameters / 1e6:.2f} M"
        shown += translated(f" ({active / 1e6:.2f} M active)") if active < parameters else ""
        shown += translated(f", {trainable / 1e6:.2f} M trained") if trainable < parameters else ""
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        engine = "DeepSpeed" if trainer.is_deepspeed_enabled else "plain"
        say(f"  model  {shown} parameters, {precision}, {args.device.type} x {world}, {engine}")
        say(
            f"  steps  {steps:,} of {batch}, learning rate "
            f"{args.learning_rate:g} ({args.lr_scheduler_type.value}), seed {args.seed}"
        )

    def finish(
        self,
        trainer: ResumableTrainer,
        tokenizer: PreTrainedTokenizerFast,
        measure: Callable[[Trainer], dict],
        report: dict | None = None,
    ) -> None:
        """Write the stage directory, every file at once: the model, then `stage.json` with what
        `measure` finds, and last what only tells about the run. All processes call it."""
        try:
            self._write(trainer, tokenizer, measure, report)
        finally:
            unlock_directory()
        leave_process_group(trainer)

    def _write(
        self, trainer: ResumableTrainer, tokenizer: PreTrainedTokenizerFast, measure, report
    ) -> None:
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
            say(f"{self.kind} is complete in {self.output_dir} after {record['seconds']:.0f} s")
            keep_output_writable()

    def _write_model(self, trainer: Trainer, tokenizer: PreTrainedTokenizerFast) -> None:
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
        (self.output_dir / "stage.json").unlink(missing_ok=True)
        for stale in (
            "adapter_config.json",
            "adapter_model.safetensors",
            "config.json",
            "model.safetensors",
        ):
            (self.output_dir / stale).unlink(missing_ok=True)
        for file in partial.iterdir():
            file.replace(self.output_dir / file.name)
        partial.rmdir()

    def _record(
        self,
        trainer: ResumableTrainer,
        tokenizer: PreTrainedTokenizerFast,
        metrics: dict,
        report: dict | None,
    ) -> dict:
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
            "best": self.best(trainer),
            "seconds": round(time.time() - self.started, 1),
        }

    def _decorate(self, trainer: Trainer, record: dict, report: dict | None) -> None:
        """Write what only tells about the run that is complete: whatever goes wrong is said and
        ends nothing."""
        if report:
            with decoration("keeping the mask report"):
                write_json(self.output_dir / "mask_report.json", report)
        with decoration("the losses of single tokens"):
            record["token_loss"] = self.token_loss(trainer)
            write_json(self.output_dir / "stage.json", record)
        with decoration("loss.png"):
            from minimind.training.plots import plot_loss  # matplotlib may be missing or broken

            log = read_log(self.output_dir / "train_log.jsonl")
            plot_loss(
                log,
                self.output_dir / "loss.png",
                title_of(self.kind, self.output_dir),
                loss_unit(self.kind),
            )
        if written := write_report(self.output_dir):
            say(f"report: {written}")

    def best(self, trainer: ResumableTrainer) -> dict | None:
        """The best evaluation by --metric_for_best_model; its step is 0 where none beat the
        start."""
        state, metric = trainer.state, self.args.metric_for_best_model
        if state.best_metric is None or not math.isfinite(state.best_metric):
            return None
        logged = metric if metric.startswith("eval_") else f"eval_{metric}"
        # The state's own best step is that of a checkpoint, and there may be none.
        step = next(
            (each["step"] for each in state.log_history if each.get(logged) == state.best_metric), 0
        )
        best = {"metric": metric, "value": float(state.best_metric), "step": step}
        if not step:
            say(
                f"no evaluation was better than the {metric} {best['value']:.4f} before the first"
                " step"
            )
        elif self.args.load_best_model_at_end and trainer.weights_step == step:
            say(f"the best model is that of step {step:,}: {metric} {best['value']:.4f}")
        elif self.args.load_best_model_at_end:
            say(
                f"warning: the best evaluation is that of step {step:,}: {metric}"
                f" {best['value']:.4f}, but its checkpoint is not there: the weights of step"
                f" {trainer.weights_step:,} were saved"
            )
        return best

    def token_loss(self, trainer: Trainer) -> dict | None:
        """How the loss of single held-out tokens is distributed; None for pairs, and where weights
        are spread."""
        known = self.name in ("pretrain", "sft") and isinstance(trainer.eval_dataset, Dataset)
        if not known or is_deepspeed_zero3_enabled():
            return None
        losses = token_losses(trainer)
        losses = losses[~losses.isnan()]
        return token_loss_distribution(losses) if len(losses) else None


def changed_options(args: transformers.TrainingArguments) -> dict:
    """Options of a run that are not the library's defaults, as JSON; without tokens, which the
    library masks."""
    given, changed = args.to_dict(), {}
    defaults = {
        field.name: field
        for field in (*dataclasses.fields(args), *dataclasses.fields(TrainingArguments))
    }
    for name, field in defaults.items():
        default = (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        default = default.value if isinstance(default, Enum) else default
        elsewhere = name.endswith("_token") or name in ("output_dir", "run_name", "local_rank")
        if name in given and given[name] != default and not elsewhere:
            changed[name] = given[name]
    return json.loads(json.dumps(changed, default=str))


def git_commit() -> str | None:
    """The commit of the project's checkout, with "+" where it has uncommitted changes; None outside
    of git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        run = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, encoding="utf-8", timeout=30
        )
    except (OSError, ValueError, subprocess.SubprocessError):  # no git, or not one that works
        return None
    return run.stdout.strip() or None
