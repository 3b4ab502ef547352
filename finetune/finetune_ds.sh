#!/usr/bin/env bash
# Full fine-tuning under DeepSpeed ZeRO-3, on every GPU of every machine.
# bash finetune/finetune_ds.sh -m MODEL -d DATA.json [key=value ...]
set -euo pipefail
ARGS=("$@")
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch tuner=full deepspeed=zero3
