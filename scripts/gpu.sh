#!/usr/bin/env bash
# One call on a GPU machine: CUDA tests, all notebooks on smoke under nbval, the engine's benchmark, the study `gpu`.
#
#     OUT=gpu-out scripts/gpu.sh                DEVICE=cpu QUICK=1 scripts/gpu.sh     # a dry run, in a minute
#     STAGES=study OUT=gpu-out scripts/gpu.sh   # the study alone; it goes on from $DMM_RUNS, where that lasted
#
# With the packed environment of .gpu/ where there is one, else with .venv or the python3 that is there. Each stage has a
# limit; one that fails or runs out of time stops no other. At the end: a table. $OUT holds few files: table.txt, all
# logs in logs.tar.gz, engine.json, and of the study results.csv, medians.md and a figure, each there as soon as it is.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
OUT=$(mkdir -p "${OUT:-gpu-out}" && cd "${OUT:-gpu-out}" && pwd) LOGS=$(mktemp -d)
DEVICE=${DEVICE:-cuda} QUICK=${QUICK:-} TOTAL=${TOTAL:-480} SECONDS=0
STAGES=${STAGES:-cuda_tests notebooks engine study}
PYTHON=python3
if [ -f .gpu/unpack ]; then
  . .gpu/unpack > "$OUT/unpack.log" 2>&1 || { tail -5 "$OUT/unpack.log"; exit 1; }
  mv "$OUT/unpack.log" "$LOGS"
elif [ -x .venv/bin/python ]; then
  PYTHON=$PWD/.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" DMM_TEST_DEVICE=$DEVICE DMM_RUNS=${DMM_RUNS:-$PWD/runs}
echo "stage result seconds" > "$OUT/table.txt"

stage() { # name, limit in seconds, command: runs it for as long as is left
  local name=$1 limit=$2 start=$SECONDS left=$((TOTAL - SECONDS)) result
  shift 2
  [[ " $STAGES " == *" $name "* ]] || return
  if [ "$left" -lt 5 ]; then
    echo "$name not-started 0" >> "$OUT/table.txt"
    return
  fi
  timeout -k 5 $((limit < left ? limit : left)) "$@" > "$LOGS/$name.log" 2>&1
  case $? in 0) result=passed ;; 124 | 137) result=out-of-time ;; *) result=failed ;; esac
  echo "$name $result $((SECONDS - start))" >> "$OUT/table.txt"
  tar -czf "$OUT/logs.tar.gz" -C "$LOGS" .
}

notebooks() { # all at once, each with a share of the cores; QUICK looks at one, as it is committed
  local chosen=${QUICK:+01_convex_setting} test=${QUICK:+committed} pids=() failed=0 threads=$(($(nproc) / 8 + 1))
  for name in ${chosen:-$(basename -s .ipynb notebooks/[0-9][0-9]_*.ipynb)}; do
    OMP_NUM_THREADS=$threads "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_notebooks.py \
      -k "${test:-nbval_on_smoke} and $name" > "$LOGS/notebook-$name.log" 2>&1 &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  tail -qn 1 "$LOGS"/notebook-*.log
  return $failed
}

stage cuda_tests 60 "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_ensemble.py -k "cuda"
export -f notebooks
export LOGS PYTHON QUICK
stage notebooks 150 bash -c notebooks
stage engine $((QUICK ? 240 : 90)) "$PYTHON" benchmarks/engine.py --device "$DEVICE" --out "$OUT/engine.json" ${QUICK:+--models mlp --rounds 1 --steps 10 --one-core}
stage study "$TOTAL" "$PYTHON" -m benchmarks.gpu_study --run --device "$DEVICE" --out "$OUT" ${QUICK:+--quick} \
  ${CIFAR10:+--images "$CIFAR10"}
rm -r "$LOGS"
column -t "$OUT/table.txt" 2> /dev/null || cat "$OUT/table.txt"
