#!/usr/bin/env bash
# Starts one training on one or more nodes with torchrun. Run it on every node with the same arguments:
#
#   GPUS=8 configs/launch/torchrun.sh fit --config configs/experiment/image.yaml --run_dir /shared/runs/a
#   NNODES=2 HEAD=node0 GPUS=8 configs/launch/torchrun.sh fit --config ... --run_dir /shared/runs/a
#
# Sizes come from here, never from YAML. --run_dir must lie on storage that every node sees.
#   GPUS      processes on this node (CPU: any number)      NNODES    nodes, or MIN:MAX for an elastic job
#   HEAD      host name of the node where ranks meet        PORT      its port
#   JOB       a name of this job: after a restart, ranks recognise their own run by it
#   RESTARTS  how often lost workers are started again; a restarted job goes on from its last checkpoint
# A worker that was pre-empted ends with exit code 75; torchrun itself then ends with 1.
set -euo pipefail
: "${GPUS:=1}" "${NNODES:=1}" "${HEAD:=$(hostname)}" "${PORT:=29500}" "${RESTARTS:=3}"
: "${JOB:=$(date +%Y%m%d-%H%M%S)}"

# Without this a restarted job finds the keys of its predecessor in the store and hangs (pytorch #135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Several network cards: name the one that the nodes share.
# export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0
# Seconds that a rank waits for a lost one (300 unless set).
# export QM_LIGHTNING_TIMEOUT_S=300

if [ "$NNODES" = 1 ]; then
  PORT=0 # any free port: two jobs on one machine do not meet
  HEAD=127.0.0.1
fi
# If no node believes that it is the head, all of them wait for a minute and fail; so we say it.
is_host=0
case "$HEAD" in "$(hostname)" | "$(hostname -s)" | "$(hostname -f)" | 127.0.0.1 | localhost) is_host=1 ;; esac

# `--` keeps torchrun from taking our options for its own. Workers have 60 s to save after a SIGTERM.
# The launcher is torchrun itself; what it adds is that a node which lost its head ends within the timeout.
python=.venv/bin/python
[ -x "$python" ] || python=python
exec "${PYTHON:-$python}" -m qm_lightning.runtime.launcher \
  --nnodes="$NNODES" --nproc-per-node="$GPUS" --max-restarts="$RESTARTS" --monitor-interval=1 \
  --rdzv-backend=c10d --rdzv-id="$JOB" --rdzv-endpoint="$HEAD:$PORT" --rdzv-conf="is_host=${IS_HOST:-$is_host}${RDZV_CONF:+,$RDZV_CONF}" \
  --shutdown-timeout=60 \
  -- "$(dirname "$0")/../../train.py" "$@"
