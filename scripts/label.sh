#!/usr/bin/env bash
# Captions become grounding data: a teacher looks for their noun phrases in their images.
#   scripts/label.sh SHARDS --workdir=DIR --out=DIR [...]
#   scripts/label.sh SHARDS --detections=FILE.json --categories=ANNOTATIONS.json --out=DIR [...]
# e.g. scripts/label.sh shards/cc3m --workdir=runs/teacher --out=shards/cc3m_labelled
# Arguments go to `python -m glip_jax label`; `scripts/label.sh --help` lists them. Makes the environment first.
# The same command again goes on where it was stopped; given on several hosts that see the same folders, or once for
# each accelerator of one (CUDA_VISIBLE_DEVICES=0, 1, ...), it shares the work. GLIP_JAX_REQUIREMENTS=requirements-gpu.txt or
# requirements-tpu.txt says what the machine needs; where several begin at once, make the environment once before (--help does).
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh

# As for pretrain.sh: requirements-tpu.txt or requirements-gpu.txt where there is one.
environment "${GLIP_JAX_REQUIREMENTS:-requirements.txt}"
# Paths are those of the folder that the command was given in.
cd "$here"
PYTHONPATH=$root exec "$root/.venv/bin/python" -m glip_jax label "$@"
