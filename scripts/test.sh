#!/usr/bin/env bash
# Makes the environment if needed and runs the tests: lint, then types and pytest side by side. Arguments go to pytest: bash scripts/test.sh -m slow
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_env
cd "$root"
"$python" -m ruff check --quiet .
# Types take half a minute the first time, on the share of the cores that tests leave.
"$python" -m mypy &
types=$! failed=0
# A file's tests share what its fixtures made, so files are what is spread, in the order that tests/conftest.py gives them.
"$python" -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=20 "$@" || failed=$?
wait "$types" || failed=1
exit "$failed"
