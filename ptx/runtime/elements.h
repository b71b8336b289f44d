// The element types of matrix instructions: their widths and their exact values.
#pragma once
#include <bit>
#include <cstdint>

#include "math.h"

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

// The tensor cores ignore the 13 lowest bits of a tf32 operand.
inline float tf32_value(uint32_t word) { return std::bit_cast<float>(word & 0xffffe000u); }

// The values of one 32-bit register, lowest bits first.
template <typename Value>
inline void unpack(Element element, uint32_t word, Value* out) {
  switch (element) {
    case Element::kF16:
      for (int i = 0; i < 2; i++)
        out[i] = static_cast<Value>(widen<Half>(word >> 16 * i & 0xffffu));
      return;
    case Element::kBf16:
      for (int i = 0; i < 2; i++)
        out[i] = static_cast<Value>(widen<Brain>(word >> 16 * i & 0xffffu));
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
      for (int i = 0; i < 4; i++) out[i] = static_cast<Value>(widen<E4m3>(word >> 8 * i & 0xffu));
      return;
    case Element::kE5m2:
      for (int i = 0; i < 4; i++) out[i] = static_cast<Value>(widen<E5m2>(word >> 8 * i & 0xffu));
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
