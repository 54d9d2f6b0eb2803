#!/usr/bin/env bash
# benchmarks.on_gpu on a machine with a GPU and no network: JAX, PyTorch and transformers are there, other packages may come as wheels.
#
#   benchmarks/on_gpu.sh --wheels             # on a machine with a network: fetches what requirements.txt names into wheels/
#   benchmarks/on_gpu.sh --out=gpu            # there, with wheels/ beside the repository's files; at most 9 minutes
#   benchmarks/on_gpu.sh --tiny --out=gpu     # small sizes, also without a GPU
#
# PYTHON: the Python with JAX and PyTorch (default: python3). Other options: `python3 -m benchmarks.on_gpu --help`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [[ "${1:-}" == --wheels ]]; then
  exec "$python" -m pip download --quiet --dest wheels --no-deps --only-binary=:all: --python-version "${GPU_PYTHON:-3.12}" \
    flax optax chex toolz jaxtyping wadler-lindig etils absl-py
fi
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
for wheel in wheels/*.whl; do
  [[ -e $wheel ]] || break
  name=$(basename "$wheel"); name=${name%%-*}
  # Only what is missing: a package that is there fits the machine's JAX and PyTorch.
  if ! "$python" -c "import importlib.metadata as m; m.version('$name')" 2> /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$wheel"
  fi
done
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
timeout --foreground --signal=INT 540 "$python" -m benchmarks.on_gpu "$@"
