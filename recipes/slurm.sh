#!/usr/bin/env bash
# Two machines of eight GPUs under Slurm:
#
#     sbatch recipes/slurm.sh mine.yaml --run_name mine
#
# All arguments go to `stages.pipeline`. Both machines must see the run's folder (runs_dir) and the models at the
# same paths; the cache may be a bucket (cache_dir s3://...). Change the #SBATCH lines to your cluster, or give them
# to sbatch.
#
# Slurm sends SIGTERM three minutes before the time is up, and when the job is preempted. Training then ends after the
# step at hand with a checkpoint; the job is queued again and goes on from there.
#SBATCH --job-name=dualkl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=08:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=150 # seconds that torchrun leaves the processes for their checkpoint
asked=""
trap 'asked=1; kill -TERM "$step"' TERM

# --kill-on-bad-exit: a machine that fails ends the other, instead of waiting for it
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "$SLURM_GPUS_ON_NODE" \
    --rdzv_backend c10d --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$head_node:${RDZV_PORT:-29500}" \
    -m stages.pipeline "$@" &
step=$!

code=0
wait "$step" || code=$?
if [ -n "$asked" ]; then # `wait` was interrupted by the signal: wait for the checkpoint
    wait "$step" || code=$?
    scontrol requeue "$SLURM_JOB_ID" || true # Slurm has queued a preempted job again itself
fi
exit "$code"
