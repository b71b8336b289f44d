// Layer norm on CUDA, host side: picks the kernel and the grid from the shape, and launches.
// Kernels: cuda_forward.cuh, cuda_backward.cuh. No torch, no Python: this file compiles alone.
#pragma once

#include "layer_norm/cuda_backward.cuh"
#include "layer_norm/cuda_forward.cuh"

namespace kernels::layer_norm {

// Where a launch goes, and how many multiprocessors the persistent grids may count on.
struct Target {
  int multiprocessors;
  cudaStream_t stream;
};

// Persistent blocks of this size that the device holds at a time.
inline int64_t resident_blocks(int multiprocessors, Bounds bounds, dim3 block) {
  const unsigned per_multiprocessor = bounds.resident() / (block.x * block.y);
  return int64_t{multiprocessors} * std::max(1u, per_multiprocessor);
}

// Calls f<T, kVec>() for the dtype of x: 128-bit chunks where every pointer and row allows it.
template <typename F>
void with_vectors(DType x_dtype, bool vectorise, F&& f) {
  const auto with = [&]<typename T>() {
    if (vectorise) return f.template operator()<T, kVectorBytes / static_cast<int>(sizeof(T))>();
    f.template operator()<T, 1>();
  };
  if (x_dtype == DType::kFloat32) return with.template operator()<float>();
  if (x_dtype == DType::kBFloat16) return with.template operator()<__nv_bfloat16>();
  with.template operator()<__half>();
}

template <typename T, int kVec, int kItems>
void launch_forward_rows(const ForwardArgs& a, Target target) {
  constexpr const char* kName = "layer_norm forward_rows_kernel";
  const dim3 block = row_block(a.cols, kVec, kItems, kGroupThreads);
  const int64_t most = resident_blocks(target.multiprocessors, forward_bounds(kItems, kVec), block);
  const unsigned grid = checked_grid(balanced_blocks(ceil_div(a.rows, block.y), most), kName);
  forward_rows_kernel<T, kVec, kItems>
      <<<grid, block, tile_bytes(block, load_tile_floats(kVec, kItems)), target.stream>>>(a);
  check_launch(kName);
}

template <typename T, int kVec>
void launch_forward(const ForwardArgs& a, Target target) {
  if (a.cols <= max_register_columns(kVec)) {
    const int items = items_for(a.cols, kVec, forward_bounds(16, kVec).threads);
    if (items == 8) return launch_forward_rows<T, kVec, 8>(a, target);
    if (items == 16) return launch_forward_rows<T, kVec, 16>(a, target);
    if constexpr (kVec > 1) return launch_forward_rows<T, kVec, 32>(a, target);
  }
  constexpr const char* kName = "layer_norm forward_long_kernel";
  const int64_t most = static_cast<int64_t>(target.multiprocessors) * kLongBlocks;
  const unsigned grid = checked_grid(balanced_blocks(a.rows, most), kName);
  forward_long_kernel<T, kVec><<<grid, kLongThreads, 0, target.stream>>>(a);
  check_launch(kName);
}

// y, mean and rstd of rows of x. Nothing is launched for an empty x.
inline void forward(const ForwardArgs& a, DType x_dtype, Target target) {
  if (a.rows == 0 || a.cols == 0) return;
  const int64_t row_bytes = a.cols * (x_dtype == DType::kFloat32 ? 4 : 2);
  const bool vectorise = vectorisable(row_bytes, a.x, a.y, a.weight, a.bias);
  with_vectors(x_dtype, vectorise,
               [&]<typename T, int kVec>() { launch_forward<T, kVec>(a, target); });
}

// How a backward pass is cut up; a function of the shape and the device only, never of the data,
// so that equal calls add in equal order.
struct BackwardPlan {
  bool fused;              // one pass for dx and the column sums
  int64_t partials;        // fp32 rows that the first stage leaves behind; 1: it writes the result
  int64_t rows_per_range;  // column_sums_kernel: rows behind one partial
};

inline BackwardPlan plan_backward(int64_t rows, int64_t cols, bool dx, bool sums,
                                  int multiprocessors) {
  if (!sums) return {false, 0, 0};
  const bool shared_warps = cols <= 32 * kWarp;
  // A partial costs 16 bytes per column (two sums, written and read), a row of bf16 costs 6.
  const int64_t least_rows = shared_warps ? std::max<int64_t>(16, 4096 / cols) : 4;
  // Wide rows that do not give every multiprocessor work for a while: x and dy are then small
  // enough to be read a second time from the L2 cache, and both kernels fill the device.
  if (dx && cols <= kMaxRegisterColumnsBackward &&
      (shared_warps || rows >= least_rows * multiprocessors)) {
    const int items = items_for(cols, kVectorBytes, backward_bounds(16).threads);
    const dim3 block = row_block(cols, kVectorBytes, items, kGroupThreads);
    const int64_t most = resident_blocks(multiprocessors, backward_bounds(items), block);
    return {true, balanced_blocks(ceil_div(rows, least_rows), most), 0};
  }
  const int64_t tiles = ceil_div(cols, kWarp * kSumItems);
  const int64_t ranges = std::clamp<int64_t>(ceil_div(int64_t{multiprocessors} * kSumBlocks, tiles),
                                             1, ceil_div(rows, 64));
  const int64_t rows_per_range = ceil_div(rows, ranges);
  return {false, ceil_div(rows, rows_per_range), rows_per_range};
}

template <typename T, int kVec, int kItems>
void launch_backward_rows(const BackwardArgs& a, int64_t blocks, Target target) {
  constexpr const char* kName = "layer_norm backward_rows_kernel";
  const dim3 block = row_block(a.cols, kVec, kItems, kGroupThreads);
  if (blocks == 0) {  // no column sums: as in the forward
    const int64_t most = resident_blocks(target.multiprocessors, backward_bounds(kItems), block);
    blocks = balanced_blocks(ceil_div(a.rows, block.y), most);
  }
  backward_rows_kernel<T, kVec, kItems>
      <<<checked_grid(blocks, kName), block, tile_bytes(block, kItems), target.stream>>>(a);
  check_launch(kName);
}

// dx; `blocks` is the number of partials, or 0 where dx is all that is computed.
template <typename T, int kVec>
void launch_dx(const BackwardArgs& a, int64_t blocks, Target target) {
  if (a.cols <= kMaxRegisterColumnsBackward) {
    const int items = items_for(a.cols, kVec, backward_bounds(16).threads);
    if (items == 8) return launch_backward_rows<T, kVec, 8>(a, blocks, target);
    if (items == 16) return launch_backward_rows<T, kVec, 16>(a, blocks, target);
    if constexpr (kVec > 1) return launch_backward_rows<T, kVec, 32>(a, blocks, target);
  }
  constexpr const char* kName = "layer_norm backward_long_kernel";
  const int64_t most = static_cast<int64_t>(target.multiprocessors) * kLongBlocks;
  const unsigned grid = checked_grid(balanced_blocks(a.rows, most), kName);
  backward_long_kernel<T, kVec><<<grid, kLongThreads, 0, target.stream>>>(a);
  check_launch(kName);
}

template <typename T, int kVec>
void launch_column_sums(const BackwardArgs& a, int64_t partials, Target target) {
  constexpr const char* kName = "layer_norm column_sums_kernel";
  const dim3 block(kWarp, kSumRows);
  const dim3 grid(checked_grid(ceil_div(a.cols, kWarp * kSumItems), kName),
                  checked_grid(partials, kName));
  column_sums_kernel<T, kVec><<<grid, block, tile_bytes(block, kSumItems), target.stream>>>(a);
  check_launch(kName);
}

inline void launch_reduce(const ReduceArgs& a, int gradients, Target target) {
  constexpr const char* kName = "layer_norm reduce_partials_kernel";
  unsigned warps = 1;
  while (warps < kWarp && warps < a.count) warps *= 2;
  const dim3 grid(checked_grid(ceil_div(a.cols, kWarp), kName), static_cast<unsigned>(gradients));
  reduce_partials_kernel<<<grid, dim3(kWarp, warps), 0, target.stream>>>(a);
  check_launch(kName);
}

// The gradients whose pointers are given; the others cost nothing. `partials` holds
// [gradients of parameters, plan.partials, cols] floats, and is not used where plan.partials is 1.
// Nothing is launched for an empty x: then the caller fills dweight and dbias with zeros.
inline void backward(BackwardArgs a, DType x_dtype, float* partials, Target target) {
  if (a.rows == 0 || a.cols == 0) return;
  const bool sums = a.dweight != nullptr || a.dbias != nullptr;
  const BackwardPlan plan =
      plan_backward(a.rows, a.cols, a.dx != nullptr, sums, target.multiprocessors);
  a.rows_per_range = plan.rows_per_range;
  ReduceArgs reduce{partials,      a.dweight,     a.dbias, a.dweight_dtype,
                    a.dbias_dtype, plan.partials, a.cols};
  const int gradients = (a.dweight != nullptr) + (a.dbias != nullptr);
  if (a.dweight == nullptr) {
    reduce.out = a.dbias;
    reduce.dtype = a.dbias_dtype;
  }
  if (plan.partials > 1) {  // the first stage writes fp32 partials in place of the results
    a.dweight_dtype = a.dbias_dtype = DType::kFloat32;
    if (a.dbias != nullptr) a.dbias = partials + (gradients - 1) * plan.partials * a.cols;
    if (a.dweight != nullptr) a.dweight = partials;
  }
  const int64_t row_bytes = a.cols * (x_dtype == DType::kFloat32 ? 4 : 2);
  with_vectors(x_dtype, vectorisable(row_bytes, a.x, a.dy, a.dx, a.weight),
               [&]<typename T, int kVec>() {
                 if (plan.fused) return launch_dx<T, kVec>(a, plan.partials, target);
                 if (sums) launch_column_sums<T, kVec>(a, plan.partials, target);
                 if (a.dx == nullptr) return;
                 BackwardArgs dx_only = a;
                 dx_only.dweight = dx_only.dbias = nullptr;
                 launch_dx<T, kVec>(dx_only, 0, target);
               });
  if (plan.partials > 1) launch_reduce(reduce, gradients, target);
}

}  // namespace kernels::layer_norm
