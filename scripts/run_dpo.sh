#!/usr/bin/env bash
# Preference optimisation: pairs -> runs/dpo, from runs/sft. Further arguments are passed on, for example
#   NPROC=2 bash scripts/run_dpo.sh --max_steps 100
set -euo pipefail
source "$(dirname "$0")/environment.sh"
launch train_dpo.py "$@"
