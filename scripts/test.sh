#!/usr/bin/env bash
# Environment, ruff, pyright, tests. Arguments go to pytest: scripts/test.sh tests/test_boxes.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment requirements-test.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright --pythonpath .venv/bin/python
.venv/bin/python -m pytest -q "$@"
