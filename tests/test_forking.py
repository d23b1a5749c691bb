"""Functions in forks, as scripts/quickstart.sh runs its stages."""

import subprocess
import sys

PROGRAM = """
import atexit, signal, sys
from minimind.common.forking import run_forked

# A shell starts what it runs in the background with Ctrl-C ignored
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(kind):
    atexit.register(print, "exit_function")
    print("working", flush=True)
    if kind == "exit":
        sys.exit(3)
    if kind == "raise":
        raise ValueError("a bug")
    if kind == "interrupt":
        signal.raise_signal(signal.SIGINT)
    if kind == "kill":
        signal.raise_signal(signal.SIGKILL)

for kind in ("end", "exit", "raise", "interrupt", "kill"):
    print(kind)
    print(run_forked(work, kind), signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""
ENDS = """
end working exit_function 0 True
exit working exit_function 3 True
raise working exit_function 1 True
interrupt working exit_function -2 True
kill working -9 True
"""


def test_a_fork_ends_like_a_process_of_its_own_and_its_parent_continues():
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ENDS.split(), done.stderr
    assert done.stderr.count("ValueError: a bug") == 1
    assert done.returncode == 0
