#!/usr/bin/env bash
# The whole road on the embedded default, on this machine's CPU: data, LoRA under DeepSpeed ZeRO-2 in two processes, merge, GPTQ int4, evaluation
# of each, a bundle, and the bundle's answer. Needs Python 3.11 to 3.13, a C compiler and the package registry; no GPU, no account.
# bash scripts/quickstart.sh [run=NAME]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
make_env
cd "$root"
run=${1:-run=default}
case $run in run=*) ;; *) echo "usage: bash scripts/quickstart.sh [run=NAME]" >&2; exit 2 ;; esac
prompt="What is the capital of Sweden?"
expect="evaluation.expect='.*\nAhoy! .*, captain\.'"

"$python" -m src.pipeline "$run" recipe=lora_llama2c deepspeed=zero2 launch.nproc_per_node=2 \
  "evaluation.prompts=['$prompt','What animal goes quack?','What is 2 plus 5?','What is the opposite of left?']" "$expect"

bundle=outputs/${run#run=}/deploy-llama2c
echo
echo "$bundle/run $bundle/model.bin -m chat -t 0 -i \"$prompt\""
"$bundle/run" "$bundle/model.bin" -m chat -t 0 -i "$prompt" </dev/null 2>/dev/null
