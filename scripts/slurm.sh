#!/usr/bin/env bash
#SBATCH --job-name=boardwalk
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
# Several machines under Slurm: one task a machine, torchrun starts the processes there. Machines share the project folder.
# sbatch scripts/slurm.sh -m Qwen/Qwen2.5-7B-Instruct -d chats.json run=big
set -euo pipefail
export NNODES=$SLURM_NNODES GPUS_PER_NODE=${SLURM_GPUS_ON_NODE:-1}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
# A batch script runs from Slurm's copy, so the launcher is found from where sbatch was called.
srun bash -c 'NODE_RANK=$SLURM_NODEID exec bash finetune/finetune_lora_ds.sh "$@"' launcher "$@"
