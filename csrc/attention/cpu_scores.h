// What may happen to a block of scores besides scaling: softcap, ALiBi, masks, the pattern's global
// positions, dropout.  Each is a pass over the block while it is in the L1 cache, so a call without
// them does not pay for them.
//
// Blocks are transposed, [key][query] with kQueries floats a row: queries run along the vector.
#pragma once
#include "attention/cpu_math.h"
#include "attention/cpu_tiles.h"

namespace kernels::ISA::attention {

SIMD_INLINE vf load_mask(const uint8_t* p) {  // true: 1
  vf x;
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i++) x[i] = p[i] ? 1.f : 0.f;
  return x;
}
template <class T>
SIMD_INLINE vf load_mask(const T* p) {
  return load(p);
}
template <class T>
SIMD_INLINE vf load_mask_some(const T* p, int count) {
  if (count >= kLanes) return load_mask(p);
  T some[kLanes] = {};
  memcpy(some, p, count * sizeof(T));
  return load_mask(some);
}

// The mask's values at a rectangle, out[key][query].
template <class T>
void fetch_mask(const Mask& m, const T* data, const Tile& t, const Rectangle& r, float* out) {
  data += t.first * m.query + r.key * m.key;
  if (m.query == 0 && m.key == 0) {
    const T same[kLanes] = {*data};
    const vf x = set1(load_mask(same)[0]);
    for (int j = 0; j < r.keys; j++) {
      for (int v = r.first_vector; v < r.end_vector; v++) store(out + j * kQueries + v * kLanes, x);
    }
    return;
  }
  for (int j = 0; j < r.keys; j += kLanes) {
    const int keys = least(r.keys - j, kLanes);
    for (int v = r.first_vector; v < r.end_vector; v++) {
      vf x[kLanes];
      for (int i = 0; i < kLanes; i++) {
        const int query = least(v * kLanes + i, t.rows - 1);
        const T* row = data + query * m.query;
        if (m.key == 0) {
          const T same[kLanes] = {*row};
          x[i] = set1(load_mask(same)[0]);
        } else {
          x[i] = load_mask_some(row + j, keys);
        }
      }
      transpose(x);
      for (int k = 0; k < keys; k++) store(out + (j + k) * kQueries + v * kLanes, x[k]);
    }
  }
}

inline void fetch_mask(const Head& h, const Tile& t, const Rectangle& r, float* out) {
  const Mask& m = h.call.mask;
  const int64_t at = h.sequence.batch * m.batch + h.number * m.head;
  auto fetch = [&](auto type) {
    fetch_mask(m, static_cast<const decltype(type)*>(m.data) + at, t, r, out);
  };
  switch (m.kind) {
    case MaskKind::kNone:
      return;
    case MaskKind::kBool:
      return fetch(uint8_t{});
    case MaskKind::kFloat32:
      return fetch(float{});
    case MaskKind::kBFloat16:
      return fetch(BFloat16{});
    case MaskKind::kFloat16:
      return fetch(Float16{});
  }
}

// Products q.k of a rectangle to final scores, -inf where hidden.  `mask` is what
// fetch_mask gave; `slope`, if wanted, gets the softcap's derivative.
template <class F>
SIMD_INLINE void modify_column(const Head& h, const Tile& t, const Rectangle& r, int v, float* s,
                               const float* mask, float* slope, F visible) {
  const Call& c = h.call;
  const MaskKind kind = c.mask.kind;
  const vf hidden = set1(-INFINITY);
  const vi position = lane_numbers() + set1(t.position + v * kLanes);
  for (int j = 0; j < r.keys; j++) {
    const int at = j * kQueries + v * kLanes;
    vf x = load(s + at) * set1(c.scale);
    if (c.softcap != 0) {
      const vf bent = tanh(x * set1(1 / c.softcap));
      x = bent * set1(c.softcap);
      if (slope) store(slope + at, set1(1.f) - bent * bent);
    }
    if (c.alibi_slopes) {
      const vi d = set1(r.key + j) - position;
      x -= set1(h.slope) * __builtin_convertvector(d < 0 ? -d : d, vf);
    }
    if (kind == MaskKind::kBool) {
      x = load(mask + at) > vf{} ? x : hidden;
    } else if (kind != MaskKind::kNone) {
      x += load(mask + at);
    }
    store(s + at, visible(r.key + j, position) ? x : hidden);
  }
}

inline void modify_scores(const Head& h, const Tile& t, const Rectangle& r, float* s,
                          const float* mask, float* slope) {
  const Pattern& p = h.pattern;
  const vi before = set1(p.causal ? 0 : kFar);
  for (int v = r.first_vector; v < r.end_vector; v++) {
    if (!r.cut) {
      modify_column(h, t, r, v, s, mask, slope, [](int, vi) { return vi{} == vi{}; });
      continue;
    }
    vi sees_all{};  // queries at global positions
    for (int i = 0; i < kLanes; i++) {
      const int query = v * kLanes + i;
      const bool within = query >= t.global_first && query < t.global_end;
      sees_all[i] = within && p.is_global(t.position + query) ? -1 : 0;
    }
    modify_column(h, t, r, v, s, mask, slope, [&](int key, vi position) {
      const vi seen_by_all = set1(p.has_globals && p.is_global(key) ? -1 : 0);
      return (near_keys(p, key, position) | sees_all | seen_by_all) &
             (set1(key) - position <= before);
    });
  }
}

// keep / (1 - dropout_p) of every weight of a rectangle.  One call of the generator gives 16 bits
// for each of eight keys: kernels/attention/README.md.
inline void dropout_factors(const Head& h, const Tile& t, const Rectangle& r, float* out) {
  const Call& c = h.call;
  const vu threshold = vu{} + uint32_t(lrint(c.dropout_p * 65536));
  const vf kept = set1(c.dropout_p < 1 ? float(1 / (1 - c.dropout_p)) : 0.f);
  const uint32_t number = uint32_t(h.sequence.number * c.heads + h.number);
  const int end = r.key + r.keys;
  for (int v = r.first_vector; v < r.end_vector; v++) {
    const vu query = (vu)(lane_numbers() + set1(t.first + v * kLanes));
    for (int group = r.key / 32; group * 32 < end; group++) {
      for (int pair = 0; pair < 4; pair++) {
        const Random random = philox(c.seed, query, uint32_t(group * 4 + pair), number);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
          const int key = group * 32 + n * 8 + pair * 2;
          float* row = out + (key - r.key) * kQueries + v * kLanes;
          const vu even = random.word[n] & 0xffff, odd = random.word[n] >> 16;
          if (key >= r.key && key < end) store(row, even >= threshold ? kept : vf{});
          if (key + 1 >= r.key && key + 1 < end) {
            store(row + kQueries, odd >= threshold ? kept : vf{});
          }
        }
      }
    }
  }
}

// x *= factor over a rectangle.
inline void multiply(const Rectangle& r, float* x, const float* factor) {
  for (int j = 0; j < r.keys; j++) {
    for (int v = r.first_vector; v < r.end_vector; v++) {
      const int at = j * kQueries + v * kLanes;
      store(x + at, load(x + at) * load(factor + at));
    }
  }
}

}  // namespace kernels::ISA::attention
