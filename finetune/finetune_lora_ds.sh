#!/usr/bin/env bash
# LoRA under DeepSpeed ZeRO-2, on every GPU of every machine.
# bash finetune/finetune_lora_ds.sh -m MODEL -d DATA.json [key=value ...]
set -euo pipefail
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch tuner=lora deepspeed=zero2
