// Copies of boxes of a tensor to shared memory by the tensor memory accelerator (sm_90 and later):
// one thread asks for a box, and an mbarrier learns when it has landed.
//
// Tensors here have four dimensions [batch, heads, rows, columns] of 16-bit floats. A box is a
// panel: some rows of 64 columns, 128 bytes each, one after the other in shared memory, with their
// 16-byte chunks permuted by the 128-byte swizzle: chunk c of row r lies where c ^ r % 8 would.
// What a box has beyond the tensor's edges becomes zeros.
#pragma once

#include <cuda.h>

#include "common/cuda/launch.cuh"
#include "common/cuda/mbarrier.cuh"

namespace kernels {

constexpr int kPanelColumns = 64, kPanelRowBytes = 128;
constexpr int kPanelAlignment = 1024;  // bytes: where the permutation begins again

// The panel that begins at these coordinates, to the shared address `to` (PTX ISA,
// "cp.async.bulk.tensor"). `map` is a __grid_constant__ parameter of the kernel.
__device__ __forceinline__ void load_panel(uint32_t to, const CUtensorMap& map, int column, int row,
                                           int head, int batch, Mbarrier& landed) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(shared_address(&landed))
      : "memory");
}

// A tensor of 16-bit floats on 16-byte boundaries: sizes and strides (bytes) of batch, heads and
// rows. The coordinate of a dimension with stride 0 must be 0.
struct PanelSource {
  const void* at;
  int64_t sizes[3], strides[3];
  int columns;
};

// What the accelerator must know to copy panels of `rows` rows of it.
inline CUtensorMap panel_map(const PanelSource& from, DType dtype, int rows) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  check_cuda(cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result),
             kName);
  if (result != cudaDriverEntryPointSuccess) {
    throw std::runtime_error(std::string(kName) + " is not in the driver");
  }
  cuuint64_t sizes[4] = {static_cast<cuuint64_t>(from.columns)}, strides[3];
  for (int i = 0; i < 3; ++i) {  // here the last dimension comes first
    const int64_t stride = from.strides[2 - i];
    sizes[1 + i] = stride == 0 ? 1 : static_cast<cuuint64_t>(from.sizes[2 - i]);
    strides[i] = stride == 0 ? kPanelRowBytes : static_cast<cuuint64_t>(stride);
  }
  const cuuint32_t box[4] = {kPanelColumns, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t every[4] = {1, 1, 1, 1};
  CUtensorMap map;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const CUresult error =
      encode(&map,
             dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(from.at), sizes, strides, box, every,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error(std::string(kName) + " answers error " + std::to_string(error));
  }
  return map;
}

}  // namespace kernels
