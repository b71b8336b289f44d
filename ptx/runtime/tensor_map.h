// The executor's own tensor map: 128 bytes, opaque to kernels, as the CUDA driver's is.
#pragma once
#include <cstdint>

namespace ptx {

constexpr uint64_t kTensorMapMagic = 0x70616d5f78747021;
constexpr int kMaxTensorDims = 5;

// The numbers of PTX's tensormap.replace.tile.elemtype.
enum class TensorElement : uint8_t {
  kU8,
  kU16,
  kU32,
  kS32,
  kU64,
  kS64,
  kF16,
  kF32,
  kF32Ftz,
  kF64,
  kBf16,
  kTf32,
  kTf32Ftz
};

enum class TensorSwizzle : uint8_t { kNone, k32B, k64B, k128B };

struct TensorMap {
  uint64_t magic;
  uint64_t address;
  uint64_t strides[kMaxTensorDims - 1];  // bytes, of dimensions 1 …; dimension 0 is contiguous
  uint64_t sizes[kMaxTensorDims];        // elements
  uint32_t box[kMaxTensorDims];          // elements, before element_strides thin them out
  uint8_t element_strides[kMaxTensorDims];
  uint8_t dims;
  TensorElement element;
  uint8_t interleave;  // 0: none, the only one supported
  TensorSwizzle swizzle;
  uint8_t fill_nan;  // what elements outside the tensor read as: 0 or NaN
  uint8_t reserved[10];
};
static_assert(sizeof(TensorMap) == 128);

uint32_t element_bytes(TensorElement);

// What is wrong with a map, as one sentence; null when it may be used.
const char* tensor_map_error(const TensorMap&);

// cuTensorMapEncodeTiled: its arguments with its numbering and its checks.  Returns null, or one
// sentence saying which argument is refused and what is accepted.
const char* encode_tensor_map(void* map, int data_type, uint32_t rank, const void* address,
                              const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                              const uint32_t* element_strides, int interleave, int swizzle,
                              int fill);

}  // namespace ptx
