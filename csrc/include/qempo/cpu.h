// What every CPU op shares: instruction-set dispatch and threads. Nothing here knows torch or Python.
#pragma once

#include <cstdint>

namespace qempo::cpu {

enum class Isa { baseline, avx2, avx512 };

// Best level this processor runs; QEMPO_CPU_ISA lowers it. use_isa() is for tests: false if it cannot run here.
Isa isa();
bool use_isa(Isa level);
bool runs_here(Isa level);
const char* isa_name(Isa level);
// "GenuineIntel", "AuthenticAMD", ... or "" where cpuid does not exist.
const char* vendor();

// Name of the thread runtime in use: "openmp" (the one already in the process) or "std::thread".
const char* thread_runtime();

using RangeFn = void (*)(void* context, int thread, int64_t begin, int64_t end);
// Splits [0, items) into at most `threads` contiguous ranges, one each; `thread` < threads.
void parallel_for(int threads, int64_t items, void* context, RangeFn run);

template <class F>
void parallel(int threads, int64_t items, F& body) {
  parallel_for(threads, items, &body, [](void* context, int thread, int64_t begin, int64_t end) {
    (*static_cast<F*>(context))(thread, begin, end);
  });
}

// Asks for huge pages under a large buffer not yet touched: first writing 100 MB takes 36 ms in pages of 4 KiB, 8 ms
// so.
void ask_huge_pages(void* data, int64_t bytes);

// out[i, :] = rows[index[i], :] for i < n, rows of that many bytes; the rows of out from n to padded repeat the first.
void gather_rows(void* out, const void* rows, const int64_t* index, int64_t n, int64_t padded, int64_t bytes,
                 int threads);

// out[index[i], :] += rows[i, :] for n distinct indices; out and rows are dense with d columns. seen marks the rows of
// out that hold a value: the first row added to another is stored, so out needs no zeroing first. bfloat16 rows are
// read as their bits. torch's index_add_ runs on one thread: it took 12% of a float32 step and 20% of a bfloat16 one.
void add_rows(double* out, uint8_t* seen, const int64_t* index, const double* rows, int64_t n, int64_t d, int threads);
void add_rows(float* out, uint8_t* seen, const int64_t* index, const float* rows, int64_t n, int64_t d, int threads);
void add_rows(float* out, uint8_t* seen, const int64_t* index, const uint16_t* rows, int64_t n, int64_t d, int threads);

// Zeroes the rows of out, of that many bytes, that seen does not mark.
void zero_unseen(void* out, const uint8_t* seen, int64_t n, int64_t bytes, int threads);

// out[r, :] = rows[r, :] rounded to bfloat16, 0 where seen does not mark r.
void round_rows(uint16_t* out, const uint8_t* seen, const float* rows, int64_t n, int64_t d, int threads);

}  // namespace qempo::cpu
