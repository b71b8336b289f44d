// The .approx instructions: correctly rounded or nearly so; under the option jitter anywhere within
// the error that the PTX ISA documents, so that tests see whether their tolerances have room.
#include <cmath>
#include <cstring>

#include "state.h"

namespace ptx {

namespace {

// Documented bounds (PTX ISA, floating-point instructions), relative unless said otherwise.
constexpr double kExp2 = 0x1p-22, kLog2 = 0x1p-22, kRsqrt = 0x1.125fp-23, kRcp = 0x1p-23;
constexpr double kSqrt = 0x1p-23, kTanh = 0x1p-11, kDiv = 0x1p-22;
constexpr double kSinAbsolute = 0x1.6a09p-21;  // 2^-20.5, for |x| <= 2 pi

// A number in [-1, 1) that depends on the value and the seed only: as on hardware, equal inputs
// give equal results in every thread.
double noise(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = (bits + options.seed * 0x9E3779B97F4A7C15ull) * 0xBF58476D1CE4E5B9ull;
  bits ^= bits >> 31;
  bits *= 0x94D049BB133111EBull;
  bits ^= bits >> 29;
  return static_cast<double>(static_cast<int64_t>(bits >> 11)) * 0x1p-52 - 1.0;
}

float rounded(double value, double relative, double absolute = 0) {
  if (options.jitter && std::isfinite(value)) {
    // Half a unit in the last place goes to the rounding below.
    double room = (relative - 0x1p-24) * std::fabs(value) + absolute;
    if (room < 0) room = 0;
    value += room * noise(value);
  }
  return static_cast<float>(value);
}

}  // namespace

float approx_exp2(float x) { return rounded(std::exp2(double{x}), kExp2); }
float approx_log2(float x) {
  // Near 1, where the logarithm is near 0, the bound is an absolute one.
  bool near_one = x > 0.5f && x < 2.0f && x != 1.0f;
  return rounded(std::log2(double{x}), near_one ? 0 : kLog2, near_one ? kLog2 : 0);
}
float approx_rsqrt(float x) { return rounded(1.0 / std::sqrt(double{x}), kRsqrt); }
float approx_rcp(float x) { return rounded(1.0 / double{x}, kRcp); }
float approx_sqrt(float x) { return rounded(std::sqrt(double{x}), kSqrt); }
float approx_sin(float x) { return rounded(std::sin(double{x}), 0, x ? kSinAbsolute : 0); }
float approx_cos(float x) { return rounded(std::cos(double{x}), 0, kSinAbsolute); }
float approx_tanh(float x) { return rounded(std::tanh(double{x}), kTanh); }
// div.full as well as div.approx, so without the latter's zero for divisors beyond 2^126.
float approx_div(float x, float y) { return rounded(double{x} / double{y}, kDiv); }

}  // namespace ptx
