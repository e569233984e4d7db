#!/usr/bin/env bash
# Makes a virtual environment, installs the package with its test tools at the pinned versions, and runs lint and tests.
#   bash tools/test.sh [pytest arguments]        ECG_JAX_VENV=DIR uses another environment
# Two processes share the test files; `-n 0` runs them in one.
set -euo pipefail
cd "$(dirname "$0")/.."
source tools/venv.sh test
"$VENV/bin/ruff" format --check .
"$VENV/bin/ruff" check .
JAX_PLATFORMS=cpu "$VENV/bin/python" -m pytest -n 2 --dist loadfile "$@"
