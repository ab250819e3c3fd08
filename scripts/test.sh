#!/usr/bin/env bash
# Make .venv if needed, install, then check lint, import layers and types, and run the tests that are quick.
#   bash scripts/test.sh          in a minute or three; each step says its name, and more only if it fails
#   bash scripts/test.sh --all    the slow tests, too: kills at any moment, compilers, torchrun, whole commands
# Other arguments go to pytest alone, slow tests included: bash scripts/test.sh tests/test_unroll.py -k adjoint
set -euo pipefail
. "$(dirname "$0")/setup.sh"
export PYTHONDONTWRITEBYTECODE=  # kept bytecode halves the start of every process
pytest=("$python" -m pytest --numprocesses auto --maxprocesses 4)
if [ $# -gt 0 ] && [ "$1" != --all ]; then
  echo "== running the tests"
  exec "${pytest[@]}" "$@"
fi

said="$(mktemp)"
trap 'rm -f "$said"' EXIT
step() {  # what it is, the command
  echo "== $1"
  shift
  "$@" > "$said" 2>&1 || { cat "$said"; exit 1; }
}
step "lint" "$python" -m ruff check
step "format" "$python" -m ruff format --check
step "import layers" "$venv/bin/lint-imports"
step "types" "$python" -m mypy
if [ $# -eq 0 ]; then
  echo "== tests (the quick ones; all of them: bash scripts/test.sh --all)"
  "${pytest[@]}" -m "not slow"
else
  echo "== tests"
  "${pytest[@]}" "${@:2}"
fi
