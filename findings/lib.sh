# Shared by the scripts in this folder; source it, do not run it.
#
#   install "name==x.y" ...   make a fresh virtual environment and install into it
#   probe <<'PY' ... PY       run Python in it, print and keep what it prints
#   expect <<'TXT' ... TXT    compare that with the text given; exit 1 if it differs
#
# Everything lives in one temporary folder that is removed on exit. PYTHON picks
# the interpreter (3.11 was used); pip's own PIP_* variables apply as usual.
set -euo pipefail

WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

install() {
    "${PYTHON:-python3}" -m venv "$WORK/venv"
    if ! "$WORK/venv/bin/pip" install --quiet "$@" 2>"$WORK/pip.log"; then
        cat "$WORK/pip.log" >&2
        exit 2
    fi
}

probe() {
    mkdir -p "$WORK/home" "$WORK/run"
    # A private HOME, so that no library writes caches or tokens elsewhere.
    if ! (cd "$WORK/run" && env HOME="$WORK/home" HF_HUB_OFFLINE=1 \
        RAY_TMPDIR="$WORK/r" RAY_USAGE_STATS_ENABLED=0 PYTHONWARNINGS=ignore \
        "$WORK/venv/bin/python" - >"$WORK/seen" 2>"$WORK/err"); then
        cat "$WORK/seen" "$WORK/err" >&2
        exit 2
    fi
    cat "$WORK/seen"
}

expect() {
    if diff -u --label expected --label seen - "$WORK/seen"; then
        echo "OK: behaves as described"
    else
        echo "CHANGED: not the output described in this script" >&2
        exit 1
    fi
}
