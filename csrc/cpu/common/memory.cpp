// What the ops do with memory beyond arithmetic: page sizes, and rows added by index.
#include <cstring>

#include "qempo/cpu.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qempo::cpu {
namespace {

template <class A>
A value(A x) {
  return x;
}

float value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

template <class A, class S>
void add(A* out, const int64_t* index, const S* rows, int64_t n, int64_t d, int threads) {
  auto part = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* to = out + index[i] * d;
      const S* from = rows + i * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) to[j] += value(from[j]);
    }
  };
  parallel(threads, n, part);
}

}  // namespace

void ask_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  // Advice only: where the kernel refuses, the pages stay small.
  if (bytes >= (8 << 20)) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

void add_rows(double* out, const int64_t* index, const double* rows, int64_t n, int64_t d, int threads) {
  add(out, index, rows, n, d, threads);
}
void add_rows(float* out, const int64_t* index, const float* rows, int64_t n, int64_t d, int threads) {
  add(out, index, rows, n, d, threads);
}
void add_rows(float* out, const int64_t* index, const uint16_t* rows, int64_t n, int64_t d, int threads) {
  add(out, index, rows, n, d, threads);
}

}  // namespace qempo::cpu
