# Sourced by the other scripts: makes .venv in the checkout and installs the package with what tests need; idempotent.
# PYTHON names another interpreter (3.10 or newer) to make .venv with.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
venv="$root/.venv"
wanted="$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" || { echo "error: python3 not found" >&2; exit 2; }
case "$wanted" in
  3.[0-9]) echo "error: Python 3.10 or newer is needed, ${PYTHON:-python3} is $wanted; set PYTHON=python3.11, say" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" "$root/scripts/machine.py" "$root" || exit 2
if [ ! -x "$venv/bin/python" ]; then
  echo "== making .venv with Python $wanted"
  "${PYTHON:-python3}" -m venv "$venv"
fi
stamp="$venv/.installed-$(cksum < pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  echo "== installing pad and what it needs into .venv (once; PyTorch is large)"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[test]"
  rm -f "$venv"/.installed-*
  touch "$stamp"
fi
python="$venv/bin/python"
