#!/usr/bin/env bash
# Imports an annotation file and its pictures into a folder of shards that training reads.
#   scripts/build_data.sh FORM ANNOTATIONS --images=DIR --out=DIR [...]
# e.g. scripts/build_data.sh coco instances.json --images=pictures --out=shards/mine
# Arguments go to `python -m glip_jax data`; `scripts/build_data.sh --help` lists the forms, FORM --help its options.
# Makes the environment first. The same command again goes on where it was stopped.
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh

environment requirements.txt
if [ "${1:-}" = tfds ]; then
    environment requirements-tfds.txt
fi
# Paths are those of the folder that the command was given in.
cd "$here"
PYTHONPATH=$root exec "$root/.venv/bin/python" -m glip_jax data "$@"
