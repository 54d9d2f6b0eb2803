#!/usr/bin/env bash
# Builds the site of docs/ into docs/_build/html, warnings as errors. Makes the environment with requirements-docs.txt first.
#   scripts/docs.sh [...]     arguments go to sphinx-build, such as -E (read every page again)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,3s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
environment requirements-docs.txt
.venv/bin/python -m sphinx --builder=html --fail-on-warning --keep-going --nitpicky --quiet "$@" docs docs/_build/html
echo "docs/_build/html/index.html"
