#!/usr/bin/env bash
# Exports a checkpoint and verifies the result.
#   scripts/export.sh CKPT OUT --format=glip-pth|huggingface|onnx [...]
# CKPT is the working folder of a run or of `import`, OUT the output file (glip-pth) or folder; further arguments are passed to
# `python -m glip_jax export`. Creates the environment with requirements-export.txt first.
set -euo pipefail
here=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
source scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,5s/^# \{0,1\}//p' scripts/export.sh
    exit 0
    ;;
esac
if [ $# -lt 2 ] || [[ $1 == -* ]] || [[ $2 == -* ]]; then
    echo "export.sh: expected CKPT OUT --format=glip-pth|huggingface|onnx, found: $*" >&2
    exit 2
fi

environment requirements-export.txt
workdir=$1 out=$2
shift 2
# Paths are relative to the folder in which the command was given.
cd "$here"
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$root/.venv/bin/python" -m glip_jax export --workdir="$workdir" --out="$out" "$@"
