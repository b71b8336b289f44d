// Attention backward on CUDA: delta of every query; then dq by blocks of queries, and dk and dv by
// blocks of keys, which take the query heads of their key head in turn. Nothing is added
// atomically.
//
// Both recompute the weights of a tile from lse. The kept rows lie down the accumulators, so that
// weights and their gradients go straight into the next product: dq += ds k, and transposed
// dv += pᵀ dout, dk += dsᵀ q. Rounding, as in the forward, to the type of the inputs.
#pragma once

#include "attention/cuda_scores.cuh"

namespace kernels::attention {

struct BackwardArgs {
  Problem problem;
  Heads query, key, value, dout, dquery, dkey, dvalue;  // at is null where none is wanted
  const float *lse, *delta;
  Grid grid;
};

// Rows of a warp / 16, warps of a block, rows of a streamed tile, as in ForwardShape.
template <typename T, int kColumns, bool kKeysKept>
struct BackwardShape {
  static constexpr bool kHalf = sizeof(T) == 2;
  // dk and dv of 256 columns do not fit into the registers at once: a block makes one of them.
  static constexpr bool kSplit = kKeysKept && kColumns == 256;
  static constexpr int kM = kHalf && kColumns == 64 ? 2 : 1;
  static constexpr int kWarps = !kHalf && kColumns == 256 ? 2 : 4;
  static constexpr int kTile = (kColumns == 256 ? 16 : 32) / (kHalf || kColumns == 64 ? 1 : 2);
  static constexpr int kRows = 16 * kM * kWarps;
  static constexpr int kThreads = kWarp * kWarps;
  static constexpr int kBlocks =
      8 / kWarps;  // of a multiprocessor: a thread may have 255 registers
  // Two tiles of kept rows, two stages of two streamed ones, lse (split) and delta of the queries.
  static constexpr size_t kShared =
      sizeof(T) * kColumns * (2 * kRows + 4 * kTile) + (kKeysKept ? 6 * sizeof(float) * kTile : 0);
  static_assert(kShared <= kMaxShared);
};

// In powers of two; such that a row that saw nothing has weights 2^(-inf).
__device__ __forceinline__ Split lse_base2(float lse) {
  return lse == -INFINITY ? Split{INFINITY, 0.f} : times_log2e(lse);
}

// s: products to weights, those of dropout included. dp: their gradients, to those of the products.
// lse_at(row, column) and delta_at give the query's lse, in powers of two, and delta, by the slot
// of 2 kM down and of 2 kN across.
template <bool kKeysKept, int kM, int kN, typename T, typename Lse, typename Delta>
__device__ __forceinline__ void differentiate(Accumulator (&s)[kM][kN], Accumulator (&dp)[kM][kN],
                                              const Plane<T>& plane, const Band& band,
                                              bool elementwise, const Subset& rows, int row0,
                                              const Subset& columns, int column0, Lse lse_at,
                                              Delta delta_at) {
  const Problem& a = plane.a;
  const int lane = threadIdx.x % kWarp;
  const bool dropout = a.seed != nullptr;
  auto bits = static_cast<Bits<kM, kN>>(-1);
  const Split factor = plane.factor(elementwise);
  if (dropout) bits = keep_bits<kM, kN, kKeysKept>(plane, rows, row0, columns, column0);
  if (elementwise) {
#pragma unroll 1
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int across = columns.at(column0 + 8 * n + lane % 4 * 2 + c);
#pragma unroll
        for (int r = 0; r < 2 * kM; ++r) {
          const int down = rows.at(row0 + 8 * r + lane / 4);
          float& product = s[r / 2][0][r % 2 * 2 + c];
          float& gradient = dp[r / 2][0][r % 2 * 2 + c];
          float derivative;
          product = plane.score(product, kKeysKept ? across : down, kKeysKept ? down : across, band,
                                derivative);
          const bool kept = bits >> keep_bit<kM, kN, kKeysKept>(r, 2 * n + c) & 1;
          gradient = kept ? gradient * a.keep_factor : 0.f;
          gradient = derivative * (gradient - delta_at(r, 2 * n + c));
        }
      }
      rotate(s);
      rotate(dp);
    }
  }
#pragma unroll
  for (int column = 0; column < 2 * kN; ++column) {
#pragma unroll
    for (int r = 0; r < 2 * kM; ++r) {
      const int e = r % 2 * 2 + column % 2;
      float& product = s[r / 2][column / 2][e];
      float& gradient = dp[r / 2][column / 2][e];
      const float p = weight<T>(product, factor, lse_at(r, column));
      gradient = p * (elementwise ? gradient : gradient - delta_at(r, column));
      const bool kept = bits >> keep_bit<kM, kN, kKeysKept>(r, column) & 1;
      product = kept ? p : 0.f;
    }
  }
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(BackwardShape<T, kColumns, false>::kThreads,
                                  BackwardShape<T, kColumns, false>::kBlocks)
    dquery_kernel(const __grid_constant__ BackwardArgs args) {
  using Shape = BackwardShape<T, kColumns, false>;
  using Chunks = Tile<T, kColumns>;
  constexpr int kM = Shape::kM, kTile = Shape::kTile, kN = kTile / 8, kRows = Shape::kRows;
  extern __shared__ __align__(kVectorBytes) unsigned char memory[];
  const Chunks queries{reinterpret_cast<T*>(memory)};
  const Chunks douts = queries.from_row(kRows);
  const Chunks stages = queries.from_row(2 * kRows);

  const Problem& a = args.problem;
  const Place place(args.grid, kRows);
  const Sequence sequence(a, place.sequence);
  const Subset rows = place.gathered ? sequence.global_queries(a) : sequence.all_queries();
  if (place.first >= rows.count) return;
  const Walk<kTile, false> walk(a, sequence, place, rows, kRows);
  const Plane<T> plane(a, sequence, place.head);
  const int kv_head = place.head / a.group;
  const Rows<T> key = args.key.rows<T>(sequence.batch, kv_head, sequence.key0);
  const Rows<T> value = args.value.rows<T>(sequence.batch, kv_head, sequence.key0);

  const auto load_keys = [&](int tile) {
    const Subset keys = walk.subset(tile);
    const auto row_at = [&](int r) { return keys.at(walk.start(tile) + r); };
    const Chunks stage = stages.from_row(tile % 2 * 2 * kTile);
    load_tiles<kTile, Shape::kThreads>(stage, key, value, row_at);
  };
  if (walk.tiles > 0) {
    const auto row_at = [&](int r) { return rows.at(place.first + r); };
    const Rows<T> query = args.query.rows<T>(sequence.batch, place.head, sequence.query0);
    const Rows<T> dout = args.dout.rows<T>(sequence.batch, place.head, sequence.query0);
    load_tiles<kRows, Shape::kThreads>(queries, query, dout, row_at);
  }

  const int warp_row = threadIdx.x / kWarp * 16 * kM, row0 = place.first + warp_row;
  const Chunks own = queries.from_row(warp_row);
  Split lse[2 * kM];
  float delta[2 * kM];
#pragma unroll
  for (int r = 0; r < 2 * kM; ++r) {
    const int row = rows.at(row0 + 8 * r + threadIdx.x % kWarp / 4);
    const int64_t at = sequence.lse0(a, place.head) + row;
    lse[r] = lse_base2(row < 0 ? -INFINITY : args.lse[at]);
    delta[r] = row < 0 ? 0.f : args.delta[at];
  }
  Accumulator dquery[kM][kColumns / 8] = {};
  const bool elaborate = plane.elaborate() || place.gathered || a.seed != nullptr;

#pragma unroll 1
  for (int tile = -1; tile < walk.tiles; ++tile) {
    if (tile >= 0) {
      wait_for_copies();
      __syncthreads();  // the tile is there for all, and nobody reads the one before any more
    }
    if (tile + 1 < walk.tiles) load_keys(tile + 1);
    if (tile < 0) continue;
    const Chunks stage = stages.from_row(tile % 2 * 2 * kTile);
    const int key0 = walk.start(tile);
    Work work = Work::kElementwise;
    if (walk.is_near(tile) && !place.gathered) {
      work = work_of<false>(walk.near, plane.offset, row0, 16 * kM, key0, kTile, sequence.keys);
    }
    if (work == Work::kNone) continue;

    Accumulator s[kM][kN] = {}, dp[kM][kN] = {};
    multiply_rows<T>(s, own, stage, args.key.columns);
    multiply_rows<T>(dp, douts.from_row(warp_row), stage.from_row(kTile), args.value.columns);
    differentiate<false>(
        s, dp, plane, walk.band(tile), elaborate || work != Work::kPlain, rows, row0,
        walk.subset(tile), key0, [&](int r, int) { return lse[r]; },
        [&](int r, int) { return delta[r]; });
    multiply_columns<T>(dquery, dp, stage, args.key.columns);
  }

  store_rows(
      dquery, own, args.dquery.rows<T>(sequence.batch, place.head, sequence.query0),
      [&](int) { return a.scale; },
      [&](int r) {
        const int query = rows.at(row0 + r);
        const bool left_out = query >= 0 && !place.gathered && a.has_globals() &&
                              sequence.is_global(a, query + sequence.offset);
        return left_out ? -1 : query;
      });
}

template <typename T, int kColumns>
__global__ void __launch_bounds__(BackwardShape<T, kColumns, true>::kThreads,
                                  BackwardShape<T, kColumns, true>::kBlocks)
    dkey_dvalue_kernel(const __grid_constant__ BackwardArgs args) {
  using Shape = BackwardShape<T, kColumns, true>;
  using Chunks = Tile<T, kColumns>;
  constexpr int kM = Shape::kM, kTile = Shape::kTile, kN = kTile / 8, kRows = Shape::kRows;
  extern __shared__ __align__(kVectorBytes) unsigned char memory[];
  const Chunks keys{reinterpret_cast<T*>(memory)};
  const Chunks values = keys.from_row(kRows);
  const Chunks stages = keys.from_row(2 * kRows);
  float* statistics = reinterpret_cast<float*>(stages.from_row(4 * kTile).at);  // [2, 3, kTile]

  const Problem& a = args.problem;
  const Place place(args.grid, kRows);
  const Sequence sequence(a, place.sequence);
  const Subset rows = place.gathered ? sequence.global_keys(a) : sequence.all_keys();
  // A block of kSplit makes dv where blockIdx.y is 0, dk where it is 1.
  const bool with_dvalue = args.dvalue.at != nullptr && !(Shape::kSplit && blockIdx.y == 1);
  const bool with_dkey = args.dkey.at != nullptr && !(Shape::kSplit && blockIdx.y == 0);
  if (place.first >= rows.count || !(with_dkey || with_dvalue)) return;
  const Walk<kTile, true> walk(a, sequence, place, rows, kRows);
  const int tiles = walk.tiles * a.group;

  // Query heads of the group one after the other, each with the whole walk.
  const auto load_queries = [&](int step) {
    const int tile = step % walk.tiles, head = place.head * a.group + step / walk.tiles;
    const Subset queries = walk.subset(tile);
    const auto row_at = [&](int r) { return queries.at(walk.start(tile) + r); };
    const Chunks stage = stages.from_row(step % 2 * 2 * kTile);
    const Rows<T> query = args.query.rows<T>(sequence.batch, head, sequence.query0);
    const Rows<T> dout = args.dout.rows<T>(sequence.batch, head, sequence.query0);
    load_tiles<kTile, Shape::kThreads>(stage, query, dout, row_at);
    if (threadIdx.x < kTile) {
      const int row = row_at(threadIdx.x);
      const int64_t at = sequence.lse0(a, head) + row;
      const Split lse = lse_base2(row < 0 ? -INFINITY : args.lse[at]);
      float* to = statistics + step % 2 * 3 * kTile + threadIdx.x;
      to[0] = lse.high;
      to[kTile] = lse.low;
      to[2 * kTile] = row < 0 ? 0.f : args.delta[at];
    }
  };
  if (tiles > 0) {
    const auto row_at = [&](int r) { return rows.at(place.first + r); };
    const Rows<T> key = args.key.rows<T>(sequence.batch, place.head, sequence.key0);
    const Rows<T> value = args.value.rows<T>(sequence.batch, place.head, sequence.key0);
    load_tiles<kRows, Shape::kThreads>(keys, key, value, row_at);
  }

  const int warp_row = threadIdx.x / kWarp * 16 * kM, row0 = place.first + warp_row;
  const Chunks own = keys.from_row(warp_row);
  // dv, then dk; of kSplit the one that is made.
  Accumulator gradients[Shape::kSplit ? 1 : 2][kM][kColumns / 8] = {};
  auto& dvalue = gradients[0];
  auto& dkey = gradients[Shape::kSplit ? 0 : 1];

#pragma unroll 1
  for (int step = -1; step < tiles; ++step) {
    if (step >= 0) {
      wait_for_copies();
      __syncthreads();  // the tile is there for all, and nobody reads the one before any more
    }
    if (step + 1 < tiles) load_queries(step + 1);
    if (step < 0) continue;
    const int tile = step % walk.tiles, query0 = walk.start(tile);
    const Chunks stage = stages.from_row(step % 2 * 2 * kTile);
    const Plane<T> plane(a, sequence, place.head * a.group + step / walk.tiles);
    Work work = Work::kElementwise;
    if (walk.is_near(tile) && !place.gathered) {
      work = work_of<true>(walk.near, plane.offset, row0, 16 * kM, query0, kTile, sequence.queries);
    }
    if (work == Work::kNone) continue;

    Accumulator s[kM][kN] = {}, dp[kM][kN] = {};
    multiply_rows<T>(s, own, stage, args.key.columns);
    if (with_dkey) {
      multiply_rows<T>(dp, values.from_row(warp_row), stage.from_row(kTile), args.value.columns);
    }
    const bool elementwise =
        work != Work::kPlain || place.gathered || plane.elaborate() || a.seed != nullptr;
    const float* own_columns = statistics + step % 2 * 3 * kTile + threadIdx.x % 4 * 2;
    const auto at_column = [&](int which, int column) {
      return own_columns[which * kTile + column / 2 * 8 + column % 2];
    };
    differentiate<true>(
        s, dp, plane, walk.band(tile), elementwise, rows, row0, walk.subset(tile), query0,
        [&](int, int column) { return Split{at_column(0, column), at_column(1, column)}; },
        [&](int, int column) { return at_column(2, column); });
    if (with_dvalue) multiply_columns<T>(dvalue, s, stage.from_row(kTile), args.value.columns);
    if (with_dkey) multiply_columns<T>(dkey, dp, stage, args.key.columns);
  }

  const auto row_at = [&](int r) {
    const int key = rows.at(row0 + r);
    const bool left_out =
        key >= 0 && !place.gathered && a.has_globals() && sequence.is_global(a, key);
    return left_out ? -1 : key;
  };
  const auto store = [&](const auto& gradient, const Heads& to, float factor) {
    store_rows(
        gradient, own, to.rows<T>(sequence.batch, place.head, sequence.key0),
        [&](int) { return factor; }, row_at);
  };
  // The tile of keys is free for the own rows: no other warp reads those.
  if (with_dvalue) store(dvalue, args.dvalue, a.seed == nullptr ? 1.f : a.keep_factor);
  if (with_dkey) store(dkey, args.dkey, a.scale);
}

}  // namespace kernels::attention
