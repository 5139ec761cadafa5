#!/bin/sh
# Makes the virtual environment and installs the project into it: setup.sh VENV STAMP [PYTHON]
set -eu
venv=$1 stamp=$2 wanted=${3:-}

fail() {
    echo "error: $*" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

python=
for candidate in ${wanted:-python3 python3.13 python3.12 python3.11 python3.14}; do
    if command -v "$candidate" >/dev/null 2>&1 && new_enough "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    found=$("${wanted:-python3}" --version 2>&1 || true)
    fail "Python 3.11 or newer is needed, found: ${found:-none}. Install one, or name it: make PYTHON=python3.12"
fi
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv"

# One installation at a time; a lock left by a killed one is taken over.
lock="$venv.lock"
while ! mkdir "$lock" 2>/dev/null; do
    [ -d "$lock" ] || mkdir "$lock" || fail "$lock cannot be made, so nothing can be installed here"
    holder=$(cat "$lock/pid" 2>/dev/null || { sleep 1; cat "$lock/pid" 2>/dev/null; } || true)
    if [ -n "$holder" ] && kill -0 "$holder" 2>/dev/null; then
        sleep 2
    else
        rm -rf "$lock"
    fi
done
echo $$ >"$lock/pid"
trap 'rm -rf "$lock"' EXIT
trap 'exit 130' INT TERM
[ -f "$stamp" ] && exit 0

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
echo "installing into $venv (a few minutes the first time; about 7 GB with torch's CUDA libraries)"
quiet=--quiet
[ -t 1 ] && quiet= # a terminal gets pip's progress bars
# shellcheck disable=SC2086 - an empty option must vanish
"$venv/bin/python" -m pip install --disable-pip-version-check $quiet --no-compile --constraint constraints.txt \
    --editable '.[dev]' ||
    fail "pip could not install the packages (see above). Run the same command again: it goes on where it stopped"
# On all cores, where pip compiles on one, and without what is rarely imported. Some files are templates, no Python.
rare='/tests?/|/transformers/models/|/diffusers/pipelines/'
"$venv/bin/python" -m compileall -q -j 0 -x "$rare" "$venv/lib" >/dev/null 2>&1 || true
rm -f "$venv"/.installed-*
touch "$stamp"
