#!/usr/bin/env bash
# `make sanitize`: csrc built with AddressSanitizer and UndefinedBehaviorSanitizer into build/sanitize, a folder of its
# own with links to the Python files, and the tests of the native code run on it. The first report ends its process.
# Left out are tests that never enter csrc (reference, Triton, gradcheck) and tests/test_memory.py, which counts the
# memory that the sanitizer takes as ours.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
build=$PWD/build/sanitize
tools=$build/tools

# pip builds the package in an environment of its own, so .venv has none of these.
if [ ! -d "$tools/pybind11" ]; then
  "$python" -m pip install --quiet -c constraints-cpu.txt --target "$tools" "pybind11>=3.0,<4" "cmake>=3.25,<5" ninja
fi
export PATH=$tools/bin:$PATH
PYTHONPATH=$tools QEMPO_CUDA=0 cmake -S . -B "$build/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DQEMPO_SANITIZE=ON \
  "-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$build/qempo_fast" "-DPython_EXECUTABLE=$python" \
  "-Dpybind11_DIR=$tools/pybind11/share/cmake/pybind11" >"$build/configure.log"
PYTHONPATH=$tools cmake --build "$build/cmake"
find "$build/qempo_fast" -type l -delete
for file in "$PWD"/qempo_fast/*; do
  case $file in *.so | *__pycache__) ;; *) ln -s "$file" "$build/qempo_fast/" ;; esac
done
ln -s "$PWD/kernels" "$build/qempo_fast/kernels"

# libstdc++ with them: loaded later, as a dependency of torch, its exceptions end in "CHECK failed: real___cxa_throw".
# Leaks: Python and torch keep memory to the end. Torch's allocator frees with free() what it took with posix_memalign.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1
# Two threads: a kernel on one never meets a neighbour's part.
export PYTHONPATH=$build:$PWD/tests HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2
run() { "$python" -P "$@"; }

echo "A write past the end has to be seen:"
if run - >"$build/deliberate.log" 2>&1 <<'EOF'; then echo "no report" && exit 1; fi
import torch
from qempo_fast import _C
out, seen, at, rows = torch.zeros(4, 2), torch.zeros(4, dtype=torch.uint8), torch.tensor([4]), torch.ones(1, 2)
_C.add_rows(0, out.data_ptr(), seen.data_ptr(), at.data_ptr(), rows.data_ptr(), 1, 2, 1)
EOF
grep "ERROR: AddressSanitizer: heap-buffer-overflow" "$build/deliberate.log"
run -c "import qempo_fast; assert qempo_fast._C.__file__.startswith('$build'), qempo_fast._C.__file__"

# -s: pytest would keep the report of a process that ends. What is deselected is a bound on rounding that -O1 misses by
# a fiftieth: 3.91e-14 for 3.82e-14.
run -m pytest -q -s -n 0 -p no:cacheprovider "$@" \
  --deselect "tests/test_logps.py::test_exact_against_float64[cpu-torch.float64-several row chunks and tiles, ragged ends]" \
  -k "not reference and not triton and not gradcheck and not interpreter and not golden and not several_chunks and not two_shards" \
  tests/test_add_rows.py tests/test_dpp.py tests/test_dpp_large_quality.py tests/test_dpp_select.py \
  tests/test_logps.py tests/test_logps_from_logits.py tests/test_logps_sampled.py tests/test_logps_support.py tests/test_losses_cpu.py tests/test_segment_sums.py
# What a call says that torch itself refuses is not looked at here: `make fuzz` does.
run -m fuzz --seconds 60 --seed 1 --report opaque
echo "no report of a sanitizer"
