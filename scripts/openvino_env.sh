#!/usr/bin/env bash
# Makes the environment of OpenVINO's exporter for `deploy target=openvino_cpu` and `openvino_npu`, about 1.3 GB:
#   bash scripts/openvino_env.sh [FOLDER]      default .venv-openvino; another folder goes with target.environment=FOLDER
# The file requirements.sha256 in it is written last, so a half-made environment is finished, and changed pins bring it up to date.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pins=$root/scripts/openvino_requirements.txt
folder=${1:-$root/.venv-openvino}
python=$folder/bin/python
want=$(sha256sum "$pins" | cut -d' ' -f1)

if [ -x "$python" ] && [ "$(cat "$folder/requirements.sha256" 2>/dev/null)" = "$want" ]; then
  echo "$folder: up to date" >&2
  exit 0
fi
if [ ! -x "$python" ]; then
  base=""
  for candidate in "${PYTHON:-}" "$root/.venv/bin/python" python3.12 python3.11 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      base=$candidate
      break
    fi
  done
  if [ -z "$base" ]; then
    echo "missing tool: Python 3.11 or newer with venv" >&2
    echo "  fix:   install it (Debian, Ubuntu: apt-get install python3 python3-venv), or PYTHON=/path/to/python bash $0" >&2
    exit 7
  fi
fi
echo "making $folder from $pins, about two minutes" >&2
[ -x "$python" ] || "$base" -m venv "$folder"
# torch with all it needs on this machine (on a GPU machine that is CUDA), then the rest exactly as listed and nothing else.
pip=("$python" -m pip install -qq --disable-pip-version-check --no-input)
"${pip[@]}" --constraint "$pins" torch
"${pip[@]}" --no-deps --requirement "$pins"
"$python" -I -c 'import openvino_genai, optimum.intel'
echo "$want" >"$folder/requirements.sha256"
