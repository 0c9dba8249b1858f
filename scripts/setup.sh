# Make .venv and install this checkout into it. Sourced by the other scripts, which set
# EXTRAS to "" or "[dev]". Quick when nothing has changed since the last time.

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        found="$candidate ($("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null))"
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or newer, found ${found:-none}; install it, or name one: PYTHON=/path/to/python3.11 $0"
}

stamp=".venv/installed${EXTRAS}"
# The lines that decide what is installed, and where: a moved checkout installs anew.
state="$(cksum <pyproject.toml) $PWD"
if [ ! -x .venv/bin/python ] || [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
    python="$(find_python)" || exit 1
    echo "installing into .venv (once; needs the network) ..." >&2
    "$python" -m venv .venv >/dev/null 2>&1 ||
        fail "'$python -m venv .venv' failed: install Python's venv module (on Debian: apt-get install python3-venv)"
    .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        fail "'$python' made an environment without pip: install it (on Debian: apt-get install python3-pip python3-venv)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS}" ||
        fail "pip could not install the dependencies: see its message above"
    echo "$state" >"$stamp"
fi
