#!/usr/bin/env bash
# Trains a model.
#   scripts/pretrain.sh                       the demo: environment, synthetic scenes, training, evaluation, an HTML report
#   scripts/pretrain.sh --short               the same with 40 scenes and 20 steps, to check that everything works (used by .ci/run)
#   scripts/pretrain.sh --config=configs/NAME.py --workdir=DIR [...]   environment, then `python -m glip_jax train` with these
# Paths are relative to the folder in which the command is given; the demo is in runs/ of the checkout.
# The same command resumes an interrupted run. Ctrl-C is safe.
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,7s/^# \{0,1\}//p' scripts/pretrain.sh
    exit 0
    ;;
esac

trap 'echo "stopped; the same command resumes from here" >&2; exit 130' INT
# Set by launchers to the requirements of their machines: requirements-tpu.txt, requirements-gpu.txt.
environment "${GLIP_JAX_REQUIREMENTS:-requirements.txt}"

run=$PWD/runs/demo
scenes=(--out=runs/demo/scenes --captions=0)
settings=(--config=configs/demo.py)
if [ "${1:-}" = --short ] && [ $# = 1 ]; then
    run=$PWD/runs/demo-short
    scenes=(--out=runs/demo-short/scenes --count=40 --captions=0 --validation=8)
    settings=(--config=configs/demo_short.py)
elif [ $# -gt 0 ]; then
    # exec, so that the job receives signals itself: it saves on SIGTERM and Ctrl-C.
    cd "$here"
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$root/.venv/bin/python" -m glip_jax train "$@"
fi

.venv/bin/python -m glip_jax scenes "${scenes[@]}"
.venv/bin/python -m glip_jax train "${settings[@]}" --workdir="$run"
.venv/bin/python -m glip_jax evaluate "${settings[@]}" --workdir="$run"
