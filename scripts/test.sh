#!/usr/bin/env bash
# Environment, ruff, pyright, tests. Other arguments go to pytest: scripts/test.sh tests/test_boxes.py -x
#   scripts/test.sh --all    also the seven tests that take minutes each (marked slow), as CI does
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment requirements-test.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright --pythonpath .venv/bin/python
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" "$@"
fi
.venv/bin/python -m pytest -q "$@"
