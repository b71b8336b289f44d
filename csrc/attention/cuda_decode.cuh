// Attention of a few queries against a cache on CUDA: the keys are split over blocks and, within a
// block, over its warps; each leaves its part of the result, and a second kernel adds those up.
//
// The queries of all heads that share a key head are rows of one 16-row tile, so that the cache is
// read once for them. An int8 cache is multiplied as it is: its numbers are exact in every T, and a
// key's scale multiplies its score, a value's its weight.
#pragma once

#include "attention/cuda_rows.cuh"

namespace kernels::attention {

enum class Cache : int { kSame = 0, kInt8 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct DecodeArgs {
  Heads query, keys, values;   // the caches [batches or pages, kv heads, rows, columns]
  const int *lengths, *table;  // [batches]; table [batches, max_pages] or null, stride below
  int64_t table_batch;
  int pages, page_size, cache_rows;  // of a page; page_size and rows without a table: of the cache
  const float *key_scale, *value_scale;  // int8: [batches or pages, kv heads, rows], strides below
  int64_t key_scale_stride[3], value_scale_stride[3];
  Cache cache;
  const float* alibi_slopes;  // [batches, heads] or null
  int64_t alibi_batch, alibi_head;
  int batches, heads, group, queries;
  int low, high, limit, global_tokens;  // as in Problem
  float scale, softcap;
  int splits;
  float *part_out, *part_lse;  // [splits * warps, batches, heads, queries, columns of values]
};

constexpr int kDecodeBlocks = 3;  // of a multiprocessor: 168 registers for each of 128 threads

template <typename T, int kColumns>
struct DecodeShape {
  static constexpr int kWarps = kColumns == 256 ? 2 : 4;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kKeys = sizeof(T) == 2 ? 16 : 8;  // of a warp
  static constexpr int kTile = kKeys * kWarps;
  static constexpr size_t kShared = sizeof(T) * kColumns * (16 + 4 * kTile);
  static_assert(kShared <= kMaxShared);
};

// Where a row of the cache is.
struct CacheRow {
  int64_t entry;  // batch entry or page
  int row;
};

__device__ __forceinline__ CacheRow cache_row(const DecodeArgs& a, int batch, int key) {
  if (a.table == nullptr) return {batch, key};
  const int page = a.table[batch * a.table_batch + key / a.page_size];
  return {min(max(page, 0), a.pages - 1), key % a.page_size};
}

// Four or eight neighbours of type S, as T.
template <typename S, typename T, int kCount>
__device__ __forceinline__ Vec<T, kCount> load_as(const void* at, int64_t index, int there,
                                                  bool whole) {
  const S* from = static_cast<const S*>(at) + index;
  Vec<S, kCount> source = Vec<S, kCount>::zero();
  if (whole) {
    source = Vec<S, kCount>::load(from);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < there) source.at[i] = from[i];
    }
  }
  Vec<T, kCount> values;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<S, T>) {
      values.at[i] = source.at[i];
    } else if constexpr (std::is_same_v<S, int8_t>) {
      values.at[i] = from_float<T>(static_cast<float>(source.at[i]));
    } else {
      values.at[i] = from_float<T>(to_float(source.at[i]));
    }
  }
  return values;
}

// Keys from `start` on, zeros from `length` on.
template <int kRows, int kThreads, typename T, int kColumns>
__device__ __forceinline__ void load_cache(Tile<T, kColumns> tile, const DecodeArgs& a,
                                           const Heads& from, int batch, int head, int start,
                                           int length) {
  using Chunks = Tile<T, kColumns>;
  constexpr int kCount = Chunks::kPerChunk;
#pragma unroll 1
  for (int index = threadIdx.x; index < kRows * Chunks::kChunks; index += kThreads) {
    const int r = index / Chunks::kChunks, chunk = index % Chunks::kChunks;
    const int column = chunk * kCount, key = start + r;
    if (column >= padded(from.columns)) continue;
    T* to = tile.chunk_at(r, chunk);
    const int there = key < length ? min(max(from.columns - column, 0), kCount) : 0;
    const CacheRow place = cache_row(a, batch, there ? key : 0);
    const int64_t at = place.entry * from.batch + head * from.head + place.row * from.row + column;
    if (a.cache == Cache::kSame && from.vectors) {
      copy_async(to, static_cast<const T*>(from.at) + (there ? at : 0), there * sizeof(T));
      continue;
    }
    const bool whole = from.vectors && there == kCount;
    if (a.cache == Cache::kSame) {
      load_as<T, T, kCount>(from.at, at, there, whole).store(to);
    } else if (a.cache == Cache::kInt8) {
      load_as<int8_t, T, kCount>(from.at, at, there, whole).store(to);
    } else if constexpr (sizeof(T) == 4) {  // 16-bit queries meet no other float cache
      if (a.cache == Cache::kBFloat16) {
        load_as<__nv_bfloat16, T, kCount>(from.at, at, there, whole).store(to);
      } else {
        load_as<__half, T, kCount>(from.at, at, there, whole).store(to);
      }
    }
  }
}

// One of a lane's two rows: a query of one head of the group.
struct DecodeRow {
  int head, query;
  float slope;
  float top = -INFINITY, sum = 0.f;
};

// Scores of row `r` to weights relative to its new maximum; `out` is rescaled to that.
template <int kN, int kColumnTiles>
__device__ __forceinline__ void decode_weights(Accumulator (&s)[kN],
                                               Accumulator (&out)[kColumnTiles], DecodeRow& row,
                                               int r, const DecodeArgs& a, int batch, int kv_head,
                                               int key0, int length) {
  const int position = row.query + length - a.queries;
  const auto scale_of = [&](const float* scales, const int64_t (&stride)[3], int key) {
    if (scales == nullptr) return 1.f;
    const CacheRow place = cache_row(a, batch, min(key, length - 1));
    return scales[place.entry * stride[0] + kv_head * stride[1] + place.row * stride[2]];
  };
  float most = -INFINITY;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int key = key0 + 8 * n + threadIdx.x % 4 * 2 + c, distance = key - position;
      const bool is_global = key < a.global_tokens || (0 <= position && position < a.global_tokens);
      const bool seen = row.head >= 0 && key < length && distance <= a.limit &&
                        ((a.low <= distance && distance <= a.high) || is_global);
      float x = s[n][2 * r + c] * a.scale * scale_of(a.key_scale, a.key_scale_stride, key);
      if (a.softcap != 0.f) x = a.softcap * tanhf(x / a.softcap);
      x = fmaf(-row.slope, static_cast<float>(abs(distance)), x);
      s[n][2 * r + c] = seen ? x : -INFINITY;
      most = fmaxf(most, s[n][2 * r + c]);
    }
  }
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
  most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
  const float next = fmaxf(row.top, most * kLog2E);
  const float base = next == -INFINITY ? 0.f : next;  // -inf - -inf is no number
  const float shrink = exp2_fast(row.top - base);
  row.top = next;
  row.sum *= shrink;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
    out[n][2 * r] *= shrink;
    out[n][2 * r + 1] *= shrink;
  }
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float& x = s[n][2 * r + c];
      x = weight<float>(x, {kLog2E, kLog2ELow}, {base, 0.f});
      row.sum += x;
      x *= scale_of(a.value_scale, a.value_scale_stride,
                    key0 + 8 * n + static_cast<int>(threadIdx.x) % 4 * 2 + c);
    }
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(DecodeShape<T, kColumns>::kThreads, kDecodeBlocks)
    decode_kernel(const __grid_constant__ DecodeArgs a) {
  using Shape = DecodeShape<T, kColumns>;
  using Chunks = Tile<T, kColumns>;
  constexpr int kTile = Shape::kTile, kKeys = Shape::kKeys, kN = kKeys / 8;
  extern __shared__ __align__(kVectorBytes) unsigned char memory[];
  const Chunks queries{reinterpret_cast<T*>(memory)};
  const Chunks stages = queries.from_row(16);

  const int rows = a.group * a.queries, row_blocks = (rows + 15) / 16, kv_heads = a.heads / a.group;
  const int row0 = blockIdx.x % row_blocks * 16, plane = blockIdx.x / row_blocks;
  const int kv_head = plane % kv_heads, batch = plane / kv_heads;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int length = min(max(a.lengths[batch], 0), a.cache_rows);
  const int offset = length - a.queries;           // position - query
  const bool sees_all = offset < a.global_tokens;  // some query is at a global position

  // Tiles: those before the window that hold global keys, then those of the window.
  const int first = sees_all ? 0 : max(offset + a.low, 0) / kTile;
  const int end = sees_all ? length : min(length, offset + a.queries + a.high);
  const int global_tiles = min((min(a.global_tokens, length) + kTile - 1) / kTile, first);
  const int all = global_tiles + max((end + kTile - 1) / kTile - first, 0);
  const int share = (all + a.splits - 1) / a.splits;
  const int begin = blockIdx.y * share, stop = min(begin + share, all);

  for (int index = threadIdx.x; index < 16 * kColumns; index += Shape::kThreads) {
    const int r = index / kColumns, column = index % kColumns, row = row0 + r;
    T* to = queries.chunk_at(r, column / Chunks::kPerChunk) + column % Chunks::kPerChunk;
    *to = from_float<T>(0.f);
    if (row < rows && column < a.query.columns) {
      const int head = kv_head * a.group + row / a.queries;
      *to = a.query.rows<T>(batch, head, row % a.queries).at[column];
    }
  }
  const auto load_keys = [&](int tile) {
    const int start = (tile < global_tiles ? tile : first + tile - global_tiles) * kTile;
    const Chunks stage = stages.from_row((tile - begin) % 2 * 2 * kTile);
    load_cache<kTile, Shape::kThreads>(stage, a, a.keys, batch, kv_head, start, length);
    load_cache<kTile, Shape::kThreads>(stage.from_row(kTile), a, a.values, batch, kv_head, start,
                                       length);
    return start;
  };

  DecodeRow row[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int number = row0 + 8 * r + lane / 4;
    row[r].head = number < rows ? kv_head * a.group + number / a.queries : -1;
    row[r].query = number % a.queries;
    row[r].slope = a.alibi_slopes == nullptr || number >= rows
                       ? 0.f
                       : a.alibi_slopes[batch * a.alibi_batch + row[r].head * a.alibi_head];
  }
  Accumulator out[1][kColumns / 8] = {};
  int next_start = 0;
#pragma unroll 1
  for (int tile = begin - 1; tile < stop; ++tile) {
    if (tile >= begin) {
      wait_for_copies();
      __syncthreads();  // the tile is there for all, and nobody reads the one before any more
    }
    const int key0 = next_start + warp * kKeys;
    if (tile + 1 < stop) next_start = load_keys(tile + 1);
    if (tile < begin) continue;
    const Chunks stage = stages.from_row((tile - begin) % 2 * 2 * kTile + warp * kKeys);

    Accumulator s[1][kN] = {};
    multiply_rows<T>(s, queries, stage, a.query.columns);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      decode_weights(s[0], out[0], row[r], r, a, batch, kv_head, key0, length);
    }
    multiply_columns<T>(out, s, stage.from_row(kTile), a.values.columns);
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = row[r].sum;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    row[r].sum = sum;
    if (row[r].head < 0) continue;
    const int64_t part = blockIdx.y * Shape::kWarps + warp;
    const int64_t at =
        ((part * a.batches + batch) * a.heads + row[r].head) * a.queries + row[r].query;
    if (lane % 4 == 0) {
      const float lse = fmaf(row[r].top, kLn2, fmaf(row[r].top, kLn2Low, logf(sum)));
      a.part_lse[at] = sum > 0.f ? lse : sum - INFINITY;
    }
    const float factor = sum == 0.f ? 0.f : 1.f / sum;
    float* to = a.part_out + at * a.values.columns;
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = column_of<T>(n, c);
        if (column < a.values.columns) to[column] = out[0][n][2 * r + c] * factor;
      }
    }
  }
}

struct CombineArgs {
  const float *part_out, *part_lse;  // [parts, rows, columns], [parts, rows]
  const float* sinks;                // [heads] or null
  Heads out;
  float* lse;  // [rows]
  int parts, heads, queries;
  int64_t rows;  // batches * heads * queries
};

// The parts of a row, weighed by their sums and added in their order: a warp per row.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) combine_kernel(const CombineArgs a) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kWarp;
  if (row >= a.rows) return;
  const int lane = threadIdx.x % kWarp, head = row / a.queries % a.heads;
  const float sink = a.sinks == nullptr ? -INFINITY : a.sinks[head];
  float top = sink;
  for (int part = 0; part < a.parts; ++part) top = fmaxf(top, a.part_lse[part * a.rows + row]);
  const float base = top == -INFINITY ? 0.f : top;
  float sum = exp2_fast((sink - base) * kLog2E);
  for (int part = 0; part < a.parts; ++part) {
    sum += exp2_fast((a.part_lse[part * a.rows + row] - base) * kLog2E);
  }
  if (lane == 0) a.lse[row] = sum > 0.f ? base + logf(sum) : sum - INFINITY;
  const float factor = sum == 0.f ? 0.f : 1.f / sum;
  T* to = const_cast<T*>(a.out.rows<T>(row / a.queries / a.heads, head, row % a.queries).at);
  for (int column = lane; column < a.out.columns; column += kWarp) {
    float total = 0.f;
    for (int part = 0; part < a.parts; ++part) {
      const int64_t at = part * a.rows + row;
      const float share = exp2_fast((a.part_lse[at] - base) * kLog2E);
      total = fmaf(share, a.part_out[at * a.out.columns + column], total);
    }
    to[column] = from_float<T>(total * factor);
  }
}

}  // namespace kernels::attention
