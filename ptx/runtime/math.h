// What generated kernels include: types, bit casts, memory access; the helpers for integers and for
// floating point lie in integers.h, floats.h and narrow_floats.h.  Light on purpose: no standard
// header but the integer types, so that a kernel compiles in about a second.
#pragma once
#include "device.h"

namespace ptx {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using u128 = unsigned __int128;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using s128 = __int128;
using f32 = float;
using f64 = double;

// What never-written registers hold: recognisable, and NaN in every floating-point type.
constexpr u16 kPoison16 = 0x7fde;
constexpr u32 kPoison32 = 0x7fdead7f;
constexpr u64 kPoison64 = 0x7ffdead07ffdead0;

constexpr f32 as_f32(u32 x) { return __builtin_bit_cast(f32, x); }
constexpr f64 as_f64(u64 x) { return __builtin_bit_cast(f64, x); }
constexpr u32 bits(f32 x) { return __builtin_bit_cast(u32, x); }
constexpr u64 bits(f64 x) { return __builtin_bit_cast(u64, x); }

// ---- Addresses

inline void* pointer(u64 address) { return reinterpret_cast<void*>(address); }
inline unsigned char* shared(u64 offset) { return shared_window + u32(offset); }

template <class T>
T load(const void* p, u32 offset = 0) {
  T value;
  __builtin_memcpy(&value, static_cast<const unsigned char*>(p) + offset, sizeof value);
  return value;
}
template <class T>
void store(void* p, T value, u32 offset = 0) {
  __builtin_memcpy(static_cast<unsigned char*>(p) + offset, &value, sizeof value);
}

// A kernel parameter read through an address in a register.
inline const unsigned char* parameter(const unsigned char* parameters, u32 size, u64 address,
                                      u32 bytes, u32 site) {
  u64 offset = address - reinterpret_cast<u64>(parameters);
  if (offset > size || size - offset < bytes)
    fatal("out-of-bounds", "read outside the kernel's parameters", site);
  return parameters + offset;
}

inline bool is_shared(u64 address) {
  return address - reinterpret_cast<u64>(shared_window) < total_shared();
}
inline bool is_local(u64 address, u32 size) {
  return address - reinterpret_cast<u64>(current->local) < size;
}

inline u32 warps_per_block() { return (block_dim.x * block_dim.y * block_dim.z + 31) / 32; }

// A clock that moves, so that waiting loops end, and that is the same in every run.
inline u64 clock_ticks() {
  static u64 ticks = 0;
  return ticks += 1000;
}

}  // namespace ptx

#include "floats.h"
#include "integers.h"
#include "messages.h"
#include "narrow_floats.h"
