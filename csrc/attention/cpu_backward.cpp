// Attention backward on CPUs: which thread does which tiles; compiled once per instruction set.
//
// Where there are heads enough, a thread takes a key head with all query heads it serves, and its
// dK and dV stay with that thread.  Else threads share a head: chunks of queries meet chunks of
// keys in waves, query chunk I and key chunk I - w in wave w, so that in a wave no two threads add
// to the same rows.  Either way every sum is taken in the same order: dQ from the last key to the
// first, dK and dV from the first query to the last.  Results do not depend on the number of
// threads.
#include "attention/cpu_gradients.h"
#include "attention/cpu_kernels.h"
#include "common/cpu/parallel.h"

namespace kernels::ISA::attention {
namespace {

// A key head of a sequence, and where its gradients are summed up.
struct Unit {
  Sequence sequence;
  int64_t kv_head;
  Sums dkey, dvalue;

  Unit() = default;
  Unit(const Call& c, int64_t number)
      : sequence(c, number / c.kv_heads), kv_head(number % c.kv_heads), dkey{}, dvalue{} {}

  int64_t query_heads(const Call& c) const { return c.heads / c.kv_heads; }
  Head head(const Call& c, int64_t member) const {
    return Head(c, sequence, kv_head * query_heads(c) + member);
  }
};

// Whether gradients can be summed up in the output itself: float rows of whole vectors.
bool sums_in_place(const Call& c, const Heads& gradient, int columns) {
  return !gradient.data || (c.dtype == DType::kFloat32 && columns % kLanes == 0);
}

// Floats of scratch for the sums of one unit with so many keys.
int64_t sums_floats(const Call& c, const Gradients& g, int64_t keys) {
  int64_t floats = 0;
  if (!sums_in_place(c, g.dkey, c.head_dim)) floats += keys * round_up(c.head_dim, 16);
  if (!sums_in_place(c, g.dvalue, c.value_dim)) floats += keys * round_up(c.value_dim, 16);
  return floats;
}

Sums begin_sums(const Head& h, const Heads& gradient, int64_t kv_head, int columns,
                float*& memory) {
  const Sequence& s = h.sequence;
  if (!gradient.data) return {};
  if (!sums_in_place(h.call, gradient, columns)) {
    const int row = round_up(columns, 16);
    float* data = memory;
    memory += int64_t(s.keys) * row;
    memset(data, 0, sizeof(float) * s.keys * row);
    return {data, row};
  }
  float* data = h.rows<float>(gradient, kv_head, s.key_row);
  for (int64_t j = 0; j < s.keys; j++) memset(data + j * gradient.row, 0, sizeof(float) * columns);
  return {data, gradient.row};
}

void end_sums(const Head& h, const Heads& gradient, int64_t kv_head, int columns, Sums sums) {
  if (sums_in_place(h.call, gradient, columns)) return;
  dispatch_float(h.call.dtype, [&](auto type) {
    auto* out = h.rows<decltype(type)>(gradient, kv_head, h.sequence.key_row);
    for (int64_t j = 0; j < h.sequence.keys; j++) {
      for (int d = 0; d < columns; d += kLanes) {
        store_some(out + j * gradient.row + d, load(sums.data + j * sums.row + d), columns - d);
      }
    }
  });
}

// Takes the memory of its sums from `memory` on.
void begin_unit(const Call& c, const Gradients& g, Unit& u, float*& memory) {
  const Head h = u.head(c, 0);
  u.dkey = begin_sums(h, g.dkey, u.kv_head, c.head_dim, memory);
  u.dvalue = begin_sums(h, g.dvalue, u.kv_head, c.value_dim, memory);
}
void end_unit(const Call& c, const Gradients& g, const Unit& u) {
  const Head h = u.head(c, 0);
  end_sums(h, g.dkey, u.kv_head, c.head_dim, u.dkey);
  end_sums(h, g.dvalue, u.kv_head, c.value_dim, u.dvalue);
}

int64_t dq_floats(const Call& c) { return int64_t(round_up(c.head_dim, 16)) * kQueries; }

void store_dq(const Head& h, const Gradients& g, const Tile& tile, const float* dq) {
  const Call& c = h.call;
  float ones[kQueries];
  for (float& one : ones) one = 1;
  dispatch_float(c.dtype, [&](auto type) {
    store_transposed(dq, ones, h.rows<decltype(type)>(g.dquery, h.number, h.first_query(tile)),
                     g.dquery.row, tile.rows, c.head_dim);
  });
}

// Has fetched what the tiles from query `first` on will read, and the keys they are the first to
// see if the pattern is causal.
void fetch_tiles(const Head& h, const Gradients& g, int first, Fetcher& fetcher) {
  const Call& c = h.call;
  const Sequence& s = h.sequence;
  const int end = least(first + kTilesAtOnce * kQueries, s.queries);
  const int64_t row = s.query_row + first, row_end = s.query_row + end;
  fetch(fetcher, h, c.query, h.number, row, row_end, c.head_dim);
  fetch(fetcher, h, g.dout, h.number, row, row_end, c.value_dim);
  fetch(fetcher, h, c.out, h.number, row, row_end, c.value_dim);
  if (!c.causal) return;
  const int key = greatest(first + s.offset, 0), key_end = least(end + s.offset, s.keys);
  fetch(fetcher, h, c.key, h.kv_head(), s.key_row + key, s.key_row + key_end, c.head_dim);
  fetch(fetcher, h, c.value, h.kv_head(), s.key_row + key, s.key_row + key_end, c.value_dim);
}

// Has fetched what a unit begins with.
void fetch_unit(const Call& c, const Gradients& g, const Unit& u, Fetcher& fetcher) {
  constexpr int kMostKeys = 512;  // whose sums are in the L2 cache when they are cleared
  const Head h = u.head(c, 0);
  fetch_tiles(h, g, 0, fetcher);
  const int64_t row = u.sequence.key_row, end = row + least(u.sequence.keys, kMostKeys);
  if (g.dkey.data) fetch(fetcher, h, g.dkey, u.kv_head, row, end, c.head_dim);
  if (g.dvalue.data) fetch(fetcher, h, g.dvalue, u.kv_head, row, end, c.value_dim);
}

// A unit on one thread, which will go on with unit `next`, or so one thinks.
template <class Dot>
void run_unit(const Call& c, const Gradients& g, const Unit& u, const Unit* next,
              GradientWorkspace<Dot>& w) {
  const int64_t members = u.query_heads(c);
  for (int64_t member = 0; member < members; member++) {
    const Head h = u.head(c, member);
    for (int first = 0; first < u.sequence.queries; first += kTilesAtOnce * kQueries) {
      int begin = u.sequence.keys, end = 0, count = 0;
      for (int query = first; count < kTilesAtOnce && query < u.sequence.queries;
           count++, query += kQueries) {
        TileGradients& t = w.tiles[count];
        t.tile = h.pattern.tile(u.sequence, query);
        write_delta(h, g, t.tile);
        load_tile<Dot>(h, g, t);
        t.dq = g.dquery.data ? t.dq_memory : nullptr;
        memset(t.dq_memory, 0, sizeof(float) * dq_floats(c));
        const KeyRange range(u.sequence, h.pattern, t.tile);
        begin = least(begin, range.begin);
        end = greatest(end, range.end);
      }
      if (first + kTilesAtOnce * kQueries < u.sequence.queries) {
        fetch_tiles(h, g, first + kTilesAtOnce * kQueries, w.fetcher);
      } else if (member + 1 < members) {
        fetch_tiles(u.head(c, member + 1), g, 0, w.fetcher);
      } else if (next) {
        fetch_unit(c, g, *next, w.fetcher);
      }
      add_keys(h, count, begin, end, u.dkey, u.dvalue, w);
      for (int i = 0; i < count && g.dquery.data; i++)
        store_dq(h, g, w.tiles[i].tile, w.tiles[i].dq);
    }
  }
}

constexpr int kMostShared = 64;

// How the units that all threads share are cut.
struct Chunks {
  int64_t tiles;          // of a unit, at most
  int per_chunk;          // tiles, and blocks of keys, that meet in a wave
  int64_t queries, keys;  // chunks

  Chunks(const Unit* units, int64_t count, int threads) : tiles(1) {
    int64_t blocks = 1;
    for (int64_t i = 0; i < count; i++) {
      const Sequence& s = units[i].sequence;
      tiles = greatest(tiles, (s.queries + kQueries - 1) / kQueries);
      blocks = greatest(blocks, (s.keys + kKeys - 1) / kKeys);
    }
    // Larger chunks are packed less often, smaller ones keep all threads busy.
    per_chunk = greatest(1, least(tiles * count / (8 * threads), kTilesAtOnce));
    queries = (tiles + per_chunk - 1) / per_chunk;
    keys = (blocks + per_chunk - 1) / per_chunk;
  }
};

// Query chunk I against key chunk J of one head.  `dq` holds the sums of all its tiles.
template <class Dot>
void run_pair(const Head& h, const Gradients& g, const Unit& u, int per_chunk, int64_t query_chunk,
              int64_t key_chunk, float* dq, GradientWorkspace<Dot>& w) {
  const Sequence& s = u.sequence;
  const int64_t key = key_chunk * per_chunk * kKeys, tile = query_chunk * per_chunk;
  if (key >= s.keys) return;
  const int begin = int(key), end = least(key + per_chunk * kKeys, s.keys);
  int count = 0;
  bool sees_some = false;
  for (; count < per_chunk && (tile + count) * kQueries < s.queries; count++) {
    TileGradients& t = w.tiles[count];
    t.tile = h.pattern.tile(s, int(tile + count) * kQueries);
    t.dq = g.dquery.data ? dq + (tile + count) * dq_floats(h.call) : nullptr;
    const KeyRange range(s, h.pattern, t.tile);
    sees_some |= range.begin < end && begin < range.end;
  }
  if (!sees_some) return;
  for (int i = 0; i < count; i++) load_tile<Dot>(h, g, w.tiles[i]);
  add_keys(h, count, begin, end, u.dkey, u.dvalue, w);
}

// One query head of each unit; runs on all threads together.
template <class Dot>
void run_waves(const Call& c, const Gradients& g, const Unit* units, int64_t count, int64_t member,
               const Chunks& chunks, float* dq, GradientWorkspace<Dot>& w) {
  auto for_tile = [&](int64_t item, auto f) {
    const Head h = units[item / chunks.tiles].head(c, member);
    const int64_t query = item % chunks.tiles * kQueries;
    if (query < h.sequence.queries)
      f(h, h.pattern.tile(h.sequence, int(query)), dq + item * dq_floats(c));
  };
#pragma omp for schedule(static)
  for (int64_t item = 0; item < count * chunks.tiles; item++) {
    for_tile(item, [&](const Head& h, const Tile& tile, float* sums) {
      write_delta(h, g, tile);
      memset(sums, 0, sizeof(float) * dq_floats(c));
    });
  }
  for (int64_t wave = 1 - chunks.keys; wave < chunks.queries; wave++) {
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < count * chunks.queries; item++) {
      const int64_t unit = item / chunks.queries, query_chunk = item % chunks.queries;
      const int64_t key_chunk = query_chunk - wave;
      if (key_chunk < 0 || key_chunk >= chunks.keys) continue;
      run_pair(units[unit].head(c, member), g, units[unit], chunks.per_chunk, query_chunk,
               key_chunk, dq + unit * chunks.tiles * dq_floats(c), w);
    }
  }
  if (!g.dquery.data) return;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < count * chunks.tiles; item++) {
    for_tile(item, [&](const Head& h, const Tile& tile, const float* sums) {
      store_dq(h, g, tile, sums);
    });
  }
}

// Units [first, first + count), shared by all threads.
template <class Dot>
void run_shared(const Call& c, const Gradients& g, int64_t first, int64_t count, int threads) {
  Unit units[kMostShared];
  for (int64_t i = 0; i < count; i++) units[i] = Unit(c, first + i);
  int64_t sums = 0;
  for (int64_t i = 0; i < count; i++) sums += sums_floats(c, g, units[i].sequence.keys);
  const Chunks chunks(units, count, threads);
  const int64_t own_floats = GradientWorkspace<Dot>::floats(c);
  const int64_t dq_of_all = count * chunks.tiles * dq_floats(c);
  ThreadMemory memory(own_floats + sums + dq_of_all);
  const GradientWorkspace<Dot> own(c, memory);  // the calling thread's
  float* dq = memory.take(dq_of_all);
  float* next = memory.take(sums);
  for (int64_t i = 0; i < count; i++) begin_unit(c, g, units[i], next);
  on_threads(threads, [&] {
    const bool is_caller = thread_number() == 0;
    ThreadMemory others(is_caller ? 0 : own_floats);
    GradientWorkspace<Dot> w = is_caller ? own : GradientWorkspace<Dot>(c, others);
    for (int64_t member = 0; member < c.heads / c.kv_heads; member++) {
      run_waves(c, g, units, count, member, chunks, dq, w);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i++) end_unit(c, g, units[i]);
  });
}

// dsinks[h] = sum over batch and queries of exp(sink_h - lse) * -delta, in one order.
void add_sinks(const Call& c, const Gradients& g) {
  for (int64_t h = 0; h < c.heads; h++) {
    double total = 0;
    for (int64_t b = 0; b < c.batch; b++) {
      const int64_t row = (b * c.heads + h) * c.queries;
      for (int64_t i = row; i < row + c.queries; i++) {
        if (c.lse[i] != -INFINITY) total -= double(expf(c.sinks[h] - c.lse[i]) * g.delta[i]);
      }
    }
    g.dsinks[h] = float(total);
  }
}

template <class Dot>
void backward_with(const Call& c, const Gradients& g) {
  const int64_t units = c.sequences * c.kv_heads;
  int64_t keys = 0;  // of the longest sequence
  for (int64_t n = 0; n < c.sequences; n++) keys = greatest(keys, Sequence(c, n).keys);
  const int threads = threads_for_scores(c);
  // A unit is one thread's until fewer are left than threads.
  const int64_t alone = units >= 4 * threads ? units : units / threads * threads;
  if (alone) {
    on_threads(threads, [&] {
      ThreadMemory memory(GradientWorkspace<Dot>::floats(c) + sums_floats(c, g, keys));
      GradientWorkspace<Dot> w(c, memory);
      float* sums = memory.take(sums_floats(c, g, keys));
#pragma omp for schedule(dynamic) nowait
      for (int64_t i = 0; i < alone; i++) {
        Unit u(c, i);
        float* next = sums;
        begin_unit(c, g, u, next);
        const Unit after = i + threads < alone ? Unit(c, i + threads) : Unit();
        run_unit(c, g, u, i + threads < alone ? &after : nullptr, w);
        end_unit(c, g, u);
      }
    });
  }
  const int at_once = least(threads, kMostShared);
  for (int64_t i = alone; i < units; i += at_once) {
    run_shared<Dot>(c, g, i, least(units - i, at_once), threads);
  }
  if (g.dsinks) add_sinks(c, g);
}

}  // namespace

void backward(const Call& c, const Gradients& g) {
#if defined(__AVX512BF16__)
  if (c.dtype == DType::kBFloat16) return backward_with<BFloat16Dot>(c, g);
#endif
  backward_with<FloatDot>(c, g);
}

}  // namespace kernels::ISA::attention
