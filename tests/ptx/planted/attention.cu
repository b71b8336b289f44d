// Causal attention of bf16 heads of 64 columns on tensor cores, and three things that may go wrong
// in it. A block of 4 warps takes 64 queries, 16 per warp, and walks over tiles of 64 keys that
// come by cp.async into two stages. Softmax runs online: maximum and sum of each row stay in
// registers.
// `// BUG name` marks the line that the report on kernel attention_name has to point at.
#include <cuda_bf16.h>

#include "tensor_core.cuh"

enum class Bug {
  kNone,
  kNoBarrierAtEnd,  // the next tile overwrites a stage that slow warps still read
  kStaleMaximum,    // sums so far are not rescaled to the new maximum: only the numbers tell
  kMaskBound,       // < instead of <=, no query sees its own key: only the numbers tell
};

constexpr int kTile = 64, kThreads = 128, kTileBytes = kTile * 128;

__device__ __forceinline__ int slot(int row, int chunk) {
  return row * 128 + (chunk ^ (row % 8)) * 16;
}

// 64 rows of 64 columns; rows past the end become zeros.
__device__ __forceinline__ void load_tile(unsigned char* tile, const __nv_bfloat16* from, int first,
                                          int rows) {
#pragma unroll
  for (int i = threadIdx.x; i < kTile * 8; i += kThreads) {
    const int row = first + i / 8, chunk = i % 8;
    const bool inside = row < rows;
    const __nv_bfloat16* source = from + (inside ? row : 0) * 64 + chunk * 8;
    copy_async(tile + slot(i / 8, chunk), source, inside ? 16 : 0);  // BUG no_barrier_at_end
  }
}

__device__ __forceinline__ uint32_t pair(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// The four lanes that share a row of a fragment.
template <typename F>
__device__ __forceinline__ float of_row(float value, F combine) {
  value = combine(value, __shfl_xor_sync(~0u, value, 1));
  return combine(value, __shfl_xor_sync(~0u, value, 2));
}

struct Rows {  // two rows of a thread: fragments hold row lane / 4 and the row 8 below it
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  float out[8][4] = {};
};

// scores[j] = queries times keys 8 j to 8 j + 7
__device__ __forceinline__ void multiply_keys(float (&scores)[8][4],
                                              const uint32_t (&queries)[4][4],
                                              const unsigned char* keys) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t k[4];
      const int row = j * 16 + lane % 8 + lane / 16 * 8;
      load_matrices(k, keys + slot(row, step * 2 + lane / 8 % 2));
      multiply_add(scores[2 * j], queries[step], k[0], k[1]);
      multiply_add(scores[2 * j + 1], queries[step], k[2], k[3]);
    }
  }
}

template <Bug kBug>
__device__ __forceinline__ void softmax(float (&scores)[8][4], Rows& rows, int query, int key,
                                        int length, float scale) {
  const int lane = threadIdx.x % 32;
  float maximum[2] = {rows.maximum[0], rows.maximum[1]};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const int col = key + i / 4 * 8 + lane % 4 * 2 + i % 2;
    const int row = query + lane / 4 + i / 2 % 2 * 8;
    const bool seen = kBug == Bug::kMaskBound && row > 0 ? col < row : col <= row;
    float& score = scores[i / 4][i % 4];
    score = seen && col < length ? score * scale : -INFINITY;
    maximum[i / 2 % 2] = fmaxf(maximum[i / 2 % 2], score);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    maximum[half] = of_row(maximum[half], [](float a, float b) { return fmaxf(a, b); });
    const float shrink =
        kBug == Bug::kStaleMaximum ? 1.f : exp2f(rows.maximum[half] - maximum[half]);
    rows.maximum[half] = maximum[half];
    rows.sum[half] *= shrink;
#pragma unroll
    for (int i = 0; i < 16; ++i) rows.out[i / 2][half * 2 + i % 2] *= shrink;
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    float& score = scores[i / 4][i % 4];
    score = exp2f(score - rows.maximum[i / 2 % 2]);
    rows.sum[i / 2 % 2] += score;
  }
}

__device__ __forceinline__ void multiply_values(Rows& rows, const float (&p)[8][4],
                                                const unsigned char* values) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const float (&even)[4] = p[2 * step], (&odd)[4] = p[2 * step + 1];
    const uint32_t a[4] = {pair(even[0], even[1]), pair(even[2], even[3]), pair(odd[0], odd[1]),
                           pair(odd[2], odd[3])};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t v[4];
      load_matrices_transposed(v, values + slot(step * 16 + lane % 16, j * 2 + lane / 16));
      multiply_add(rows.out[2 * j], a, v[0], v[1]);
      multiply_add(rows.out[2 * j + 1], a, v[2], v[3]);
    }
  }
}

template <Bug kBug>
__device__ __forceinline__ void attention(__nv_bfloat16* o, const __nv_bfloat16* q,
                                          const __nv_bfloat16* k, const __nv_bfloat16* v,
                                          int length, float scale) {
  __shared__ __align__(128) unsigned char tiles[5 * kTileBytes];  // Q, two of K, two of V
  unsigned char *keys = tiles + kTileBytes, *values = tiles + 3 * kTileBytes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first = blockIdx.x * kTile, query = first + warp * 16;
  const auto load = [&](int tile) {
    load_tile(keys + tile % 2 * kTileBytes, k, tile * kTile, length);
    load_tile(values + tile % 2 * kTileBytes, v, tile * kTile, length);
  };
  load_tile(tiles, q, first, length);
  load(0);
  commit_copies();
  Rows rows;
  uint32_t queries[4][4];
  const int count = blockIdx.x + 1;  // tiles of keys up to the diagonal
  for (int tile = 0; tile < count; ++tile) {
    if (tile + 1 < count) load(tile + 1);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        load_matrices(queries[step], tiles + slot(warp * 16 + lane % 16, step * 2 + lane / 16));
      }
    }
    float scores[8][4] = {};
    multiply_keys(scores, queries, keys + tile % 2 * kTileBytes);
    softmax<kBug>(scores, rows, query, tile * kTile, length, scale);
    multiply_values(rows, scores, values + tile % 2 * kTileBytes);
    if constexpr (kBug != Bug::kNoBarrierAtEnd) __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = of_row(rows.sum[half], [](float a, float b) { return a + b; });
    const int row = query + lane / 4 + half * 8;
    if (row >= length) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float* out = rows.out[j] + half * 2;
      uint32_t* to = reinterpret_cast<uint32_t*>(o + row * 64 + j * 8 + lane % 4 * 2);
      *to = pair(out[0] / sum, out[1] / sum);
    }
  }
}

// [length, 64] each; `scale` includes log2(e).
#define KERNEL(name, bug)                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads)                     \
      name(__nv_bfloat16* o, const __nv_bfloat16* q, const __nv_bfloat16* k, \
           const __nv_bfloat16* v, int length, float scale) {                \
    attention<Bug::bug>(o, q, k, v, length, scale);                          \
  }

KERNEL(attention, kNone)
KERNEL(attention_no_barrier_at_end, kNoBarrierAtEnd)
KERNEL(attention_stale_maximum, kStaleMaximum)
KERNEL(attention_mask_bound, kMaskBound)
