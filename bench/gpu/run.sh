#!/usr/bin/env bash
# Two calls on a machine with a GPU, each of five minutes at most: proof and the headline numbers first.
#
#   bench/gpu/run.sh first
#   bench/gpu/run.sh second [--results FILE]     FILE: results.jsonl of the first call, whose failed tests run again
#
#   KIT=.gpu         what `make gpu-kit` built: wheels, Triton's cache; empty in a rehearsal: what PYTHON has
#   OUT=gpu-out      gets log.txt, results.jsonl and tests.txt, written as they grow; all else is in a temporary folder
#   LIMIT=240        the second after which nothing new starts
#   PYTHON=python3   an interpreter that holds a torch for this GPU
#   REHEARSE=1       without a GPU: the same steps on CPU tensors, at sizes that take seconds
#
# Relative paths are from the repository's root. The card's settings stay as they are. docs/gpu.md says what comes back.
set -uo pipefail
GPU_BEGAN=$(date +%s.%N)
cd "$(dirname "$0")/../.." || exit 2
call=${1:-}; shift
fail() { echo "gpu/run: $*" >&2; exit 2; }
[ "$call" = first ] || [ "$call" = second ] || fail "wanted first or second, got '$call'"

KIT=${KIT-.gpu} REHEARSE=${REHEARSE:-0} PYTHON=${PYTHON:-python3}
[ -z "$KIT" ] || KIT=$(realpath -m "$KIT")
[ -n "$KIT" ] || [ "$REHEARSE" = 1 ] || fail "KIT is empty: wanted the folder that make gpu-kit builds"
WORK=$(mktemp -d) || fail "no temporary folder"
child=
stop() { [ -z "$child" ] || kill -TERM "$child" 2>/dev/null; wait; exit 143; }
trap stop TERM INT
trap 'rm -rf "$WORK"' EXIT
# Before OUT is emptied, where they may lie.
if [ "${1:-}" = --results ]; then
  cp "${2:-}" "$WORK/first.jsonl" 2>/dev/null || fail "results: no file ${2:-}"
  set -- --results "$WORK/first.jsonl"
fi
OUT=$(mkdir -p "${OUT:-gpu-out}" && cd "${OUT:-gpu-out}" && pwd) || fail "OUT: cannot be made"
: >"$OUT/log.txt" && : >"$OUT/results.jsonl" && : >"$OUT/tests.txt" || fail "OUT: $OUT cannot be written"
mkdir -p "$WORK"/{site,triton,tmp,inductor,cache,cuda}

# Safe path: the repository's own qempo_fast, which has no compiled part, and its kernels/ stay out of sight. bench/ is
# on the path for pytest's plugin, and hides nothing: its packages are suite, gpu, studies and report.
export GPU_BEGAN KIT REHEARSE OUT PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$WORK/site:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}"
# Bytecode that lies beside the packages is read, none is written: torch would take seconds to compile in each process.
export PYTHONDONTWRITEBYTECODE=1 TMPDIR="$WORK/tmp" XDG_CACHE_HOME="$WORK/cache" CUDA_CACHE_PATH="$WORK/cuda"
export TRITON_CACHE_DIR="$WORK/triton" TORCHINDUCTOR_CACHE_DIR="$WORK/inductor" PYTHONFAULTHANDLER=1
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false GPU_RESULTS="$OUT/results.jsonl"
unset TRITON_INTERPRET QEMPO_BACKEND
[ "$REHEARSE" = 1 ] && export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

rehearsal=(); [ "$REHEARSE" = 1 ] && rehearsal=(--rehearse)
kit=(); [ -n "$KIT" ] && kit=(--kit "$KIT")
"$PYTHON" -P bench/gpu/env.py --out "$OUT" --call "$call" "${kit[@]}" "${rehearsal[@]}" || exit 2
if [ -n "$KIT" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check \
    --root-user-action ignore --target "$WORK/site" "$KIT"/wheels/*.whl >>"$OUT/log.txt" 2>&1 ||
    fail "kit: its wheels do not install; $OUT/log.txt"
  PYTHONDONTWRITEBYTECODE="" "$PYTHON" -m compileall -q "$WORK/site/qempo_fast" >>"$OUT/log.txt" 2>&1
  # Without it the kernels compile, which takes the tests half a minute more.
  "$PYTHON" -P bench/gpu/kit.py unpack "$WORK/triton" --kit "$KIT" >>"$OUT/log.txt" 2>&1
fi

# A crash, or an item that hangs, ends the program; it goes on with the next item. Nothing starts past LIMIT.
limit=${LIMIT:-240} status=1
for _ in 1 2 3 4 5 6; do
  "$PYTHON" -P "bench/gpu/$call.py" "$@" 2>>"$OUT/log.txt" &
  child=$!
  wait $child; status=$?; child=
  [ $status != 0 ] && [ $(($(date +%s) - ${GPU_BEGAN%.*})) -lt "${limit%.*}" ] || break
  echo "gpu/run: the program ended with status $status; going on with the next item" | tee -a "$OUT/log.txt"
done
exit $status
