#!/usr/bin/env bash
# Trains under SLURM on as many nodes as are asked for, one process a GPU:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/imagenet.py \
#     --workdir=/shared/runs/imagenet
#
# Submit from the repository, in the environment to train in; all nodes must see
# it, the workdir and the data. The arguments are those of launch/main.py; each
# task wants a core for each of its data.num_workers. Five minutes before the
# time is up the run saves and the job goes back to the queue; so it does when a
# process is lost.
#SBATCH --job-name=rvq_jax
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail
cd "${SLURM_SUBMIT_DIR:?expected to run under sbatch}" || exit 2

asked=0
# shellcheck disable=SC2329  # by trap
# To the processes, not to this script: the loop saves and leaves with 143.
stop() {
  asked=1 interrupted=1
  scancel --signal=TERM "$SLURM_JOB_ID"
}
trap stop USR1

# srun leaves with the highest code of its tasks, which hides a task that found a
# mistake (2) behind those that then lost it (75, 134): it leaves a file as well.
mistake=.mistake-$SLURM_JOB_ID
rm -f "$mistake"

# No task is killed because another left: it may still be writing its share.
# bash hears TERM too, and must stay until Python is done.
# shellcheck disable=SC2016  # expanded by the tasks
srun --kill-on-bad-exit=0 --wait=300 --gpu-bind=none bash -c '
  trap : TERM
  python launch/main.py --multihost "${@:2}"
  code=$?
  if ((code == 2)); then touch "$1"; fi
  exit "$code"' rvq_jax "$mistake" "$@" &
step=$!
code=127 interrupted=1
while ((interrupted)); do  # a signal ends `wait` early
  interrupted=0
  wait "$step"
  status=$?
  ((status == 127)) || code=$status  # 127: the step was waited for before
done

# 143: asked to stop; 75, 134, 137: a process was lost. Anything else, a wrong
# flag (2) for one, would only happen again.
case $code in
  0) exit 0 ;;
  75 | 134 | 137 | 143) again=1 ;;
  *) again=$asked ;;
esac
if [[ -e $mistake ]]; then
  rm -f "$mistake"
  again=0
fi
if ((again)) && ((${SLURM_RESTART_COUNT:-0} < 100)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
