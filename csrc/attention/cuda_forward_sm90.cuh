// Attention forward on Hopper (sm_90a) for 16-bit floats: a block of 128 queries against tiles of
// 128 keys and values. One thread has TMA fetch the tiles into two rings in shared memory; two
// warpgroups multiply 64 queries each by wgmma, and their softmax is forward_kernel's.
//
// A warpgroup starts the product of the next tile's keys together with that of this tile's values,
// and makes weights of the former while the latter runs (Shah et al. 2024, FlashAttention-3,
// arXiv:2407.08608).
#pragma once

#include "attention/cuda_forward.cuh"
#include "common/cuda/tma.cuh"
#include "common/cuda/wgmma.cuh"

namespace kernels::attention {

struct ForwardSm90Args : ForwardArgs {
  CUtensorMap query_map, key_map, value_map;  // of panels of kGroupRows and kKeys rows
};

// Tiles that take turns in kStages places of shared memory: number t is in place t % kStages.
template <int kStages, int kBytes>
struct Ring {
  struct Barriers {
    Mbarrier there[kStages], free[kStages];
  };
  uint32_t places;  // shared address
  Barriers& barriers;

  __device__ __forceinline__ uint32_t place(int tile) const {
    return places + tile % kStages * kBytes;
  }
  // Of the round that the tile belongs to.
  __device__ __forceinline__ static int parity(int tile) { return tile / kStages & 1; }

  // Waits until the place is free; the tile must then be loaded with what is returned.
  __device__ __forceinline__ Mbarrier& claim(int tile) const {
    barriers.free[tile % kStages].wait(parity(tile) ^ 1);
    barriers.there[tile % kStages].arrive_expecting(kBytes);
    return barriers.there[tile % kStages];
  }
  __device__ __forceinline__ void wait(int tile) const {
    barriers.there[tile % kStages].wait(parity(tile));
  }
  // The warp has no more use of the tile.
  __device__ __forceinline__ void release(int tile) const {
    if (threadIdx.x % kWarp == 0) barriers.free[tile % kStages].arrive();
  }
};

template <int kColumns>
struct ForwardSm90Shape {
  static constexpr int kGroups = 2, kGroupRows = 64;  // warpgroups that multiply, their queries
  static constexpr int kRows = kGroups * kGroupRows, kKeys = 128, kStages = 2;
  static constexpr int kThreads = (1 + kGroups) * kWarpgroup;
  // Of a multiprocessor's 512 per thread of a warpgroup, in eights.
  static constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;

  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr int kQueryPanel = kGroupRows * kPanelRowBytes,
                       kKeyPanel = kKeys * kPanelRowBytes;
  static constexpr int kQueryBytes = kPanels * kQueryPanel, kTileBytes = kPanels * kKeyPanel;
  using Tiles = Ring<kStages, kTileBytes>;

  struct Barriers {
    Mbarrier queries;
    typename Tiles::Barriers keys, values;
  };
  // The queries of each warpgroup, keys, values, barriers.
  static constexpr int kTiles = kGroups * kQueryBytes + 2 * kStages * kTileBytes;
  static constexpr size_t kShared = kTiles + sizeof(Barriers);
  static_assert(kShared <= 227 * 1024);
};

// A block's shared memory.
template <int kColumns>
struct ForwardSm90Memory {
  using Shape = ForwardSm90Shape<kColumns>;
  unsigned char* at;
  typename Shape::Barriers& barriers;
  typename Shape::Tiles keys, values;

  __device__ __forceinline__ explicit ForwardSm90Memory(unsigned char* at)
      : at(at),
        barriers(*reinterpret_cast<typename Shape::Barriers*>(at + Shape::kTiles)),
        keys{queries(Shape::kGroups), barriers.keys},
        values{keys.places + Shape::kStages * Shape::kTileBytes, barriers.values} {}

  __device__ __forceinline__ uint32_t queries(int group) const {
    return shared_address(at) + group * Shape::kQueryBytes;
  }
  __device__ __forceinline__ void init() const {
    barriers.queries.init(1);
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      for (auto* ring : {&barriers.keys, &barriers.values}) {
        ring->there[stage].init(1);
        ring->free[stage].init(Shape::kGroups * kWarpgroup / kWarp);
      }
    }
    show_mbarriers();
  }
};

// One thread: all panels of the block's queries and then, as places become free, of its tiles.
template <int kColumns>
__device__ __forceinline__ void load_sm90(const ForwardSm90Args& args, const Place& place,
                                          int first_key, int tiles,
                                          const ForwardSm90Memory<kColumns>& memory) {
  using Shape = ForwardSm90Shape<kColumns>;
  const auto load = [&](uint32_t to, int panel_bytes, const CUtensorMap& map, const Heads& from,
                        int head, int row, Mbarrier& landed) {
#pragma unroll
    for (int panel = 0; panel < Shape::kPanels; ++panel) {
      load_panel(to + panel * panel_bytes, map, panel * kPanelColumns, row,
                 from.head == 0 ? 0 : head, from.batch == 0 ? 0 : place.sequence, landed);
    }
  };
  Mbarrier& queries = memory.barriers.queries;
  queries.arrive_expecting(Shape::kGroups * Shape::kQueryBytes);
  for (int group = 0; group < Shape::kGroups; ++group) {
    load(memory.queries(group), Shape::kQueryPanel, args.query_map, args.query, place.head,
         place.first + group * Shape::kGroupRows, queries);
  }
  const int kv_head = place.head / args.problem.group;
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    const int key = first_key + tile * Shape::kKeys;
    Mbarrier& keys = memory.keys.claim(tile);
    load(memory.keys.place(tile), Shape::kKeyPanel, args.key_map, args.key, kv_head, key, keys);
    Mbarrier& values = memory.values.claim(tile);
    load(memory.values.place(tile), Shape::kKeyPanel, args.value_map, args.value, kv_head, key,
         values);
  }
}

// Starts s = q kᵀ of the warpgroup's queries and a tile of keys, and commits it.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_keys(Accumulator (&s)[16], uint32_t queries,
                                              uint32_t keys) {
  using Shape = ForwardSm90Shape<kColumns>;
  pin(s);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kColumns; k += 16) {
    const int panel = k / kPanelColumns, within = k % kPanelColumns * 2;
    wgmma_rows<T>(s, panel_descriptor(queries + panel * Shape::kQueryPanel + within, 0),
                  panel_descriptor(keys + panel * Shape::kKeyPanel + within, 0), k > 0);
  }
  wgmma_commit();
}

// Starts out += p v, with p rounded already, and commits it.
template <typename T, int kColumns, int kSteps>
__device__ __forceinline__ void multiply_values(Accumulator (&out)[kColumns / 8],
                                                uint32_t (&p)[kSteps][4], uint32_t values) {
  pin(out);
  pin(p);
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    wgmma_columns<T>(
        out, p[k],
        panel_descriptor(values + k * 16 * kPanelRowBytes, ForwardSm90Shape<kColumns>::kKeyPanel));
  }
  wgmma_commit();
}

// The accumulators of q kᵀ as left operands of p v.
template <typename T, int kSteps>
__device__ __forceinline__ void round_weights(uint32_t (&p)[kSteps][4],
                                              const Accumulator (&s)[2 * kSteps]) {
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Accumulator& from = s[2 * k + i / 2];
      p[k][i] = pack<T>(from[i % 2 * 2], from[i % 2 * 2 + 1]);
    }
  }
}

// -inf where a query does not see a key, or there is none.
template <int kN>
__device__ __forceinline__ void hide(Accumulator (&s)[kN], const Problem& a,
                                     const Sequence& sequence, int row0, int key0) {
  const int lane = threadIdx.x % kWarp, column0 = key0 + lane % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    // Rows past the end see what the last one sees: nothing overflows.
    const int row = min(row0 + 8 * r + lane / 4, sequence.queries - 1);
    const int position = row + sequence.offset;
    const int first = max(position + a.low, 0) - column0;
    const int last = min(position + a.high, sequence.keys - 1) - column0;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * n + c;
        if (column < first || column > last) s[n][2 * r + c] = -INFINITY;
      }
    }
  }
}

// A warpgroup: its queries against all tiles of the block.
template <typename T, int kColumns>
__device__ __forceinline__ void multiply_sm90(
    const ForwardArgs& args, const Place& place, const Sequence& sequence,
    const Walk<ForwardSm90Shape<kColumns>::kKeys, false>& walk,
    const ForwardSm90Memory<kColumns>& memory, int group) {
  using Shape = ForwardSm90Shape<kColumns>;
  constexpr int kKeys = Shape::kKeys;
  const Problem& a = args.problem;
  const int warp_row = threadIdx.x % kWarpgroup / kWarp * 16;
  const int row0 = place.first + group * Shape::kGroupRows + warp_row;
  const uint32_t queries = memory.queries(group);
  const auto &keys = memory.keys, &values = memory.values;

  Accumulator out[1][kColumns / 8] = {}, s[1][kKeys / 8] = {};
  uint32_t p[kKeys / 16][4];
  float shrink[2];
  Softmax<1> softmax(a.sinks == nullptr ? nullptr : a.sinks + place.head);
  const Split factor = times_log2e(a.scale);
  const auto weigh = [&](int tile) {
    const int key0 = walk.start(tile);
    const Work work =
        work_of<false>(walk.near, sequence.offset, row0, 16, key0, kKeys, sequence.keys);
    if (work != Work::kPlain) hide(s[0], a, sequence, row0, key0);
    softmax.template weigh<T>(s, factor, shrink);
  };

  if (walk.tiles > 0) {
    memory.barriers.queries.wait(0);
    keys.wait(0);
    multiply_keys<T, kColumns>(s[0], queries, keys.place(0));
    wgmma_wait<0>();
    pin(s[0]);
    keys.release(0);
    weigh(0);  // there is nothing to shrink yet
    round_weights<T>(p, s[0]);
    if (walk.tiles > 1) keys.wait(1);
#pragma unroll 1
    for (int tile = 1; tile < walk.tiles; ++tile) {
      multiply_keys<T, kColumns>(s[0], queries, keys.place(tile));
      values.wait(tile - 1);
      multiply_values<T, kColumns>(out[0], p, values.place(tile - 1));
      wgmma_wait<1>();
      pin(s[0]);
      keys.release(tile);
      weigh(tile);
      // Here for the compiler's sake: without this branch it waits for the values, next, before it
      // makes the weights.
      if (tile + 1 < walk.tiles) keys.wait(tile + 1);
      wgmma_wait<0>();
      pin(out[0]);
      pin(p);
      values.release(tile - 1);
      rescale(out, shrink);
      round_weights<T>(p, s[0]);
    }
    values.wait(walk.tiles - 1);
    multiply_values<T, kColumns>(out[0], p, values.place(walk.tiles - 1));
    wgmma_wait<0>();
    pin(out[0]);
  }

  softmax.add_up();
  const auto row_at = [&](int r) { return row0 + r < sequence.queries ? row0 + r : -1; };
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = row_at(8 * r + threadIdx.x % kWarp / 4);
    if (threadIdx.x % 4 == 0 && row >= 0) {
      args.lse[sequence.lse0(a, place.head) + row] = softmax.lse(r);
    }
  }
  warpgroup_barrier(group);  // no warp multiplies any more: the queries' memory is free
  const Tile<T, kColumns> own{reinterpret_cast<T*>(memory.at + group * Shape::kQueryBytes) +
                              warp_row * kColumns};
  store_rows(
      out, own, args.out.rows<T>(sequence.batch, place.head, sequence.query0),
      [&](int r) { return softmax.sum[r] == 0.f ? 0.f : 1.f / softmax.sum[r]; }, row_at);
}

// Where wgmma is not, an empty kernel for one warp: `forward` on the host does not choose it.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kHasWgmma ? ForwardSm90Shape<kColumns>::kThreads : kWarp, 1)
    forward_sm90_kernel(const __grid_constant__ ForwardSm90Args args) {
  if constexpr (kHasWgmma) {
    using Shape = ForwardSm90Shape<kColumns>;
    extern __shared__ __align__(kPanelAlignment) unsigned char panels[];
    const ForwardSm90Memory<kColumns> memory(panels);
    const Place place(args.grid, Shape::kRows);
    const Sequence sequence(args.problem, place.sequence);
    const Walk<Shape::kKeys, false> walk(args.problem, sequence, place, sequence.all_queries(),
                                         Shape::kRows);
    if (threadIdx.x == 0) memory.init();
    __syncthreads();
    const int warpgroup = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 0) {
      give_up_registers<Shape::kLoadRegisters>();
      if (threadIdx.x == 0 && walk.tiles > 0) {
        load_sm90<kColumns>(args, place, walk.start(0), walk.tiles, memory);
      }
    } else {
      ask_for_registers<Shape::kMultiplyRegisters>();
      multiply_sm90<T, kColumns>(args, place, sequence, walk, memory, warpgroup - 1);
    }
  }
}

}  // namespace kernels::attention
