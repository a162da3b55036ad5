#!/usr/bin/env bash
# Start this machine's ranks of a run. On one machine:
#   launch/torchrun.sh experiment=cc12m_b32 data.root=/data/cc12m
# On several, run it on each, with the same HEAD (any one of them) and NODES:
#   HEAD=node0:29400 NODES=16 launch/torchrun.sh experiment=laion400m_b32 data.root=/data/laion400m
# NODES=8:16 begins with 8 machines or more, and goes on with those that are left or have joined; as many ranks train as
# divide data.streams, the others stand by. After a failure all start again from the last checkpoint, MAX_RESTARTS times.
# GPUS: ranks on this machine (default: its GPUs, or 1). RUN_ID: tells jobs on one head apart.
set -euo pipefail

GPUS=${GPUS:-$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)}
if [ "$GPUS" -eq 0 ]; then GPUS=1; fi
NODES=${NODES:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [ "$NODES" = 1 ]; then
  rendezvous=(--standalone)
else
  : "${HEAD:?set HEAD=host:port, the same on all nodes}"
  rendezvous=(--nnodes="$NODES" --rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-clipscale}")
fi
exec python -m clipscale.launch.node "${rendezvous[@]}" --max-restarts="${MAX_RESTARTS:-3}" \
  --nproc-per-node="$GPUS" -- "$@"
