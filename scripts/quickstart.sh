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
python -m minimind.quickstart

# stage NAME FILE COMMAND...: run COMMAND unless FILE, which it writes last, is there.
stage() {
    local name=$1 file=$2
    shift 2
    if [ -e "$file" ]; then
        echo "== $name: finished before ($file)"
    else
        echo "== $name: $*"
        "$@"
    fi
}

stage data      $run/data/dpo_eval.jsonl       minimind world $run/data
stage tokenizer $run/tokenizer/tokenizer.json  minimind tokenizer train $run/data/pretrain.jsonl $run/data/sft.jsonl \
    --vocab_size 1200 --output_dir $run/tokenizer
stage pretrain  $run/pretrain/stage.json       python pretrain.py --config configs/pretrain/quickstart.yaml
stage sft       $run/sft/stage.json            python finetune_sft.py --config configs/sft/quickstart.yaml
stage lora      $run/lora/stage.json           python finetune_sft.py --config configs/lora/quickstart.yaml
stage dpo       $run/dpo/stage.json            python train_dpo.py --config configs/dpo/quickstart.yaml
stage reward    $run/reward/stage.json         python train_reward.py --config configs/reward/quickstart.yaml
echo "== evaluation"
python -m minimind.quickstart $run
echo "The figures are in $run/summary.json after $((SECONDS - began)) s. Next:  minimind chat $run/dpo"
