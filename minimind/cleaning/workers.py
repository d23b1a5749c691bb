"""Worker processes: plain children that talk over pipes, import only the cleaning, and end with
their pipe.

`multiprocessing` would fork a process that may hold threads (tokenizers, torch), or import the
caller's main script again in each child; and its children outlive a killed parent.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minimind.cleaning.procedure import Procedure
from minimind.cleaning.segments import Item, Result, run_segment
from minimind.common.errors import UserError

AHEAD = 3  # batches in flight for each process
ROOT = Path(__file__).parents[2]  # of the package, wherever this process found it
BOOTSTRAP = """
import sys
sys.path.insert(0, sys.argv[1])
from minimind.cleaning.workers import serve
serve()
"""


class Workers:
    """Runs `run_segment` in up to `num_proc` processes (in this one for 1). Use as a context
    manager."""

    def __init__(self, procedure: Procedure, num_proc: int):
        self.procedure, self.num_proc = procedure, num_proc
        self.processes: list[subprocess.Popen] = []
        self.idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        self.threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        if self.num_proc > 1:
            self.threads = ThreadPoolExecutor(self.num_proc)
        return self

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-c", BOOTSTRAP, str(ROOT)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.processes.append(process)
        pickle.dump(self.procedure.as_dict(), process.stdin)
        process.stdin.flush()
        return process

    def __exit__(self, *exception) -> None:
        if self.threads:
            self.threads.shutdown(cancel_futures=True)
        for process in self.processes:
            process.stdin.close()
            process.wait()
            process.stdout.close()

    def _call(self, segment: int, items: list[Item]) -> Result:
        try:
            process = self.idle.get_nowait()
        except queue.Empty:  # as many threads as processes, so never more than num_proc
            process = self._start()
        try:
            pickle.dump((segment, items), process.stdin, protocol=5)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = process.wait()
            raise RuntimeError(f"a worker process ended early (exit code {code})") from None
        finally:
            self.idle.put(process)
        if isinstance(result, UserError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(f"a worker process failed:\n{result}")
        return result

    def map(self, segment: int, batches: Iterable[Any]) -> Iterator[tuple[Any, Result]]:
        """Each batch with the result of its `items`, in order; a few batches are read ahead."""
        if self.threads is None:
            for batch in batches:
                yield batch, run_segment(self.procedure, segment, batch.items)
            return
        pending: deque = deque()
        for batch in batches:
            pending.append((batch, self.threads.submit(self._call, segment, batch.items)))
            if len(pending) > AHEAD * self.num_proc:
                batch, future = pending.popleft()
                yield batch, future.result()
        for batch, future in pending:
            yield batch, future.result()


def serve() -> None:
    """A worker: batches from stdin, results to stdout, until stdin ends."""
    # Ctrl-C reaches the parent, which then closes the pipes
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the results
    try:
        procedure = Procedure.from_dict(pickle.load(sys.stdin.buffer))
        while True:
            segment, items = pickle.load(sys.stdin.buffer)
            try:
                result = run_segment(procedure, segment, items)
            except UserError as error:
                result = error
            except Exception:
                result = traceback.format_exc()
            pickle.dump(result, results, protocol=5)
            results.flush()
    except (EOFError, BrokenPipeError):
        os._exit(0)  # the parent is done, or gone; nothing is left to flush
