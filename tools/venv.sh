# Sourced by demo.sh and test.sh: sets VENV to an environment with the package installed at the pinned versions.
#   source tools/venv.sh [EXTRA]
VENV="${ECG_JAX_VENV:-.venv}"
target=".${1:+[$1]}"
stamp="$VENV/.ecg_jax-${1:-plain}"
if [ ! -x "$VENV/bin/python" ]; then
  python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed, found $(python3 -V)" >&2; exit 2; }
  python3 -m venv "$VENV"
fi
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ] || [ tools/constraints.txt -nt "$stamp" ]; then
  echo "installing ecg_jax into $VENV (a few minutes the first time)" >&2
  "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt --editable "$target"
  touch "$stamp"
fi
