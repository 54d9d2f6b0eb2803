#!/usr/bin/env bash
# Environment, ruff, pyright, tests. Other arguments go to pytest: scripts/test.sh tests/structures/test_boxes.py -x
#   scripts/test.sh --all    also the tests that take minutes each (marked slow), as CI does
#   scripts/test.sh --tpu    only the tests that compile for TPUs, with libtpu (which needs no TPU) in .cache/libtpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

environment requirements-test.txt requirements-export.txt requirements-tfds.txt requirements-spacy.txt
if [ "${1:-}" = --tpu ]; then
    shift
    # jax's own choice of it, and beside the environment: where it is installed, jax looks for a TPU.
    wanted=$(.venv/bin/python -c 'from importlib.metadata import requires; print(*(r.split(";")[0] for r in requires("jax") if r.startswith("libtpu")))')
    if [ -z "$wanted" ]; then
        echo "test.sh: jax asks for no libtpu any more (its extra is called otherwise): nothing could be compiled for a TPU" >&2
        exit 1
    fi
    if [ "$(cat .cache/libtpu/.installed 2>/dev/null)" != "$wanted" ]; then
        echo "installing $wanted into .cache/libtpu"
        rm -rf .cache/libtpu
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target=.cache/libtpu "$wanted" || {
            echo "test.sh: $wanted could not be fetched (above): nothing was compiled for a TPU" >&2
            exit 69
        }
        echo "$wanted" >.cache/libtpu/.installed
    fi
    PYTHONPATH=$PWD/.cache/libtpu${PYTHONPATH:+:$PYTHONPATH} .venv/bin/python -m pytest -q -m tpu "$@"
    exit
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright --pythonpath .venv/bin/python
if [ "${1:-}" = --all ]; then
    shift
    set -- -m "" "$@"
fi
.venv/bin/python -m pytest -q "$@"
