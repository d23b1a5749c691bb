#!/usr/bin/env bash
# Pretraining: documents -> runs/pretrain. Further arguments are passed on, for example
#   NPROC=2 bash scripts/run_pretrain.sh --max_steps 100
set -euo pipefail
source "$(dirname "$0")/environment.sh"
launch pretrain.py "$@"
