#!/usr/bin/env bash
# LoRA on one GPU.
# bash finetune/finetune_lora_single_gpu.sh -m MODEL -d DATA.json [key=value ...]
set -euo pipefail
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch tuner=lora deepspeed=none launch.nproc_per_node=1
