#!/usr/bin/env bash
# Everything that wants a GPU, in one command of at most ten minutes: build, test, sanitise, measure, in that order.
#
#   bench/gpu_run.sh [part ...]        parts: build tests sanitize bench profile train; all of them without arguments
#
#   OUT=gpu-out      where logs, results and the marks of finished parts go
#   WHEELS=          folder of wheels to install first, for a machine without a package index
#   PYTHON=python3   an interpreter that holds a torch for this GPU
#   BUDGET=590       seconds for this run; a part that would start later waits for the next run
#   REHEARSE=1       without a GPU: the same steps on CPU tensors, Triton in its interpreter, sanitizer and ncu left out
#
# A part that finished leaves OUT/PART.done and is passed over in the next run: remove that file to repeat it. A part
# that fails does not stop the later ones, except the build. The exit status is the number of parts that did not finish.
set -uo pipefail
cd "$(dirname "$0")/.."

ROOT=$PWD OUT=$(mkdir -p "${OUT:-gpu-out}" && cd "${OUT:-gpu-out}" && pwd)
PYTHON=${PYTHON:-python3} BUDGET=${BUDGET:-590} REHEARSE=${REHEARSE:-0} WHEELS=${WHEELS:-}
VENV=$OUT/venv PY=$OUT/venv/bin/python
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONSAFEPATH=1
# Seconds after which a part is stopped; their sum is the budget.
declare -A LIMIT=([build]=90 [tests]=160 [sanitize]=110 [bench]=120 [profile]=30 [train]=80)
ORDER=(build tests sanitize bench profile train)
device=cuda
[ "$REHEARSE" = 1 ] && device=cpu && export TRITON_INTERPRET=1

fail() { echo "gpu_run: $*" >&2; exit 2; }
for part in "$@"; do [ -n "${LIMIT[$part]:-}" ] || fail "no part $part; there are ${ORDER[*]}"; done
"$PYTHON" -c 'import torch' 2>/dev/null || fail "$PYTHON has no torch; set PYTHON"
if [ "$REHEARSE" != 1 ]; then
  "$PYTHON" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    fail "torch sees no GPU here; REHEARSE=1 goes through the same steps on the CPU"
fi

# The caller's torch stays as it is: the environment sees its packages, and only what is missing is added. No pip of its
# own: ensurepip of Python 3.11 brings a setuptools too old for pyproject.toml, and it would hide the caller's.
build() {
  [ -x "$PY" ] || "$PYTHON" -m venv --without-pip "$VENV" || return 1
  # Not --system-site-packages: a venv made from a venv would see the base interpreter's packages only.
  "$PYTHON" -c 'import site; print("\n".join(site.getsitepackages()))' \
    >"$("$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/caller.pth"
  [ -z "$WHEELS" ] || "$PY" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl || return 1
  local cuda=1; [ "$REHEARSE" = 1 ] && cuda=${QEMPO_CUDA:-0}
  QEMPO_CUDA=$cuda "$PY" -m pip install -q --no-deps --no-build-isolation -e "$ROOT" || return 1
  (cd / && "$VENV/bin/qempo-fast" info) || return 1
  [ "$REHEARSE" = 1 ] || nvidia-smi
}

tests() {
  # Registers, spills and shared memory are the compile checks' of CI; what needs the GPU is here.
  local select=(tests)
  [ "$REHEARSE" = 1 ] && select=(tests/test_dpp_triton.py -k "selection or dependent")
  "$PY" -m pip show -q pytest-xdist >/dev/null 2>&1 && select+=(-n "${WORKERS:-8}")
  OMP_NUM_THREADS=1 "$VENV/bin/python" -P -m pytest "${select[@]}" -q --ignore=tests/test_demo.py --ignore=tests/test_package.py
}

# memcheck sees past the caching allocator only where each tensor is an allocation of its own.
sanitize() {
  local run=("$PY" -P "$ROOT/bench/gpu_sanitize.py" --device "$device") tool op status=0
  if [ "$REHEARSE" = 1 ]; then
    "${run[@]}" --backend triton && QEMPO_BACKEND= "${run[@]}" --backend cpu
    return
  fi
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; return 1; }
  "${run[@]}" --op dpp --backend cuda || return 1
  "${run[@]}" --backend triton || return 1
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck initcheck; do
    echo "== $tool, CUDA C++ of the DPP op"
    compute-sanitizer --tool $tool --error-exitcode 9 "${run[@]}" --op dpp --backend cuda || status=1
  done
  # RSPO exchanges ranks through memory between barriers.
  echo "== racecheck, Triton, losses"
  compute-sanitizer --tool racecheck --error-exitcode 9 "${run[@]}" --op losses --backend triton || status=1
  for op in dpp logps losses; do
    echo "== memcheck, Triton, $op"
    compute-sanitizer --tool memcheck --error-exitcode 9 "${run[@]}" --op $op --backend triton || status=1
  done
  return $status
}

bench() {
  local name; name=$("$PY" -c 'import torch; print(torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else "rehearsal")')
  mkdir -p "$OUT/results"
  local quick=(); [ "$REHEARSE" = 1 ] && quick=(--set tiny)
  # A file for each op: what is measured stays when time runs out.
  local op status=0
  for op in logps dpp losses; do
    env -u TRITON_INTERPRET "$VENV/bin/qempo-fast" bench --op $op --device "$device" "${quick[@]}" \
      --json "$OUT/results/$name-$(date +%F)-$op.json" || status=1
  done
  return $status
}

# Counters of the three hot kernels. The clocks stay as they are.
profile() {
  [ "$REHEARSE" = 1 ] && { "$PY" -P "$ROOT/bench/gpu_profile.py" --device cpu --scale 64; return; }
  command -v ncu >/dev/null || { echo "ncu is not on PATH"; return 1; }
  ncu --clock-control none --target-processes all --launch-skip 4 --launch-count 12 --csv --page raw \
    --metrics gpu__time_duration.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active,sm__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,sm__warps_active.avg.pct_of_peak_sustained_active \
    -k 'regex:dpp|fused|tile|loss' "$PY" -P "$ROOT/bench/gpu_profile.py" >"$OUT/results/ncu.csv"
}

train() {
  local size=(); [ "$REHEARSE" = 1 ] && size=(--steps 1 --groups 1 --samples 2)
  env -u TRITON_INTERPRET "$PY" -P "$ROOT/bench/gpu_train.py" --device "$device" "${size[@]}" --json "$OUT/results/train.json" --plot "$OUT/results/train.png"
}

began=$SECONDS
run_part() {
  local part=$1 left=$((BUDGET - (SECONDS - began))) start=$SECONDS status
  [ -e "$OUT/$part.done" ] && { echo "$part: done before"; return 0; }
  [ $left -lt 15 ] && { echo "$part: no time left in this run"; return 1; }
  local limit=$((left < LIMIT[$part] ? left : LIMIT[$part]))
  # A function cannot be given to timeout: this script calls itself with the part's name.
  ONLY=$part timeout -k 5 $limit bash "$ROOT/bench/gpu_run.sh" >"$OUT/$part.log" 2>&1
  status=$?
  [ $status = 0 ] && touch "$OUT/$part.done"
  local word=ok; [ $status = 0 ] || word="FAILED, status $status"; [ $status = 124 ] && word="stopped after $limit s"
  echo "$part: $word, $((SECONDS - start)) s; $OUT/$part.log"
  [ $status = 0 ] || tail -n 15 "$OUT/$part.log" | sed 's/^/    /'
  return $status
}

if [ -n "${ONLY:-}" ]; then mkdir -p "$OUT/results"; $ONLY; exit $?; fi
missing=0
for part in "${ORDER[@]}"; do
  [ $# = 0 ] || [[ " $* " == *" $part "* ]] || continue
  run_part "$part" || { missing=$((missing + 1)); [ "$part" = build ] && break; }
done
echo "$missing part(s) to do; results in $OUT/results"
exit $missing
