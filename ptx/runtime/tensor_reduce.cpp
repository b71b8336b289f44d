// The arithmetic of cp.reduce.async.bulk.tensor: see tensor_reduce.h.
#include "tensor_reduce.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "elements.h"

namespace ptx {

namespace {

[[noreturn]] void refuse(uint32_t site) {
  fatal(
      "unsupported",
      "this element type of a bulk reduction; accepted: add, min, max of u32 s32 u64 s64 f16 bf16 "
      "(add of f32, f64 too), and, or, xor, inc, dec of integers",
      site);
}

template <typename T>
T reduce_integer(BulkReduction reduction, T x, T y, uint32_t site) {
  using U = std::make_unsigned_t<T>;
  switch (reduction) {
    case BulkReduction::kAdd:
      return static_cast<T>(static_cast<U>(x) + static_cast<U>(y));
    case BulkReduction::kMin:
      return std::min(x, y);
    case BulkReduction::kMax:
      return std::max(x, y);
    case BulkReduction::kInc:
      return x >= y ? 0 : x + 1;
    case BulkReduction::kDec:
      return x == 0 || x > y ? y : x - 1;
    case BulkReduction::kAnd:
      return x & y;
    case BulkReduction::kOr:
      return x | y;
    case BulkReduction::kXor:
      return x ^ y;
    case BulkReduction::kNone:
      break;
  }
  refuse(site);
}

double reduce_float(BulkReduction reduction, double x, double y, uint32_t site) {
  switch (reduction) {
    case BulkReduction::kAdd:
      return x + y;
    case BulkReduction::kMin:
      return std::fmin(x, y);
    case BulkReduction::kMax:
      return std::fmax(x, y);
    default:
      refuse(site);
  }
}

template <typename T, typename F>
void for_each_pair(unsigned char* target, const unsigned char* values, uint32_t bytes, F combine) {
  for (uint32_t i = 0; i < bytes; i += sizeof(T)) {
    T x, y;
    std::memcpy(&x, target + i, sizeof x);
    std::memcpy(&y, values + i, sizeof y);
    x = combine(x, y);
    std::memcpy(target + i, &x, sizeof x);
  }
}

template <typename T>
void integers(BulkReduction reduction, unsigned char* target, const unsigned char* values,
              uint32_t bytes, uint32_t site) {
  for_each_pair<T>(target, values, bytes,
                   [&](T x, T y) { return reduce_integer<T>(reduction, x, y, site); });
}

}  // namespace

void reduce_row(TensorElement element, BulkReduction reduction, unsigned char* target,
                const unsigned char* values, uint32_t bytes, uint32_t site) {
  const auto combine = [&](double x, double y) { return reduce_float(reduction, x, y, site); };
  switch (element) {
    case TensorElement::kU32:
      return integers<uint32_t>(reduction, target, values, bytes, site);
    case TensorElement::kS32:
      return integers<int32_t>(reduction, target, values, bytes, site);
    case TensorElement::kU64:
      return integers<uint64_t>(reduction, target, values, bytes, site);
    case TensorElement::kS64:
      return integers<int64_t>(reduction, target, values, bytes, site);
    case TensorElement::kF16:
      return for_each_pair<uint16_t>(target, values, bytes, [&](uint16_t x, uint16_t y) {
        return round_to<Half>(combine(widen<Half>(x), widen<Half>(y)));
      });
    case TensorElement::kBf16:  // the double sum of two bf16 is exact or far from a tie of bf16
      return for_each_pair<uint16_t>(target, values, bytes, [&](uint16_t x, uint16_t y) {
        return round_to<Brain>(combine(widen<Brain>(x), widen<Brain>(y)));
      });
    case TensorElement::kF32:
      if (reduction != BulkReduction::kAdd) refuse(site);
      return for_each_pair<float>(target, values, bytes, [&](float x, float y) { return x + y; });
    case TensorElement::kF64:
      if (reduction != BulkReduction::kAdd) refuse(site);
      return for_each_pair<double>(target, values, bytes,
                                   [&](double x, double y) { return x + y; });
    default:
      refuse(site);
  }
}

}  // namespace ptx
