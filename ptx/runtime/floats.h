// f32 and f64 as PTX rounds, flushes, saturates and compares them (see math.h).
#pragma once
#include "math.h"

namespace ptx {

enum class Rounding : u8 { kNearest, kZero, kDown, kUp, kAway };  // kAway: ties away from zero

inline bool is_nan(f64 a, f64 b) { return a != a || b != b; }
inline f32 absolute(f32 x) { return as_f32(bits(x) & 0x7fffffffu); }
inline f64 absolute(f64 x) { return as_f64(bits(x) & ~(1ull << 63)); }
inline f32 with_sign(f32 x, f32 sign) {
  return as_f32((bits(x) & 0x7fffffffu) | (bits(sign) & 0x80000000u));
}
inline f64 with_sign(f64 x, f64 sign) {
  return as_f64((bits(x) & ~(1ull << 63)) | (bits(sign) & 1ull << 63));
}
// .xorsign: the sign is the product of the operands' signs.
inline f32 with_joint_sign(f32 x, f32 a, f32 b) { return with_sign(x, as_f32(bits(a) ^ bits(b))); }

// testp
template <class T>
bool is_notanumber(T x) {
  return x != x;
}
template <class T>
bool is_number(T x) {
  return x == x;
}
template <class T>
bool is_finite(T x) {
  return __builtin_isfinite(x);
}
template <class T>
bool is_infinite(T x) {
  return __builtin_isinf(x);
}
template <class T>
bool is_normal(T x) {
  return __builtin_isnormal(x);
}
template <class T>
bool is_subnormal(T x) {
  return __builtin_isfinite(x) && !__builtin_isnormal(x) && x != 0;
}

// .ftz: subnormal numbers count as zeros of their sign.
inline f32 flush(f32 x) { return bits(x) & 0x7f800000u ? x : as_f32(bits(x) & 0x80000000u); }
// .sat: into [0, 1]; NaN becomes +0.
inline f32 saturate_unit(f32 x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline f64 saturate_unit(f64 x) { return x > 0 ? (x < 1 ? x : 1.0) : 0.0; }

// ---- min and max: a number wins over NaN, and -0 counts as smaller than +0

inline f32 quiet_nan(f32) { return as_f32(0x7fffffffu); }
inline f64 quiet_nan(f64) { return as_f64(0x7fffffffffffffffull); }

template <class T>
T smaller(T a, T b) {
  if (a != a) return b != b ? quiet_nan(a) : b;
  if (b != b) return a;
  return a < b || (a == b && __builtin_signbit(a)) ? a : b;
}
template <class T>
T larger(T a, T b) {
  if (a != a) return b != b ? quiet_nan(a) : b;
  if (b != b) return a;
  return a > b || (a == b && !__builtin_signbit(a)) ? a : b;
}
template <class T>
T smaller_or_nan(T a, T b) {
  return a != a || b != b ? quiet_nan(a) : smaller(a, b);
}
template <class T>
T larger_or_nan(T a, T b) {
  return a != a || b != b ? quiet_nan(a) : larger(a, b);
}

// ---- Directed rounding by the processor's rounding mode

template <Rounding R>
class RoundingMode {
 public:
  RoundingMode() : before_(__builtin_ia32_stmxcsr()) {
    constexpr u32 kMode = R == Rounding::kDown ? 1 : R == Rounding::kUp ? 2 : 3;
    __builtin_ia32_ldmxcsr((before_ & ~(3u << 13)) | kMode << 13);
  }
  ~RoundingMode() { __builtin_ia32_ldmxcsr(before_); }

 private:
  u32 before_;
};
// Keeps the compiler from moving the calculation of a value across a change of the mode.
template <class T>
void pin(T& value) {
  asm volatile("" : "+m"(value) : : "memory");
}

template <Rounding R, class F, class... T>
auto directed(F operation, T... arguments) {
  RoundingMode<R> mode;
  (pin(arguments), ...);
  auto result = operation(arguments...);
  pin(result);
  return result;
}
template <Rounding R, class T>
T directed_add(T a, T b) {
  return directed<R>([](T x, T y) { return x + y; }, a, b);
}
template <Rounding R, class T>
T directed_sub(T a, T b) {
  return directed<R>([](T x, T y) { return x - y; }, a, b);
}
template <Rounding R, class T>
T directed_mul(T a, T b) {
  return directed<R>([](T x, T y) { return x * y; }, a, b);
}
template <Rounding R, class T>
T directed_div(T a, T b) {
  return directed<R>([](T x, T y) { return x / y; }, a, b);
}
template <Rounding R, class T>
T directed_fma(T a, T b, T c) {
  if constexpr (sizeof(T) == 4)
    return directed<R>([](T x, T y, T z) { return __builtin_fmaf(x, y, z); }, a, b, c);
  else
    return directed<R>([](T x, T y, T z) { return __builtin_fma(x, y, z); }, a, b, c);
}
template <Rounding R, class T>
T directed_sqrt(T a) {
  if constexpr (sizeof(T) == 4)
    return directed<R>([](T x) { return __builtin_sqrtf(x); }, a);
  else
    return directed<R>([](T x) { return __builtin_sqrt(x); }, a);
}
template <Rounding R, class To, class From>
To directed_convert(From a) {
  return directed<R>([](From x) { return To(x); }, a);
}

// Pairs of f32 in 64 bits.
template <class F, class... Operands>
u64 each_f32(F f, Operands... operands) {
  u32 high = bits(f32(f(as_f32(u32(operands >> 32))...)));
  return u64(high) << 32 | bits(f32(f(as_f32(u32(operands))...)));
}

// ---- Conversions to integers

template <Rounding R>
f64 to_integral(f64 x) {
  if constexpr (R == Rounding::kNearest)
    return __builtin_nearbyint(x);
  else if constexpr (R == Rounding::kZero)
    return __builtin_trunc(x);
  else if constexpr (R == Rounding::kDown)
    return __builtin_floor(x);
  else
    return __builtin_ceil(x);
}
// An integral number, clamped to the type.
template <class T>
T to_integer(f64 x, T nan) {
  constexpr T kLow = T(-1) < T(0) ? T(u64(1) << (8 * sizeof(T) - 1)) : T(0);
  constexpr T kHigh = T(~kLow);
  constexpr f64 kEnd = (T(-1) < T(0) ? 1.0 : 2.0) * f64(u64(1) << (8 * sizeof(T) - 1));
  if (x != x) return nan;
  if (x <= f64(kLow)) return kLow;
  return x >= kEnd ? kHigh : T(x);
}

// rcp.approx.ftz.f64 and rsqrt.approx.f64: from and to the upper 32 bits of a number.
inline f64 flush(f64 x) { return bits(x) & 0x7ff0000000000000ull ? x : with_sign(0.0, x); }
inline f64 upper_half(f64 x) { return as_f64(bits(x) & 0xffffffff00000000ull); }
inline f64 rough_rcp(f64 x) { return flush(upper_half(1.0 / upper_half(flush(x)))); }
inline f64 rough_rsqrt(f64 x, bool flushes) {
  return upper_half(1.0 / __builtin_sqrt(upper_half(flushes ? flush(x) : x)));
}

}  // namespace ptx
