"""Training scripts that take turns, a micro-batch each, so that a machine whose speed drifts gives
the same ratios.

    python benchmarks/turns.py ADDRESS SCRIPT [ARGUMENTS ...]      # started by `Program`

Each script runs unchanged in a process of its own, as its user starts it. Hooks see where one
micro-batch ends and the next one begins: `Trainer.training_step` is called, or, in a script without
a Trainer, its model. There the process reports the micro-batch that ended to the benchmark and
waits for its next turn. So a turn holds all that happens between two micro-batches: optimizer,
logging, callbacks, checkpoints, and the data loader.
"""

import gc
import json
import os
import runpy
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

PROBE = "MINIMIND_BENCHMARK_PROBE"  # a JSON file of rows whose loss is computed before training


class Program:
    """A script in a process of its own, stopped between two micro-batches.

    `startup`: seconds from the start of the process to the end of its first micro-batch. `reports`:
    one dictionary for each turn, see `Turns`. `memory`: the peak of the turns' tensors in bytes.

    Raises:
        RuntimeError: (also from `turn`) the script has failed; its last lines say why.
    """

    def __init__(
        self,
        name: str,
        command: Iterable[Any],
        directory: Path,
        processes: int = 0,
        environment: dict[str, str] | None = None,
    ):
        """`directory` is the script's working directory, `processes` above 0 starts it by
        torchrun."""
        self.name, self.reports, self.memory = name, [], None
        address = tempfile.mktemp(prefix="turns-")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(address)
        listener.listen(1)
        listener.settimeout(1)
        launcher = [sys.executable]
        if processes:
            launcher += ["-m", "torch.distributed.run", "--nproc_per_node", processes]
            with socket.create_server(("127.0.0.1", 0)) as free:
                launcher += ["--master_port", free.getsockname()[1]]
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        began = time.time()
        self.process = subprocess.Popen(
            [str(word) for word in (*launcher, __file__, address, *command)],
            cwd=directory,
            env=os.environ | (environment or {}),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with listener:
            self.connection = self._accept(listener)
        Path(address).unlink()
        first = self._receive()
        self.startup = first["ended"] - began
        self.probe = first["probe"]

    def _accept(self, listener: socket.socket) -> Connection:
        while self.process.poll() is None:
            with suppress(TimeoutError):
                return Connection(listener.accept()[0].detach())
        raise self._failure()

    def _receive(self) -> dict:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._failure() from None

    def _failure(self) -> RuntimeError:
        self.process.wait()
        with self.log as log:
            log.seek(0)
            return RuntimeError(f"{self.name} has failed:\n{log.read()[-3000:]}")

    def turn(self) -> dict:
        """Run one micro-batch and return its report."""
        self.connection.send("turn")
        self.reports.append(self._receive())
        return self.reports[-1]

    def stop(self) -> None:
        """Read the peak of memory and end the process, with all that it has started."""
        with suppress(OSError, RuntimeError, ValueError):  # it has ended already
            self.connection.send("stop")
            self.memory = self._receive()["memory"]
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def speeds(self, what: str) -> list[float]:
        """Tokens (or what else is counted) per second of each turn."""
        return [each[what] / each["seconds"] for each in self.reports]

    def speed(self, what: str) -> float:
        """The median over the turns."""
        return statistics.median(self.speeds(what))


class Turns:
    """The side of the script: `begin` is called where a micro-batch begins.

    A report has "seconds", saving left out, "saving" (seconds), "tokens" that are not padding,
    "trained" tokens, "rows", "loss", and the seconds in "forward" (the loss included), "backward"
    and "optimizer".
    """

    def __init__(self, connection: Connection):
        self.connection = connection
        self.facts: dict[str, Any] = {}
        self.count = 0
        self.probe, self.probing = None, 0.0

    def begin(self, facts: dict[str, Any], trainer: Any = None) -> None:
        """Report the micro-batch before and wait for the next turn."""
        synchronize()
        now = time.perf_counter()
        if self.count == 0:
            self._probe_loss(trainer)
        elif self.count == 1:
            ended = time.time() - self.probing
            self.connection.send({"ended": ended, "probe": self.probe})
            self._wait()
            self.memory = start_of_memory()
        else:
            saving = self.facts.pop("saving", 0.0)
            seconds = now - self.began - saving
            loss = self.facts.pop("loss", None)
            self.facts |= {"loss": None if loss is None else float(loss), "saving": saving}
            self.connection.send(self.facts | {"seconds": seconds})
            self._wait()
        self.count += 1
        self.facts, self.began = facts, time.perf_counter()

    def _wait(self) -> None:
        if self.connection.recv() == "stop":
            memory = self.memory.read() if self.count > 1 else None
            self.connection.send({"memory": memory})
            time.sleep(60)  # until it is killed

    def _probe_loss(self, trainer: Any) -> None:
        """The loss of the rows that the benchmark asks for, before the first step."""
        if trainer is None or PROBE not in os.environ:
            return
        import torch

        began = time.perf_counter()
        rows = json.loads(Path(os.environ[PROBE]).read_text(encoding="utf-8"))
        trained = sum(label != -100 for row in rows for label in row["labels"][1:])
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        model = trainer.model_wrapped
        model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            items = torch.tensor(trained, device=trainer.args.device)
            self.probe = float(trainer.compute_loss(model, batch, num_items_in_batch=items))
        model.train()
        self.probing = time.perf_counter() - began

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, its seconds added to a fact of the micro-batch."""

        def wrapped(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize()
                self.facts[name] = self.facts.get(name, 0.0) + time.perf_counter() - began

        return wrapped

    def watch_trainers(self) -> None:
        """Let each Trainer of this process take turns."""
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer
        from transformers import Trainer

        training_step = Trainer.training_step

        def take_turns(trainer, model, inputs, *args, **kwargs):
            if "_save_checkpoint" not in vars(trainer):  # with what its own class adds
                trainer._save_checkpoint = self.timed("saving", trainer._save_checkpoint)
            self.begin(count(trainer, inputs), trainer)
            began = time.perf_counter()
            self.facts["loss"] = loss = training_step(trainer, model, inputs, *args, **kwargs)
            synchronize()
            whole = time.perf_counter() - began
            self.facts["forward"] = whole - self.facts.get("backward", 0.0)
            return loss

        Trainer.training_step = take_turns
        Accelerator.backward = self.timed("backward", Accelerator.backward)
        AcceleratedOptimizer.step = self.timed("optimizer", AcceleratedOptimizer.step)

    def watch_models(self) -> None:
        """Let the first causal model that is called in training take turns."""
        from torch.nn.modules.module import register_module_forward_pre_hook

        def before(module, args, kwargs) -> None:
            if module.training:
                labels = kwargs["labels"]
                tokens = int((labels != -100).sum())
                trained = int((labels[:, 1:] != -100).sum())
                self.begin({"tokens": tokens, "trained": trained, "rows": len(labels)})

        def find(module, args) -> None:
            if hasattr(module, "lm_head"):
                handle.remove()
                module.register_forward_pre_hook(before, with_kwargs=True)
                self.begin({"tokens": 0})

        handle = register_module_forward_pre_hook(find)


def count(trainer: Any, inputs: dict) -> dict[str, int]:
    """What a micro-batch of a Trainer holds; pairs have no labels, and their rows are counted by
    the benchmark."""
    ids = inputs["input_ids"]
    padding = trainer.processing_class.pad_token_id
    mask = inputs.get("attention_mask")
    used = ids != padding if mask is None else mask.bool()
    facts = {"tokens": int(used.sum()), "rows": trainer.args.per_device_train_batch_size}
    if "labels" in inputs:
        facts["trained"] = int((inputs["labels"][..., 1:] != -100).sum())
    return facts


def synchronize() -> None:
    """Wait for the work queued on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def start_of_memory() -> Any:
    """A `PeakMemory` from now on."""
    import torch

    from minimind.training.step_meter import PeakMemory

    storages = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor):
            for tensor in (each, each.grad if each.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return PeakMemory(device, sum(storages.values()))


def start_all(programs: Iterable[Program]) -> list[Program]:
    """The programs, each of which starts as it is iterated; if one fails, the others end too.

    Raises:
        UserError: one has failed; its last lines say why.
    """
    from minimind.common.errors import UserError  # not in the process of a peer's script

    started = []
    try:
        for each in programs:
            started.append(each)
    except BaseException as error:
        for each in started:
            each.stop()
        if isinstance(error, RuntimeError):
            raise UserError(str(error)) from error
        raise
    return started


def take_turns(programs: list[Program], rounds: int, between: Callable[[], None]) -> None:
    """One turn of each program to warm up, then `rounds` of each, in turn; ends them all.

    `between` is called before each round. A program that fails in its warm-up (too little memory,
    say) is reported and left out of the list; the first one may not fail.
    """
    try:
        for each in list(programs):
            try:
                each.turn()
                each.reports.clear()
            except (OSError, EOFError, RuntimeError) as error:
                if each is programs[0]:
                    raise
                programs.remove(each)
                each.stop()
                print(f"{each.name} ended in its second step: {str(error)[-300:] or 'killed'}")
        for _ in range(rounds):
            between()
            for each in programs:
                each.turn()
    finally:
        for each in programs:
            each.stop()


def main() -> None:
    address, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == "0":
        turns = Turns(Client(address))
        if "trainer/train_" in arguments[0]:  # minimind's scripts have loops of their own
            turns.watch_models()
        else:
            turns.watch_trainers()
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).parent)  # as python itself sets it
    sys.path.append(str(Path(__file__).parents[1]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main()
