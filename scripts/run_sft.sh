#!/usr/bin/env bash
# Supervised fine-tuning: conversations -> runs/sft, from runs/pretrain. Further arguments are passed on, for example
#   NPROC=2 bash scripts/run_sft.sh --max_steps 100
set -euo pipefail
source "$(dirname "$0")/environment.sh"
launch finetune_sft.py "$@"
