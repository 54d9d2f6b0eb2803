#!/usr/bin/env bash
# Tests a change. Times are for two idle cores and an empty compilation cache.
#   scripts/test.sh --quick   under 2 minutes: ruff, and the tests that compile no network, start no process and take no seconds
#   scripts/test.sh           under 8 minutes: also pyright, and one representative case of each kind of slow test
#   scripts/test.sh --all     every test, as CI does
#   scripts/test.sh --tpu     only the tests that compile for TPUs, with libtpu (which needs no TPU) in .cache/libtpu
#   scripts/test.sh PATH...   these tests alone, whatever their tier, without ruff and pyright: tests/structures/test_boxes.py -x
# Other arguments go to pytest: scripts/test.sh --quick tests/io, scripts/test.sh -k boxes. The environment is made first.
set -euo pipefail
# Paths are relative to the folder in which the command is given.
arguments=()
for argument in "$@"; do
    [ ! -e "${argument%%::*}" ] || [[ $argument == /* ]] || argument=$PWD/$argument
    arguments+=("$argument")
done
set -- ${arguments[@]+"${arguments[@]}"}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

case "${1:-}" in
-h | --help)
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac
environment requirements-test.txt requirements-export.txt requirements-tfds.txt requirements-spacy.txt requirements-serve.txt requirements-video.txt requirements-ray.txt
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
    export PYTHONPATH=$PWD/.cache/libtpu${PYTHONPATH:+:$PYTHONPATH}
    exec .venv/bin/python -m pytest -q -m tpu "$@"
fi
tier="not slow and not tpu" quick='' paths=''
case "${1:-}" in
--quick) shift && tier="not slow and not tpu and not compiles and not processes and not long" quick=1 ;;
--all) shift && tier="not tpu" && set -- -n 3 "$@" ;; # compilers and started processes leave two workers idle for a fifth of the time
*) for argument in "$@"; do [[ $argument == *[/.]* && -e ${argument%%::*} ]] && paths=1; done ;;
esac
if [ "$paths" ]; then
    exec .venv/bin/python -m pytest -q -m "not tpu" --dist worksteal "$@"
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
if [ "$quick" ]; then
    exec .venv/bin/python -m pytest -q -m "$tier" "$@"
fi
# pyright uses one core, and goes beside the tests.
types=$(mktemp)
trap 'rm -f "$types"' EXIT
.venv/bin/pyright --pythonpath .venv/bin/python >"$types" 2>&1 &
checker=$! failed=0
.venv/bin/python -m pytest -q -m "$tier" "$@" || failed=$?
wait "$checker" || failed=1
cat "$types"
exit "$failed"
