#!/bin/bash
# One machine, or the same command on each of several; one process a GPU.
#
#   PROCESSES=2 bash examples/cluster/torchrun.sh -m blockwise_lr train quickstart --device cpu --steps 20 --out runs/two
#   MACHINES=4 PROCESSES=8 FIRST=host-0 bash examples/cluster/torchrun.sh -m blockwise_lr train PRESET --out /shared/run
#
# What follows is what torchrun gets: a module (-m ...) or a script (examples/cluster/fsdp2.py), and its arguments.
set -eu
machines=${MACHINES:-1}
if [ "$machines" -eq 1 ]; then
    meeting=(--standalone)  # a free port
else
    meeting=(--nnodes="$machines" --rdzv-backend=c10d --rdzv-endpoint="${FIRST:?the host name of one machine}:${PORT:-29500}"
        --rdzv-id="${RUN:-blockwise}")
fi
exec torchrun "${meeting[@]}" --nproc-per-node="${PROCESSES:-gpu}" "$@"
