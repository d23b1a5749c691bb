#!/usr/bin/env bash
# From nothing to an aligned chat model on the embedded corpus: tokenizer, pretraining, SFT, LoRA, DPO,
# a reward model, evaluation.
# 2 CPU cores are enough, no network after the install; the first lines say about how long it takes on this machine.
# A finished stage is not repeated: delete runs/quickstart to start afresh.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export HF_HUB_OFFLINE=1
run=runs/quickstart
began=$SECONDS
# torch counts GPUs in a way that a fork survives.
export PYTORCH_NVML_BASED_CUDA_CHECK=1

# The name of a stage, the file that it writes last, its command. One process loads the libraries and
# runs each command in a fork of itself, which saves 5 to 8 s a stage.
python -m minimind.quickstart $run <<STAGES
data      $run/data/dpo_eval.jsonl       minimind world $run/data
tokenizer $run/tokenizer/tokenizer.json  minimind tokenizer train $run/data/pretrain.jsonl $run/data/sft.jsonl --vocab_size 1200 --output_dir $run/tokenizer
pretrain  $run/pretrain/stage.json       python pretrain.py --config configs/pretrain/quickstart.yaml
sft       $run/sft/stage.json            python finetune_sft.py --config configs/sft/quickstart.yaml
lora      $run/lora/stage.json           python finetune_sft.py --config configs/lora/quickstart.yaml
dpo       $run/dpo/stage.json            python train_dpo.py --config configs/dpo/quickstart.yaml
reward    $run/reward/stage.json         python train_reward.py --config configs/reward/quickstart.yaml
STAGES
echo "The figures are in $run/summary.json after $((SECONDS - began)) s. Next:  minimind chat $run/dpo"
