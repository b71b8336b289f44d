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
  Fetcher fetcher;
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

// Running maximum and sum of kVectors vectors from `v` on of a rectangle, whose scores, times
// `scale`, become weights.  Several vectors side by side: one alone would read 16 keys behind what
// it wrote, at an address that differs by 4096, for which the load waits.
template <bool kCut, int kVectors>
SIMD_INLINE void softmax_columns(const Rectangle& r, const Pattern& p, const TileState& t, int v,
                                 float scale, float* s) {
  s += v * kLanes;
  const int keys = r.keys;
  const vi position = lane_numbers() + set1(t.tile.position + v * kLanes);
  const vf factor = set1(scale);
  auto score = [&](int j, int i) {
    const vf x = load(s + j * kQueries + i * kLanes);
    return kCut ? (near_keys(p, r.key + j, position) ? x : set1(-INFINITY)) : x;
  };
  static_assert(!kCut || kVectors == 1);
  vf top[2][kVectors], sum[2][kVectors] = {}, finite[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) top[0][i] = top[1][i] = set1(-INFINITY);
  for (int j = 0; j < keys; j += 2) {
    const int other = j + 1 < keys ? j + 1 : j;
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      top[0][i] = max(score(j, i), top[0][i]);
      top[1][i] = max(score(other, i), top[1][i]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) {
    const int at = (v + i) * kLanes;
    const vf old = load(t.top + at);
    const vf most = max(max(top[0][i], top[1][i]) * factor, old);
    finite[i] = most == set1(-INFINITY) ? vf{} : most;  // -inf - -inf would be NaN
    const vf correction = exp_nonpositive(old - finite[i]);
    store(t.top + at, most);
    store(t.correction + at, correction);
    store(t.sum + at, load(t.sum + at) * correction);
  }
  auto weigh = [&](int j, int half) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      const vf weight = exp_nonpositive(rounded_product(score(j, i), factor) - finite[i]);
      sum[half][i] += weight;
      store(s + j * kQueries + i * kLanes, weight);
    }
  };
  int j = 0;
  for (; j + 2 <= keys; j += 2) {
    weigh(j, 0);
    weigh(j + 1, 1);
  }
  if (j < keys) weigh(j, 0);
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) {
    const int at = (v + i) * kLanes;
    store(t.sum + at, load(t.sum + at) + (sum[0][i] + sum[1][i]));
  }
}

template <class Dot>
void visit(const Head& h, TileState& t, const Rectangle& r, int begin, Operand key, Operand value,
           Workspace& w) {
  const Call& c = h.call;
  multiply_columns<Dot>(r, begin, key, t.q, c.head_dim, w.scores, &w.fetcher);
  const bool modified = h.modifies_all() || (r.cut && h.pattern.has_globals);
  if (modified) {
    fetch_mask(h, t.tile, r, w.mask);
    modify_scores(h, t.tile, r, w.scores, w.mask, nullptr);
  }
  const float scale = modified ? 1.f : c.scale;
  int v = r.first_vector;
  for (; (!r.cut || modified) && v + kVectorsAtOnce <= r.end_vector; v += kVectorsAtOnce) {
    softmax_columns<false, kVectorsAtOnce>(r, h.pattern, t, v, scale, w.scores);
  }
  for (; v < r.end_vector; v++) {
    if (r.cut && !modified && !vector_sees_all(h.pattern, t.tile, r, v)) {
      softmax_columns<true, 1>(r, h.pattern, t, v, scale, w.scores);
    } else {
      softmax_columns<false, 1>(r, h.pattern, t, v, scale, w.scores);
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
                                  .scale = t.correction + first,
                                  .fetcher = &w.fetcher},
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

// Has fetched what tiles [first, first + count) will touch and others before them have not.
void fetch_tiles(const Head& h, int first, int count, Workspace& w) {
  const Call& c = h.call;
  const Sequence& s = h.sequence;
  const int64_t begin = s.query_row + first * kQueries;
  const int64_t end = s.query_row + least((first + count) * kQueries, s.queries);
  fetch(w.fetcher, h, c.query, h.number, begin, end, c.head_dim);
  fetch(w.fetcher, h, c.out, h.number, begin, end, c.value_dim);
}
void fetch_keys(const Head& h, int begin, Workspace& w) {
  const Call& c = h.call;
  const Sequence& s = h.sequence;
  const int64_t row = s.key_row + begin, end = s.key_row + least(begin + kKeys, s.keys);
  fetch(w.fetcher, h, c.key, h.kv_head(), row, end, c.head_dim);
  fetch(w.fetcher, h, c.value, h.kv_head(), row, end, c.value_dim);
}

// Tiles [first, first + count) of a head, which share the packing of keys and values; keys before
// `known` have been fetched.
template <class Dot>
void forward_tiles(const Head& h, int first, int count, int& known, Workspace& w) {
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
    if (key >= known) {
      known = key + kKeys;
      if (known < s.keys) fetch_keys(h, known, w);
    }
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
  // Where there are heads enough a thread takes all groups of one, whose keys stay in its cache.
  const int64_t at_once = heads >= 4 * threads && groups > 1 ? groups : 1;
  const int64_t items = heads * groups / at_once;
  on_threads(threads, [&] {
    ThreadMemory memory(Workspace::floats(c));
    Workspace w(c, memory);
#pragma omp for schedule(dynamic) nowait
    for (int64_t item = 0; item < items; item++) {
      const int64_t head = item * at_once / groups;
      const Sequence s(c, head / c.heads);
      const Head h(c, s, head % c.heads);
      int known = 0;
      if (at_once == 1) {  // the last ones, which see most keys under a causal pattern, first
        const int64_t group = groups - 1 - item % groups;
        forward_tiles<Dot>(h, int(group * per_group), int(per_group), known, w);
        continue;
      }
      for (int64_t group = 0; group < groups; group++) {
        if (group + 1 < groups) {
          fetch_tiles(h, int((group + 1) * per_group), int(per_group), w);
        } else if (item + threads < items) {  // more likely than any other the thread's next
          const int64_t next = item + threads;
          const Sequence next_sequence(c, next / c.heads);
          const Head next_head(c, next_sequence, next % c.heads);
          fetch_tiles(next_head, 0, int(per_group), w);
          fetch_keys(next_head, 0, w);
        }
        forward_tiles<Dot>(h, int(group * per_group), int(per_group), known, w);
      }
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
