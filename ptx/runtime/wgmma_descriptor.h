// The matrix descriptor of wgmma: where a 16-byte row of a core matrix lies in shared memory.
//
// A core matrix is 8 rows of 16 bytes. K-major: a row holds consecutive k of one m (or n);
// MN-major: consecutive m (or n) of one k. The layouts are the canonical ones (PTX ISA, "Shared
// memory matrix layout" of wgmma; CUTLASS make_gmma_desc), here in bytes, with W the swizzle's
// width:
//   K-major,  no swizzle  (m % 8) 16 + (m / 8) SBO + (k bytes / 16) LBO
//   K-major,  swizzled    (m % 8) W + (m / 8) SBO + k bytes
//   MN-major, no swizzle  (k % 8) 16 + (m bytes / 16) SBO + (k / 8) LBO
//   MN-major, swizzled    (k % 8) W + (k / 8) SBO + (m bytes % W) + (m bytes / W) LBO
// then the swizzle is applied to the bits of the address.
#pragma once
#include <cstdint>

#include "tensor_box.h"

namespace ptx {

class WgmmaDescriptor {
 public:
  WgmmaDescriptor(uint64_t bits, bool mn_major)
      : start_(field(bits, 0)),
        leading_(field(bits, 16)),
        stride_(field(bits, 32)),
        base_offset_(bits >> 49 & 7),
        mn_major_(mn_major) {
    constexpr TensorSwizzle kModes[] = {TensorSwizzle::kNone, TensorSwizzle::k128B,
                                        TensorSwizzle::k64B, TensorSwizzle::k32B};
    swizzle_ = kModes[bits >> 62];
  }

  // The executor takes swizzle patterns to start where the address bits say.
  bool supported() const { return base_offset_ == 0; }

  // Offset in shared memory of the 16 bytes that hold `mn`, bytes k_byte … (K-major) or bytes
  // mn_byte … of row `k` (MN-major).
  uint32_t k_major_row(uint32_t mn, uint32_t k_byte) const {
    if (swizzle_ == TensorSwizzle::kNone) {
      return start_ + mn % 8 * 16 + mn / 8 * stride_ + k_byte / 16 * leading_;
    }
    return swizzled(swizzle_, start_ + mn % 8 * width() + mn / 8 * stride_ + k_byte);
  }
  uint32_t mn_major_row(uint32_t k, uint32_t mn_byte) const {
    if (swizzle_ == TensorSwizzle::kNone) {
      return start_ + k % 8 * 16 + mn_byte / 16 * stride_ + k / 8 * leading_;
    }
    return swizzled(swizzle_, start_ + k % 8 * width() + k / 8 * stride_ + mn_byte % width() +
                                  mn_byte / width() * leading_);
  }
  bool mn_major() const { return mn_major_; }

 private:
  static uint32_t field(uint64_t bits, int shift) { return (bits >> shift & 0x3fff) << 4; }
  uint32_t width() const { return 16u << static_cast<int>(swizzle_); }

  uint32_t start_, leading_, stride_, base_offset_;
  bool mn_major_;
  TensorSwizzle swizzle_;
};

}  // namespace ptx
