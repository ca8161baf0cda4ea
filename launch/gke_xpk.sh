#!/usr/bin/env bash
# Submits a run to TPUs of a GKE cluster through xpk.
#
#   CLUSTER=... PROJECT=... ZONE=... IMAGE=... TPU_TYPE=v5litepod-16 \
#     launch/gke_xpk.sh WORKLOAD [flags of dd_jax.main]
#
# The image holds this repository as its working directory, installed with
# `pip install -e '.[tpu]'`; the work directory is on a volume that all pods
# mount.
set -euo pipefail

if (($# < 1)); then
  echo "usage: $0 WORKLOAD [flags of dd_jax.main]" >&2
  exit 2
fi
workload=$1
shift
if (($# == 0)); then
  set -- --config=configs/dd_var.py:digits --workdir=runs/dd_var_digits
fi
printf -v run '%q ' launch/preemptible.sh python -m dd_jax.main "$@"
xpk workload create --workload="$workload" --command="$run" \
  --cluster="${CLUSTER:?}" --project="${PROJECT:?}" --zone="${ZONE:?}" \
  --docker-image="${IMAGE:?}" --tpu-type="${TPU_TYPE:?}" --num-slices=1 \
  --max-restarts="${MAX_RESTARTS:-10}"
