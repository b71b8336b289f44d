// The element types of matrix instructions: their widths and their exact values.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "device.h"

namespace ptx {

inline int bits_of(Element element) {
  switch (element) {
    case Element::kF16:
    case Element::kBf16:
      return 16;
    case Element::kS8:
    case Element::kU8:
    case Element::kE4m3:
    case Element::kE5m2:
      return 8;
    case Element::kTf32:
    case Element::kF32:
    case Element::kS32:
      return 32;
  }
  return 0;
}

inline bool is_integer(Element element) {
  return element == Element::kS8 || element == Element::kU8 || element == Element::kS32;
}

inline bool is_fp8(Element element) {
  return element == Element::kE4m3 || element == Element::kE5m2;
}

inline float bf16_value(uint32_t half) { return std::bit_cast<float>(half << 16); }

// The tensor cores ignore the 13 lowest bits of a tf32 operand.
inline float tf32_value(uint32_t word) { return std::bit_cast<float>(word & 0xffffe000u); }

inline float f16_value(uint32_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity or NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // Shifted into place the exponent is 112 too small; the product is exact for subnormals too.
  const float shifted = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) | sign);
}

// e5m2 is the upper byte of an f16.
inline float e5m2_value(uint32_t byte) { return f16_value(byte << 8); }

// e4m3 (OCP "fn"): bias 7, no infinity, 0x7f and 0xff are NaN.
inline float e4m3_value(uint32_t byte) {
  const uint32_t sign = (byte & 0x80u) << 24, magnitude = byte & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  const float shifted = std::bit_cast<float>(magnitude << 20) * 0x1p120f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(shifted) | sign);
}

// To the nearest f16, ties to even, in one rounding.
inline uint16_t round_to_f16(double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000u : 0;
  const double magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fffu;
  if (magnitude >= 65520.0) return sign | 0x7c00u;
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  const int ulp = exponent - 11 < -24 ? -24 : exponent - 11;  // of f16 at this magnitude
  const auto steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, -ulp)));
  // Normal numbers carry the implicit bit in steps; adding it raises the exponent field by one,
  // and so does a carry out of the mantissa.
  return sign | static_cast<uint16_t>(steps + (static_cast<uint32_t>(ulp + 24) << 10));
}

// The values of one 32-bit register, lowest bits first.
template <typename Value>
inline void unpack(Element element, uint32_t word, Value* out) {
  switch (element) {
    case Element::kF16:
      for (int i = 0; i < 2; i++) out[i] = static_cast<Value>(f16_value(word >> 16 * i & 0xffffu));
      return;
    case Element::kBf16:
      for (int i = 0; i < 2; i++) out[i] = static_cast<Value>(bf16_value(word >> 16 * i & 0xffffu));
      return;
    case Element::kTf32:
      out[0] = static_cast<Value>(tf32_value(word));
      return;
    case Element::kS8:
      for (int i = 0; i < 4; i++) out[i] = static_cast<int8_t>(word >> 8 * i);
      return;
    case Element::kU8:
      for (int i = 0; i < 4; i++) out[i] = static_cast<uint8_t>(word >> 8 * i);
      return;
    case Element::kE4m3:
      for (int i = 0; i < 4; i++) out[i] = static_cast<Value>(e4m3_value(word >> 8 * i & 0xffu));
      return;
    case Element::kE5m2:
      for (int i = 0; i < 4; i++) out[i] = static_cast<Value>(e5m2_value(word >> 8 * i & 0xffu));
      return;
    case Element::kF32:
      out[0] = static_cast<Value>(std::bit_cast<float>(word));
      return;
    case Element::kS32:
      out[0] = static_cast<Value>(static_cast<int32_t>(word));
      return;
  }
}

}  // namespace ptx
