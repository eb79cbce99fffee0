#!/bin/bash
# What has to be checked on a GPU, in at most 9 minutes a call; no internet.
#
#   bash benchmarks/gpu.sh prepare        once, on any machine: text as tokens in benchmarks/gpu-data (some 5 MiB)
#   bash benchmarks/gpu.sh                every part, each with a time limit
#   bash benchmarks/gpu.sh correctness    one part: correctness throughput sharpness optimizers compare fsdp2
#
# `compare` goes on where it was cut off: call it again until it says that it is finished. --device cpu --tiny tries
# everything that can be tried without a GPU. Each part writes results/gpu_checks-PART-DATE.json. One that fails does not
# stop the others; the exit code is then 1. 2: no CUDA device. LIMIT=SECONDS: another time limit of every part.
set -u
here=$(dirname "$0")
parts=() flags=()
for argument in "$@"; do
    case $argument in
        prepare | correctness | throughput | sharpness | optimizers | compare | fsdp2) parts+=("$argument") ;;
        *) flags+=("$argument") ;;
    esac
done
alone=${#parts[@]}
[ "$alone" -eq 0 ] && parts=(correctness throughput sharpness optimizers compare fsdp2)
declare -A limits=([correctness]=120 [throughput]=170 [sharpness]=40 [optimizers]=40 [compare]=110 [fsdp2]=50)  # 530 s
failed=0
for part in "${parts[@]}"; do
    limit=${limits[$part]:-520}
    [ "$alone" -eq 1 ] && limit=520
    limit=${LIMIT:-$limit}
    timeout --kill-after=5 "$limit" "${PYTHON:-python}" "$here/gpu_checks.py" "$part" ${flags[@]+"${flags[@]}"}
    code=$?
    [ "$code" -eq 2 ] && exit 2
    [ "$code" -eq 0 ] || { echo "gpu.sh: $part failed (exit code $code; 124: cut off after $limit s)" >&2; failed=1; }
done
exit $failed
