#!/usr/bin/env bash
# Labels captions with boxes: a teacher detects their noun phrases in their images.
#   scripts/label.sh SHARDS --workdir=DIR --out=DIR [...]
#   scripts/label.sh SHARDS --detections=FILE.json --categories=ANNOTATIONS.json --out=DIR [...]
# e.g. scripts/label.sh shards/cc3m --workdir=runs/teacher --out=shards/cc3m_labelled
# Arguments are passed to `python -m glip_jax label`; `scripts/label.sh --help` lists them. Creates the environment first.
# The same command resumes an interrupted job. Several machines share the work by --part=I/N or --ray (docs/guides/ray.md).
# GLIP_JAX_REQUIREMENTS=requirements-gpu.txt or requirements-tpu.txt selects the requirements of the machine; before several processes
# start at once, create the environment once (--help does).
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh

# As for pretrain.sh: requirements-tpu.txt or requirements-gpu.txt on machines with TPUs or GPUs.
environment "${GLIP_JAX_REQUIREMENTS:-requirements.txt}"
# Paths are relative to the folder in which the command was given.
cd "$here"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$root/.venv/bin/python" -m glip_jax label "$@"
