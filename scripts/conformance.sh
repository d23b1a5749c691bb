#!/usr/bin/env bash
# transformers' own common model tests over MiniMind and its twins (docs/conformance.md). Further arguments are pytest's.
# Exit status 75: the package index, where the tests come from once, does not answer.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
python -m pytest tests/conformance "$@"
