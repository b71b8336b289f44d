// f16, bf16, tf32, e4m3 and e5m2: rounding, widening, arithmetic with one rounding (see math.h).
//
// Sums and products of 16-bit numbers are formed in f64 and rounded once to the 16-bit format.  A
// product of two is exact in f64 (22 or 16 bits of 53, exponents far inside).  A sum, or fma's
// exact product plus a term, may need more than 53 bits; odd_sum() rounds it to odd: a discarded
// rest sets the last bit.  An odd 53-bit number is neither representable in p <= 51 bits nor midway
// between two such numbers, so the final rounding decides as it would on the exact value (Boldo and
// Melquiond, "Emulation of FMA and correctly rounded sums", 2008), in every direction and for
// subnormal results too.
#pragma once
#include "floats.h"

namespace ptx {

// A binary format: bits of the significand with the hidden one, smallest normal exponent, and
// codes.
struct Half {
  static constexpr int kPrecision = 11, kMinExponent = -14;
  static constexpr u32 kSign = 0x8000, kMax = 0x7bff, kInfinity = 0x7c00, kNan = 0x7fff,
                       kOne = 0x3c00;
};
struct Brain {
  static constexpr int kPrecision = 8, kMinExponent = -126;
  static constexpr u32 kSign = 0x8000, kMax = 0x7f7f, kInfinity = 0x7f80, kNan = 0x7fff,
                       kOne = 0x3f80;
};
struct Tf32 {  // without the 13 zero bits below
  static constexpr int kPrecision = 11, kMinExponent = -126;
  static constexpr u32 kSign = 0x40000, kMax = 0x3fbff, kInfinity = 0x3fc00, kNan = 0x3ffff;
};
struct E4m3 {  // has no infinity
  static constexpr int kPrecision = 4, kMinExponent = -6;
  static constexpr u32 kSign = 0x80, kMax = 0x7e, kInfinity = 0x7f, kNan = 0x7f;
};
struct E5m2 {
  static constexpr int kPrecision = 3, kMinExponent = -14;
  static constexpr u32 kSign = 0x80, kMax = 0x7b, kInfinity = 0x7c, kNan = 0x7f;
};

// Rounds to the format once; returns the code.  finite: what is too large becomes the largest
// number.
template <class F>
u32 encode(f64 x, Rounding rounding, bool finite = false) {
  u64 magnitude = bits(x) & ~(1ull << 63);
  bool negative = bits(x) >> 63;
  u32 sign = negative ? F::kSign : 0;
  if (x != x) return F::kNan;
  if (magnitude == 0) return sign;
  if (magnitude == 0x7ffull << 52) return sign | (finite ? F::kMax : F::kInfinity);
  int field = int(magnitude >> 52);
  u64 significand = (magnitude & ((1ull << 52) - 1)) | (field ? 1ull << 52 : 0);
  int exponent = (field ? field : 1) - 1023;  // of the significand's highest bit
  int rounded_exponent = exponent > F::kMinExponent ? exponent : F::kMinExponent;
  int dropped = 53 - F::kPrecision + rounded_exponent - exponent;
  if (dropped > 60) dropped = 60;  // far below half a unit: only "not zero" matters
  u64 kept = significand >> dropped, rest = significand & ((1ull << dropped) - 1);
  u64 half = 1ull << (dropped - 1);
  bool up = false;
  if (rounding == Rounding::kNearest) up = rest > half || (rest == half && (kept & 1));
  if (rounding == Rounding::kAway) up = rest >= half;
  if (rounding == Rounding::kUp) up = rest && !negative;
  if (rounding == Rounding::kDown) up = rest && negative;
  kept += up;
  // the hidden bit, where it is set, adds one to the exponent's field
  u64 code = (u64(rounded_exponent - F::kMinExponent) << (F::kPrecision - 1)) + kept;
  if (code <= F::kMax) return sign | u32(code);
  bool towards_zero = rounding == Rounding::kZero || (rounding == Rounding::kUp && negative) ||
                      (rounding == Rounding::kDown && !negative);
  return sign | (finite || towards_zero ? F::kMax : F::kInfinity);
}

// The number of a code, exactly.
template <class F>
f32 widen(u32 code) {
  const u32 sign = code & F::kSign, magnitude = code & (F::kSign - 1);
  constexpr int kUp = 24 - F::kPrecision;  // from the place of a field to its place in f32
  f32 value = as_f32(magnitude << kUp);
  // The exponent's field counts from another start: the product is exact, for subnormals too.
  if constexpr (F::kMinExponent != Brain::kMinExponent)
    value = value * as_f32(u32(126 + F::kMinExponent + 127) << 23);
  if (magnitude > F::kMax) value = as_f32(magnitude << kUp | 0x7f800000u);
  return as_f32(bits(value) | sign * (0x80000000u / F::kSign));
}

// ---- Rounding

template <class F>
u16 round_to(f64 x, Rounding rounding = Rounding::kNearest) {
  return u16(encode<F>(x, rounding));
}
template <class F>
u16 round_to(f32 x, Rounding rounding) {
  return u16(encode<F>(x, rounding));
}
template <class F>
u16 round_to(f32 x) {  // to nearest, the way of every kernel's output
  if constexpr (F::kPrecision == Brain::kPrecision)
    return x != x ? u16(F::kNan) : u16((bits(x) + 0x7fff + (bits(x) >> 16 & 1)) >> 16);
  else
    return u16(encode<F>(x, Rounding::kNearest));
}
inline u32 round_to_tf32(f32 x, Rounding rounding, bool finite) {
  u32 code = encode<Tf32>(x, rounding, finite);
  return x != x ? 0x7fffffffu : code << 13;
}

// ---- Arithmetic

inline f64 odd_sum(f64 a, f64 b) {
  f64 sum = a + b;
  f64 b_part = sum - a;
  f64 rest =
      (a - (sum - b_part)) + (b - b_part);  // exact (Knuth's TwoSum); NaN where sum is not finite
  if (rest == 0 || rest != rest || (bits(sum) & 1)) return sum;
  return as_f64(bits(sum) + ((rest > 0) == (sum > 0) ? 1 : -1));
}
// A 64-bit integer, rounded to odd.
inline f64 to_odd_f64(s64 x) { return odd_sum(f64(s64(u64(x) & ~0xffffull)), f64(x & 0xffff)); }
inline f64 to_odd_f64(u64 x) { return odd_sum(f64(x & ~0xffffull), f64(x & 0xffff)); }
template <class T>
f64 to_odd_f64(T x) {
  return f64(x);
}

template <class F>
u16 add16(u16 a, u16 b) {
  return round_to<F>(odd_sum(widen<F>(a), widen<F>(b)));
}
template <class F>
u16 sub16(u16 a, u16 b) {
  return round_to<F>(odd_sum(widen<F>(a), -f64(widen<F>(b))));
}
template <class F>
u16 mul16(u16 a, u16 b) {
  return round_to<F>(f64(widen<F>(a)) * widen<F>(b));
}
template <class F>
u16 fma16(u16 a, u16 b, u16 c) {
  return round_to<F>(odd_sum(f64(widen<F>(a)) * widen<F>(b), widen<F>(c)));
}
template <class F, bool kQuiet = true, bool kJointSign = false>
u16 extreme16(u16 a, u16 b, f32 (*choose)(f32, f32)) {
  f32 x = widen<F>(a), y = widen<F>(b);
  if ((x != x && y != y) || (!kQuiet && is_nan(x, y))) return F::kNan;
  if constexpr (!kJointSign) return round_to<F>(choose(x, y));
  return round_to<F>(with_joint_sign(choose(absolute(x), absolute(y)), x, y));
}
template <class F, bool kQuiet = true, bool kJointSign = false>
u16 min16(u16 a, u16 b) {
  return extreme16<F, kQuiet, kJointSign>(a, b, smaller<f32>);
}
template <class F, bool kQuiet = true, bool kJointSign = false>
u16 max16(u16 a, u16 b) {
  return extreme16<F, kQuiet, kJointSign>(a, b, larger<f32>);
}
template <class F>
u16 neg16(u16 a) {
  return u16(a ^ 0x8000);
}
template <class F>
u16 abs16(u16 a) {
  return a & 0x7fff;
}
template <class F>
u16 ex216(u16 a) {
  return round_to<F>(approx_exp2(widen<F>(a)));
}
template <class F>
u16 tanh16(u16 a) {
  return round_to<F>(approx_tanh(widen<F>(a)));
}

template <class F>
bool is_nan16(u16 a) {
  return (a & 0x7fffu) > F::kInfinity;
}
template <class F>
u16 flush16(u16 a) {
  return (a & F::kInfinity) ? a : a & 0x8000;
}
template <class F>
u16 saturate16(u16 a) {
  if (is_nan16<F>(a) || (a & 0x8000)) return 0;
  return a < F::kOne ? a : F::kOne;
}
template <class F>
u16 relu16(u16 a) {
  return is_nan16<F>(a) ? F::kNan : a & 0x8000 ? 0 : a;
}
template <class F>
u16 finite16(u16 a) {
  return (a & 0x7fffu) == F::kInfinity ? u16((a & 0x8000) | F::kMax) : a;
}

// ---- 8 bits

template <class F>
u8 round_to_8(f32 x) {
  return u8(encode<F>(x, Rounding::kNearest, true));
}
template <class F>
u32 widen_pair(u16 codes) {  // two 8-bit numbers as f16, exactly
  return u32(round_to<Half>(widen<F>(codes >> 8))) << 16 | round_to<Half>(widen<F>(codes & 0xff));
}
template <class F>
u32 relu_pair(u32 codes) {
  return each_half(relu16<F>, codes);
}

}  // namespace ptx
