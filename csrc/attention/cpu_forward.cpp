// Attention forward on CPUs; compiled once per instruction set.
//
// A thread takes tiles of 64 queries and walks the blocks of 64 keys they see with a running
// maximum and sum (M. Milakov and N. Gimelshein, "Online normalizer calculation for softmax",
// 2018). Everything is transposed: queries run along the vector, keys and head dims are broadcast,
// so maximum, sum and rescaling need no horizontal operation.
//
//     S^T[j][i] = K[j][:] . Q[i][:]         A = K,   B = Q^T
//     O^T[d][i] = sum_j V[j][d] P^T[j][i]   A = V,   B = P^T
#include "attention/cpu_blocks.h"
#include "attention/cpu_kernels.h"
#include "attention/cpu_scores.h"
#include "common/cpu/parallel.h"

namespace kernels::ISA::attention {
namespace {

constexpr int kTilesPerGroup = 4;  // tiles that share what is packed of keys and values

struct TileState {  // what outlives a block of keys
  Tile tile;
  float *q, *out;                 // Q^T in steps, O^T: [dim][kQueries]
  float *top, *sum, *correction;  // [kQueries]: running maximum and sum
};

struct Workspace {
  float *scores, *pairs;  // [kKeys][kQueries]: S^T, then P^T; pairs of its rows
  float *mask, *dropout;  // [kKeys][kQueries]
  float *key, *value;     // packed blocks
  TileState tiles[kTilesPerGroup];

  static int64_t floats(const Call& c) {
    return kKeys * (4 * kQueries + packed_row(c.head_dim) + packed_row(c.value_dim)) +
           kTilesPerGroup * kQueries * (round_up(c.head_dim, 16) + round_up(c.value_dim, 16) + 3);
  }
  Workspace(const Call& c, ThreadMemory& memory) {
    for (float** block : {&scores, &pairs, &mask, &dropout}) *block = memory.take(kKeys * kQueries);
    key = memory.take(kKeys * packed_row(c.head_dim));
    value = memory.take(kKeys * packed_row(c.value_dim));
    for (TileState& t : tiles) {
      t.q = memory.take(round_up(c.head_dim, 16) * kQueries);
      t.out = memory.take(round_up(c.value_dim, 16) * kQueries);
      for (float** row : {&t.top, &t.sum, &t.correction}) *row = memory.take(kQueries);
    }
  }
};

void begin_tile(const Head& h, TileState& t, auto dot) {
  using Dot = decltype(dot);
  const Call& c = h.call;
  dispatch_element<Dot>(c.dtype, [&](auto type) {
    pack_transposed<Dot::kPack>(
        h.rows<const decltype(type)>(c.query, h.number, h.first_query(t.tile)), c.query.row,
        t.tile.rows, c.head_dim, t.q);
  });
  memset(t.out, 0, sizeof(float) * round_up(c.value_dim, kLanes) * kQueries);
  const float sink = c.sinks ? c.sinks[h.number] : -INFINITY;
  for (int i = 0; i < kQueries; i++) {
    t.top[i] = sink;
    t.sum[i] = sink == -INFINITY ? 0.f : 1.f;
  }
}

// Running maximum and sum of vector `v` of a rectangle, whose scores, times `scale`, become
// weights.
template <bool kCut>
SIMD_INLINE void softmax_column(const Rectangle& r, const Pattern& p, const TileState& t, int v,
                                float scale, float* s) {
  s += v * kLanes;
  const vi position = lane_numbers() + set1(t.tile.position + v * kLanes);
  const vf factor = set1(scale);
  auto score = [&](int j) {
    const vf x = load(s + j * kQueries);
    return kCut ? (near_keys(p, r.key + j, position) ? x : set1(-INFINITY)) : x;
  };
  vf top0 = set1(-INFINITY), top1 = top0;
  int j = 0;
  for (; j + 2 <= r.keys; j += 2) {
    top0 = max(score(j), top0);
    top1 = max(score(j + 1), top1);
  }
  if (j < r.keys) top0 = max(score(j), top0);
  const vf old = load(t.top + v * kLanes);
  const vf top = max(max(top0, top1) * factor, old);
  const vf finite = top == set1(-INFINITY) ? vf{} : top;  // -inf - -inf would be NaN
  const vf correction = exp_nonpositive(old - finite);
  vf sum0{}, sum1{};
  for (j = 0; j + 2 <= r.keys; j += 2) {
    const vf p0 = exp_nonpositive(rounded_product(score(j), factor) - finite);
    const vf p1 = exp_nonpositive(rounded_product(score(j + 1), factor) - finite);
    sum0 += p0;
    sum1 += p1;
    store(s + j * kQueries, p0);
    store(s + (j + 1) * kQueries, p1);
  }
  if (j < r.keys) {
    const vf p0 = exp_nonpositive(rounded_product(score(j), factor) - finite);
    sum0 += p0;
    store(s + j * kQueries, p0);
  }
  store(t.top + v * kLanes, top);
  store(t.sum + v * kLanes, load(t.sum + v * kLanes) * correction + (sum0 + sum1));
  store(t.correction + v * kLanes, correction);
}

template <class Dot>
void visit(const Head& h, TileState& t, const Rectangle& r, int begin, Operand key, Operand value,
           Workspace& w) {
  const Call& c = h.call;
  multiply_columns<Dot>(r, begin, key, t.q, c.head_dim, w.scores);
  const bool modified = h.modifies_all() || (r.cut && h.pattern.has_globals);
  if (modified) {
    fetch_mask(h, t.tile, r, w.mask);
    modify_scores(h, t.tile, r, w.scores, w.mask, nullptr);
  }
  const float scale = modified ? 1.f : c.scale;
  for (int v = r.first_vector; v < r.end_vector; v++) {
    if (r.cut && !modified && !vector_sees_all(h.pattern, t.tile, r, v)) {
      softmax_column<true>(r, h.pattern, t, v, scale, w.scores);
    } else {
      softmax_column<false>(r, h.pattern, t, v, scale, w.scores);
    }
  }
  if (c.dropout_p != 0) {
    dropout_factors(h, t.tile, r, w.dropout);
    multiply(r, w.scores, w.dropout);
  }
  const float* weights = w.scores;
  if constexpr (Dot::kPack == 2) {
    pair_rows(w.scores, r.keys, r.first_vector, r.end_vector, w.pairs);
    weights = w.pairs;
  }
  const int first = r.first_vector * kLanes;
  matmul<Dot, Write::kScaledAdd>({.a = value.data + (r.key - begin) / Dot::kPack * value.row,
                                  .a_row = 1,
                                  .a_step = value.row,
                                  .b = weights + first,
                                  .b_step = kQueries,
                                  .c = t.out + first,
                                  .c_row = kQueries,
                                  .scale = t.correction + first},
                                 c.value_dim, r.end_vector - r.first_vector,
                                 (r.keys + Dot::kPack - 1) / Dot::kPack);
}

void end_tile(const Head& h, const TileState& t) {
  const Call& c = h.call;
  float* lse = c.lse + h.statistics_row() + t.tile.first;
  for (int i = 0; i < t.tile.rows; i++) {
    lse[i] = t.top[i] + logf(t.sum[i]);
    t.correction[i] = t.sum[i] == 0 ? 0.f : 1 / t.sum[i];
  }
  dispatch_float(c.dtype, [&](auto type) {
    store_transposed(t.out, t.correction,
                     h.rows<decltype(type)>(c.out, h.number, h.first_query(t.tile)), c.out.row,
                     t.tile.rows, c.value_dim);
  });
}

// Tiles [first, first + count) of a head, which share the packing of keys and values.
template <class Dot>
void forward_tiles(const Head& h, int first, int count, Workspace& w) {
  const Call& c = h.call;
  const Sequence& s = h.sequence;
  int begin = s.keys, end = 0, tiles = 0;
  for (; tiles < count && (first + tiles) * kQueries < s.queries; tiles++) {
    TileState& t = w.tiles[tiles];
    t.tile = h.pattern.tile(s, (first + tiles) * kQueries);
    begin_tile(h, t, Dot());
    const KeyRange range(s, h.pattern, t.tile);
    begin = least(begin, range.begin);
    end = greatest(end, range.end);
  }
  const int64_t kv_head = h.kv_head();
  for (int key = begin; key < end; key += kKeys) {
    const int key_end = least(key + kKeys, s.keys);
    Operand keys{}, values{};
    for (int i = 0; i < tiles; i++) {
      for_each_rectangle(h.pattern, w.tiles[i].tile, key, key_end, [&](const Rectangle& r) {
        if (!keys.data) {  // only what some tile sees is packed
          const int64_t row = s.key_row + key, row_end = s.key_row + key_end;
          keys = columns_operand<Dot>(h, c.key, kv_head, row, row_end, c.head_dim, w.key);
          values = rows_operand<Dot>(h, c.value, kv_head, row, row_end, c.value_dim, w.value);
        }
        visit<Dot>(h, w.tiles[i], r, key, keys, values, w);
      });
    }
  }
  for (int i = 0; i < tiles; i++) end_tile(h, w.tiles[i]);
}

template <class Dot>
void forward_with(const Call& c) {
  int64_t longest = c.queries;
  if (c.cu_seqlens_q) {
    longest = 0;
    for (int64_t n = 0; n < c.sequences; n++) longest = greatest(longest, Sequence(c, n).queries);
  }
  const int64_t tiles = (longest + kQueries - 1) / kQueries, heads = c.sequences * c.heads;
  const int threads = threads_for_scores(c);
  // Packing is shared where that leaves every thread enough to do.
  const bool packs =
      Dot::kPack != 1 || c.dtype != DType::kFloat32 || !close_together(c.key.row, c.head_dim);
  const int64_t per_group =
      packs && heads * tiles >= 8 * kTilesPerGroup * threads ? kTilesPerGroup : 1;
  const int64_t groups = (tiles + per_group - 1) / per_group;
  on_threads(threads, [&] {
    ThreadMemory memory(Workspace::floats(c));
    Workspace w(c, memory);
    // The last tiles see most keys under a causal pattern, so they are begun first.
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < heads * groups; item++) {
      const int64_t head = item / groups, group = groups - 1 - item % groups;
      const Sequence s(c, head / c.heads);
      const Head h(c, s, head % c.heads);
      forward_tiles<Dot>(h, int(group * per_group), int(per_group), w);
    }
  });
}

}  // namespace

void forward(const Call& c) {
#if defined(__AVX512BF16__)
  if (c.dtype == DType::kBFloat16) return forward_with<BFloat16Dot>(c);
#endif
  forward_with<FloatDot>(c);
}

}  // namespace kernels::ISA::attention
