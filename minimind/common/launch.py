"""The environment of a process before the first library sets up devices: one script for every
launcher.

`deepspeed`, `torchrun` and `accelerate launch` set the rendezvous variables; plain `python` does
not, and DeepSpeed would then look for MPI.
"""

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from minimind.common.errors import UserError, install
from minimind.common.language import say

LOOPBACK = ("127.0.0.1", "localhost")
EXISTING_STORE = "TORCHELASTIC_USE_AGENT_STORE"  # torch then connects to a store and opens none
SHARED_MEMORY = Path("/dev/shm")
STORES: list = []  # they listen as long as the process lives


def prepare_launch(uses_deepspeed: bool) -> None:
    """Set the environment for this launcher and device; the user's own settings are kept."""
    environment = os.environ
    if not torch.cuda.is_available():
        # The processes of one machine share its cores; more threads than cores make every step
        # several times slower.
        local_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
        if "OMP_NUM_THREADS" not in environment:
            # torch counts physical cores, and only those that this process may use
            threads = max(1, torch.get_num_threads() // local_size)
            environment["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)
        # Without it DeepSpeed looks for accelerators and warns if there is none.
        environment.setdefault("DS_ACCELERATOR", "cpu")
        if uses_deepspeed:
            # `accelerate launch` sets it on a machine without a GPU, and accelerate then silently
            # leaves DeepSpeed out (seen in accelerate 1.15).
            environment.pop("ACCELERATE_USE_CPU", None)

    if uses_deepspeed and "RANK" not in environment:
        with socket.socket() as unused:
            unused.bind((LOOPBACK[0], 0))
            port = unused.getsockname()[1]
        defaults = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
        defaults |= {"MASTER_ADDR": LOOPBACK[0], "MASTER_PORT": port}
        for name, value in defaults.items():
            environment.setdefault(name, str(value))
    open_meeting_point()
    if uses_deepspeed:
        refuse_code_in_pickles()
        _announce_compilation()


def open_meeting_point() -> None:
    """Listen at the port where the processes meet.

    torch would listen at all addresses of the machine; if all processes are on one machine, this
    listens only at the loopback address. torchrun opens the port itself.

    Raises:
        UserError: the port is taken, usually by another run.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    is_local = address in LOOPBACK
    if is_local:
        interface = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        for library in ("GLOO", "NCCL") if interface else ():
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", interface)
    exists = os.environ.get(EXISTING_STORE) == "True"
    if os.environ.get("RANK") != "0" or exists or not port.isdigit():
        return
    try:
        listener = socket.create_server((address if is_local else "", int(port)))
    except OSError as error:
        raise UserError(
            f"port {port}, at which the processes are to meet, cannot be opened: {error.strerror},"
            f" perhaps by another run. Give another one: deepspeed --master_port {int(port) + 1}"
            " ..., or MASTER_PORT."
        ) from error
    if not is_local:
        listener.close()  # torch opens it
        return
    options = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
    STORES.append(torch.distributed.TCPStore(address, int(port), **options))
    os.environ[EXISTING_STORE] = "True"


def refuse_code_in_pickles() -> None:
    """Keep `torch.load` from running code in a file, also where DeepSpeed calls it: a checkpoint
    may come from anybody.

    The objects that DeepSpeed's checkpoints hold besides tensors are allowed.
    TORCH_FORCE_WEIGHTS_ONLY_LOAD=0 allows everything.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1") != "0":
        os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses both
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise UserError(
            f"--deepspeed needs DeepSpeed, which is not here ({error}): {install('deepspeed')}."
        ) from error

    torch.serialization.add_safe_globals(
        [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    )


def is_main_process() -> bool:
    """Whether this process prints and writes for all; true before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def largest_of_all(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each number among all processes: the same on all of them. One collective of a
    few bytes; one process only gets its numbers back."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def notice(text: str) -> None:
    """Print one line about the run, once for all processes."""
    if is_main_process():
        say(f"notice: {text}", file=sys.stderr)


def _announce_compilation() -> None:
    """DeepSpeed compiles its shared-memory communication operator the first time it runs on CPU."""
    if torch.cuda.is_available() or not is_main_process():
        return
    home = os.path.expanduser("~")  # noqa: PTH111, Path raises where there is none
    default = Path(home) / ".cache" / "torch_extensions"
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)
    if not list(cache.glob("**/deepspeed_shm_comm/*.so")):
        say(
            "DeepSpeed compiles one operator on its first run on a CPU: about 2 minutes without"
            f" further output, once (cached in {cache})."
        )


def bf16_is_fast(device: str | None = None) -> bool:
    """Whether a device ("cuda" or "cpu"; default: this machine's) computes in bf16 natively;
    otherwise bf16 is emulated, on a CPU 30 to 60 times slower than fp32.

    On a CPU oneDNN computes the matrix products, and `ONEDNN_MAX_CPU_ISA` may limit the
    instructions it uses.
    """
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return bool(
        native
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def release_shared_buffers() -> None:
    """Remove the names of the buffers through which DeepSpeed's processes communicate on a CPU.

    DeepSpeed 0.19 never does: 69 MB of memory would stay in use for each process of each run, until
    the machine restarts. All processes have opened them when this is called, and can use them until
    they end.
    """
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_*"
    for buffer in SHARED_MEMORY.glob(name):
        buffer.unlink(missing_ok=True)


def leave_process_group(trainer) -> None:
    """Leave the process group of a complete run; DeepSpeed's engine leaves it on its own.

    If that waits for the end of the interpreter, gloo's threads occasionally abort the process, and
    the launcher reports a failed run.
    """
    if torch.distributed.is_initialized() and not trainer.is_deepspeed_enabled:
        torch.distributed.destroy_process_group()
