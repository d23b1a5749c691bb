#!/usr/bin/env bash
# Rated replies: thumbs up and thumbs down -> runs/kto, from runs/sft. Further arguments are passed on, for example
#   NPROC=2 bash scripts/run_kto.sh --max_steps 100
set -euo pipefail
source "$(dirname "$0")/environment.sh"
launch train_kto.py "$@"
