#!/usr/bin/env bash
# English and Chinese grammar from nothing, in an hour on 2 CPU cores: the sentences of any documents and chats, a model of
# 6 M parameters, and its score card, also along its checkpoints. See docs/language.md.
#   bash scripts/run_language.sh corpus_en.jsonl corpus_zh.jsonl chats.jsonl
#   WEIGHTS="poetry=0" PAIRS=blimp.jsonl bash scripts/run_language.sh corpus.jsonl -- --time_budget 20m
# WEIGHTS says how often a source's sentences count, PAIRS names further minimal pairs; after -- come options of pretrain.py.
# The same command continues an interrupted one.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
run=runs/language
files=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do files+=("$1"); shift; done
[ $# -eq 0 ] || shift
if [ ${#files[@]} -eq 0 ]; then
    echo "error: give files of documents or chats, such as corpus_en.jsonl corpus_zh.jsonl" >&2
    exit 2
fi

if [ ! -e $run/data/zh.jsonl ]; then
    # shellcheck disable=SC2086
    python scripts/sentences.py $run/data "${files[@]}" ${WEIGHTS:+--weights $WEIGHTS}
else
    echo "== sentences: those in $run/data are used, whatever files are named; delete $run to start afresh"
fi
python pretrain.py --config configs/pretrain/language.yaml "$@"
# shellcheck disable=SC2086
minimind evaluate $run/pretrain --own_set all ${PAIRS:+--pairs $PAIRS} --checkpoints --output $run/card
