#!/usr/bin/env bash
# Fine-tunes a detector on a folder of your own data: environment, then `python -m glip_jax finetune` with the arguments.
#   scripts/finetune.sh --data=FOLDER --workdir=DIR [--minutes=10] [--checkpoint=RUN] [...]
# Paths are relative to the folder in which the command is given. The same command resumes an interrupted run. Ctrl-C is safe.
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,4s/^# \{0,1\}//p' scripts/finetune.sh
    exit 0
    ;;
esac
environment "${GLIP_JAX_REQUIREMENTS:-requirements.txt}"
cd "$here"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$root/.venv/bin/python" -m glip_jax finetune "$@"
