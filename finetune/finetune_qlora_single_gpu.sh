#!/usr/bin/env bash
# Q-LoRA on one GPU: adapters on a 4-bit base.
# bash finetune/finetune_qlora_single_gpu.sh -m MODEL -d DATA.json [key=value ...]
set -euo pipefail
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch tuner=qlora deepspeed=none launch.nproc_per_node=1
