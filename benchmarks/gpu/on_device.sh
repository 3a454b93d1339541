#!/bin/bash
# On a machine with one H200 and no network, at the root of the tree:
#   OUT=DIR bash benchmarks/gpu/on_device.sh [PART ...]
# PARTs: correct speed train rest; without one the first three. DIR receives
# results.json and summary.md after every row, more.tgz (logs, metrics, figures)
# after every stage. What is finished in $WORK (runs/gpu) is not run again.
# Ends after SECONDS_IN_ALL=570; REHEARSE=1 takes tiny sizes, on any machine.
set -u
start=$(date +%s)
out=${OUT:?expected OUT=DIR, a folder for the results}
work=${WORK:-$PWD/runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$work/logs" "$work/runs" "$out"
out=$(cd "$out" && pwd)
export JAX_COMPILATION_CACHE_DIR=$work/cache XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_PLATFORMS=cuda,cpu TF_CPP_MIN_LOG_LEVEL=1  # never the CPU in silence
all=(--work="$work" --out="$out")
if [ -n "${REHEARSE:-}" ]; then
  all+=(--tiny)
  export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1
fi

left() { echo $((${SECONDS_IN_ALL:-570} - $(date +%s) + start)); }

pack() {  # under a name of its own first: another may pack, too
  local part=$out/.$BASHPID
  (cd "$work" && find logs runs -type f -size -2M \( -name '*.log' -o -name \
    '*.json*' -o -name '*.png' \) -print0 | tar czf "$part" --null -T -)
  mv "$part" "$out/more.tgz"
} 2> /dev/null

# limited NAME SECONDS COMMAND ...: with a log, in the time that is left
limited() {
  local name=$1 most=$2 code
  shift 2
  if [ -n "${REHEARSE:-}" ]; then most=$((8 * most)); fi
  if [ "$most" -gt $(($(left) - 25)) ]; then most=$(($(left) - 25)); fi
  if [ "$most" -lt 10 ]; then return; fi
  timeout -k 20 "$most" "$python" "$@" >> "$work/logs/$name.log" 2>&1
  code=$?
  echo "[$(left) s left] $name: exit $code" \
    "$([ $code = 0 ] || tail -n 1 "$work/logs/$name.log" | cut -c1-200)"
}

# stage NAME SECONDS STAGE [FLAG ...]
stage() {
  local name=$1 most=$2
  shift 2
  grep -qs '"done": true' "$work/results/$name.json" && return
  limited "$name" "$most" \
    benchmarks/gpu/stages.py "$@" --name="$name" "${all[@]}"
  pack
}

setup() {
  if [ -d .gpu ] && [ ! -d "$work/site" ]; then
    for wheel in .gpu/wheels/*.whl; do  # plain archives
      "$python" -m zipfile -e "$wheel" "$work/site"
    done
    tar xJf .gpu/cifar10.tar.xz -C "$work"
  fi
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
  (nvidia-smi; "$python" -m pip list) > "$work/logs/machine.log" 2>&1
  "$python" -c "import jax; jax.devices('${JAX_PLATFORMS%%,*}')" || exit 3
}

correct() {  # beside each other: none of them measures time
  stage edges 110 edges &
  stage resume_bfloat16 110 resume &
  stage resume_float32 110 resume --dtype=float32 &
  stage parity 110 parity &
  stage families 110 families &
  wait
}

speed() {
  stage quantizer 120 quantizer
  stage step_imagenet 130 step --config=imagenet
  stage step_f4 100 step --config=cifar10:f4
  stage peers 80 peers
}

rest() {
  stage quantizer_2_17 80 quantizer --codes=131072
  stage step_imagenet_float32 110 step --config=imagenet --dtype=float32
  stage step_f4_not_filling 90 step --config=cifar10:f4 --init_from=normal
}

# 4 estimators x 3 seeds, six at a time. A run that is stopped saves itself.
train() {
  local seed name steps=$work/runs/steps seeds='0 1 2'
  local names='ste rotation rotation_unscaled best'
  if [ -n "${REHEARSE:-}" ]; then
    seeds=0 names='ste best'
    echo 10 > "$steps"
  elif [ ! -e "$steps" ]; then  # once: the schedule depends on it
    "$python" - "$work/results/step_f4.json" $(($(left) - 120)) << 'EOF' > "$steps"
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
ms = json.loads(file.read_text())['rows'][0]['ms'] if file.exists() else 6
print(int(min(max(1e3 * int(sys.argv[2]) / (1.2 * ms * 12), 1500), 7800)))
EOF
  fi
  for seed in $seeds; do
    for name in $names; do
      while [ "$(jobs -rp | wc -l)" -ge 6 ]; do wait -n; done
      run "$name" "$seed" "$(cat "$steps")" &
    done
  done
  wait
}

run() {  # ESTIMATOR SEED STEPS
  local dir=$work/runs/$1_$2 config=cifar10.py:f4 late=0 more=()
  [ ! -e "$dir/evaluation/test/metrics.json" ] || return 0
  if [ "$1" = best ]; then
    config+=,best late=$(($3 / 10))
  else
    more=(--config.model.estimator="$1")
  fi
  if [ -n "${REHEARSE:-}" ]; then
    config=photos.py
    more+=(--config.batch_size=4 --config.data.image_size=32
      --config.model.num_res_blocks=0 --config.model.codebook_size=16
      --config.optimizer.warmup_steps=0)
  else
    more+=(--config.data.data_dir="$work/tfds" --config.data.split=official
      --config.model.dtype=bfloat16)
  fi
  limited "$1_$2" 999 launch/main.py \
    --config="configs/$config" --workdir="$dir" --config.seed="$2" \
    --config.num_steps="$3" --config.model.quantize_after="$late" \
    --config.eval_every=0 --config.checkpoint_every=0 "${more[@]}"
  "$python" benchmarks/gpu/stages.py runs "${all[@]}" > /dev/null
  pack
}

setup
for part in ${*:-correct speed train}; do
  "$part"
done
tail -n 40 "$out/summary.md" | cut -c1-200
grep -q 'should be: 0' "$out/summary.md" && ! grep -q STOPPED "$out/summary.md"
