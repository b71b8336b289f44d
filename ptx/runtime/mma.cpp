// mma.sync m16n8kK: f16, bf16, tf32, fp8 and 8-bit integers; the fragments are those of
// fragments.h.
#include <algorithm>
#include <bit>
#include <limits>

#include "accumulate.h"
#include "fragments.h"
#include "state.h"

namespace ptx {

namespace {

constexpr int kM = 16, kN = 8, kMaxK = 32;

struct MmaOperands {
  const Mma* shape;
  uint32_t* d;
  const uint32_t *a, *b, *c;
};

template <typename Value>
struct MmaTiles {
  alignas(16) Value a[kM * kMaxK];
  alignas(16) Value b[kMaxK * kN];

  void gather(const Mma& shape, Fiber* const* lanes) {
    for (int lane = 0; lane < kLanes; lane++) {
      const MmaOperands& x = operands<MmaOperands>(lanes, lane);
      unpack_a(shape.a, x.a, lane, shape.k, a, kMaxK);
      unpack_b(shape.b, x.b, lane, shape.k, b);
    }
  }
};

// Row r of the result lies in lanes 4 (r % 8) … + 3, two columns in each.
void resolve_float(Fiber* const* lanes, uint32_t) {
  counts.mma++;
  const Mma& shape = *operands<MmaOperands>(lanes, 0).shape;
  static MmaTiles<double> tiles;
  tiles.gather(shape, lanes);
  const bool packed = shape.d == Element::kF16;
  for (int row = 0; row < kM; row++) {
    // First register of this row; f16 has both columns in it, f32 the second one in the next.
    const int r = row / 8 * (packed ? 1 : 2), first = row % 8 * 4;
    double sums[kN];
    for (int j = 0; j < kN; j++) {
      const uint32_t* c = operands<MmaOperands>(lanes, first + j / 2).c;
      sums[j] = accumulator(shape.d, c[packed ? r : r + j % 2], j % 2);
    }
    accumulate(tiles.a + row * kMaxK, tiles.b, kN, shape.k, sums, options.mma_rounding);
    for (int j = 0; j < kN; j += packed ? 2 : 1) {
      uint32_t* d = operands<MmaOperands>(lanes, first + j / 2).d;
      d[packed ? r : r + j % 2] = result_word(shape.d, sums + j);
    }
  }
}

void resolve_integer(Fiber* const* lanes, uint32_t) {
  counts.mma++;
  const Mma& shape = *operands<MmaOperands>(lanes, 0).shape;
  static MmaTiles<int16_t> tiles;
  tiles.gather(shape, lanes);
  for (int row = 0; row < kM; row++) {
    const int r = row / 8 * 2, first = row % 8 * 4;
    int64_t sums[kN];
    for (int j = 0; j < kN; j++) {
      sums[j] = static_cast<int32_t>(operands<MmaOperands>(lanes, first + j / 2).c[r + j % 2]);
    }
    accumulate(tiles.a + row * kMaxK, tiles.b, kN, shape.k, sums);
    for (int j = 0; j < kN; j++) {
      if (shape.saturate) {
        using Limits = std::numeric_limits<int32_t>;
        sums[j] = std::clamp<int64_t>(sums[j], Limits::min(), Limits::max());
      }
      operands<MmaOperands>(lanes, first + j / 2).d[r + j % 2] = static_cast<uint32_t>(sums[j]);
    }
  }
}

bool supported(const Mma& shape) {
  if (shape.m != kM || shape.n != kN) return false;
  const int bits = bits_of(shape.a);
  if (shape.k * bits != 128 && shape.k * bits != 256) return false;
  const bool integers = is_integer(shape.a) && is_integer(shape.b) && bits == 8 &&
                        bits_of(shape.b) == 8 && shape.d == Element::kS32;
  if (integers) return true;
  if (shape.saturate || (shape.d != Element::kF32 && shape.d != Element::kF16)) return false;
  if (is_fp8(shape.a)) return is_fp8(shape.b);
  if (shape.a != shape.b) return false;
  if (shape.a == Element::kF16) return true;
  return (shape.a == Element::kBf16 || shape.a == Element::kTf32) && shape.d == Element::kF32;
}

}  // namespace

void mma(const Mma& shape, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c,
         uint32_t site) {
  if (!supported(shape)) {
    fatal("unsupported",
          "this mma; accepted: m16n8 with f16 (into f32, f16), bf16, tf32 (into f32), s8, u8 (into "
          "s32), e4m3, e5m2 (into f32, f16)",
          site);
  }
  MmaOperands x{&shape, d, a, b, c};
  const Resolve resolve = is_integer(shape.a) ? resolve_integer : resolve_float;
  collective("mma.sync", ~0u, site, &x, resolve);
}

}  // namespace ptx
