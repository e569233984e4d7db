#!/bin/bash
# One training run over several nodes, a process per node:
#
#   sbatch --nodes=2 --gpus-per-node=8 tools/launch_slurm.sh configs/supervised_ptbxl.toml --run runs/R12 model.rung=R12
#
# Everything after the script's name goes to `ecg-jax train`. Data and run folder lie on a file system that every node
# sees. The number of processes divides 8, the lanes of the data (1, 2, 4, 8), as does that of all devices.
#
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# TERM comes two minutes before the end of the allocation, and when the job is preempted: the run saves itself and
# exits 75, and the same job goes on when it is queued again. `exec` is no way here: the exit code has to be looked at.
export JAX_COORDINATOR_ADDRESS="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 20000))"
export JAX_NUM_PROCESSES="$SLURM_NTASKS"
# jax asks whether a proxy stands between the processes, and waits for it.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY

code=0
srun --kill-on-bad-exit=1 --wait=60 bash -c 'JAX_PROCESS_ID=$SLURM_PROCID exec ecg-jax train "$@"' launch "$@" || code=$?
if [ "$code" = 75 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
