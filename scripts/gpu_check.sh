#!/usr/bin/env bash
# On a machine with a CUDA card: the tests marked cuda, then the table of scripts/benchmarks/gpu.py. At most some eight minutes.
#   bash scripts/gpu_check.sh                    what is said and measured goes to runs/gpu
#   bash scripts/gpu_check.sh FOLDER --cells     to another folder; further arguments go to gpu.py
# Downloads and installs nothing. PYTHON names the Python to take; without it .venv's, or python3. Test files that import
# what it lacks are named and left out. The exit code is not 0 where a test or a measurement failed.
set -euo pipefail
folder=runs/gpu
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  folder="$1"
  shift
fi
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
"$python" -c "import torch" || { echo "error: $python has no torch; PYTHON names another" >&2; exit 2; }

found="$("$python" - <<'PY'
import runpy
import sys
from pathlib import Path

sys.path[:0] = ["", "tests", "tests/pipeline"]  # as pytest has them
for file in sorted(Path("tests").rglob("test_*.py")):
    if "mark.cuda" in file.read_text(encoding="utf-8"):
        try:
            for needed in ("tests/conftest.py", str(file)):
                runpy.run_path(needed)
        except ModuleNotFoundError as missing:
            print(f"{file} is left out: {missing.name} is not installed", file=sys.stderr)
        else:
            print(file)
PY
)"
name="$folder/$(date -u +%Y%m%dT%H%M%S)"
failed=0
if [ -n "$found" ]; then
  echo "== tests on CUDA"
  mapfile -t files <<< "$found"
  timeout 240 "$python" -m pytest -m cuda "${files[@]}" 2>&1 | tee "$name-tests.txt" || {
    failed=1
    echo "== a test failed, or they took more than 240 s"
  }
fi
echo "== measuring"
"$python" scripts/benchmarks/gpu.py --out "$name.json" "$@" 2>&1 | tee "$name.txt" || failed=$?
echo "== it is all in $name*"
exit "$failed"
