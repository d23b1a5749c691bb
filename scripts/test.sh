#!/usr/bin/env bash
# The checks that every change passes: lint, format, the direction of imports, tests. Further
# arguments are pytest's: "-m slow" for the runs that are killed, lose a host, change their number of
# processes or start many, for the commands of the guides, the tutorial and the site.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
# Two files of tests at a time, each with one thread: most of a small test is Python. By name: in xdist's own order the
# file with the most tests is first, and that of the launchers, the longest, last and alone.
export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
lint-imports --no-cache --no-logo
# On a CPU DeepSpeed compiles one operator, once for a machine: no test waits for it.
python -c 'import torch
from deepspeed.accelerator import get_accelerator
torch.cuda.is_available() or get_accelerator().create_op_builder("ShareMemCommBuilder").load()' &>/dev/null || true
python -m pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
