// DPP: log-determinants, gains and baselines of groups of embeddings forward, the gradients of both backward; one
// launch each way (ragged groups: one for the small, one for the large). Each pass reads the embeddings once, and the
// backward one writes their gradient: three passes over memory, the floor. Formulae: docs/dpp.md.
#include "dpp_careful.cuh"
#include "dpp_direct.cuh"
#include "dpp_gram.cuh"
#include "dpp_select.cuh"

namespace qempo::cuda {
namespace {

// Sizes of group that one kernel of a launch serves; `rest`: it also fills what no valid group owns with NaN.
struct Share {
  int low, high;
  bool rest;
};

constexpr int kWarpsPerBlock = 4;

template <int K>
constexpr int kBlockThreads = K == 64 ? BlockTeam::kThreads : 32 * kWarpsPerBlock;
// How many blocks a processor must be able to hold: enough rows in flight for its share of the memory's bandwidth. Left
// to itself ptxas takes 112 registers for K = 4, and for K = 64 spills to make room for four, where shared memory holds
// two.
template <int K>
constexpr int kBlocksPerProcessor = K == 4   ? 6
                                    : K == 8 ? 5
                                             : 2;
template <int K>
constexpr int kTeamsPerBlock = K == 64 ? 1 : kWarpsPerBlock;

template <class T, int K>
__global__ void __launch_bounds__(kBlockThreads<K>, kBlocksPerProcessor<K>)
    dpp_fwd_kernel(const __grid_constant__ DppForward call, const Share share) {
  const int team_in_block = K == 64 ? 0 : threadIdx.x / 32;
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock<K> + team_in_block;
  if (g >= call.in.groups) return;
  const typename Tile<K>::Team team;
  const Span span = span_of(call.in, g);
  if (share.rest)
    for_orphans(call.in, g, span, true, [&](int64_t from, int64_t to) {
      for (int64_t i = from + team.rank; i < to; i += team.kThreads) call.gains[i] = call.baselines[i] = NAN;
    });
  if (!span.valid) {
    if (share.rest && team.rank == 0) call.logdet[g] = NAN;
    return;
  }
  if (span.k < share.low || span.k > share.high) return;
  const Room<K> room(team_in_block);
  const T* x = static_cast<const T*>(call.in.x) + span.start * call.in.width;
  gram_fast(x, static_cast<int>(span.k), call.in.width, team, room);
  Tile<K> tile(team.rank);
  if (invert(call.in, span, tile, team, room)) {
    direct_results(call, g, span, tile, team, room);
    return;
  }
  gram_careful(x, static_cast<int>(span.k), call.in.width, team.rank, room);
  careful(call, g, span, team.rank, room);
}

// dloss/dx = W x in raw rows: W_ij = 2 r_i sum_l (gl delta_il + P_il gg_l) Q_lj / (|x_i| |x_j|), less the radial part
// 2 dq_i / |x_i|^2 on the diagonal where rows are normalised. W goes over P in a, float for the direct path
// (transposed, as its readers want it), double for the careful one. Writes dloss/dlog_quality on the way.
template <int K>
__device__ void weights(const DppBackward& call, int64_t g, const Span& span, bool careful, typename Tile<K>::Team team,
                        const Room<K> room) {
  const int k = static_cast<int>(span.k), pitch = call.kept.pitch;
  double *factor = room.vector(0), *length = room.vector(1), *gain_grad = room.vector(2), *radial = room.vector(3);
  const double logdet_grad = call.grad_logdet ? call.grad_logdet[g] : 0.f;
  // Without a gradient of the gains every sum over l below is 0.
  const int terms = call.grad_gains ? k : 0;
  for (int n = team.rank; n < k * k; n += team.kThreads) {
    const int64_t from = (span.start + n / k) * pitch + n % k;
    room.a[n / k * kLd<K> + n % k] = call.kept.p[from];
    if (careful) room.b[n / k * kLd<K> + n % k] = call.kept.q[from];
  }
  if (team.rank < k) {
    const double* row = call.kept.rows + 3 * (span.start + team.rank);
    factor[team.rank] = row[0];
    length[team.rank] = row[2];
    gain_grad[team.rank] = call.grad_gains ? call.grad_gains[span.start + team.rank] : 0.f;
  }
  team.sync();
  if (team.rank < k) {
    double sum = logdet_grad;
    for (int l = 0; l < terms; ++l)
      sum += gain_grad[l] * room.a[team.rank * kLd<K> + l] * room.a[team.rank * kLd<K> + l];
    const double ridge_m = call.kept.rows[3 * (span.start + team.rank) + 1];
    // A row of zeros has no direction in which its quality could count.
    const double quality = length[team.rank] == 0 ? 0.0 : logdet_grad + gain_grad[team.rank] - ridge_m * sum;
    if (call.grad_log_quality) call.grad_log_quality[span.start + team.rank] = static_cast<float>(quality);
    radial[team.rank] = call.in.normalize ? 2 * quality : 0.0;
  }
  const double* second = careful ? room.b : room.a;
  Tile<K> w(team.rank);
#pragma unroll
  for (int a = 0; a < Tile<K>::kRows; ++a)
#pragma unroll
    for (int b = 0; b < Tile<K>::kCols; ++b) {
      const int i = w.i0 + a, j = w.j0 + b;
      if (i >= k || j >= k) continue;
      double sum = logdet_grad * second[i * kLd<K> + j];
      for (int l = 0; l < terms; ++l) sum += room.a[i * kLd<K> + l] * gain_grad[l] * second[l * kLd<K> + j];
      w.at[a][b] = 2 * factor[i] * sum * (careful ? 1.0 : factor[j]);
    }
  team.sync();
#pragma unroll
  for (int a = 0; a < Tile<K>::kRows; ++a)
#pragma unroll
    for (int b = 0; b < Tile<K>::kCols; ++b) {
      const int i = w.i0 + a, j = w.j0 + b;
      if (i >= K || j >= K) continue;
      double entry = 0;
      if (i < k && j < k && length[i] != 0 && length[j] != 0)
        entry = (w.at[a][b] - (i == j ? radial[i] : 0.0)) / length[i] / length[j];
      if (careful)
        room.a[i * kLd<K> + j] = entry;
      else
        reinterpret_cast<float*>(room.a)[j * K + i] = static_cast<float>(entry);
    }
  team.sync();
}

// A lane holds 16 bytes of every row and writes 16 bytes of every gradient.
template <class T, int K>
__device__ void multiply(const T* x, T* out, int k, int64_t width, WarpTeam team, const Room<K> room) {
  const float* w = reinterpret_cast<const float*>(room.a);
  const bool aligned = in_packs<T>(x, width) && in_packs<T>(out, width);
  for (int64_t c = team.rank * Pack<T>::kCount; c < width; c += 32 * Pack<T>::kCount) {
    Pack<T> rows[K];
#pragma unroll
    for (int j = 0; j < K; ++j) rows[j] = j < k ? load(x + j * width, c, width, aligned) : Pack<T>{};
    for (int i = 0; i < k; ++i) {
      float sums[Pack<T>::kCount] = {};
#pragma unroll
      for (int j = 0; j < K; ++j)
#pragma unroll
        for (int e = 0; e < Pack<T>::kCount; ++e) sums[e] += w[j * K + i] * get(rows[j], e);
      Pack<T> pack{};
#pragma unroll
      for (int e = 0; e < Pack<T>::kCount; ++e) put(pack, e, sums[e]);
      store(out + i * width, c, width, aligned, pack);
    }
  }
}

// A thread computes 8 rows of 4 columns from a staged chunk.
template <class T, int K>
__device__ void multiply(const T* x, T* out, int k, int64_t width, BlockTeam team, const Room<K> room) {
  const float* w = reinterpret_cast<const float*>(room.a);
  float* stage = reinterpret_cast<float*>(room.b);
  constexpr int kColumns = kStage / 4;
  for (int64_t first = 0; first < width; first += kStage) {
    stage_rows(x, k, k, first, width, team, stage);
    team.sync();
    for (int n = team.rank; n < (k + 7) / 8 * kColumns; n += BlockTeam::kThreads) {
      const int i0 = n / kColumns * 8, c = n % kColumns * 4;
      float sums[8][4] = {};
      for (int j = 0; j < k; ++j) {
        const float4 column = *reinterpret_cast<const float4*>(stage + j * kStageLd + c);
#pragma unroll
        for (int a = 0; a < 8; ++a) {
          const float weight = w[j * K + i0 + a];
          sums[a][0] += weight * column.x;
          sums[a][1] += weight * column.y;
          sums[a][2] += weight * column.z;
          sums[a][3] += weight * column.w;
        }
      }
#pragma unroll
      for (int a = 0; a < 8; ++a)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (i0 + a < k && first + c + e < width) narrow(sums[a][e], out[(i0 + a) * width + first + c + e]);
    }
    team.sync();
  }
}

template <class T, int K>
__device__ __noinline__ void multiply_careful(const T* x, T* out, int k, int64_t width, int rank, const Room<K> room) {
  for (int64_t c = rank; c < width; c += Tile<K>::Team::kThreads)
    for (int i = 0; i < k; ++i) {
      double sum = 0;
      for (int j = 0; j < k; ++j) sum += room.a[i * kLd<K> + j] * static_cast<double>(widen(x[j * width + c]));
      narrow(static_cast<float>(sum), out[i * width + c]);
    }
}

template <class T, int K>
__global__ void __launch_bounds__(kBlockThreads<K>, kBlocksPerProcessor<K>)
    dpp_bwd_kernel(const __grid_constant__ DppBackward call, const Share share) {
  const int team_in_block = K == 64 ? 0 : threadIdx.x / 32;
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock<K> + team_in_block, width = call.in.width;
  if (g >= call.in.groups) return;
  const typename Tile<K>::Team team;
  const Span span = span_of(call.in, g);
  if (share.rest)
    for_orphans(call.in, g, span, true, [&](int64_t from, int64_t to) {
      T* out = static_cast<T*>(call.grad_x);
      for (int64_t n = from * width + team.rank; n < to * width; n += team.kThreads) narrow(NAN, out[n]);
      if (call.grad_log_quality)
        for (int64_t i = from + team.rank; i < to; i += team.kThreads) call.grad_log_quality[i] = NAN;
    });
  if (!span.valid || span.k < share.low || span.k > share.high) return;
  const Room<K> room(team_in_block);
  const int k = static_cast<int>(span.k);
  const bool careful = call.kept.careful[g] != 0;
  weights(call, g, span, careful, team, room);
  const T* x = static_cast<const T*>(call.in.x) + span.start * width;
  T* out = static_cast<T*>(call.grad_x) + span.start * width;
  if (careful)
    multiply_careful(x, out, k, width, team.rank, room);
  else
    multiply(x, out, k, width, team, room);
}

// Products in float64 for all: float32 ones would order rows whose gains differ by less than 1e-7.
template <class T, int K>
__global__ void __launch_bounds__(kBlockThreads<K>, kBlocksPerProcessor<K>)
    dpp_select_kernel(const __grid_constant__ DppSelect call, const Share share) {
  const int team_in_block = K == 64 ? 0 : threadIdx.x / 32;
  const int64_t g = static_cast<int64_t>(blockIdx.x) * kTeamsPerBlock<K> + team_in_block;
  if (g >= call.in.groups) return;
  const typename Tile<K>::Team team;
  const Span span = span_of(call.in, g);
  const bool possible = span.valid && call.n <= span.k;
  const bool mine = possible && span.k >= share.low && span.k <= share.high;
  if (!mine && (possible || !share.rest)) return;
  const Room<K> room(team_in_block);
  bool fine = mine;
  if (mine) {
    const int k = static_cast<int>(span.k);
    gram_careful(static_cast<const T*>(call.in.x) + span.start * call.in.width, k, call.in.width, team.rank, room);
    fine = cosines(call.in, span, team.rank, room);
    if (fine) greedy<K>(call, g, k, team, room);
  }
  // What cannot be chosen from, in numbers that no position has.
  if (!fine)
    for (int n = team.rank; n < call.n; n += team.kThreads) call.picks[g * call.n + n] = -1;
}

template <int K, class Call>
cudaError_t launch(void (*kernel)(const Call, const Share), Call call, Share share, cudaStream_t stream) {
  const int64_t blocks = (call.in.groups + kTeamsPerBlock<K> - 1) / kTeamsPerBlock<K>;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const size_t shared = Room<K>::kDoubles * kTeamsPerBlock<K> * sizeof(double);
  if (shared > 48 * 1024) {
    // More than the default asks for consent, which costs no synchronisation.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {&call, &share};
  return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads<K>), arguments, shared,
                          stream);
}

template <class T, int K>
cudaError_t launch_as(const DppForward& call, Share share, cudaStream_t stream) {
  return launch<K>(&dpp_fwd_kernel<T, K>, call, share, stream);
}
template <class T, int K>
cudaError_t launch_as(const DppBackward& call, Share share, cudaStream_t stream) {
  return launch<K>(&dpp_bwd_kernel<T, K>, call, share, stream);
}
template <class T, int K>
cudaError_t launch_as(const DppSelect& call, Share share, cudaStream_t stream) {
  return launch<K>(&dpp_select_kernel<T, K>, call, share, stream);
}

// Offsets lie on the device and are not read here: ragged groups get the warp's kernel, then the block's, each for the
// groups of its sizes.
template <class T, class Call>
cudaError_t dispatch(const Call& call, cudaStream_t stream) {
  if (call.in.groups == 0) return cudaSuccess;
  if (call.in.offsets) {
    const bool small = call.in.rows <= 16;
    const cudaError_t error = launch_as<T, 16>(call, {1, 16, small}, stream);
    return error != cudaSuccess || small ? error : launch_as<T, 64>(call, {17, kDppLargest, true}, stream);
  }
  const Share all{1, kDppLargest, false};
  if (call.in.k < 1 || call.in.k > kDppLargest) return cudaErrorInvalidValue;
  if (call.in.k <= 4) return launch_as<T, 4>(call, all, stream);
  if (call.in.k <= 8) return launch_as<T, 8>(call, all, stream);
  if (call.in.k <= 16) return launch_as<T, 16>(call, all, stream);
  return launch_as<T, 64>(call, all, stream);
}

template <class Call>
int run(DppDtype dtype, const Call& call, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case DppDtype::f32: return dispatch<float>(call, on);
    case DppDtype::bf16: return dispatch<__nv_bfloat16>(call, on);
    case DppDtype::f16: return dispatch<__half>(call, on);
    case DppDtype::f64: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int dpp_fwd(DppDtype dtype, const DppForward& call, void* stream) { return run(dtype, call, stream); }
int dpp_bwd(DppDtype dtype, const DppBackward& call, void* stream) { return run(dtype, call, stream); }
int dpp_select(DppDtype dtype, const DppSelect& call, void* stream) { return run(dtype, call, stream); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace qempo::cuda
