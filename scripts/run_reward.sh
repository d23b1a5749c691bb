#!/usr/bin/env bash
# A reward model: pairs -> runs/reward, from runs/sft. Further arguments are passed on, for example
#   NPROC=2 bash scripts/run_reward.sh --max_steps 100
set -euo pipefail
source "$(dirname "$0")/environment.sh"
launch train_reward.py "$@"
