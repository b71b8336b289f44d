// Which bytes of a tensor and of shared memory a box pairs up.
//
// The box lies in shared memory densely, its innermost dimension first. A swizzle of 32, 64 or 128
// bytes exchanges the 16-byte chunks of each row: bits 4 … of the shared address are XORed with
// bits 7 … (PTX ISA, "Swizzling modes"), so chunks stay whole and within their row.
#pragma once
#include <algorithm>
#include <cstdint>

#include "bulk_copy.h"

namespace ptx {

inline uint32_t swizzled(TensorSwizzle swizzle, uint32_t address) {
  const uint32_t mask = (1u << static_cast<int>(swizzle)) - 1;  // 0, 1, 3, 7
  return address ^ (address >> 7 & mask) << 4;
}

// Rows of the box along a dimension: element_strides thins out all but the innermost.
inline uint32_t box_count(const TensorMap& map, int dimension) {
  if (dimension == 0) return map.box[0];
  return (map.box[dimension] + map.element_strides[dimension] - 1) / map.element_strides[dimension];
}

// The run of bytes along the innermost dimension at one place in the others.
struct BoxRow {
  uint32_t shared;  // offset before swizzling
  uint32_t bytes;
  uint32_t inside, inside_bytes;  // the part that lies in the tensor: offset in the row, length
  unsigned char* global;          // of that part
};

template <typename F>
void for_each_row(const BulkBox& box, F visit) {
  const TensorMap& map = box.map;
  const int64_t width = element_bytes(map.element), columns = map.box[0];
  const int64_t left = std::max<int64_t>(0, -int64_t{box.coordinates[0]});
  const int64_t right =
      std::min<int64_t>(columns, static_cast<int64_t>(map.sizes[0]) - box.coordinates[0]);
  uint32_t index[kMaxTensorDims] = {};
  BoxRow row = {};
  row.bytes = static_cast<uint32_t>(columns * width);
  for (row.shared = box.shared; row.shared < box.shared + box.bytes; row.shared += row.bytes) {
    bool in_tensor = left < right;
    int64_t address = static_cast<int64_t>(map.address) + (box.coordinates[0] + left) * width;
    for (int i = 1; i < map.dims; i++) {
      const int64_t at = box.coordinates[i] + int64_t{index[i]} * map.element_strides[i];
      in_tensor = in_tensor && at >= 0 && at < static_cast<int64_t>(map.sizes[i]);
      address += at * static_cast<int64_t>(map.strides[i - 1]);
    }
    row.inside = in_tensor ? static_cast<uint32_t>(left * width) : 0;
    row.inside_bytes = in_tensor ? static_cast<uint32_t>((right - left) * width) : 0;
    row.global = reinterpret_cast<unsigned char*>(address);
    visit(row);
    for (int i = 1; i < map.dims && ++index[i] == box_count(map, i); i++) index[i] = 0;
  }
}

// The 16-byte chunks of the row's bytes [begin, begin + bytes): visit(offset in the row, offset in
// shared memory, bytes). An unswizzled row is one piece.
template <typename F>
void for_each_piece(TensorSwizzle swizzle, const BoxRow& row, uint32_t begin, uint32_t bytes,
                    F visit) {
  if (swizzle == TensorSwizzle::kNone) {
    if (bytes) visit(begin, row.shared + begin, bytes);
    return;
  }
  for (uint32_t at = begin, end = begin + bytes; at < end;) {
    const uint32_t chunk_end = std::min(end, at / kChunkBytes * kChunkBytes + kChunkBytes);
    visit(at, swizzled(swizzle, row.shared + at), chunk_end - at);
    at = chunk_end;
  }
}

}  // namespace ptx
