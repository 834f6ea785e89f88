#include "qempo/memory.h"

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
void add(A* out, uint8_t* seen, const int64_t* index, const S* rows, int64_t n, int64_t d, int threads) {
  auto part = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* sum = out + index[i] * d;
      const S* from = rows + i * d;
      if (!seen[index[i]]) {
        seen[index[i]] = 1;
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) sum[j] = value(from[j]);
      } else {
#pragma omp simd
        for (int64_t j = 0; j < d; ++j) sum[j] += value(from[j]);
      }
    }
  };
  parallel(threads, n, part);
}

uint16_t rounded(float x) {
  // To nearest even; a NaN keeps its top bits, where the carry would turn some into infinity.
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  const uint32_t near = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : near);
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

void gather_rows(void* out, const void* rows, const int64_t* index, int64_t n, int64_t padded, int64_t bytes,
                 int threads) {
  auto part = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::memcpy(static_cast<char*>(out) + i * bytes, static_cast<const char*>(rows) + index[i < n ? i : 0] * bytes,
                  static_cast<size_t>(bytes));
  };
  if (n > 0) parallel(threads, padded, part);
}

void add_rows(double* out, uint8_t* seen, const int64_t* index, const double* rows, int64_t n, int64_t d, int threads) {
  add(out, seen, index, rows, n, d, threads);
}
void add_rows(float* out, uint8_t* seen, const int64_t* index, const float* rows, int64_t n, int64_t d, int threads) {
  add(out, seen, index, rows, n, d, threads);
}
void add_rows(float* out, uint8_t* seen, const int64_t* index, const uint16_t* rows, int64_t n, int64_t d,
              int threads) {
  add(out, seen, index, rows, n, d, threads);
}

void zero_unseen(void* out, const uint8_t* seen, int64_t n, int64_t bytes, int threads) {
  auto part = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!seen[i]) std::memset(static_cast<char*>(out) + i * bytes, 0, static_cast<size_t>(bytes));
  };
  parallel(threads, n, part);
}

void round_rows(uint16_t* out, const uint8_t* seen, const float* rows, int64_t n, int64_t d, int threads) {
  auto part = [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint16_t* to = out + i * d;
      if (!seen[i]) {
        std::memset(to, 0, static_cast<size_t>(d) * sizeof(uint16_t));
        continue;
      }
      const float* from = rows + i * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) to[j] = rounded(from[j]);
    }
  };
  parallel(threads, n, part);
}

}  // namespace qempo::cpu
