#!/usr/bin/env bash
# Trains under SLURM, one process per GPU, with the flags of `rvq train`:
#
#   sbatch --nodes=4 launch/slurm.sh --config=imagenet \
#     --workdir=/shared/runs/imagenet
#
# Submit from the repository, in the environment to train in; all nodes must see
# it, the workdir and the data. Five minutes before the time is up, or when a
# process is lost, the run saves and the job is requeued.
#SBATCH --job-name=rvq_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?expected to run under sbatch}" || exit 2

# When a task ends, the others live on: they may still be saving.
srun --kill-on-bad-exit=0 --wait=300 --gpu-bind=none \
  python launch/main.py --multihost "$@"
code=$?
# 138, 143: stopped by a signal, and saved; 75, 134, 137: a process was lost. A
# mistake (2) would only repeat.
case $code in
  75 | 134 | 137 | 138 | 143)
    ((${SLURM_RESTART_COUNT:-0} < 20)) && scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$code"
