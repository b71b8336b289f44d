// Integer and bit instructions of PTX as inline functions of generated kernels (see math.h).
#pragma once
#include "math.h"

namespace ptx {

template <class T>
constexpr bool kSigned = T(-1) < T(0);
template <class T>
constexpr u32 kBits = 8 * sizeof(T);

// ---- Shifts: a count of the width or more is legal and shifts everything out

template <class T>
T shift_left(T a, u32 n) {
  return n < kBits<T> ? T(a << n) : T(0);
}
template <class T>
T shift_right(T a, u32 n) {  // the sign of a signed type moves in
  if constexpr (kSigned<T>)
    return T(a >> (n < kBits<T> ? n : kBits<T> - 1));
  else
    return n < kBits<T> ? T(a >> n) : T(0);
}
// shf: 32 bits of {high, low} shifted; n is taken mod 32 (wrap) or limited to 32.
inline u32 funnel_left(u32 low, u32 high, u32 n, bool wrap) {
  n = wrap ? n & 31 : n < 32 ? n : 32;
  return u32(((u64(high) << 32 | low) << n) >> 32);
}
inline u32 funnel_right(u32 low, u32 high, u32 n, bool wrap) {
  n = wrap ? n & 31 : n < 32 ? n : 32;
  return u32((u64(high) << 32 | low) >> n);
}

// ---- Arithmetic

// Division by zero: the ISA leaves the result open.  Here all ones, and the dividend remains.
template <class T>
T divide(T a, T b) {
  if (b == 0) return T(-1);
  if constexpr (kSigned<T>)
    if (b == T(-1)) return T(0 - u64(a));  // the smallest number / -1 would trap
  return T(a / b);
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (kSigned<T>)
    if (b == T(-1)) return 0;
  return T(a % b);
}

template <class To, class From>
To saturate(From value, From low, From high) {
  return value < low ? To(low) : value > high ? To(high) : To(value);
}

// cvt.sat between integers.
template <class To, class From>
To clamp_to(From value) {
  constexpr s128 kHigh = kSigned<To> ? s128(To(~(u64(1) << (kBits<To> - 1)))) : s128(To(~u64(0)));
  constexpr s128 kLow = kSigned<To> ? -kHigh - 1 : 0;
  return saturate<To>(s128(value), kLow, kHigh);
}

// carry_in and carry_out are CC.CF; for differences it holds the borrow.
template <class T>
T add_carry(T a, T b, u32 carry_in, u32& carry_out) {
  T sum;
  bool first = __builtin_add_overflow(a, b, &sum);
  bool second = __builtin_add_overflow(sum, T(carry_in), &sum);
  carry_out = first || second;
  return sum;
}
template <class T>
T sub_carry(T a, T b, u32 borrow_in, u32& borrow_out) {
  T difference;
  bool first = __builtin_sub_overflow(a, b, &difference);
  bool second = __builtin_sub_overflow(difference, T(borrow_in), &difference);
  borrow_out = first || second;
  return difference;
}

inline u32 low24(u32 a) { return a & 0xffffff; }
inline s32 low24(s32 a) { return s32(u32(a) << 8) >> 8; }

// dp4a and dp2a: A and B are the element types of the packed operands.
template <class A, class B>
u32 dot_4(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; i++) c += u32(s32(A(a >> 8 * i)) * s32(B(b >> 8 * i)));
  return c;
}
template <class A, class B>
u32 dot_2(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 2; i++) c += u32(s32(A(a >> 16 * i)) * s32(B(b >> 8 * i)));
  return c;
}

// Applies f to both 16-bit halves of packed operands.
template <class F, class... Operands>
u32 each_half(F f, Operands... operands) {
  return u32(u16(f(u16(operands >> 16)...))) << 16 | u16(f(u16(operands)...));
}

// ---- Bits

// Bit i of Table is the result where a, b, c are the bits of i, a the highest.
template <int Table>
u32 lop3(u32 a, u32 b, u32 c) {
  u32 result = 0;
  if constexpr (Table & 1) result |= ~a & ~b & ~c;
  if constexpr (Table & 2) result |= ~a & ~b & c;
  if constexpr (Table & 4) result |= ~a & b & ~c;
  if constexpr (Table & 8) result |= ~a & b & c;
  if constexpr (Table & 16) result |= a & ~b & ~c;
  if constexpr (Table & 32) result |= a & ~b & c;
  if constexpr (Table & 64) result |= a & b & ~c;
  if constexpr (Table & 128) result |= a & b & c;
  return result;
}

// bfe: bits beyond the top repeat the sign of a signed type, which is bit min(start + length - 1,
// top); position and length are 8 bits wide.
template <class T>
T bit_field(T a, u32 start, u32 length) {
  using Unsigned = decltype(sizeof(T) == 8 ? u64(0) : u32(0));
  start &= 255;
  length &= 255;
  if (length == 0) return 0;
  constexpr u32 kTop = kBits<T> - 1;
  u32 sign_at = start + length - 1 < kTop ? start + length - 1 : kTop;
  Unsigned field = shift_right<Unsigned>(Unsigned(a), start);
  if (length >= kBits<T> && start == 0) return T(field);
  Unsigned mask = length >= kBits<T> ? ~Unsigned(0) : (Unsigned(1) << length) - 1;
  field &= mask;
  bool sign = kSigned<T> && (Unsigned(a) >> sign_at & 1);
  u32 valid = start > kTop ? 0 : kTop + 1 - start;  // bits that really come from a
  if (valid > length) valid = length;
  if (sign) field |= valid >= kBits<T> ? Unsigned(0) : ~Unsigned(0) << valid;
  return T(field);
}
// bfi: the low `length` bits of a put into b at `start`.
template <class T>
T insert_bits(T a, T b, u32 start, u32 length) {
  start &= 255;
  length &= 255;
  if (length == 0 || start >= kBits<T>) return b;
  T mask = (length >= kBits<T> ? ~T(0) : (T(1) << length) - 1) << start;
  return (b & ~mask) | ((a << start) & mask);
}
// bfind: the highest bit that differs from the sign, or its distance from the top.
template <class T>
u32 highest_bit(T a, bool shift_amount) {
  u64 value = kSigned<T> && a < 0 ? ~u64(s64(a)) : sizeof(T) == 4 ? u64(u32(a)) : u64(a);
  if (value == 0) return ~0u;
  u32 bit = 63 - u32(__builtin_clzll(value));
  return shift_amount ? kBits<T> - 1 - bit : bit;
}
template <class T>
u32 leading_zeros(T a) {
  return a ? u32(__builtin_clzll(u64(a))) - (64 - kBits<T>) : kBits<T>;
}
template <class T>
T reverse_bits(T a) {
  T result = 0;
  for (u32 i = 0; i < kBits<T>; i++) result |= (a >> i & 1) << (kBits<T> - 1 - i);
  return result;
}
inline u32 bit_mask(u32 start, u32 length, bool wrap) {
  if (wrap) return ((1u << (length & 31)) - 1) << (start & 31);
  u32 ones = length >= 32 ? ~0u : (1u << length) - 1;
  return start >= 32 ? 0 : ones << start;
}
// szext: the low `length` bits of a, extended by zero or by the sign.
template <class T>
T extend_from(T a, u32 length, bool wrap) {
  if (wrap) length &= 31;
  if (length >= 32) return a;
  if (length == 0) return 0;
  u32 rest = 32 - length;
  return T(T(u32(a) << rest) >> rest);
}
// fns: the n-th set bit counted from `base`, upwards for n > 0, downwards for n < 0.
inline u32 nth_set_bit(u32 mask, u32 base, s32 n) {
  if (n == 0) return base < 32 && (mask >> base & 1) ? base : ~0u;
  s32 step = n < 0 ? -1 : 1;
  u32 left = n < 0 ? 0 - u32(n) : u32(n);
  for (s64 bit = base; bit >= 0 && bit < 32; bit += step)
    if (mask >> bit & 1 && --left == 0) return u32(bit);
  return ~0u;
}

// prmt: four bytes chosen from the eight of {b, a}; bit 3 of a selector repeats the byte's sign.
inline u32 permute(u32 a, u32 b, u32 selectors) {
  u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; i++) {
    u32 selector = selectors >> 4 * i & 15;
    u8 byte = u8(bytes >> 8 * (selector & 7));
    if (selector & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= u32(byte) << 8 * i;
  }
  return result;
}
// Its modes: the low two bits of c choose a row of selectors, lowest byte in the lowest digit.
inline u32 permute_row(u32 a, u32 b, u32 c, u32 row0, u32 row1, u32 row2, u32 row3) {
  const u32 rows[] = {row0, row1, row2, row3};
  return permute(a, b, rows[c & 3]);
}
inline u32 permute_f4e(u32 a, u32 b, u32 c) {
  return permute_row(a, b, c, 0x3210, 0x4321, 0x5432, 0x6543);
}
inline u32 permute_b4e(u32 a, u32 b, u32 c) {
  return permute_row(a, b, c, 0x5670, 0x6701, 0x7012, 0x0123);
}
inline u32 permute_rc8(u32 a, u32 b, u32 c) {
  return permute_row(a, b, c, 0x0000, 0x1111, 0x2222, 0x3333);
}
inline u32 permute_ecl(u32 a, u32 b, u32 c) {
  return permute_row(a, b, c, 0x3210, 0x3211, 0x3222, 0x3333);
}
inline u32 permute_ecr(u32 a, u32 b, u32 c) {
  return permute_row(a, b, c, 0x0000, 0x1110, 0x2210, 0x3210);
}
inline u32 permute_rc16(u32 a, u32 b, u32 c) {
  return permute_row(a, b, c, 0x1010, 0x3232, 0x1010, 0x3232);
}

}  // namespace ptx
