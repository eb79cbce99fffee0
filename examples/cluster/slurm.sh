#!/bin/bash
# One torchrun a machine, one process a GPU:
#
#   sbatch examples/cluster/slurm.sh -m blockwise_lr train PRESET --out /shared/run
#
# Without Slurm, as if on one machine of a cluster:
#
#   SLURM_NNODES=1 SLURM_JOB_ID=1 SLURM_JOB_NODELIST=localhost PROCESSES=2 \
#       bash examples/cluster/slurm.sh -m blockwise_lr train quickstart --device cpu --steps 20 --out runs/two
#
#SBATCH --job-name=blockwise
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# SIGTERM two minutes before the time is up, and the job in the queue again where the machines are taken back.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -eu
: "${SLURM_NNODES:?set by Slurm}" "${SLURM_JOB_ID:?set by Slurm}" "${SLURM_JOB_NODELIST:?set by Slurm}"
first=localhost
[ "$SLURM_NNODES" -eq 1 ] || first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
start=()  # on one machine too it is srun's steps that get Slurm's SIGTERM, and not this script
if command -v srun > /dev/null; then start=(srun --kill-on-bad-exit=1); fi
# A port of the job's own, since two jobs may share a machine.
exec ${start[@]+"${start[@]}"} torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${PROCESSES:-gpu}" \
    --rdzv-backend=c10d --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))" --rdzv-id="$SLURM_JOB_ID" "$@"
