#!/usr/bin/env bash
# Runs the same command on every worker of a TPU VM, restarted when preempted.
#
#   launch/tpu_vm.sh NAME ZONE [flags of dd_jax.main]
#
# Every worker needs this repository at ~/dd_jax, `pip install -e '.[tpu]'`, and
# the work directory on a file system that all of them mount. Each keeps a log
# at ~/dd_jax/<host>.log.
set -euo pipefail

if (($# < 2)); then
  echo "usage: $0 NAME ZONE [flags of dd_jax.main]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
if (($# == 0)); then
  set -- --config=configs/dd_var.py:digits --workdir=runs/dd_var_digits
fi
printf -v run '%q ' launch/preemptible.sh python -m dd_jax.main "$@"
# The login shell of the workers is bash; without pipefail tee would hide errors.
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="set -o pipefail; cd dd_jax && $run 2>&1 | tee -a \$(hostname).log"
