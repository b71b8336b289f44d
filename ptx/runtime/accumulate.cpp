// The arithmetic of matrix instructions: see accumulate.h.
#include "accumulate.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "elements.h"

namespace ptx {

namespace {

constexpr int kChunk = 8, kTruncatedBits = 24;

// The sum of c and at most kChunk products, each cut to kTruncatedBits bits below the largest.
float truncated_sum(float c, const double* products, int n) {
  double largest = std::fabs(static_cast<double>(c)), plain = c;
  for (int i = 0; i < n; i++) {
    largest = std::max(largest, std::fabs(products[i]));
    plain += products[i];
  }
  if (largest == 0 || !std::isfinite(plain)) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - kTruncatedBits);
  double sum = std::trunc(c / unit);
  for (int i = 0; i < n; i++) sum += std::trunc(products[i] / unit);
  const double exact = sum * unit;
  const auto rounded = static_cast<float>(exact);
  const bool grew = std::fabs(static_cast<double>(rounded)) > std::fabs(exact);
  return grew ? std::nextafter(rounded, 0.0f) : rounded;
}

void accumulate_truncating(const double* a, const double* b, int stride, int k, double* sums) {
  for (int j = 0; j < kColumns; j++) {
    auto sum = static_cast<float>(sums[j]);
    for (int start = 0; start < k; start += kChunk) {
      double products[kChunk];
      const int n = std::min(kChunk, k - start);
      for (int i = 0; i < n; i++) products[i] = a[start + i] * b[(start + i) * stride + j];
      sum = truncated_sum(sum, products, n);
    }
    sums[j] = sum;
  }
}

using Pair = double __attribute__((vector_size(16)));

void accumulate_in_double(const double* a, const double* b, int stride, int k, double* sums) {
  Pair s0 = {sums[0], sums[1]}, s1 = {sums[2], sums[3]}, s2 = {sums[4], sums[5]},
       s3 = {sums[6], sums[7]};
  for (int i = 0; i < k; i++) {
    const auto* row = reinterpret_cast<const Pair*>(b + i * stride);  // b is 16-byte aligned
    const Pair x = {a[i], a[i]};
    s0 += x * row[0];
    s1 += x * row[1];
    s2 += x * row[2];
    s3 += x * row[3];
  }
  const Pair all[4] = {s0, s1, s2, s3};
  for (int j = 0; j < kColumns; j++) sums[j] = all[j / 2][j % 2];
}

}  // namespace

void accumulate(const double* a, const double* b, int stride, int k, double* sums, int rounding) {
  if (rounding == 0) {
    accumulate_in_double(a, b, stride, k, sums);
  } else if (rounding == 1) {
    for (int i = 0; i < k; i++) {
      for (int j = 0; j < kColumns; j++) {
        sums[j] = static_cast<float>(sums[j] + a[i] * b[i * stride + j]);
      }
    }
  } else {
    accumulate_truncating(a, b, stride, k, sums);
  }
}

void accumulate(const int16_t* a, const int16_t* b, int stride, int k, int64_t* sums) {
  int32_t partial[kColumns] = {};  // at most 32 products below 2^16: no overflow
  for (int i = 0; i < k; i++) {
    for (int j = 0; j < kColumns; j++) partial[j] += a[i] * b[i * stride + j];
  }
  for (int j = 0; j < kColumns; j++) sums[j] += partial[j];
}

double accumulator(Element d, uint32_t word, int half) {
  if (d == Element::kF16) return widen<Half>(word >> 16 * half & 0xffffu);
  return std::bit_cast<float>(word);
}

uint32_t result_word(Element d, const double* sums) {
  if (d == Element::kF16) return round_to<Half>(sums[0]) | uint32_t{round_to<Half>(sums[1])} << 16;
  return std::bit_cast<uint32_t>(static_cast<float>(sums[0]));
}

}  // namespace ptx
