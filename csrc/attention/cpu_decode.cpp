// Attention of a few queries against a cache, on CPUs; compiled once per instruction set.
//
// Every row of the cache is read once for all query heads it serves, so memory is the limit.  Keys
// are cut into parts of fixed length, which threads share and whose results are combined in order:
// results do not depend on the number of threads.  Scores run along the vector; while a block's
// keys are worked on its values are fetched, and the next block's keys meanwhile: the hardware does
// not look that far ahead.
#include "attention/cpu_kernels.h"
#include "attention/cpu_math.h"
#include "attention/cpu_pack.h"
#include "common/cpu/parallel.h"

namespace kernels::ISA::attention {
namespace {

using kernels::attention::DecodeCall;
using kernels::attention::Heads;

constexpr int kPart = 512;  // keys

template <class T>
struct Rows {  // of a block of keys or values
  const T* data;
  int64_t stride;
};

SIMD_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(static_cast<const char*>(row) + b);
}

// Products of one query with `count` keys; `next` are rows that will be read soon, fetched one by
// one: all at once they would hold up the loads in between.
template <class T>
void products(const float* query, int dims, Rows<T> keys, int count, Rows<T> next, float* out) {
  for (int j = 0; j < count; j += kLanes) {
    const int last = count - j < kLanes ? count - j - 1 : kLanes - 1;
    const T* block = keys.data + j * keys.stride;
    vf sum[kLanes] = {};
    int d = 0;
    if (last == kLanes - 1) {
      for (; d + kLanes <= dims; d += kLanes) {
        const vf q = load(query + d);
#pragma GCC unroll 16
        for (int r = 0; r < kLanes; r++) {
          const int64_t row = j + r;
          sum[r] += q * load_some(block + r * keys.stride + d, kLanes);
          __builtin_prefetch(next.data + row * next.stride + d);
        }
      }
    }
    for (; d < dims; d += kLanes) {  // the last dims, or fewer keys than lanes
      const vf q = load(query + d);
      for (int r = 0; r <= last; r++) {
        sum[r] += q * load_some(block + r * keys.stride + d, dims - d);
      }
    }
    store(out + j, sums_of(sum));
  }
}

// out[d] = out[d] * correction + sum_j weight[j] * value[j][d], kVectors vectors of d; `next` as
// above.
template <int kVectors, class T>
SIMD_INLINE void add_values_at(const float* weight, Rows<T> values, int count, int dims,
                               float correction, Rows<T> next, float* out) {
  vf sum[kVectors] = {};
  for (int j = 0; j < count; j++) {
    const vf w = set1(weight[j]);
    if constexpr (kVectors > 1) {
      prefetch(next.data + j * next.stride, kVectors * kLanes * int64_t(sizeof(T)));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      sum[v] +=
          w * load_some(values.data + j * values.stride + v * kLanes, kVectors > 1 ? kLanes : dims);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; v++) {
    float* to = out + v * kLanes;
    store(to, load(to) * set1(correction) + sum[v]);
  }
}
template <class T>
void add_values(const float* weight, Rows<T> values, int count, int dims, float correction,
                Rows<T> next, float* out) {
  int d = 0;
  for (; d + 4 * kLanes <= dims; d += 4 * kLanes) {
    add_values_at<4>(weight, Rows<T>{values.data + d, values.stride}, count, dims, correction,
                     Rows<T>{next.data + d, next.stride}, out + d);
  }
  for (; d < dims; d += kLanes) {
    add_values_at<1>(weight, Rows<T>{values.data + d, values.stride}, count, dims - d, correction,
                     next, out + d);
  }
}

// The running result of one query over the keys so far: [padded value dims], maximum, sum.
struct Partial {
  float* out;
  float *top, *sum;
};

// One query of one head of a sequence, as far as scores depend on it.
struct Query {
  int position;
  float slope;
};

bool sees_all(const DecodeCall& c, int position, int key, int end) {
  return (!c.causal || end - 1 <= position) && (c.left < 0 || key >= position - c.left) &&
         (c.right < 0 || end - 1 <= position + c.right);
}

// Products to scores, -inf past `count` and where the pattern hides the key; returns the maximum.
SIMD_INLINE float finish_scores(const DecodeCall& c, Query q, int key, int count,
                                const float* key_scale, int64_t scale_stride, float* s) {
  const bool all = sees_all(c, q.position, key, key + count);
  const bool windowed = c.left >= 0 || c.right >= 0;
  vf top = set1(-INFINITY);
  for (int j = 0; j < count; j += kLanes) {
    vf x = load(s + j) * set1(c.scale);
    if (key_scale) {
      vf scale{};
      for (int i = 0; i < kLanes && j + i < count; i++)
        scale[i] = key_scale[(j + i) * scale_stride];
      x *= scale;
    }
    if (c.softcap != 0) x = tanh(x * set1(1 / c.softcap)) * set1(c.softcap);
    const vi number = lane_numbers() + set1(j);  // within the block
    const vi at = number + set1(key), distance = at - set1(q.position);
    if (c.alibi_slopes) {
      x -= set1(q.slope) * __builtin_convertvector(distance < 0 ? -distance : distance, vf);
    }
    vi visible = number < set1(count);
    if (!all) {
      vi near = set1(-1);
      if (c.left >= 0) near &= distance >= set1(-int(c.left));
      if (c.right >= 0) near &= distance <= set1(int(c.right));
      if (windowed) {
        near |= at < set1(int(c.global_tokens));
        if (q.position >= 0 && q.position < c.global_tokens) near = set1(-1);
      }
      if (c.causal) near &= distance <= 0;
      visible &= near;
    }
    x = visible ? x : set1(-INFINITY);
    store(s + j, x);
    top = max(x, top);
  }
  float most = top[0];
  for (int i = 1; i < kLanes; i++) most = top[i] > most ? top[i] : most;
  return most;
}

// Adds a block of keys to one query's result.  The next keys are likely to follow in memory.
template <class T>
void add_block(const DecodeCall& c, Query q, const float* query, int key, int count, Rows<T> keys,
               Rows<T> values, const float* key_scale, int64_t key_scale_row,
               const float* value_scale, int64_t value_scale_row, Partial partial) {
  alignas(64) float s[kKeys];
  products(query, c.head_dim, keys, count, values, s);
  const float most = finish_scores(c, q, key, count, key_scale, key_scale_row, s);
  if (most == -INFINITY) {
    bool all_hidden = true;  // a NaN is no maximum, but must not be lost
    for (int j = 0; j < count; j++) all_hidden &= s[j] == -INFINITY;
    if (all_hidden) return;
  }
  const float old = *partial.top, top = most > old ? most : old;
  const float finite = top == -INFINITY ? 0.f : top;
  vf total{};
  for (int j = 0; j < count; j += kLanes) {
    const vf p = exp_nonpositive(load(s + j) - set1(finite));
    total += p;
    store(s + j, p);
  }
  const float correction = old == -INFINITY ? 0.f : expf(old - finite);
  *partial.top = top;
  *partial.sum = *partial.sum * correction + sum(total);
  if (value_scale) {
    for (int j = 0; j < count; j++) s[j] *= value_scale[j * value_scale_row];
  }
  add_values(s, values, count, c.value_dim, correction,
             Rows<T>{keys.data + count * keys.stride, keys.stride}, partial.out);
}

// Where a sequence's key `key` of a head lies in the cache: its page and the row in it.
struct Place {
  int64_t page, row;
};
SIMD_INLINE Place place_of(const DecodeCall& c, int64_t batch, int key) {
  if (!c.block_table) return {batch, key};
  return {c.block_table[batch * c.table_row + key / c.page_size], key % c.page_size};
}

// All queries of a key head, [group * queries] of them, and what a thread needs for them.
struct Workspace {
  float* queries;        // [group * queries][padded head dim]
  float *keys, *values;  // a block as floats, [kKeys][padded dims]

  static int64_t floats(const DecodeCall& c) {
    return c.heads / c.kv_heads * c.queries * round_up(c.head_dim, 16) +
           kKeys * int64_t(round_up(c.head_dim, 16) + round_up(c.value_dim, 16));
  }
  Workspace(const DecodeCall& c, ThreadMemory& memory)
      : queries(memory.take(c.heads / c.kv_heads * c.queries * round_up(c.head_dim, 16))),
        keys(memory.take(kKeys * round_up(c.head_dim, 16))),
        values(memory.take(kKeys * round_up(c.value_dim, 16))) {}
};

template <class T>
void widen_block(Rows<T> rows, int count, int dims, float* out) {
  for (int j = 0; j < count; j++) {
    for (int d = 0; d < dims; d += kLanes) {
      store(out + j * round_up(dims, 16) + d, load_some(rows.data + j * rows.stride + d, dims - d));
    }
  }
}

// Floats of one query's result: the weighted values, the maximum and the sum.
int64_t partial_floats(const DecodeCall& c) { return round_up(c.value_dim, 16) + 16; }

Partial partial_at(const DecodeCall& c, float* memory) {
  float* statistics = memory + round_up(c.value_dim, 16);
  return {memory, statistics, statistics + 1};
}

// The keys of a sequence that any of its queries sees, the first positions aside.
struct Visible {
  int begin, end, globals;
  Visible(const DecodeCall& c, int64_t batch) {
    const int length = c.lengths[batch], first = length - int(c.queries);
    const bool windowed = c.left >= 0 || c.right >= 0;
    globals = windowed ? int(c.global_tokens < length ? c.global_tokens : length) : 0;
    const bool some_see_all = globals > 0 && first < globals;
    begin = c.left < 0 || some_see_all || first < c.left ? 0 : int(first - c.left);
    end = length;  // the last query stands on the last key
  }
  bool any(int key, int key_end) const { return key < globals || key_end > begin; }
};

// Keys [begin, end) of one key head; the results of its queries lie at `partials`, one after
// another.
template <class T>
void decode_part(const DecodeCall& c, int64_t batch, int64_t kv_head, int begin, int end,
                 const Visible& visible, float* partials, Workspace& w) {
  const int64_t group = c.heads / c.kv_heads, count = group * c.queries;
  const int query_row = round_up(c.head_dim, 16), length = c.lengths[batch];
  for (int64_t i = 0; i < count; i++) {
    const int64_t head = kv_head * group + i / c.queries, row = i % c.queries;
    dispatch_float(c.dtype, [&](auto type) {
      const auto* query = static_cast<const decltype(type)*>(c.query.data) + batch * c.query.batch +
                          head * c.query.head + row * c.query.row;
      widen_block(Rows<decltype(type)>{query, 0}, 1, c.head_dim, w.queries + i * query_row);
    });
    const Partial partial = partial_at(c, partials + i * partial_floats(c));
    memset(partial.out, 0, sizeof(float) * round_up(c.value_dim, 16));
    *partial.top = -INFINITY;
    *partial.sum = 0;
  }
  for (int key = begin; key < end;) {
    const Place place = place_of(c, batch, key);
    int64_t block_end = key + kKeys < end ? key + kKeys : end;  // and within the page
    if (c.block_table && key + c.page_size - place.row < block_end) {
      block_end = key + c.page_size - place.row;
    }
    const int keys = int(block_end) - key;
    if (!visible.any(key, int(block_end))) {
      key = int(block_end);
      continue;
    }
    auto rows_in = [&](const Heads& x) {
      return Rows<T>{static_cast<const T*>(x.data) + place.page * x.batch + kv_head * x.head +
                         place.row * x.row,
                     x.row};
    };
    auto scales_in = [&](const kernels::attention::Scales& x) {
      return x.data ? x.data + place.page * x.batch + kv_head * x.head + place.row * x.row
                    : nullptr;
    };
    const float *key_scale = scales_in(c.key_scale), *value_scale = scales_in(c.value_scale);
    const bool widens = sizeof(T) != sizeof(float) && count > 1;
    if (widens) {
      widen_block(rows_in(c.key), keys, c.head_dim, w.keys);
      widen_block(rows_in(c.value), keys, c.value_dim, w.values);
    }
    for (int64_t i = 0; i < count; i++) {
      const int64_t head = kv_head * group + i / c.queries;
      Query q{length - int(c.queries) + int(i % c.queries), 0};
      if (c.alibi_slopes) q.slope = c.alibi_slopes[batch * c.alibi_batch + head * c.alibi_head];
      const Partial partial = partial_at(c, partials + i * partial_floats(c));
      auto add = [&](auto key_rows, auto value_rows) {
        add_block(c, q, w.queries + i * query_row, key, keys, key_rows, value_rows, key_scale,
                  c.key_scale.row, value_scale, c.value_scale.row, partial);
      };
      if (widens) {
        add(Rows<float>{w.keys, round_up(c.head_dim, 16)},
            Rows<float>{w.values, round_up(c.value_dim, 16)});
      } else {
        add(rows_in(c.key), rows_in(c.value));
      }
    }
    key = int(block_end);
  }
}

// The parts of one query head's row put together.
void combine(const DecodeCall& c, int64_t batch, int64_t head, int64_t row, const float* first,
             int64_t parts, int64_t part_stride) {
  const int dims = round_up(c.value_dim, 16);
  float top = c.sinks ? c.sinks[head] : -INFINITY;
  for (int64_t p = 0; p < parts; p++) top = fmaxf(top, first[p * part_stride + dims]);
  const float finite = top == -INFINITY ? 0.f : top;
  float total = c.sinks ? expf(c.sinks[head] - finite) : 0.f;
  alignas(64) float out[kernels::attention::kMaxHeadDim] = {};
  for (int64_t p = 0; p < parts; p++) {
    const float* partial = first + p * part_stride;
    if (partial[dims + 1] == 0) continue;  // saw nothing
    const float factor = expf(partial[dims] == -INFINITY ? 0.f : partial[dims] - finite);
    total += partial[dims + 1] * factor;
    for (int d = 0; d < dims; d++) out[d] += partial[d] * factor;
  }
  c.lse[(batch * c.heads + head) * c.queries + row] = top + logf(total);
  const float inverse = total == 0 ? 0.f : 1 / total;
  dispatch_float(c.dtype, [&](auto type) {
    auto* to = static_cast<decltype(type)*>(c.out.data) + batch * c.out.batch + head * c.out.head +
               row * c.out.row;
    for (int d = 0; d < c.value_dim; d += kLanes) {
      store_some(to + d, load(out + d) * set1(inverse), c.value_dim - d);
    }
  });
}

template <class T>
void decode_with(const DecodeCall& c) {
  int64_t longest = 0, keys = 0;
  for (int64_t b = 0; b < c.batch; b++) {
    longest = c.lengths[b] > longest ? c.lengths[b] : longest;
    keys += c.lengths[b];
  }
  const int64_t parts = (longest + kPart - 1) / kPart, units = c.batch * c.kv_heads;
  const int64_t group = c.heads / c.kv_heads, rows = group * c.queries;
  const int64_t part_stride = rows * partial_floats(c);
  const int threads = threads_for(keys * c.heads * c.queries * (c.head_dim + c.value_dim) / 16);
  const int64_t own = Workspace::floats(c);
  ThreadMemory memory(own + units * parts * part_stride);
  const Workspace callers(c, memory);
  float* partials = memory.take(units * parts * part_stride);
  on_threads(threads, [&] {
    const bool is_caller = thread_number() == 0;
    ThreadMemory others(is_caller ? 0 : own);
    Workspace w = is_caller ? callers : Workspace(c, others);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < units * parts; item++) {
      const int64_t unit = item / parts, batch = unit / c.kv_heads;
      const int begin = int(item % parts) * kPart;
      const Visible visible(c, batch);
      int end = begin + kPart < visible.end ? begin + kPart : visible.end;
      int from = begin;
      if (!visible.any(begin, end)) end = begin;
      if (visible.globals <= begin && from < visible.begin) {
        from = visible.begin < end ? visible.begin : end;
      }
      decode_part<T>(c, batch, unit % c.kv_heads, from, end, visible, partials + item * part_stride,
                     w);
    }
#pragma omp for schedule(static)
    for (int64_t item = 0; item < units * rows; item++) {
      const int64_t unit = item / rows, row = item % rows;
      combine(c, unit / c.kv_heads, unit % c.kv_heads * group + row / c.queries, row % c.queries,
              partials + unit * parts * part_stride + row * partial_floats(c), parts, part_stride);
    }
  });
}

}  // namespace

void decode(const DecodeCall& c) {
  if (c.int8_cache) return decode_with<int8_t>(c);
  dispatch_float(c.cache_dtype, [&](auto type) { decode_with<decltype(type)>(c); });
}

}  // namespace kernels::ISA::attention
