#!/usr/bin/env bash
# From nothing to a scored synthetic set, on the embedded images: makes .venv if needed, then runs all three stages.
# One and a half to three minutes on two CPU cores after installation. What came out, on one page: runs/quickstart/FashionMNISTMini/10/ConvNetW32/quickstart/report.html
set -euo pipefail
exec bash "$(dirname "$0")/pipeline.sh" "$(dirname "$0")/../configs/quickstart" "$@"
