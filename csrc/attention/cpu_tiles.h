// Which parts of the scores are computed: tiles of 64 queries against blocks of 64 keys, cut into
// rectangles that leave out what the pattern hides.
#pragma once
#include "attention/cpu.h"
#include "attention/cpu_math.h"
#include "attention/cpu_pack.h"

namespace kernels::ISA::attention {

using kernels::attention::Call;
using kernels::attention::Heads;
using kernels::attention::Mask;
using kernels::attention::MaskKind;

constexpr int kStrip = 16;     // keys that are cut off together at the edge of a band
constexpr int kFar = 1 << 30;  // stands for an unbounded side of a window

SIMD_INLINE int least(int64_t a, int64_t b) { return int(a < b ? a : b); }
SIMD_INLINE int greatest(int64_t a, int64_t b) { return int(a > b ? a : b); }

// One batch entry, or one of several packed sequences.
struct Sequence {
  int64_t number;              // of the batch entry or the sequence
  int64_t batch;               // entry that holds it
  int64_t query_row, key_row;  // its first rows
  int queries, keys;
  int offset;  // query i stands at position i + offset among the keys

  Sequence() = default;
  Sequence(const Call& c, int64_t n) : number(n) {
    const bool packed = c.cu_seqlens_q;
    batch = packed ? 0 : n;
    query_row = packed ? c.cu_seqlens_q[n] : 0;
    key_row = packed ? c.cu_seqlens_k[n] : 0;
    queries = packed ? c.cu_seqlens_q[n + 1] - int(query_row) : int(c.queries);
    keys = packed ? c.cu_seqlens_k[n + 1] - int(key_row) : int(c.keys);
    offset = c.lower_right ? keys - queries : 0;
  }
};

struct Tile {
  int first, rows;  // queries
  int position;     // of the first
  int vectors;
  int global_first, global_end;  // queries among which all those at global positions are

  int last_position() const { return position + rows - 1; }
};

// A key j and a query at p see each other where -left <= j - p <= right, or where the pattern has
// global positions and either is one; causality, which is part of `right`, cuts those too.
struct Pattern {
  int left, right;
  bool causal, has_globals;
  int global_tokens;           // first positions of the sequence
  const uint8_t* global_mask;  // [keys] or null

  Pattern(const Call& c, const Sequence& s) : causal(c.causal) {
    left = c.left < 0 ? kFar : least(c.left, kFar);
    right = c.right < 0 ? kFar : least(c.right, kFar);
    if (causal) right = 0;
    const bool windowed = c.left >= 0 || c.right >= 0;
    global_tokens = windowed ? least(c.global_tokens, s.keys) : 0;
    global_mask = windowed && c.global_mask ? c.global_mask + s.batch * c.keys : nullptr;
    has_globals = global_tokens > 0 || global_mask;
  }

  bool is_global(int t) const { return t < global_tokens || (global_mask && global_mask[t]); }

  // Shrinks [begin, end) to its first and last global positions; false where it has none.
  bool trim_to_globals(int& begin, int& end) const {
    while (begin < end && !is_global(begin)) begin++;
    while (end > begin && !is_global(end - 1)) end--;
    return begin < end;
  }

  bool all_near(int key, int key_end, int position, int last_position) const {
    return key >= last_position - left && key_end - 1 <= position + right;
  }

  Tile tile(const Sequence& s, int first) const {
    Tile t;
    t.first = first;
    t.rows = least(s.queries - first, kQueries);
    t.position = first + s.offset;
    t.vectors = (t.rows + kLanes - 1) / kLanes;
    int begin = greatest(t.position, 0), end = least(t.position + t.rows, s.keys);
    const bool found = has_globals && trim_to_globals(begin, end);
    t.global_first = found ? begin - t.position : 0;
    t.global_end = found ? end - t.position : 0;
    return t;
  }
};

// Keys [begin, end) that the tile's queries can see: multiples of kKeys, or the end of the
// sequence.
struct KeyRange {
  int begin, end;            // of all
  int near_begin, near_end;  // without the global positions

  KeyRange(const Sequence& s, const Pattern& p, const Tile& t) {
    near_end = greatest(least(int64_t(t.last_position()) + p.right + 1, s.keys), 0);
    near_begin = least(greatest(int64_t(t.position) - p.left, 0) / kKeys * kKeys, near_end);
    begin = near_begin;
    end = near_end;
    if (!p.has_globals) return;
    begin = 0;
    end = p.causal ? greatest(least(int64_t(t.last_position()) + 1, s.keys), 0) : s.keys;
  }
};

struct Rectangle {
  int key, keys;                 // keys [key, key + keys)
  int first_vector, end_vector;  // of the tile's queries
  bool cut;                      // some pairs in it are hidden
};

// f(rectangle) for what the tile sees of the keys [begin, end) of a block.
template <class F>
SIMD_INLINE void for_each_rectangle(const Pattern& p, const Tile& t, int begin, int end, F f) {
  if (p.all_near(begin, end, t.position, t.last_position())) {
    return f(Rectangle{begin, end - begin, 0, t.vectors, false});
  }
  for (int key = begin; key < end; key += kStrip) {
    int from = key, to = least(key + kStrip, end);
    int first = greatest(int64_t(from) - p.right - t.position, 0);  // queries
    int past = least(int64_t(to) + p.left - t.position, t.rows);
    if (p.has_globals) {
      const bool near = first < past;
      int global = from, global_end = to;
      if (p.trim_to_globals(global, global_end)) {
        if (!near && t.global_first == t.global_end) {
          from = global & ~1;  // pairs of keys stay together
          to = least((global_end + 1) & ~1, end);
        }
        const int sees = p.causal ? greatest(int64_t(global) - t.position, 0) : 0;
        first = near ? least(first, sees) : sees;
        past = t.rows;
      } else if (!near) {
        first = past = t.global_first;
      }
      if (t.global_first < t.global_end) {
        first = least(first, t.global_first);
        past = greatest(past, t.global_end);
      }
    }
    if (first >= past) continue;
    const int first_vector = first / kLanes, end_vector = (past + kLanes - 1) / kLanes;
    const int last = least(end_vector * kLanes, t.rows) - 1;
    const bool cut = !p.all_near(from, to, t.position + first_vector * kLanes, t.position + last);
    f(Rectangle{from, to - from, first_vector, end_vector, cut});
  }
}

// Whether the queries of vector `v` see all keys of the rectangle.
SIMD_INLINE bool vector_sees_all(const Pattern& p, const Tile& t, const Rectangle& r, int v) {
  const int first = t.position + v * kLanes;
  return p.all_near(r.key, r.key + r.keys, first, least(first + kLanes - 1, t.last_position()));
}

// Which of the queries at `position` the key is near enough to.
SIMD_INLINE vi near_keys(const Pattern& p, int key, vi position) {
  const vi distance = set1(key) - position;
  return (distance >= set1(-p.left)) & (distance <= set1(p.right));
}

// What one head of one sequence is computed from.
struct Head {
  const Call& call;
  Sequence sequence;
  Pattern pattern;
  int64_t number;  // of the query head
  float slope;     // ALiBi's

  Head(const Call& c, const Sequence& s, int64_t h)
      : call(c), sequence(s), pattern(c, s), number(h), slope(0) {
    if (c.alibi_slopes) slope = c.alibi_slopes[s.number * c.alibi_batch + h * c.alibi_head];
  }

  int64_t statistics_row() const {  // of lse and delta
    return (sequence.batch * call.heads + number) * call.queries + sequence.query_row;
  }

  template <class T>
  T* rows(const Heads& x, int64_t head, int64_t first_row) const {
    return static_cast<T*>(x.data) + sequence.batch * x.batch + head * x.head + first_row * x.row;
  }

  int64_t kv_head() const { return number / (call.heads / call.kv_heads); }
  int64_t first_query(const Tile& t) const { return sequence.query_row + t.first; }

  // Whether every score, not only those at the edges of the pattern, needs `modify_scores`: also
  // for a scale that is not positive, times which the largest product is not the largest score, nor
  // -inf hidden.
  bool modifies_all() const {
    return call.softcap != 0 || call.alibi_slopes || call.mask.kind != MaskKind::kNone ||
           !(call.scale > 0);
  }
};

}  // namespace kernels::ISA::attention
