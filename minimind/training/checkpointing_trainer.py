"""The trainer that writes checkpoints: complete ones, or none and one message."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minimind.common.errors import UserError, decoration
from minimind.common.files import write_json
from minimind.common.language import say
from minimind.common.launch import is_main_process, notice
from minimind.training.callback_handler import RunCallbackHandler
from minimind.training.checkpoints import (
    keep_logs,
    largest,
    last_good,
    problem_of,
    rotate,
    write_manifest,
)
from minimind.training.output_directory import RECIPE, delete_checkpoint
from minimind.training.resumable_trainer import ResumableTrainer
from minimind.training.saving import (
    REMEDY,
    NotWrittenError,
    Writing,
    checkpoint_bytes,
    directory_bytes,
)

BEST = ("best_metric", "best_global_step", "best_model_checkpoint")  # of a trainer's state


class CheckpointingTrainer(ResumableTrainer):
    """Mixed into the libraries' trainers; identical to them except:

    A manifest declares a checkpoint complete, and rotation keeps complete ones.

    A checkpoint that finds no room is left out, what there is of it is removed, and training
    continues. Nor is one written at a step that is not finite: it is postponed to the next that is,
    see `DueCheckpointCallback`. The state before is the one to keep, and rotation would delete it.
    """

    definition: dict  # all that decides the result of the run; recorded in each checkpoint
    interrupted = False  # set by `InterruptCallback`
    postponed = False  # a checkpoint, to the next step that is finite
    last_saved: int | None = None
    weights_step: int | None = None  # the step of the final weights: the last one or the best one
    needed = 0  # bytes of a checkpoint
    writing: Writing | None = None  # while a checkpoint is written

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.definition, self.best_before = {}, {}
        self.callback_handler = RunCallbackHandler(self.callback_handler)

    def _determine_best_metric(self, metrics, trial):
        if self.state.best_global_step != self.state.global_step:
            self.best_before = {name: getattr(self.state, name) for name in BEST}
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model, trial):
        state, handler = self.state, self.callback_handler
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        was_postponed, self.postponed = self.postponed, self.in_streak()
        try:
            if self.postponed:
                raise NotWrittenError("the step is not finite")
            self._check_room(checkpoint)
            self._write_checkpoint(checkpoint, model, trial)
            self.needed, handler.left_out = directory_bytes(checkpoint), False
        except NotWrittenError as error:
            handler.left_out = True
            if is_main_process():
                with suppress(OSError):
                    delete_checkpoint(checkpoint)
            if state.best_global_step == state.global_step:  # it cannot be loaded again
                vars(state).update(self.best_before)
            outlook = "" if self.control.should_training_stop else ", training continues"
            if not self.postponed:
                notice(f"step {state.global_step}: no checkpoint{outlook}. {error}. {REMEDY}.")
            elif not was_postponed:
                notice(f"step {state.global_step}: no checkpoint, since {error}")

    def _check_room(self, checkpoint: Path) -> None:
        """Raise NotWrittenError, on all processes, where the main process finds no room."""
        self.needed = self.needed or checkpoint_bytes(self.model, self.is_deepspeed_enabled)
        writing, output_dir = Writing(checkpoint, self.needed), checkpoint.parent
        if is_main_process():
            with writing.part():
                output_dir.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
                if shutil.disk_usage(output_dir).free < self.needed:
                    full, size = os.strerror(errno.ENOSPC), f"{self.needed / 1e6:,.0f} MB"
                    raise OSError(errno.ENOSPC, f"{full}, it needs about {size}")
        writing.check()

    def _write_checkpoint(self, checkpoint: Path, model, trial) -> None:
        """Raise NotWrittenError, on all processes, where the disk of one does not take its part."""
        step, args = self.state.global_step, self.args
        if self.last_saved == step:
            return  # requested twice, as by --save_steps and a signal
        self.check_weights()

        # An empty directory that is ours, since it has the definition.
        writing = Writing(checkpoint, checkpoint_bytes(self.model, self.is_deepspeed_enabled))
        if args.should_save:
            with writing.part():
                delete_checkpoint(checkpoint)  # a broken one, or of a run that was given up
                checkpoint.mkdir(parents=True, exist_ok=True)
                write_json(checkpoint / RECIPE, self.definition)
        barrier()

        # The library's files. Where one of several processes left with an error of another kind,
        # the others might wait inside for it.
        self.writing = writing
        try:
            with (
                self._without_rotation() as limit,
                writing.part(Exception if args.world_size == 1 else OSError),
            ):
                super()._save_checkpoint(model, trial)
        finally:
            self.writing = None

        # Ours, and when all are written the manifest.
        with writing.part():
            torch.save(self.run_state(), checkpoint / f"run_state_{args.process_index}.pth")
        if args.should_save:
            with writing.part():
                keep_logs(Path(args.output_dir), checkpoint)
        writing.check()
        if args.should_save:
            with writing.part():
                facts = {"step": step, "processes": args.world_size, "finite": True}
                if self.time_budget:
                    facts["elapsed"] = round(self.time_budget.elapsed, 3)
                write_manifest(checkpoint, **facts)
        writing.check()
        self.last_saved = step

        if args.should_save:
            best = self.state.best_model_checkpoint
            with decoration("deleting older checkpoints"):
                rotate(checkpoint.parent, limit, [checkpoint, *([Path(best)] if best else [])])

    @contextmanager
    def _without_rotation(self) -> Iterator[int | None]:
        """Keep the library from deleting checkpoints; yields the limit of their number."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield limit
        finally:
            self.args.save_total_limit = limit

    # The parts of a checkpoint, between which the libraries let the processes wait for each other.

    def _part(self):
        return self.writing.part() if self.writing else nullcontext()

    def _save(self, *args, **kwargs):
        with self._part():
            super()._save(*args, **kwargs)

    def _save_rng_state(self, output_dir):
        with self._part():
            super()._save_rng_state(output_dir)

    def _save_scaler(self, output_dir):
        with self._part():
            super()._save_scaler(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        if not (self.writing and self.is_deepspeed_enabled):
            with self._part():
                super()._save_optimizer_and_scheduler(output_dir)
            return
        # DeepSpeed's engine waits too, and nothing of it can be overridden from outside.
        engine, parts = self.model_wrapped, self.writing.parts
        with (
            parts(engine.checkpoint_engine, "save", "makedirs"),
            parts(engine, "_copy_recovery_script"),
        ):
            try:
                super()._save_optimizer_and_scheduler(output_dir)
            except OSError as error:  # of the file "latest", before whose barrier the others wait
                self.writing.keep(error)
                barrier()

    def check_weights(self) -> None:
        """Raise UserError, on all processes, where a weight of any is not finite: nobody should
        continue from it."""
        weights = self.accelerator.unwrap_model(self.model).state_dict(keep_vars=True)
        weights = {name: getattr(value, "ds_tensor", value) for name, value in weights.items()}
        weights = {name: value for name, value in weights.items() if value.is_floating_point()}
        values = torch.stack(
            [largest(value).float().to(self.args.device) for value in weights.values()]
        )
        finite = values.isfinite().tolist()
        names = gather_object(
            [name for name, is_finite in zip(weights, finite, strict=True) if not is_finite]
        )
        if not names:
            return
        rest = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        good = last_good(Path(self.args.output_dir))
        left = "There is no earlier checkpoint."
        if good:
            left = f"The same command continues from {good}."
        raise UserError(
            f"after step {self.state.global_step:,} the weights are not finite: {names[0]}{rest}."
            " They are not saved and the run ends, since no step could make them finite again."
            f" {left} Lower --learning_rate, and leave --max_nonfinite_steps above 0, which skips"
            " steps that are not finite."
        )

    # The end of training.

    def _finalize_training(self, trial, num_train_samples, start_time):
        # `--save_strategy best` found this step no better, and did not save it
        if self.interrupted:
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.weights_step = self.state.global_step
        with self._without_rotation():
            return super()._finalize_training(trial, num_train_samples, start_time)

    def _load_best_model(self):
        """The library's, where the best checkpoint is complete; sets `weights_step`. The same on
        all processes."""
        if self.interrupted:
            return
        best = Path(self.state.best_model_checkpoint)
        problem = problem_of(best, weights_alone=True) if is_main_process() else None
        (problem,) = broadcast_object_list([problem])
        if problem is None:
            super()._load_best_model()
            self.weights_step = int(best.name.rpartition("-")[2])
        elif is_main_process():
            say(f"warning: the best model cannot be loaded from {best}: {problem}", file=sys.stderr)


class DueCheckpointCallback(TrainerCallback):
    """Decides when a checkpoint that falls due is written.

    One that was postponed falls due again at the next step that is finite. One that falls on the
    last step, or on an epoch's, is written after what the end of the epoch brings (an evaluation,
    say): a run resumed from it begins with the next epoch.
    """

    def __init__(self, trainer: CheckpointingTrainer):
        self.trainer = trainer
        self.at_epoch_end = False

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.trainer.postponed and not self.trainer.in_streak()
        is_last = state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        if control.should_save and is_last:
            control.should_save, self.at_epoch_end = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.at_epoch_end
        self.at_epoch_end = False


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
