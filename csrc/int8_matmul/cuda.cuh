// Int8 matmul on CUDA, host side: plans a call by its shape alone, and launches its kernels.
// Kernels: cuda_quantize.cuh, cuda_layout.cuh, cuda_gemm.cuh, cuda_gemv.cuh, cuda_weight_only.cuh,
// cuda_epilogue.cuh. No torch, no Python: this file compiles alone.
#pragma once

#include "common/cuda/launch.cuh"
#include "int8_matmul/cuda_gemm.cuh"
#include "int8_matmul/cuda_gemv.cuh"
#include "int8_matmul/cuda_layout.cuh"
#include "int8_matmul/cuda_quantize.cuh"
#include "int8_matmul/cuda_weight_only.cuh"

namespace kernels::int8_matmul {

enum class Mode : int { kInt8 = 0, kDynamic = 1, kStatic = 2, kWeightOnly = 3 };  // raw: kInt8

struct Call {
  Mode mode;
  const void* x;  // [m, k], int8 in mode kInt8, else x_dtype
  int64_t x_stride;
  DType x_dtype;
  bool x_vectors;        // rows of x start on 16-byte boundaries
  const int8_t* weight;  // [n, k]; weight_stride between rows, or columns where n_contiguous
  int64_t weight_stride;
  bool weight_vectors, n_contiguous;
  const float* given_scale;  // of mode kStatic
  int k;
  Epilogue out;

  int64_t x_bytes() const { return mode == Mode::kInt8 ? 1 : x_dtype == DType::kFloat32 ? 4 : 2; }
  bool quantises() const { return mode == Mode::kDynamic || mode == Mode::kStatic; }
};

struct Target {
  int multiprocessors;
  cudaStream_t stream;
};

// Calls f<T>() for a float dtype.
template <typename F>
void with_float(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f.template operator()<float>();
  if (dtype == DType::kBFloat16) return f.template operator()<__nv_bfloat16>();
  f.template operator()<__half>();
}

// ---- the plan ----------------------------------------------------------------------------------
constexpr int64_t kLeastSplit = 512;  // columns that are worth a block of their own

// Which kernels run, and where in the workspace (256-byte steps) they leave what for each other.
struct Plan {
  bool gemv, big;  // big: tiles of 128
  bool quantise;   // x by a kernel of its own
  bool realign_x, copy_weight;
  int splits, split_steps;
  int64_t values, scales, weight, parts;  // offsets in bytes
  int64_t bytes;
};

// Blocks of gemv_kernel: one warp per kGemvOutputs columns, fewer of them a block where those would
// not give every multiprocessor a block.
struct GemvGrid {
  int64_t blocks;
  int warps;
};

inline GemvGrid gemv_grid(int64_t n, int multiprocessors) {
  const int64_t groups = ceil_div(n, kGemvOutputs);
  int warps = kGemvThreads / kWarp;
  while (warps > 1 && groups / warps < multiprocessors) warps /= 2;
  return {ceil_div(groups, warps), warps};
}

inline Plan plan(const Call& c, int multiprocessors) {
  Plan p{};
  const int64_t m = c.out.m, n = c.out.n, row_bytes = ceil_div(c.k, 16) * 16;
  p.gemv = m <= kGemvRows;
  // A block of gemv_kernel that quantises x reads it twice: all of them half the weight at most.
  const int64_t x_bytes = m * c.k * c.x_bytes();
  const bool fused = p.gemv && x_bytes <= kFusedBytes &&
                     2 * gemv_grid(n, multiprocessors).blocks * x_bytes <= n * c.k / 2;
  p.quantise = c.quantises() && !fused;
  p.realign_x = !p.gemv && c.mode == Mode::kInt8 && !c.x_vectors;
  p.copy_weight = c.n_contiguous || (!p.gemv && !c.weight_vectors);

  const bool floats = c.mode == Mode::kWeightOnly;
  p.big = !floats && ceil_div(m, 128) * ceil_div(n, 128) >= multiprocessors;
  const int64_t tile = p.big ? 128 : 64, tiles = ceil_div(m, tile) * ceil_div(n, tile);
  const int depth = floats && c.x_dtype == DType::kFloat32 ? 32 : 64;
  const int64_t steps = ceil_div(c.k, depth);
  const int64_t wanted =
      std::min(2 * int64_t{multiprocessors} / tiles, steps * depth / kLeastSplit);
  p.split_steps = static_cast<int>(ceil_div(steps, p.gemv ? 1 : std::max<int64_t>(wanted, 1)));
  p.splits = static_cast<int>(ceil_div(steps, p.split_steps));

  const auto take = [&](bool wanted_too, int64_t bytes) {
    const int64_t at = p.bytes;
    if (wanted_too) p.bytes += ceil_div(bytes, 256) * 256;
    return at;
  };
  p.values = take(p.quantise || p.realign_x, m * row_bytes);
  p.scales = take(p.quantise, m * 4);
  p.weight = take(p.copy_weight, n * row_bytes);
  p.parts = take(p.splits > 1, p.splits * m * c.out.part_columns() * 4);
  return p;
}

// ---- launches ----------------------------------------------------------------------------------
template <typename T, RowKind kKind>
void launch_rows(RowsArgs a, Target target) {
  constexpr const char* kName = "int8_matmul quantize_rows_kernel";
  constexpr int kVec = kVectorBytes / static_cast<int>(sizeof(T));
  constexpr int kItems = kKind == RowKind::kPlain ? kPlainItems : kNormalizedItems;
  a.vectors = vectorisable(a.x_stride * static_cast<int64_t>(sizeof(T)), a.x);
  a.parameters = vectorisable(0, a.weight, a.bias);
  a.stores = (reinterpret_cast<uintptr_t>(a.values) | a.values_stride) % kVec == 0;
  const int64_t cols = std::min<int64_t>(a.cols, int64_t{kItems} * kMaxRowThreads);
  const dim3 block = row_block(cols, kVec, kItems, kGroupThreads);
  int64_t blocks = ceil_div(a.rows, block.y);
  if (kKind == RowKind::kNormalized) {
    const unsigned resident = kMaxRowThreads / (block.x * block.y);
    blocks = balanced_blocks(blocks, int64_t{target.multiprocessors} * resident);
  }
  quantize_rows_kernel<T, kKind><<<checked_grid(blocks, kName), block, 0, target.stream>>>(a);
  check_launch(kName);
}

inline void quantize_rows(const RowsArgs& a, DType dtype, bool normalized, Target target) {
  with_float(dtype, [&]<typename T>() {
    if (!normalized) return launch_rows<T, RowKind::kPlain>(a, target);
    const bool fits = a.cols <= int64_t{kNormalizedItems} * kMaxRowThreads;
    if (fits) return launch_rows<T, RowKind::kNormalized>(a, target);
    launch_rows<T, RowKind::kLongNormalized>(a, target);
  });
}

inline void realign(const LayoutArgs& given, bool transposed, cudaStream_t stream) {
  LayoutArgs a = given;
  a.words = (static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.from)) | a.stride) % 4 == 0;
  if (transposed) {
    constexpr const char* kName = "int8_matmul transpose_kernel";
    const unsigned grid = checked_grid(ceil_div(a.rows, 64) * ceil_div(a.columns, 64), kName);
    transpose_kernel<<<grid, kLayoutThreads, 0, stream>>>(a);
    return check_launch(kName);
  }
  constexpr const char* kName = "int8_matmul realign_kernel";
  const unsigned grid = checked_grid(ceil_div(a.rows * (a.to_stride / 16), kLayoutThreads), kName);
  realign_kernel<<<grid, kLayoutThreads, 0, stream>>>(a);
  check_launch(kName);
}

template <bool kInteger>
void gemv(GemvArgs a, Target target) {
  constexpr const char* kName = "int8_matmul gemv_kernel";
  constexpr int kBytes = kInteger ? 1 : 4;
  constexpr int kBatch = kGemvSteps * kGemvStep;
  const int64_t most = kGemvShared / kBytes / a.out.m / kBatch;
  a.slice = static_cast<int>(std::min(ceil_div(a.k, kBatch), most)) * kBatch;
  const auto [blocks, warps] = gemv_grid(a.out.n, target.multiprocessors);
  const unsigned grid = checked_grid(blocks, kName);
  const size_t shared = static_cast<size_t>(a.slice) * kBytes * a.out.m;
  gemv_kernel<kInteger><<<grid, warps * kWarp, shared, target.stream>>>(a);
  check_launch(kName);
}

// `kernel` over the tiles and splits of y, then the sums of the splits.
template <typename Sum, typename Args>
void launch_tiles(void (*kernel)(Args), const char* name, const Args& a, int tile, int splits,
                  int threads, size_t shared, cudaStream_t stream) {
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(shared)),
             name);
  const dim3 grid(checked_grid(ceil_div(a.out.m, tile) * ceil_div(a.out.n, tile), name),
                  static_cast<unsigned>(splits));
  kernel<<<grid, threads, shared, stream>>>(a);
  check_launch(name);
  if (splits == 1) return;
  constexpr const char* kName = "int8_matmul add_parts_kernel";
  const int64_t chunks = a.out.m * (a.out.part_columns() / 4);
  add_parts_kernel<Sum>
      <<<checked_grid(ceil_div(chunks, kReduceThreads), kName), kReduceThreads, 0, stream>>>(
          a.out, splits);
  check_launch(kName);
}

template <int kRows>
void gemm(const GemmArgs& a, int splits, cudaStream_t stream) {
  using Shape = GemmShape<kRows>;
  launch_tiles<int>(gemm_kernel<kRows>, "int8_matmul gemm_kernel", a, kRows, splits,
                    Shape::kThreads, Shape::kShared, stream);
}

inline void weight_only(const WeightOnlyArgs& a, DType dtype, int splits, cudaStream_t stream) {
  with_float(dtype, [&]<typename T>() {
    using Shape = WeightOnlyShape<T>;
    launch_tiles<float>(weight_only_kernel<T>, "int8_matmul weight_only_kernel", a, Shape::kRows,
                        splits, Shape::kThreads, Shape::kShared, stream);
  });
}

// y of a call with m, n, k >= 1. `workspace`: plan(...).bytes of it.
inline void matmul(Call c, char* workspace, Target target) {
  const Plan p = plan(c, target.multiprocessors);
  const int64_t row_bytes = ceil_div(c.k, 16) * 16;
  auto* const values = reinterpret_cast<int8_t*>(workspace + p.values);
  if (p.quantise) {
    RowsArgs rows{};
    rows.x = c.x;
    rows.x_stride = c.x_stride;
    rows.given = c.given_scale;
    rows.values = values;
    rows.values_stride = row_bytes;
    rows.scale = reinterpret_cast<float*>(workspace + p.scales);
    rows.rows = c.out.m;
    rows.cols = c.k;
    quantize_rows(rows, c.x_dtype, false, target);
    c.mode = Mode::kInt8;
    c.out.x_scale = rows.scale;
    c.out.x_scale_step = 1;
  } else if (p.realign_x) {
    const auto* x = static_cast<const int8_t*>(c.x);
    realign({x, c.x_stride, values, row_bytes, c.out.m, c.k}, false, target.stream);
  }
  if (p.quantise || p.realign_x) {
    c.x = values;
    c.x_stride = row_bytes;
    c.x_vectors = true;
  }
  if (p.copy_weight) {
    auto* const copy = reinterpret_cast<int8_t*>(workspace + p.weight);
    realign({c.weight, c.weight_stride, copy, row_bytes, c.out.n, c.k}, c.n_contiguous,
            target.stream);
    c.weight = copy;
    c.weight_stride = row_bytes;
    c.weight_vectors = true;
  }
  if (p.gemv) {
    const GemvArgs a{
        c.x,      c.x_stride,      c.mode == Mode::kInt8, c.x_vectors, c.x_dtype, c.given_scale,
        c.weight, c.weight_stride, c.weight_vectors,      c.k,         0,         c.out};
    return c.mode == Mode::kWeightOnly ? gemv<false>(a, target) : gemv<true>(a, target);
  }
  if (p.splits > 1) c.out.parts = workspace + p.parts;
  if (c.mode == Mode::kWeightOnly) {
    const WeightOnlyArgs a{c.x, c.x_stride,    c.x_vectors, c.weight, c.weight_stride,
                           c.k, p.split_steps, c.out};
    return weight_only(a, c.x_dtype, p.splits, target.stream);
  }
  const GemmArgs a{static_cast<const int8_t*>(c.x),
                   c.weight,
                   c.x_stride,
                   c.weight_stride,
                   c.k,
                   p.split_steps,
                   c.out};
  return p.big ? gemm<128>(a, p.splits, target.stream) : gemm<64>(a, p.splits, target.stream);
}

}  // namespace kernels::int8_matmul
