// What attention's CUDA kernels are told, and which tiles of which sequence a block works on.
//
// A block keeps some rows (queries; keys in the kernel of dk and dv) and walks over tiles of the
// others. Where a window has global positions, their rows are taken out of the ordinary blocks and
// handled, gathered, by blocks of their own, which walk over everything; an ordinary block walks
// over what its window covers and then over the gathered global positions. Every pair of a query
// and a key so comes up in one place only.
#pragma once

#include "common/cuda/launch.cuh"
#include "common/cuda/tile.cuh"

namespace kernels::attention {

constexpr int kFar = 1 << 30;             // further than any two positions are apart
constexpr size_t kMaxShared = 99 * 1024;  // of a block on sm_86, 89 and 120; others have more

// A tensor [batch, heads, rows, columns] with neighbouring columns; strides in elements.
struct Heads {
  const void* at;
  int64_t batch, head, row;
  int columns;
  bool vectors;  // every row starts on a 16-byte boundary

  template <typename T>
  __device__ __forceinline__ Rows<T> rows(int64_t b, int64_t h, int64_t first) const {
    const T* start = static_cast<const T*>(at) + b * batch + h * head + first * row;
    return {start, row, columns, vectors};
  }
};

enum class Mask : int { kNone = 0, kBool = 1, kFloat32 = 2, kSameType = 3 };

struct Problem {
  int batches, heads, group;  // sequences; query heads; query heads of a key head
  int queries, keys;          // of the longest sequence
  int64_t all_queries;        // of all packed sequences, or as above: rows of lse
  const int *cu_q, *cu_k;     // [batches + 1] where sequences are packed, or null

  int low, high;    // the window: low <= distance <= high, where distance = key - position
  int limit;        // distances beyond it are never seen, window or not
  int lower_right;  // position = query + (lower_right ? keys - queries : 0)
  int global_tokens;
  const uint8_t* global_mask;      // [batches, keys] or null, strides below
  const int *globals, *n_globals;  // [batches, keys], [batches]: global positions in order, or null
  int64_t global_batch, global_key;

  const void* mask;  // [batches, heads, queries, keys], strides below
  Mask mask_kind;
  int64_t mask_batch, mask_head, mask_query, mask_key;
  const float* alibi_slopes;  // [batches, heads] or null
  int64_t alibi_batch, alibi_head;
  const float* sinks;  // [heads] or null

  float scale, softcap;  // softcap 0: none
  const int64_t* seed;   // null: no dropout
  unsigned threshold;    // a weight is kept where its 16 random bits are at least this
  float keep_factor;     // of kept weights

  __host__ __device__ bool has_globals() const { return global_tokens > 0 || global_mask; }
};

// Rows of a sequence: all of them, or those at the global positions.
struct Subset {
  const int* list;  // positions; null: 0, 1, 2, …
  int count;
  int shift;   // row = position - shift
  int length;  // rows of the sequence

  // The row number `index` of the subset, negative where there is none.
  __device__ __forceinline__ int at(int index) const {
    if (index >= count) return -1;
    const int row = (list == nullptr ? index : list[index]) - shift;
    return row < length ? row : -1;
  }
};

// One sequence of one batch entry.
struct Sequence {
  int number;            // batch entry, or number of the packed sequence
  int queries, keys;     // its lengths
  int64_t query0, key0;  // its first rows in the tensors
  int64_t batch;         // its place in the tensors' batch dimension
  int offset;            // position - query

  __device__ __forceinline__ Sequence(const Problem& a, int number)
      : number(number), queries(a.queries), keys(a.keys), query0(0), key0(0), batch(number) {
    if (a.cu_q != nullptr) {
      query0 = a.cu_q[number];
      key0 = a.cu_k[number];
      queries = a.cu_q[number + 1] - static_cast<int>(query0);
      keys = a.cu_k[number + 1] - static_cast<int>(key0);
      batch = 0;
    }
    offset = a.lower_right ? keys - queries : 0;
  }
  __device__ __forceinline__ Subset all_queries() const { return {nullptr, queries, 0, queries}; }
  __device__ __forceinline__ Subset all_keys() const { return {nullptr, keys, 0, keys}; }
  __device__ __forceinline__ Subset global_keys(const Problem& a) const {
    if (a.globals == nullptr) return {nullptr, min(a.global_tokens, keys), 0, keys};
    return {a.globals + static_cast<int64_t>(number) * a.keys, a.n_globals[number], 0, keys};
  }
  __device__ __forceinline__ Subset global_queries(const Problem& a) const {
    Subset subset = global_keys(a);
    subset.shift = offset;
    subset.length = queries;
    return subset;
  }
  __device__ __forceinline__ bool is_global(const Problem& a, int position) const {
    if (position < 0 || position >= keys) return false;
    if (position < a.global_tokens) return true;
    return a.global_mask != nullptr &&
           a.global_mask[number * a.global_batch + position * a.global_key] != 0;
  }
  // Index into lse of the first query of `head`.
  __device__ __forceinline__ int64_t lse0(const Problem& a, int head) const {
    return (batch * a.heads + head) * a.all_queries + query0;
  }
};

// Distances that a query sees in one part of a walk.
struct Band {
  int low, high;                // seen
  int except_low, except_high;  // but not these, which another part has

  __device__ __forceinline__ bool has(int distance) const {
    return low <= distance && distance <= high &&
           !(except_low <= distance && distance <= except_high);
  }
};

// Blocks of a launch: `gathered` of global rows and then `ordinary`, for each head of each
// sequence.
struct Grid {
  int gathered, ordinary, heads;
  bool reversed;  // the last rows first: with causality they have most to do

  __host__ __device__ int blocks() const { return gathered + ordinary; }
};

inline Grid grid_of(const Problem& a, int rows, int rows_per_block, int heads, bool reversed) {
  int gathered = 0;
  if (a.has_globals()) gathered = a.global_mask ? a.keys : std::min(a.global_tokens, a.keys);
  return {static_cast<int>(ceil_div(gathered, rows_per_block)),
          static_cast<int>(ceil_div(rows, rows_per_block)), heads, reversed};
}

struct Place {
  int first;  // row of the block, as a number of its subset
  bool gathered;
  int head, sequence;

  __device__ __forceinline__ Place(const Grid& grid, int rows_per_block) {
    const int blocks = grid.blocks();
    const int block = blockIdx.x % blocks, plane = blockIdx.x / blocks;
    gathered = block < grid.gathered;
    const int ordinary = block - grid.gathered;
    first = rows_per_block * (gathered        ? block
                              : grid.reversed ? grid.ordinary - 1 - ordinary
                                              : ordinary);
    head = plane % grid.heads;
    sequence = plane / grid.heads;
  }
};

// The tiles that a block walks over: some of all rows, then all of the gathered global ones.
// kKeysKept: the block keeps keys and walks over queries.
template <int kTile, bool kKeysKept>
struct Walk {
  int first, near_tiles, tiles;
  Band near, global;
  Subset all, globals;

  __device__ __forceinline__ Walk(const Problem& a, const Sequence& s, const Place& place,
                                  const Subset& kept, int rows_per_block) {
    all = kKeysKept ? s.all_queries() : s.all_keys();
    globals = kKeysKept ? s.global_queries(a) : s.global_keys(a);
    near = {a.low, a.high, 1, 0};
    global = {-kFar, a.limit, a.low, a.high};
    const bool crosses = a.has_globals() && !place.gathered;
    if (place.gathered) near = {-kFar, a.limit, 1, 0};
    first = near_tiles = tiles = 0;
    const int last_index = min(place.first + rows_per_block, kept.count) - 1;
    if (last_index < place.first || all.length == 0) return;
    // Kept rows in order: the outermost give what they see together.
    const int row = kept.list == nullptr ? max(place.first - kept.shift, 0) : 0;
    const int last = kept.list == nullptr ? last_index - kept.shift : kept.length - 1;
    const int from = kKeysKept ? row - s.offset - near.high : row + s.offset + near.low;
    const int to = kKeysKept ? last - s.offset - near.low : last + s.offset + near.high;
    const int begin = max(from, 0), end = min(to, all.length - 1);
    if (begin <= end) {
      first = begin / kTile;
      near_tiles = end / kTile + 1 - first;
    }
    tiles = near_tiles + (crosses ? (globals.count + kTile - 1) / kTile : 0);
  }
  __device__ __forceinline__ bool is_near(int tile) const { return tile < near_tiles; }
  // By value and member by member: a reference to one of two would put both into memory.
  __device__ __forceinline__ Subset subset(int tile) const {
    const bool from_all = is_near(tile);
    return {from_all ? nullptr : globals.list, from_all ? all.count : globals.count,
            from_all ? 0 : globals.shift, all.length};
  }
  __device__ __forceinline__ Band band(int tile) const {
    const bool is_near_band = is_near(tile);
    return {is_near_band ? near.low : global.low, is_near_band ? near.high : global.high,
            is_near_band ? near.except_low : global.except_low,
            is_near_band ? near.except_high : global.except_high};
  }
  // Number of the tile's first row in its subset.
  __device__ __forceinline__ int start(int tile) const {
    return (is_near(tile) ? first + tile : tile - near_tiles) * kTile;
  }
};

}  // namespace kernels::attention
