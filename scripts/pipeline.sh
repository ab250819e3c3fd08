#!/usr/bin/env bash
# All three stages in a row, from a folder of settings (buffer.yaml, distill.yaml, evaluation.yaml):
#   bash scripts/pipeline.sh configs/cifar10_small --data_path /data/cifar10
# Ends with one HTML page of the run, and names it. Further arguments go to every stage, so only those that all three know. What is finished already is kept, so the same command goes on after a stop.
set -euo pipefail
[ -n "${1:-}" ] && [ -d "$1" ] || { echo "usage: bash scripts/pipeline.sh FOLDER_OF_SETTINGS [--option value ...]" >&2; exit 2; }
settings="$(cd "$1" && pwd)"
shift
here="$PWD"
. "$(dirname "$0")/setup.sh"
cd "$here"

started=$SECONDS
echo "== stage 1 of 3: rank the real images, record expert trajectories"
"$python" "$root/buffer/buffer_CL.py" --cfg "$settings/buffer.yaml" "$@"
echo "== stage 2 of 3: distil ($((SECONDS - started)) s so far)"
"$python" "$root/distill/PAD.py" --cfg "$settings/distill.yaml" --resume "$@"
echo "== stage 3 of 3: evaluate ($((SECONDS - started)) s so far)"
"$python" "$root/distill/evaluation.py" --cfg "$settings/evaluation.yaml" --overwrite "$@"  # what is there is of an earlier set of this run
if grep -q "^synthetic:" "$settings/evaluation.yaml"; then  # it names the run
  "$python" "$root/scripts/report.py" "$settings/evaluation.yaml"
fi
echo "== done in $((SECONDS - started)) s"
