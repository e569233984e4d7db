#!/bin/bash
# One training run on a TPU slice of several hosts; to be started on every host of the slice:
#
#   gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all --command \
#       "cd ecg_jax && bash tools/launch_tpu.sh configs/supervised_ptbxl.toml --run /shared/runs/R12 model.rung=R12"
#
# Everything after the script's name goes to `ecg-jax train`. Data and run folder lie on a file system that every host
# sees (Filestore, a mounted bucket). Slices of 1, 2, 4 or 8 chips: the devices of a run divide the 8 lanes of the data.
set -euo pipefail

# The number of this host and the addresses of all of them, as the slice's own environment or its metadata give them.
attribute() {
  curl -sf -H 'Metadata-Flavor: Google' \
    "http://metadata.google.internal/computeMetadata/v1/instance/attributes/$1"
}
: "${TPU_WORKER_ID:=$(attribute agent-worker-number)}"
# worker-network-endpoints: entries `name:number:address`, with commas between them
: "${TPU_WORKER_HOSTNAMES:=$(attribute worker-network-endpoints | tr ',' '\n' | cut -d: -f3 | paste -sd,)}"

IFS=, read -ra hosts <<< "$TPU_WORKER_HOSTNAMES"
export JAX_COORDINATOR_ADDRESS="${hosts[0]}:8476"
export JAX_NUM_PROCESSES="${#hosts[@]}"
export JAX_PROCESS_ID="$TPU_WORKER_ID"
exec ecg-jax train "$@"
