#!/usr/bin/env bash
# Runs the same command on every worker of a TPU VM, restarted when preempted.
#
#   launch/tpu_vm.sh NAME ZONE [flags of dd_jax.main]
#
# Every worker needs this repository at ~/dd_jax, an environment with
# `pip install -e '.[tpu,data]'` at VENV (~/venv, a path there), and the work
# directory on a file system that all of them mount. Each keeps a log at
# ~/dd_jax/<host>.log. MAX_RESTARTS (100) and RETRY_SECONDS (10) go to the
# workers, too. When the VM itself is gone, the command RECREATE, if there is
# one, has to bring it back as it was; otherwise this script waits for somebody
# to do so.
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
printf -v run '%q ' env MAX_RESTARTS="${MAX_RESTARTS:-100}" \
  RETRY_SECONDS="${RETRY_SECONDS:-10}" \
  launch/preemptible.sh python -m dd_jax.main "$@"
# The login shell of the workers is bash; without pipefail tee hides errors. A ~
# in VENV is the home there.
run="set -o pipefail; export PATH=${VENV:-~/venv}/bin:\$PATH; cd dd_jax && \
$run 2>&1 | tee -a \$(hostname).log"
for ((attempt = 0; ; attempt++)); do
  status=0
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
    --command="$run" || status=$?
  case $status in 0 | 1 | 2 | 130) exit "$status" ;; esac
  if ((attempt >= ${MAX_RESTARTS:-100})); then
    echo "$0: status $status after $attempt restarts; giving up" >&2
    exit "$status"
  fi
  while state=$(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" \
    --format='value(state)' || echo GONE) && [[ $state != READY ]]; do
    echo "$0: $name is $state" >&2
    if [[ -n ${RECREATE:-} ]]; then
      bash -c "$RECREATE" || true
    fi
    sleep "${RETRY_SECONDS:-60}"
  done
  echo "$0: status $status; going on" >&2
  sleep "${RETRY_SECONDS:-10}"
done
