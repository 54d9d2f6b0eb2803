#!/usr/bin/env bash
# Imports an annotation file and its images into a folder of shards for training.
#   scripts/build_data.sh FORMAT ANNOTATIONS --images=DIR --out=DIR [...]
# e.g. scripts/build_data.sh coco instances.json --images=pictures --out=shards/mine
# Arguments are passed to `python -m glip_jax data`; `scripts/build_data.sh --help` lists the formats, FORMAT --help its options.
# Creates the environment first. The same command resumes an interrupted import.
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh

environment requirements.txt
if [ "${1:-}" = tfds ]; then
    environment requirements-tfds.txt
fi
# Paths are relative to the folder in which the command was given.
cd "$here"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$root/.venv/bin/python" -m glip_jax data "$@"
