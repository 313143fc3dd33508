# Sourced by scripts/test and scripts/demo: `prepare EXTRAS` makes .venv at the project root hold coupfast[EXTRAS].
#
# Everything goes through plain pip, so pip's own variables choose what is installed: PIP_CONSTRAINT=FILE pins
# versions, PIP_INDEX_URL and PIP_EXTRA_INDEX_URL name other indexes. On Linux the default torch is the CUDA build,
# about 6 GB installed; .ci/run shows how to pin another one. A torch that already is in .venv and satisfies
# pyproject.toml is kept, so you may also make .venv yourself and install into it the torch that you want.
# PYTHON names the interpreter that makes .venv (default python3), VENV another folder for it.

prepare() {
    local extras=$1 python=${PYTHON:-python3} output=--quiet stamp wanted
    venv=${VENV:-$PWD/.venv}
    if ! "$venv/bin/pip" --version >/dev/null 2>&1; then
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "error: coupfast needs Python 3.10 or newer; $python is: $("$python" --version 2>&1 | head -n 1)" >&2
            echo "       Name another one, for example: PYTHON=python3.12 $0" >&2
            return 1
        fi
        echo "Making $venv with $("$python" --version)" >&2
        "$python" -m venv --clear "$venv"
    fi
    # The path is part of the hash: an editable install points here, also after the folder was moved or copied.
    stamp=$venv/installed-$extras
    wanted=$(
        { pwd && "$venv/bin/python" --version && cat pyproject.toml && echo "${PIP_CONSTRAINT:-}" &&
            if [ -f "${PIP_CONSTRAINT:-}" ]; then cat "$PIP_CONSTRAINT"; fi; } |
            "$venv/bin/python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
    )
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Installing coupfast[$extras] into $venv (minutes, once: the default torch is large)" >&2
        [ ! -t 1 ] || output=--progress-bar=on
        "$venv/bin/python" -m pip install "$output" --disable-pip-version-check -e ".[$extras]"
        echo "$wanted" >"$stamp"
    fi
}
