// What every CPU op shares: instruction sets, dtypes and threads. Nothing here knows torch or Python.
#pragma once

#include <cstdint>

namespace qempo::cpu {

enum class Isa { baseline, avx2, avx512 };

// Best level this processor runs; QEMPO_CPU_ISA lowers it, and a word that names none throws std::invalid_argument.
// use_isa() is for tests: false if it cannot run here.
Isa isa();
bool use_isa(Isa level);
bool runs_here(Isa level);
const char* isa_name(Isa level);
// "GenuineIntel", "AuthenticAMD", ... or "" where cpuid does not exist.
const char* vendor();

// What the rows of an op hold, under the numbers that Python passes.
enum class Dtype { f32, bf16, f64 };

// A kernel for each dtype; that of double rows computes in double, the others in float.
template <class F, class F64 = F>
struct ByDtype {
  F f32, bf16;
  F64 f64;

  // run(zero of the type that it computes in, kernel) with the kernel of dtype.
  template <class Run>
  void with(int dtype, const Run& run) const {
    switch (static_cast<Dtype>(dtype)) {
      case Dtype::f32: return run(0.f, f32);
      case Dtype::bf16: return run(0.f, bf16);
      case Dtype::f64: return run(0.0, f64);
    }
  }
};

// Name of the thread runtime in use: "openmp" (the one already in the process) or "std::thread".
const char* thread_runtime();

// A thread takes microseconds to wake; below this many entries of a sum or a loss one does the work.
constexpr int64_t kThreadPays = 32768;

using RangeFn = void (*)(void* context, int thread, int64_t begin, int64_t end);
// Splits [0, items) into at most `threads` contiguous ranges, one each; `thread` < threads.
void parallel_for(int threads, int64_t items, void* context, RangeFn run);

template <class F>
void parallel(int threads, int64_t items, F& body) {
  parallel_for(threads, items, &body, [](void* context, int thread, int64_t begin, int64_t end) {
    (*static_cast<F*>(context))(thread, begin, end);
  });
}

}  // namespace qempo::cpu
