#!/usr/bin/env bash
# LoRA fine-tuning: conversations -> an adapter in runs/lora, from runs/sft. Further arguments are passed on, for example
#   NPROC=2 bash scripts/run_lora.sh --max_steps 100
set -euo pipefail
source "$(dirname "$0")/environment.sh"
launch finetune_sft.py --use_peft --output_dir runs/lora "$@"
