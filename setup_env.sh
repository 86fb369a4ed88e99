# Sourced by run_sid.sh and run_tests.sh: sets PYTHON to an interpreter that has the packages, making .venv if need be.
# $1: the extra to install (empty or "test"); $2: Python code that succeeds when nothing is missing.
PYTHON=${PYTHON:-python3}
if ! "$PYTHON" -c "$2" 2>/dev/null; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "Error: Python 3.10 or newer is needed; name one with PYTHON=..." >&2
        exit 2
    fi
    [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
    PYTHON=$PWD/.venv/bin/python
    if [ "${PYTHONDONTWRITEBYTECODE:-}" ]; then # keep compiled modules out of all folders but .venv
        unset PYTHONDONTWRITEBYTECODE
        export PYTHONPYCACHEPREFIX=$PWD/.venv/pycache
    fi
    if ! "$PYTHON" -c "$2" 2>/dev/null; then
        echo "Installing the packages into .venv ..."
        # Python compiles what it loads by itself; pip would compile several times as much.
        "$PYTHON" -m pip install --quiet --no-compile -c constraints.txt -e ".${1:+[$1]}"
    fi
fi
