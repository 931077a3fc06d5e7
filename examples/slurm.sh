#!/usr/bin/env bash
#SBATCH --job-name=dq
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#
# Training on several nodes: sbatch examples/slurm.sh ~/data_imagenet --keep_ratio 0.125
# Without SLURM, on one machine: NODES=1 bash examples/slurm.sh DATA ...
#
# Every node runs torchrun once. The compact set is made by one rank; the cache must be a folder that all nodes see.
set -euo pipefail

nodes=${NODES:-${SLURM_NNODES:-1}}
gpus=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}
host=${MASTER_ADDR:-$(scontrol show hostnames "${SLURM_JOB_NODELIST:-}" 2>/dev/null | head -n 1 || true)}
export DQ_LIGHTNING_CACHE=${DQ_LIGHTNING_CACHE:-$PWD/results/cache}
script=${SCRIPT:-examples/imagenet.py}

command=(torchrun --nnodes "$nodes" --nproc_per_node "$gpus")
if [ "$nodes" -gt 1 ]; then
    command+=(--rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$host:${MASTER_PORT:-29500}")
    exec srun "${command[@]}" "$script" "$@" --num_nodes "$nodes" --devices "$gpus"
fi
exec "${command[@]}" --standalone "$script" "$@" --num_nodes 1 --devices "$gpus"
