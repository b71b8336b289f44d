// Vectors of neighbouring elements that one load or store instruction moves, up to 128 bits.
#pragma once

#include "common/cuda/dtype.cuh"

namespace kernels {

constexpr int kVectorBytes = 16;  // the widest access every target has

template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Vec {
  using Word = typename WordOf<sizeof(T) * kCount>::Type;
  T at[kCount];

  __device__ __forceinline__ static Vec zero() {
    Vec v;
    reinterpret_cast<Word&>(v) = Word{};
    return v;
  }
  // Through Word, or the compiler may split the access element by element.
  __device__ __forceinline__ static Vec load(const T* from) {
    Vec v;
    reinterpret_cast<Word&>(v) = *reinterpret_cast<const Word*>(from);
    return v;
  }
  __device__ __forceinline__ void store(T* to) const {
    *reinterpret_cast<Word*>(to) = reinterpret_cast<const Word&>(*this);
  }
  // Makes the compiler convert the elements anew at the next use. It would otherwise keep the fp32
  // values of a previous use, which take twice the registers of the vector.
  __device__ __forceinline__ void forget_conversions() {
    if constexpr (sizeof(T) == 2 && sizeof(Vec) == 16) {
      Word& w = reinterpret_cast<Word&>(*this);
      asm("" : "+r"(w.x), "+r"(w.y), "+r"(w.z), "+r"(w.w));
    }
  }
};

// Whether rows of `row_bytes` starting at every one of `pointers` may be read in 128-bit steps.
// Null pointers stand for absent tensors.
template <typename... Pointers>
bool vectorisable(int64_t row_bytes, Pointers... pointers) {
  const uintptr_t bits = (static_cast<uintptr_t>(row_bytes) | ... |
                          reinterpret_cast<uintptr_t>(static_cast<const void*>(pointers)));
  return bits % kVectorBytes == 0;
}

}  // namespace kernels
