#!/usr/bin/env bash
# Makes the environment of OpenVINO's exporter for `deploy target=openvino_cpu` and `openvino_npu`, about 1.3 GB:
#   bash scripts/openvino_env.sh [FOLDER]      default .venv-openvino; another folder goes with target.environment=FOLDER
# The file requirements.sha256 in it is written last, so a half-made environment is finished, and changed pins bring it up to date.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
pins=$root/scripts/openvino_requirements.txt
begin_own_env "${1:-$root/.venv-openvino}" "$pins" "about two minutes"
# torch with all it needs on this machine (on a GPU machine that is CUDA), then the rest exactly as listed and nothing else.
pip=("$python" -m pip install -qq --disable-pip-version-check --no-input)
"${pip[@]}" --constraint "$pins" torch
"${pip[@]}" --no-deps --requirement "$pins"
"$python" -I -c 'import openvino_genai, optimum.intel'
echo "$want" >"$folder/requirements.sha256"
