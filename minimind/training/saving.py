"""Writing to a disk that may be full, limited, read-only or broken: what is written is complete, or
left out with one message."""

import errno
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import Trainer

from minimind.common.errors import UserError
from minimind.common.launch import is_main_process

PROBE = 1 << 20  # bytes that are written to learn whether a disk takes them
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
DISK_ERRORS |= {errno.EACCES, errno.EPERM}
DISK_ERRORS |= {errno.ESTALE, errno.ENOTCONN}  # network file systems that are gone
REMEDY = "Make room, or lift what limits it (a quota, ulimit -f, a read-only mount)"


class NotWrittenError(UserError):
    """Something could not be written, and the disk is at fault."""


def disk_fault(
    directory: Path, size: int = 0, error: BaseException | None = None, probe: int = PROBE
) -> OSError | None:
    """Why `size` bytes cannot be written to a directory (or above it, where it does not exist),
    None if they can be.

    A system's error number in `error` decides. Where a library hides it behind words of its own,
    the disk is tested: the space that is left, `probe` bytes written through, a file of that size.
    """
    while error is not None:
        number = getattr(error, "errno", None)
        # Rust's form, in safetensors and tokenizers
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            number = int(match[1])
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
            # The last byte alone meets a limit of the size of files
            if size > probe:
                os.pwrite(file.fileno(), b"0", size - 1)
            os.fsync(file.fileno())
    except OSError as failure:
        return failure
    return None


def not_written(path: Path, fault: OSError) -> NotWrittenError:
    """The error about something that a disk did not take."""
    try:
        usage = shutil.disk_usage(path if path.exists() else path.parent)
        free = f"{usage.free / 1e6:,.0f} MB free"
    except OSError:
        free = "how much is free is not known"
    return NotWrittenError(f"{path} could not be written: {fault.strerror} ({free})")


@contextmanager
def reports_disk_errors(path: Path, size: int = 0) -> Iterator[None]:
    """Turn an error of the disk inside this block, which writes about `size` bytes below `path`,
    into one UserError."""
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

    The libraries let the processes wait for each other between the files: the others would wait
    forever for one that left with an error. So the first error of a process is kept, the rest is
    tried all the same, and `check` raises it on all.
    """

    def __init__(self, directory: Path, size: int):
        self.directory, self.size = directory, size
        self.error: Exception | None = None
        self.fault: OSError | None = None

    @contextmanager
    def part(self, kind: type[Exception] = Exception) -> Iterator[None]:
        """A block that writes; keep an error of this `kind` in it."""
        try:
            yield
        except kind as error:
            self.keep(error)

    def keep(self, error: Exception) -> None:
        """Keep the first error, and test at once whether the disk is at fault."""
        if self.error is None:
            self.error, self.fault = error, disk_fault(self.directory, self.size, error)

    @contextmanager
    def parts(self, owner, *names: str) -> Iterator[None]:
        """A block in which these methods of a library's object, which cannot be overridden, are
        parts."""
        for name in names:
            setattr(owner, name, self.part()(getattr(owner, name)))
        try:
            yield
        finally:
            for name in names:
                delattr(owner, name)

    def check(self) -> None:
        """Raise on all processes, which all call it, the error of any.

        Raises:
            NotWrittenError: the disk is at fault.
        """
        own = None
        if self.error is not None:
            words = f"{type(self.error).__name__}: {self.error}"
            own = (words, self.fault and (self.fault.errno, self.fault.strerror))
        errors = [each for each in gather_object([own]) if each]
        if self.error is not None and self.fault is None:
            raise self.error
        for words, fault in errors:
            if fault is None:
                raise RuntimeError(f"another process could not write {self.directory}: {words}")
        if errors:
            raise not_written(self.directory, OSError(*errors[0][1])) from self.error


def numel(parameter: torch.Tensor) -> int:
    """Elements of a parameter, including one that ZeRO-3 divides."""
    return getattr(parameter, "ds_numel", parameter.numel())


def weights_bytes(model: torch.nn.Module) -> int:
    """The size of all weights in their data types."""
    return sum(numel(p) * p.element_size() for p in model.parameters())


def checkpoint_bytes(model: torch.nn.Module, deepspeed: bool) -> int:
    """About how much a checkpoint takes: weights, AdamW's two fp32 moments of trained ones, and
    under DeepSpeed their fp32 master copies."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    elements = sum(map(numel, trained))
    is_adapter = trained and elements * 2 <= sum(map(numel, parameters))
    saved = trained if is_adapter else parameters
    return sum(numel(p) * p.element_size() for p in saved) + elements * (12 if deepspeed else 8)


def directory_bytes(path: Path) -> int:
    """The size of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def save_model(trainer: Trainer, directory: Path) -> None:
    """Save weights, config and model code; all processes call it, since sharded weights are
    gathered.

    Identical to `Trainer.save_model` except: a tied `lm_head.weight` is written once under ZeRO
    too, where accelerate clones the state dict and the library no longer sees that the two are one;
    `use_cache`, which training turns off, is on again; an adapter names its base by an absolute
    path.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    state_dict = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if not is_main_process():
        return
    # TRL shadows `forward` on the instance. The saved code is the class's, without it
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for tied in base.all_tied_weights_keys:
        state_dict.pop(tied, None)
    if isinstance(model, PeftModel):
        base_path = str(Path(base.config._name_or_path).resolve())
        model.peft_config[model.active_adapter].base_model_name_or_path = base_path
    use_cache, base.config.use_cache = base.config.use_cache, True
    try:
        with warnings.catch_warnings():
            # A base that is an adapter has no config.json: peft says that it takes the vocabulary
            # to be unchanged, which it is
            warnings.filterwarnings("ignore", message="Could not find a config file in")
            model.save_pretrained(directory, state_dict=state_dict)
    finally:
        base.config.use_cache = use_cache  # an evaluation may follow
    (directory / "README.md").unlink(missing_ok=True)  # peft's model card, a form with empty fields
