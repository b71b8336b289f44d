// Attention backward of a few tiles of queries against blocks of keys; weights are recomputed from
// the saved lse.  Which thread does which: cpu_backward.cpp.
//
// With delta[i] = sum_d dO[i][d] O[i][d] - dlse[i], for each block, transposed as in the forward:
//
//     S^T  = K Q^T        P^T  = exp(S^T - lse)             A = K
//     dP^T = V dO^T       dS^T = P^T * (dP^T - delta)       A = V
//     dV  += P^T dO       dK  += scale * dS^T Q             A = P^T, dS^T; vectors along d
//     dQ^T += scale * K^T dS^T                              A = K^T
#pragma once
#include "attention/cpu_blocks.h"
#include "attention/cpu_scores.h"

namespace kernels::ISA::attention {

using kernels::attention::Gradients;

constexpr int kTilesAtOnce = 4;  // that share what is packed of keys and values

// Sums of dK or dV of one key head, row by row; null where not wanted.
struct Sums {
  float* data;
  int64_t row;
};

struct TileGradients {
  Tile tile;
  float *q, *dout;            // Q^T, dO^T: [step][kQueries]
  float *q_rows, *dout_rows;  // steps along queries: [query / kPack][packed_row(dim)]
  float *dq_memory, *dq;      // dQ^T: [dim][kQueries], here or elsewhere, null where not wanted
  float *lse, *delta;         // [kQueries]
};

template <class Dot>
struct GradientWorkspace {
  float *weights, *dweights;      // [kKeys][kQueries]: S^T, then P^T; dP^T, then scale * dS^T
  float *mask, *slope, *dropout;  // [kKeys][kQueries]
  float *weight_rows, *dweight_rows, *dweight_pairs;  // both as pairs of queries, pairs of keys
  float *key, *key_rows, *value;                      // packed blocks
  Fetcher fetcher;
  TileGradients tiles[kTilesAtOnce];

  static int64_t floats(const Call& c) {
    const int64_t dims = packed_row(c.head_dim) + packed_row(c.value_dim);
    return 8 * kKeys * kQueries + kKeys * (dims + packed_row(c.head_dim)) +
           kTilesAtOnce * kQueries * (3 * dims + 2);
  }
  GradientWorkspace(const Call& c, ThreadMemory& memory) {
    for (float** block : {&weights, &dweights, &mask, &slope, &dropout, &weight_rows, &dweight_rows,
                          &dweight_pairs}) {
      *block = memory.take(kKeys * kQueries);
    }
    const int head_dim = packed_row(c.head_dim), value_dim = packed_row(c.value_dim);
    key = memory.take(kKeys * head_dim);
    key_rows = memory.take(kKeys * head_dim);
    value = memory.take(kKeys * value_dim);
    for (TileGradients& t : tiles) {
      for (float** rows : {&t.q, &t.q_rows, &t.dq_memory}) *rows = memory.take(kQueries * head_dim);
      for (float** rows : {&t.dout, &t.dout_rows}) *rows = memory.take(kQueries * value_dim);
      for (float** row : {&t.lse, &t.delta}) *row = memory.take(kQueries);
    }
  }
};

// delta of the tile's queries, in double: where few keys are seen, dP - delta cancels.
inline void write_delta(const Head& h, const Gradients& g, const Tile& t) {
  const Call& c = h.call;
  dispatch_float(c.dtype, [&](auto type) {
    using T = const decltype(type);
    const T* out = h.rows<T>(c.out, h.number, h.first_query(t));
    const T* dout = h.rows<T>(g.dout, h.number, h.first_query(t));
    const float* dlse = g.dlse;
    if (dlse) {
      dlse += h.sequence.batch * g.dlse_batch + h.number * g.dlse_head +
              h.first_query(t) * g.dlse_query;
    }
    float* delta = g.delta + h.statistics_row() + t.first;
    for (int i = 0; i < t.rows; i++) {
      Doubles total{};
      for (int d = 0; d < c.value_dim; d += kLanes) {
        const int some = c.value_dim - d;
        total += to_doubles(load_some(out + i * c.out.row + d, some)) *
                 to_doubles(load_some(dout + i * g.dout.row + d, some));
      }
      double whole = dlse ? -double(dlse[i * g.dlse_query]) : 0.0;
      for (int lane = 0; lane < kLanes; lane++) whole += total[lane];
      delta[i] = float(whole);
    }
  });
}

// Everything of a tile but dq; delta has been written.
template <class Dot>
void load_tile(const Head& h, const Gradients& g, TileGradients& t) {
  const Call& c = h.call;
  dispatch_element<Dot>(c.dtype, [&](auto type) {
    auto pack = [&](const Heads& x, int columns, float* transposed, float* along_queries) {
      const auto* rows = h.rows<const decltype(type)>(x, h.number, h.first_query(t.tile));
      pack_transposed<Dot::kPack>(rows, x.row, t.tile.rows, columns, transposed);
      pack_rows<Dot::kPack>(rows, x.row, t.tile.rows, columns, along_queries, packed_row(columns));
    };
    pack(c.query, c.head_dim, t.q, t.q_rows);
    pack(g.dout, c.value_dim, t.dout, t.dout_rows);
  });
  const float* lse = c.lse + h.statistics_row() + t.tile.first;
  const float* delta = g.delta + h.statistics_row() + t.tile.first;
  for (int i = 0; i < kQueries; i++) {
    const bool sees_some = i < t.tile.rows && lse[i] != -INFINITY;
    t.lse[i] = sees_some ? lse[i] : INFINITY;  // weights of exp(-inf) = 0
    t.delta[i] = sees_some ? delta[i] : 0.f;
  }
}

// kVectors vectors from `v` on of a rectangle: scores times `score_scale` to weights, dP to
// scale * dS.  Several side by side, as in the forward's softmax_columns.
template <bool kCut, int kVectors>
SIMD_INLINE void gradient_columns(const Rectangle& r, const Pattern& p, const TileGradients& t,
                                  int v, float score_scale, float scale, const float* slope,
                                  float* weights, float* dweights) {
  static_assert(!kCut || kVectors == 1);
  const vi position = lane_numbers() + set1(t.tile.position + v * kLanes);
  vf lse[kVectors], delta[kVectors];
#pragma GCC unroll 4
  for (int i = 0; i < kVectors; i++) {
    lse[i] = load(t.lse + (v + i) * kLanes);
    delta[i] = load(t.delta + (v + i) * kLanes);
  }
  const int keys = r.keys;
  for (int j = 0; j < keys; j++) {
#pragma GCC unroll 4
    for (int i = 0; i < kVectors; i++) {
      const int at = j * kQueries + (v + i) * kLanes;
      const vf score = rounded_product(load(weights + at), set1(score_scale));
      vf weight = exp_nonpositive(score - lse[i]);
      if constexpr (kCut) weight = near_keys(p, r.key + j, position) ? weight : vf{};
      vf dweight = weight * set1(scale) * (load(dweights + at) - delta[i]);
      if (slope) dweight *= load(slope + at);
      store(weights + at, weight);
      store(dweights + at, dweight);
    }
  }
}

struct KeyOperands {  // of a block that begins at key `begin`
  int begin;
  Operand key, key_rows, value;
};

// Weights and their gradients of a rectangle, in w.weights and w.dweights.
template <class Dot>
void rectangle_weights(const Head& h, const TileGradients& t, const Rectangle& r,
                       const KeyOperands& k, GradientWorkspace<Dot>& w) {
  const Call& c = h.call;
  multiply_columns<Dot>(r, k.begin, k.key, t.q, c.head_dim, w.weights, &w.fetcher);
  multiply_columns<Dot>(r, k.begin, k.value, t.dout, c.value_dim, w.dweights, &w.fetcher);
  const bool modified = h.modifies_all() || (r.cut && h.pattern.has_globals);
  const float* slope = modified && c.softcap != 0 ? w.slope : nullptr;
  if (modified) {
    fetch_mask(h, t.tile, r, w.mask);
    modify_scores(h, t.tile, r, w.weights, w.mask, w.slope);
  }
  if (c.dropout_p != 0) {
    dropout_factors(h, t.tile, r, w.dropout);
    multiply(r, w.dweights, w.dropout);
  }
  const float score_scale = modified ? 1.f : c.scale;
  int v = r.first_vector;
  for (; (!r.cut || modified) && v + kVectorsAtOnce <= r.end_vector; v += kVectorsAtOnce) {
    gradient_columns<false, kVectorsAtOnce>(r, h.pattern, t, v, score_scale, c.scale, slope,
                                            w.weights, w.dweights);
  }
  for (; v < r.end_vector; v++) {
    if (r.cut && !modified && !vector_sees_all(h.pattern, t.tile, r, v)) {
      gradient_columns<true, 1>(r, h.pattern, t, v, score_scale, c.scale, nullptr, w.weights,
                                w.dweights);
    } else {
      gradient_columns<false, 1>(r, h.pattern, t, v, score_scale, c.scale, slope, w.weights,
                                 w.dweights);
    }
  }
  if (c.dropout_p != 0) multiply(r, w.weights, w.dropout);
}

// Adds what a rectangle gives to dQ, dK and dV.
template <class Dot>
void add_rectangle(const Head& h, const TileGradients& t, const Rectangle& r, const KeyOperands& k,
                   Sums dkey, Sums dvalue, GradientWorkspace<Dot>& w) {
  constexpr int kPack = Dot::kPack;
  const Call& c = h.call;
  rectangle_weights<Dot>(h, t, r, k, w);
  const float *weights = w.weights, *dweights = w.dweights, *dweights_by_key = w.dweights;
  if constexpr (kPack == 2) {
    narrow_rows(w.weights, r.keys, r.first_vector, r.end_vector, w.weight_rows);
    narrow_rows(w.dweights, r.keys, r.first_vector, r.end_vector, w.dweight_rows);
    pair_rows(w.dweights, r.keys, r.first_vector, r.end_vector, w.dweight_pairs);
    weights = w.weight_rows;
    dweights = w.dweight_rows;
    dweights_by_key = w.dweight_pairs;
  }
  const int first = r.first_vector * kLanes;
  const int queries = least(r.end_vector * kLanes, t.tile.rows) - first;
  auto add_to_keys = [&](Sums sums, const float* a, const float* rows, int columns) {
    if (!sums.data) return;
    matmul<Dot, Write::kAdd>({.a = a + first / kPack,
                              .a_row = kQueries / kPack,
                              .a_step = 1,
                              .b = rows + first / kPack * packed_row(columns),
                              .b_step = packed_row(columns),
                              .c = sums.data + r.key * sums.row,
                              .c_row = sums.row,
                              .scale = nullptr},
                             r.keys, round_up(columns, kLanes) / kLanes,
                             (queries + kPack - 1) / kPack);
  };
  add_to_keys(dvalue, weights, t.dout_rows, c.value_dim);
  add_to_keys(dkey, dweights, t.q_rows, c.head_dim);
  if (!t.dq) return;
  matmul<Dot, Write::kAdd>({.a = k.key_rows.data + (r.key - k.begin) / kPack * k.key_rows.row,
                            .a_row = 1,
                            .a_step = k.key_rows.row,
                            .b = dweights_by_key + first,
                            .b_step = kQueries,
                            .c = t.dq + first,
                            .c_row = kQueries,
                            .scale = nullptr},
                           c.head_dim, r.end_vector - r.first_vector, (r.keys + kPack - 1) / kPack);
}

// Adds what tiles [0, count) of the workspace get from keys [begin, end), a range that begins at a
// multiple of kKeys.  Blocks are taken from the last to the first and tiles in order, so that sums
// do not depend on how keys and tiles were divided between calls.
template <class Dot>
void add_keys(const Head& h, int count, int begin, int end, Sums dkey, Sums dvalue,
              GradientWorkspace<Dot>& w) {
  const Call& c = h.call;
  const Sequence& s = h.sequence;
  for (int key = (end - 1) / kKeys * kKeys; key >= begin && key < end; key -= kKeys) {
    const int key_end = least(key + kKeys, s.keys);
    KeyOperands operands{};
    for (int i = 0; i < count; i++) {
      const TileGradients& t = w.tiles[i];
      for_each_rectangle(h.pattern, t.tile, key, key_end, [&](const Rectangle& r) {
        if (!operands.key.data) {  // only what some tile sees is packed
          const int64_t row = s.key_row + key, row_end = s.key_row + key_end, head = h.kv_head();
          operands.begin = key;
          operands.key = columns_operand<Dot>(h, c.key, head, row, row_end, c.head_dim, w.key);
          operands.value =
              columns_operand<Dot>(h, c.value, head, row, row_end, c.value_dim, w.value);
          operands.key_rows = operands.key;
          if constexpr (Dot::kPack == 2) {
            operands.key_rows =
                rows_operand<Dot>(h, c.key, head, row, row_end, c.head_dim, w.key_rows);
          }
        }
        add_rectangle<Dot>(h, t, r, operands, dkey, dvalue, w);
      });
    }
  }
}

}  // namespace kernels::ISA::attention
