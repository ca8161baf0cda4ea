#!/usr/bin/env bash
# The multi-host rehearsal on one machine: two processes of four fake devices.
#
#   launch/cpu_mesh.sh [flags of dd_jax.main]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# == 0)); then
  set -- --config=configs/dd_var.py:digits --workdir=runs/cpu_mesh
fi
export JAX_PLATFORMS=cpu
export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=4"
port=${PORT:-$((20000 + RANDOM % 10000))}

pids=()
# Neither process can go on alone: when one ends early, the other is told to.
trap 'kill "${pids[@]}" 2>/dev/null || true; wait' EXIT
for id in 0 1; do
  python -m dd_jax.main "$@" --coordinator="localhost:$port" \
    --num_processes=2 --process_id="$id" &
  pids+=("$!")
done
for _ in "${pids[@]}"; do
  wait -n
done
