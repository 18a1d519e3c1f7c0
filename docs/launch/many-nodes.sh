#!/usr/bin/env bash
# The same command on every machine. RUN is a folder that rank 0's machine sees; HEAD is the host name of one machine.
# NODES may be a range (2:4): an elastic run goes on with the machines there are, if the batch divides by their processes.
set -euo pipefail
SPEC=${1:?"usage: HEAD=host NODES=2 many-nodes.sh SPEC RUN"}
RUN=${2:?"usage: HEAD=host NODES=2 many-nodes.sh SPEC RUN"}
torchrun --nnodes "${NODES:?}" --nproc-per-node gpu --max-restarts 3 \
  --rdzv-backend c10d --rdzv-id "${RUN_ID:-graphopt}" --rdzv-endpoint "${HEAD:?}:29400" \
  -m graphopt train "$SPEC" --out "$RUN"
