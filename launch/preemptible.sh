#!/usr/bin/env bash
# Runs a command again until it is done; every run resumes where the last ended.
#
#   launch/preemptible.sh python -m dd_jax.main --config=... --workdir=...
#
# Done is status 0. 1 (a mistake that the run reports), 2 (wrong use) and 130
# (Ctrl-C) would come again and end it too. The rest, such as 143 of a
# preempted run or 75 of one that lost another host, is tried again, at most
# MAX_RESTARTS times (100).
set -uo pipefail

if (($# == 0)); then
  echo "usage: $0 COMMAND..." >&2
  exit 2
fi
for ((run = 0; ; run++)); do
  "$@"
  status=$?
  case $status in 0 | 1 | 2 | 130) exit "$status" ;; esac
  if ((run >= ${MAX_RESTARTS:-100})); then
    echo "$0: status $status after $run restarts; giving up" >&2
    exit "$status"
  fi
  echo "$0: status $status; restarting" >&2
  sleep "${RETRY_SECONDS:-10}"
done
