"""The trainer that writes checkpoints and resumes from them exactly."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from minimind.common.errors import UserError, decoration, reason
from minimind.common.files import (
    write_json,
)
from minimind.common.language import say
from minimind.common.launch import is_main_process
from minimind.stage_directory import check_fit
from minimind.training.checkpoints import (
    best_of,
    keep_logs,
    largest,
    last_good,
    problem_of,
    restore_logs,
    rotate,
    write_manifest,
)
from minimind.training.definition import LENGTH, is_about
from minimind.training.output_directory import (
    RECIPE,
    delete_checkpoint,
)
from minimind.training.saving import Writing, checkpoint_bytes, reports_disk_errors


class ResumableTrainer(Trainer):
    """Mixed into the libraries' trainers; identical to them except:

    a checkpoint is declared whole by a manifest, and rotation keeps whole ones; a resumed run takes
    up what the library forgets (the loss since the last log, the trackers' means, the callbacks'
    counts, time spent), does not train on where the last step was done, and groups rows by length
    as it did before.
    """

    stage = None  # set by `Stage.announce`
    last_saved: int | None = None
    # The step whose weights it has in the end: the last one's or the best one's
    weights_step: int | None = None
    interrupted = False  # set by `InterruptCallback`
    earlier_seconds = 0.0  # of training before the interruption

    def train(self, resume_from_checkpoint=None, **options):
        """The library's; raises UserError where a file of the checkpoint asks for code to be
        run."""
        try:
            return super().train(resume_from_checkpoint, **options)
        except UnpicklingError as error:
            raise UserError(
                f"{resume_from_checkpoint} cannot be loaded: {reason(error)}. Begin anew in another"
                " --output_dir; docs/security.md says what a checkpoint may hold."
            ) from error

    def _save_checkpoint(self, model, trial):
        """Raises NotWrittenError, on all processes, where the disk of one does not take its
        part."""
        step = self.state.global_step
        checkpoint = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.last_saved == step:
            return  # asked for twice, as by --save_steps and a signal
        self.check_weights()
        self.writing = writing = Writing(
            checkpoint, checkpoint_bytes(self.model, self.is_deepspeed_enabled)
        )
        if self.args.should_save:
            with writing.part():
                delete_checkpoint(checkpoint)  # a broken one, or of a run that was given up
                checkpoint.mkdir(parents=True, exist_ok=True)
                # By it it is ours
                write_json(checkpoint / RECIPE, self.stage.definition if self.stage else {})
        barrier()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            # Of several processes the others may wait inside for one that left with an error of
            # another kind.
            with writing.part(Exception if self.args.world_size == 1 else OSError):
                super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.writing = limit, None
        with writing.part():
            torch.save(self._run_state(), checkpoint / f"run_state_{self.args.process_index}.pth")
        if self.args.should_save:
            with writing.part():
                keep_logs(Path(self.args.output_dir), checkpoint)
        writing.check()
        if self.args.should_save:
            with writing.part():
                write_manifest(checkpoint, step=step, processes=self.args.world_size, finite=True)
        writing.check()
        self.last_saved = step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            with decoration("deleting older checkpoints"):
                rotate(checkpoint.parent, limit, [checkpoint, *([Path(best)] if best else [])])

    writing: Writing | None = None  # while a checkpoint is written

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
        engine = self.model_wrapped
        files, script = (
            self.writing.parts(engine.checkpoint_engine, "save", "makedirs"),
            "_copy_recovery_script",
        )
        with files, self.writing.parts(engine, script):
            try:
                super()._save_optimizer_and_scheduler(output_dir)
            except OSError as error:  # of the file "latest", before whose barrier the others wait
                self.writing.keep(error)
                barrier()

    def check_weights(self) -> None:
        """Raises UserError, on all processes, where a weight of any is not finite: nobody should go
        on from it."""
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
        left = (
            f"The same command goes on from {good}."
            if good
            else "There is no checkpoint from before."
        )
        raise UserError(
            f"after step {self.state.global_step:,} the weights are not finite: {names[0]}{rest}."
            " They are not saved and the run ends, since no step could make them finite again."
            f" {left} Lower --learning_rate, and leave --max_nonfinite_steps above 0, which skips"
            " steps that are not finite."
        )

    def _run_state(self) -> dict:
        state = {
            "loss": self._tr_loss.detach().cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "seconds": self.earlier_seconds + time.time() - self.train_began,
            "wall_seconds": time.time() - self.stage.started if self.stage else 0.0,
            "callbacks": {
                type(callback).__name__: callback.state_dict()
                for callback in self.callback_handler.callbacks
                if hasattr(callback, "state_dict")
            },
            "exported": {
                type(callback).__name__: callback.state()["attributes"]
                for callback in self.callback_handler.callbacks
                if isinstance(callback, ExportableState)
            },
        }
        state["training"] = self.model.training  # by which TRL's log chooses between its metrics
        if hasattr(self, "_total_train_tokens"):  # TRL's
            state["trl_tokens"] = self._total_train_tokens
            state["trl_metrics"] = {mode: dict(values) for mode, values in self._metrics.items()}
        if getattr(self.args, "sync_ref_model", False):  # DPO's reference that follows the model
            state["reference"] = self.accelerator.unwrap_model(self.ref_model).state_dict()
        return state

    def take_up(self, checkpoint: Path) -> None:
        """Restore what `_run_state` saved; called when training begins, after the library has reset
        its own."""
        files = sorted(checkpoint.glob("run_state_*.pth"))
        states = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        alike = len(states) == self.args.world_size
        state = states[self.args.process_index if alike else 0]
        # The log shows the mean over the processes: with another number of them each takes that
        # mean.
        loss = state["loss"] if alike else torch.stack([each["loss"] for each in states]).mean(0)
        self._tr_loss.copy_(loss)
        self._total_loss_scalar, self._globalstep_last_logged = (
            state["total_loss"],
            state["last_logged"],
        )
        self._initial_global_step = 0  # the mean loss at the end is over all steps
        self.earlier_seconds = state["seconds"]
        self.state.best_model_checkpoint = best_of(checkpoint)
        self.model.train(state.get("training", True))
        # How often to log, evaluate and save may change
        self.state.compute_steps(self.args, self.state.max_steps)
        for callback in self.callback_handler.callbacks:
            name = type(callback).__name__
            if name in state["callbacks"] and hasattr(callback, "load_state_dict"):
                callback.load_state_dict(state["callbacks"][name])
            for attribute, value in state["exported"].get(name, {}).items():
                setattr(callback, attribute, value)
            if isinstance(callback, EarlyStoppingCallback):
                counted = callback.early_stopping_patience_counter
                self.control.should_training_stop |= counted >= callback.early_stopping_patience
        if "trl_metrics" in state and hasattr(self, "_metrics"):
            self._total_train_tokens = state["trl_tokens"]
            for mode, values in state["trl_metrics"].items():
                self._metrics[mode].update(values)
        if "reference" in state:
            self.accelerator.unwrap_model(self.ref_model).load_state_dict(state["reference"])
        if self.stage:
            self.stage.started -= state["wall_seconds"]
        if self.args.should_save:
            with reports_disk_errors(Path(self.args.output_dir)):
                restore_logs(checkpoint, Path(self.args.output_dir))

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        return (
            SeededEpochs(sampler, self.args.seed)
            if isinstance(sampler, LengthGroupedSampler)
            else sampler
        )

    def _issue_warnings_after_load(self, load_result):
        # Written once, see `stages.save_model`
        tied = getattr(self.model, "all_tied_weights_keys", ())
        missing = [key for key in load_result.missing_keys if key not in tied]
        check_fit(
            Path(self.args.resume_from_checkpoint or self.args.output_dir),
            missing,
            load_result.unexpected_keys,
        )

    def _load_optimizer_and_scheduler(self, checkpoint):
        """The library's, and then what an accepted change of the recipe asks for in place of the
        checkpoint's."""
        changes = self.stage.changes if self.stage and checkpoint else {}
        old, new = changes.get("lr_scheduler_type", (None, None))
        # They keep another kind of state
        if not {old, new}.isdisjoint(("reduce_lr_on_plateau", "greedy")):
            raise UserError(
                f"--lr_scheduler_type {new}: a run cannot be resumed with it that had {old}. Put"
                " the old one back, or begin anew in another --output_dir."
            )
        super()._load_optimizer_and_scheduler(checkpoint)
        if not changes:
            return
        old, new = changes.get("learning_rate", (1, 1))
        schedule = self.lr_scheduler

        def scaled(rate: float) -> float:
            return rate * new / old if old else new

        if hasattr(schedule, "base_lrs"):
            schedule.base_lrs = list(map(scaled, schedule.base_lrs))
        for index, group in enumerate(self.optimizer.param_groups):
            group["lr"] = scaled(group["lr"])
            if "initial_lr" in group:
                group["initial_lr"] = scaled(group["initial_lr"])
            if hasattr(schedule, "lr_lambdas"):  # the next step's, by the new schedule
                group["lr"] = schedule.base_lrs[index] * schedule.lr_lambdas[index](
                    schedule.last_epoch
                )
            if "weight_decay" in changes and group.get("weight_decay"):
                group["weight_decay"] = self.args.weight_decay
            if "betas" in group:
                group["betas"] = (self.args.adam_beta1, self.args.adam_beta2)
        # What the next log shows
        schedule._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _run_epoch(self, *args, start_time, **kwargs):
        self.train_began = start_time
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, start_time=start_time, **kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        # `--save_strategy best` found this step no better, and did not save it
        if self.interrupted:
            self._save_checkpoint(self.model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.weights_step = self.state.global_step
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(
                trial, num_train_samples, start_time - self.earlier_seconds
            )
        finally:
            self.args.save_total_limit = limit

    def _load_best_model(self):
        """The library's, where the best checkpoint is whole; sets `weights_step`. The same on all
        processes."""
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

    def create_model_card(self, *args, **kwargs):
        """TRL's form with empty fields only where it goes to the hub: a user's README.md stays."""
        if self.args.push_to_hub:
            with decoration("the model card"):
                super().create_model_card(*args, **kwargs)


class SeededEpochs(Sampler):
    """A sampler whose order depends on seed and epoch alone, not on the random numbers drawn
    before."""

    def __init__(self, sampler: Sampler, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self):
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(self.sampler)

    def __len__(self):
        return len(self.sampler)


class ResumeCallback(TrainerCallback):
    """Takes up an interrupted run when training begins; to be added last.

    A checkpoint that falls on the last step, or an epoch's, is written after what the end of the
    epoch brings (an evaluation, say): going on from it begins with the next epoch.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer
        self.postponed = False

    def on_train_begin(self, args, state, control, **kwargs):
        if args.resume_from_checkpoint:
            self.trainer.take_up(Path(args.resume_from_checkpoint))
            self._say_rate(state, kwargs["optimizer"])

    def _say_rate(self, state, optimizer) -> None:
        """Where another length of the run moves the learning rate, as a cosine that has come down
        before."""
        rates = [line["learning_rate"] for line in state.log_history if "learning_rate" in line]
        changes = self.trainer.stage.changes if self.trainer.stage else {}
        rate = optimizer.param_groups[0]["lr"]
        if rates and state.is_world_process_zero and any(is_about(key, LENGTH) for key in changes):
            say(
                f"the learning rate was {rates[-1]:.3g} in the last step, and is {rate:.3g} in the"
                " next"
            )

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save and (
            state.epoch == int(state.epoch) or state.global_step >= state.max_steps
        ):
            control.should_save, self.postponed = False, True

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_save |= self.postponed
        self.postponed = False


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()
