#!/usr/bin/env bash
# Makes a virtual environment, installs the package at the pinned versions, and runs the demonstration.
#   bash tools/demo.sh [OUT]        default OUT: ./demo        ECG_JAX_VENV=DIR uses another environment
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-demo}"
source tools/venv.sh ""
JAX_PLATFORMS=cpu "$VENV/bin/ecg-jax" demo --out "$out"
