#!/usr/bin/env bash
# Exports a checkpoint, checked against itself.
#   scripts/export.sh CKPT OUT --format=glip-pth|huggingface|onnx [...]
# CKPT is the working folder of a run or of `import`, OUT the file (glip-pth) or folder to make; what follows goes to
# `python -m glip_jax export`. Makes the environment with requirements-export.txt first.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
if [ $# -lt 2 ] || [[ $1 == -* ]] || [[ $2 == -* ]]; then
    echo "export.sh: expected CKPT OUT --format=glip-pth|huggingface|onnx, found: $*" >&2
    exit 2
fi

# Paths are those of the folder that the command was given in.
place() {
    case "$1" in
    /* | *://*) echo "$1" ;;
    *) echo "$here/$1" ;;
    esac
}

environment requirements-export.txt
workdir=$(place "$1") out=$(place "$2")
shift 2
exec .venv/bin/python -m glip_jax export --workdir="$workdir" --out="$out" "$@"
