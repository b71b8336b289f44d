// Making and checking tensor maps, on the host and on the device (tensormap.replace).
#include "tensor_map.h"

#include <cstring>

namespace ptx {

namespace {

constexpr uint64_t kMaxSize = uint64_t{1} << 32, kMaxStride = uint64_t{1} << 40;
constexpr uint32_t kMaxBox = 256, kMaxElementStride = 8;

// CUtensorMapDataType in the order of cuda.h; it differs from PTX's numbers after kF32.
constexpr TensorElement kDriverElements[] = {
    TensorElement::kU8,     TensorElement::kU16,  TensorElement::kU32,    TensorElement::kS32,
    TensorElement::kU64,    TensorElement::kS64,  TensorElement::kF16,    TensorElement::kF32,
    TensorElement::kF64,    TensorElement::kBf16, TensorElement::kF32Ftz, TensorElement::kTf32,
    TensorElement::kTf32Ftz};

bool is_float(TensorElement element) { return element >= TensorElement::kF16; }

const char* dimension_error(const TensorMap& map, int i) {
  if (map.sizes[i] == 0 || map.sizes[i] > kMaxSize) return "a size is not in 1 … 2^32";
  if (map.box[i] == 0 || map.box[i] > kMaxBox) return "a box size is not in 1 … 256";
  if (map.element_strides[i] == 0 || map.element_strides[i] > kMaxElementStride) {
    return "an element stride is not in 1 … 8";
  }
  if (i == 0) return nullptr;
  const uint64_t stride = map.strides[i - 1];
  if (stride % 16 != 0) return "a stride is not a multiple of 16 bytes";
  if (stride >= kMaxStride) return "a stride is not below 2^40 bytes";
  return nullptr;
}

}  // namespace

uint32_t element_bytes(TensorElement element) {
  switch (element) {
    case TensorElement::kU8:
      return 1;
    case TensorElement::kU16:
    case TensorElement::kF16:
    case TensorElement::kBf16:
      return 2;
    case TensorElement::kU64:
    case TensorElement::kS64:
    case TensorElement::kF64:
      return 8;
    default:
      return 4;
  }
}

const char* tensor_map_error(const TensorMap& map) {
  if (map.magic != kTensorMapMagic) return "these 128 bytes are not a tensor map";
  if (map.dims < 1 || map.dims > kMaxTensorDims) return "the rank is not in 1 … 5";
  if (map.element > TensorElement::kTf32Ftz) return "the element type is unknown";
  if (map.interleave != 0) return "only interleave NONE is supported";
  if (map.swizzle > TensorSwizzle::k128B) return "the swizzle is not NONE, 32B, 64B or 128B";
  if (map.address == 0 || map.address % 16 != 0)
    return "the address is null or not 16-byte aligned";
  for (int i = 0; i < map.dims; i++) {
    if (const char* error = dimension_error(map, i)) return error;
  }
  const uint32_t row = map.box[0] * element_bytes(map.element);
  if (row % 16 != 0) return "the box's inner dimension is not a multiple of 16 bytes";
  if (map.swizzle != TensorSwizzle::kNone && row > 16u << static_cast<int>(map.swizzle)) {
    return "the box's inner dimension is wider than the swizzle";
  }
  if (map.fill_nan > 1) return "the fill is neither zero nor NaN";
  if (map.fill_nan && !is_float(map.element)) return "a NaN fill needs a floating-point type";
  return nullptr;
}

const char* encode_tensor_map(void* map, int data_type, uint32_t rank, const void* address,
                              const uint64_t* sizes, const uint64_t* strides, const uint32_t* box,
                              const uint32_t* element_strides, int interleave, int swizzle,
                              int fill) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) return "the map itself is not 64-byte aligned";
  if (data_type < 0 || data_type > 12) return "the data type is not one of CUtensorMapDataType";
  if (rank < 1 || rank > kMaxTensorDims) return "the rank is not in 1 … 5";
  if (interleave != 0) return "only interleave NONE is supported";
  if (swizzle < 0 || swizzle > 3) return "the swizzle is not NONE, 32B, 64B or 128B";
  if (fill < 0 || fill > 1) return "the fill is neither zero nor NaN";
  TensorMap made = {};
  made.magic = kTensorMapMagic;
  made.address = reinterpret_cast<uint64_t>(address);
  made.dims = static_cast<uint8_t>(rank);
  made.element = kDriverElements[data_type];
  made.swizzle = static_cast<TensorSwizzle>(swizzle);
  made.fill_nan = static_cast<uint8_t>(fill);
  for (uint32_t i = 0; i < rank; i++) {
    made.sizes[i] = sizes[i];
    made.box[i] = box[i];
    // The field is narrower than the argument: what does not fit becomes 0, which is refused.
    made.element_strides[i] =
        static_cast<uint8_t>(element_strides[i] <= kMaxElementStride ? element_strides[i] : 0);
    if (i > 0) made.strides[i - 1] = strides[i - 1];
  }
  if (const char* error = tensor_map_error(made)) return error;
  std::memcpy(map, &made, sizeof made);
  return nullptr;
}

}  // namespace ptx
