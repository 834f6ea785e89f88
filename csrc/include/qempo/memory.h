// What the ops do with memory beyond arithmetic: page sizes, and rows read and added by index.
// csrc/cpu/common/memory.cpp.
#pragma once

#include <cstdint>

namespace qempo::cpu {

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
