#!/usr/bin/env bash
# One machine, one process per GPU; a rank that dies makes all start again from the last checkpoint.
set -euo pipefail
SPEC=${1:?"usage: one-node.sh SPEC RUN [PROCESSES]"}
RUN=${2:?"usage: one-node.sh SPEC RUN [PROCESSES]"}
torchrun --standalone --nproc-per-node "${3:-gpu}" --max-restarts 3 -m graphopt train "$SPEC" --out "$RUN"
