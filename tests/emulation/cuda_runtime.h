// CUDA on the host, for tests: what the .cu files of csrc/cuda use, and nothing else. Every lane of a block is a fibre;
// lanes run one at a time, in random order, up to their next barrier or shuffle. A missing barrier therefore lets a
// lane read what another has not yet written, or overwrite what another has not yet read, and a shuffle whose mask,
// partner or lanes do not fit stops the launch with an error.
#pragma once

#include <math.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulation {

extern dim3 thread_index, block_index;

enum class Wait { warp, block };
// Lets the calling lane wait; `what` tells barriers and shuffles apart, which must not meet.
void wait(Wait kind, unsigned mask, const char* what);
// Leaves `bytes` of value for the other lanes of the mask and returns those of `partner`.
void exchange(unsigned mask, int partner, void* value, size_t bytes);
cudaError_t run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);
void allow_shared(const void* kernel, int bytes);
size_t allowed_shared(const void* kernel);
const char* message();
void reseed(uint64_t seed);

template <class T>
T shuffle_xor(unsigned mask, T value, int lane_mask) {
  exchange(mask, static_cast<int>(thread_index.x % 32) ^ lane_mask, &value, sizeof value);
  return value;
}

template <class F>
const void* key(F* kernel) {
  return reinterpret_cast<const void*>(kernel);
}

}  // namespace emulation

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

inline void __syncthreads() { emulation::wait(emulation::Wait::block, 0xffffffffu, "__syncthreads"); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::wait(emulation::Wait::warp, mask, "__syncwarp"); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emulation::shuffle_xor(mask, value, lane_mask);
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

template <class... A>
cudaError_t cudaFuncSetAttribute(void (*kernel)(A...), cudaFuncAttribute, int bytes) {
  emulation::allow_shared(emulation::key(kernel), bytes);
  return cudaSuccess;
}

template <class... A, size_t... I>
cudaError_t emulate(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t shared,
                    std::index_sequence<I...>) {
  // By value, as a launch copies its arguments.
  std::tuple<std::decay_t<A>...> copy(*static_cast<std::decay_t<A>*>(arguments[I])...);
  if (shared > emulation::allowed_shared(emulation::key(kernel))) return cudaErrorInvalidValue;
  return emulation::run(grid, block, shared, [&] { kernel(std::get<I>(copy)...); });
}

template <class... A>
cudaError_t cudaLaunchKernel(void (*kernel)(A...), dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return emulate(kernel, grid, block, arguments, shared, std::index_sequence_for<A...>{});
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulation::message();
}
