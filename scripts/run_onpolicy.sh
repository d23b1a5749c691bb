#!/usr/bin/env bash
# On-policy preference optimisation: the current model replies, a judge picks the best and the worst reply to each prompt,
# DPO trains on these pairs, and again with the new model. At the end: is the last model better than the first?
#   bash scripts/run_onpolicy.sh                                         # the quickstart's SFT model, for polite replies
#   MODEL=runs/26m/sft PROMPTS=prompts.jsonl HELD_OUT=others.jsonl CHATS=chats_eval.jsonl OUT=runs/26m/onpolicy \
#       RECIPE=my.yaml ROUNDS=3 bash scripts/run_onpolicy.sh --reward_model runs/26m/reward
# The arguments are the judge's (minimind pairs --help); CHATS are conversations whose perplexity must not rise.
# The same command continues an interrupted one.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
run=runs/quickstart
start=${MODEL:-$run/sft} prompts=${PROMPTS:-$run/data/dpo.jsonl}
held_out=${HELD_OUT:-$run/data/dpo_eval.jsonl} chats=${CHATS:-$run/data/sft_eval.jsonl}
out=${OUT:-$run/onpolicy} recipe=${RECIPE:-configs/dpo/onpolicy.yaml} tokens=${MAX_NEW_TOKENS:-64}
judge=("$@")
if [ $# -eq 0 ]; then judge=(--rule_regex '(Glad to help!|很高兴帮到您！)$'); fi

model=$start
for round in $(seq "${ROUNDS:-2}"); do
    echo "== round $round: replies of $model"
    minimind pairs "$model" "$prompts" "$out/pairs-$round.jsonl" "${judge[@]}" --samples 8 --seed "$round" --max_new_tokens "$tokens"
    python train_dpo.py --config "$recipe" --model_name_or_path "$model" --train_files "$out/pairs-$round.jsonl" \
        --output_dir "$out/round-$round"
    model=$out/round-$round
done
echo "== did it help? $start (A) against $model (B)"
minimind compare "$start" "$model" "$held_out" "${judge[@]}" --max_new_tokens "$tokens" \
    --perplexity_files "$chats" --html "$out/compare.html"
