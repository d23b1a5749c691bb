#!/usr/bin/env bash
# The checks that every change passes: lint, format, tests. Further arguments are pytest's.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export HF_HUB_OFFLINE=1 WANDB_MODE=offline
ruff check .
ruff format --check .
python -m pytest "$@"
