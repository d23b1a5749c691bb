#!/usr/bin/env bash
# Build the docs as a site in site/: open site/index.html. A broken link, a missing picture or translation and a page that
# docs/README.md does not list are errors.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
python scripts/docs/build_docs.py "${1:-site}"
