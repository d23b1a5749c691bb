"""What a run writes to a disk that may be full, limited, read-only or broken: whole, or left out
with one message."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import (
    Trainer,
    TrainerCallback,
)

from minimind.common.errors import UserError
from minimind.common.launch import is_main_process, notice
from minimind.training.output_directory import delete_checkpoint

PROBE = 1 << 20  # bytes that are really written to learn whether a disk takes them
DISK_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
}
REMEDY = "Make room, or lift what limits it (a quota, ulimit -f, a read-only mount)"
DISK_ERRORS |= {errno.ESTALE, errno.ENOTCONN}  # network file systems that are gone


class NotWrittenError(UserError):
    """Something could not be written, and it is the disk's fault."""


def disk_fault(
    directory: Path, size: int = 0, error: BaseException | None = None, probe: int = PROBE
) -> OSError | None:
    """Why `size` bytes cannot be written to a directory (or above it, where it does not exist),
    None if they can be.

    An error number of the system in `error` decides. The libraries hide it behind words of their
    own, so otherwise the disk is asked: the space that is left, `probe` bytes that are written
    through, a file of that size.
    """
    while error is not None:
        number = getattr(error, "errno", None)
        # Rust's, in safetensors and tokenizers
        if said := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(said[1])
        if number in DISK_ERRORS:
            return OSError(number, os.strerror(number))
        error = error.__cause__ or error.__context__
    try:
        while not directory.is_dir():
            directory = directory.parent
        if shutil.disk_usage(directory).free < size:
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(probe))
            file.flush()
            # Its last byte alone, which a limit of the size of files does not let pass
            if size > probe:
                os.pwrite(file.fileno(), b"0", size - 1)
            os.fsync(file.fileno())
    except OSError as failure:
        return failure
    return None


def not_written(path: Path, fault: OSError) -> NotWrittenError:
    """What is said of something that a disk did not take."""
    try:
        free = (
            f"{shutil.disk_usage(path if path.exists() else path.parent).free / 1e6:,.0f} MB free"
        )
    except OSError:
        free = "how much is free is not known"
    return NotWrittenError(f"{path} could not be written: {fault.strerror} ({free})")


@contextmanager
def reports_disk_errors(path: Path, size: int = 0) -> Iterator[None]:
    """What is written below `path` inside this block, about `size` bytes, succeeds, or ends in one
    UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        fault = disk_fault(path, size, error)
        if fault is None:
            raise
        raise UserError(
            f"{not_written(path, fault)}. What was complete before is unchanged. {REMEDY}, then run"
            " the same command again."
        ) from error


def check_writable(directory: Path) -> None:
    """Make the directory, and raise UserError where a file in it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        fault = disk_fault(directory, probe=1)
    except OSError as error:
        fault = error
    if fault:
        raise UserError(
            f"--output_dir {directory} cannot be written: {fault.strerror or fault}. Give a"
            " directory on a disk with room, that is yours to write."
        )


class Writing:
    """The files of one checkpoint, while all processes write theirs.

    The libraries let the processes wait for each other between the files: one that left with an
    error would let the others wait for ever. So the first error of a process is kept, what follows
    is tried all the same, and `check` tells it to all.
    """

    def __init__(self, directory: Path, size: int):
        self.directory, self.size = directory, size
        self.error: Exception | None = None
        self.fault: OSError | None = None

    @contextmanager
    def part(self, kind: type[Exception] = Exception) -> Iterator[None]:
        """A block that writes; an error of this `kind` in it is kept."""
        try:
            yield
        except kind as error:
            self.keep(error)

    def keep(self, error: Exception) -> None:
        """Keep an error, unless there was one before, and see at once whether the disk is at
        fault."""
        if self.error is None:
            self.error, self.fault = error, disk_fault(self.directory, self.size, error)

    @contextmanager
    def parts(self, owner, *names: str) -> Iterator[None]:
        """A block in which these methods of an object are parts."""
        for name in names:
            setattr(owner, name, self.part()(getattr(owner, name)))
        try:
            yield
        finally:
            for name in names:
                delattr(owner, name)

    def check(self) -> None:
        """Called by all processes, raises on all of them what one met.

        Raises:
            NotWrittenError: the disk is at fault.
        """
        found = None
        if self.error is not None:
            words = f"{type(self.error).__name__}: {self.error}"
            found = (words, self.fault and (self.fault.errno, self.fault.strerror))
        errors = [each for each in gather_object([found]) if each]
        if self.error is not None and self.fault is None:
            raise self.error
        for words, fault in errors:
            if fault is None:
                raise RuntimeError(f"another process could not write {self.directory}: {words}")
        if errors:
            raise not_written(self.directory, OSError(*errors[0][1])) from self.error


def in_streak(trainer: Trainer) -> bool:
    """Whether the last step of a guarded run was not finite; waits for the device."""
    return any(
        each.in_streak()
        for each in trainer.callback_handler.callbacks
        if hasattr(each, "in_streak")
    )


def numel(parameter: torch.Tensor) -> int:
    """Elements of a parameter, also of one that ZeRO-3 divides."""
    return getattr(parameter, "ds_numel", parameter.numel())


def weights_bytes(model: torch.nn.Module) -> int:
    """The size of all weights as they are."""
    return sum(numel(p) * p.element_size() for p in model.parameters())


def checkpoint_bytes(model: torch.nn.Module, deepspeed: bool) -> int:
    """About how much a checkpoint takes: weights as they are, two fp32 moments of AdamW for what is
    trained, and under DeepSpeed its fp32 master weights."""
    trained = [p for p in model.parameters() if p.requires_grad]
    elements = sum(map(numel, trained))
    saved = trained or list(model.parameters())
    if elements * 2 > sum(map(numel, model.parameters())):  # no adapter: the whole model is written
        saved = list(model.parameters())
    return sum(numel(p) * p.element_size() for p in saved) + elements * (12 if deepspeed else 8)


def directory_bytes(path: Path) -> int:
    """The size of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


class SaveCallback(TrainerCallback):
    """A checkpoint that finds no room is left out, and training goes on; what there is of it is
    removed.

    Nor is one written at a step that is not finite: it falls to the next step that is. The state
    before is the one to keep, and the rotation would delete it.

    The main process looks at the room, before anything is written, and all do as it says.
    """

    def __init__(self, trainer: Trainer, output_dir: Path):
        self.trainer, self.output_dir = trainer, output_dir
        self.needed = 0  # bytes
        self.left_out = self.postponed = False
        trainer._save_checkpoint = self._guarded(trainer._save_checkpoint)
        trainer.callback_handler.on_save = self._unless_left_out(trainer.callback_handler.on_save)

    def on_step_begin(self, args, state, control, **kwargs):
        self.best = state.best_metric, state.best_global_step, state.best_model_checkpoint

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= self.postponed and not in_streak(self.trainer)

    def _guarded(self, save_checkpoint):
        @wraps(save_checkpoint)
        def wrapped(model, trial):
            state = self.trainer.state
            target = self.output_dir / f"checkpoint-{state.global_step}"
            put_off, self.postponed = self.postponed, in_streak(self.trainer)
            try:
                if self.postponed:
                    raise NotWrittenError("the step is not finite")
                self._check_room(target)
                save_checkpoint(model, trial)
                self.needed, self.left_out = directory_bytes(target), False
            except NotWrittenError as error:
                self.left_out = True
                if is_main_process():
                    with suppress(OSError):
                        delete_checkpoint(target)
                if state.best_global_step == state.global_step:  # it cannot be loaded again
                    state.best_metric, state.best_global_step, state.best_model_checkpoint = (
                        self.best
                    )
                goes_on = "" if self.trainer.control.should_training_stop else ", training goes on"
                if not self.postponed:
                    notice(f"step {state.global_step}: no checkpoint{goes_on}. {error}. {REMEDY}.")
                elif not put_off:
                    notice(f"step {state.global_step}: no checkpoint, since {error}")

        return wrapped

    def _check_room(self, target: Path) -> None:
        self.needed = self.needed or checkpoint_bytes(
            self.trainer.model, self.trainer.is_deepspeed_enabled
        )
        room = Writing(target, self.needed)
        if is_main_process():
            with room.part():
                self.output_dir.mkdir(parents=True, exist_ok=True)  # somebody may have deleted it
                free = shutil.disk_usage(self.output_dir).free
                if free < self.needed:
                    needed = (
                        f"{os.strerror(errno.ENOSPC)}, it needs about {self.needed / 1e6:,.0f} MB"
                    )
                    raise OSError(errno.ENOSPC, needed)
        room.check()

    def _unless_left_out(self, on_save):
        @wraps(on_save)
        def wrapped(args, state, control):
            if not self.left_out:
                return on_save(args, state, control)
            control.should_save = False
            for callback in self.trainer.callback_handler.callbacks:
                if hasattr(callback, "on_left_out"):
                    callback.on_left_out(args, state, control)
            return control

        return wrapped


def save_model(trainer: Trainer, directory: Path) -> None:
    """Save weights, config and model code; every process calls it, since sharded weights are
    gathered.

    Identical to `Trainer.save_model` except: a tied `lm_head.weight` is written once also under
    ZeRO, where accelerate clones the state dict and the library no longer sees that the two are
    one; `use_cache`, which training turns off, is on again; an adapter names its base by an
    absolute path.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_main_process():
        return
    # TRL shadows `forward` on the instance; the saved code is the class's, so nothing of it reaches
    # the checkpoint.
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for tied in base.all_tied_weights_keys:
        state_dict.pop(tied, None)
    if isinstance(model, PeftModel):
        name = model.active_adapter
        model.peft_config[name].base_model_name_or_path = str(
            Path(base.config._name_or_path).resolve()
        )
    use_cache, base.config.use_cache = base.config.use_cache, True
    try:
        model.save_pretrained(directory, state_dict=state_dict)
    finally:
        base.config.use_cache = use_cache  # an evaluation may follow
    (directory / "README.md").unlink(missing_ok=True)  # peft's model card, a form with empty fields
