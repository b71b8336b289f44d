// Warp operations that move registers between lanes: shuffle, vote, redux, match, elect.
//
// None of them orders memory; only syncwarp does (PTX ISA, "Parallel Synchronization and
// Communication Instructions").
#include <algorithm>
#include <bit>
#include <cmath>

#include "state.h"

namespace ptx {

namespace {

// Calls f(lane) for every lane of mask.
template <typename F>
void for_lanes(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
}

int first_lane(uint32_t mask) { return std::countr_zero(mask); }

void resolve_syncwarp(Fiber* const* lanes, uint32_t mask) {
  counts.warp_syncs++;
  join_lanes(lanes[first_lane(mask)]->warp, mask);
}

struct ShuffleOperands {
  Shuffle mode;
  uint32_t value, b, c;
  uint32_t result;
  bool in_range;
};

// The lane that `lane` reads, by the pseudo-code of PTX's shfl.sync; sets in_range.
int shuffle_source(int lane, ShuffleOperands& x) {
  const int b = x.b & 31, clamp = x.c & 31, segment = x.c >> 8 & 31;
  const int max_lane = (lane & segment) | (clamp & ~segment), min_lane = lane & segment;
  int source = 0;
  switch (x.mode) {
    case Shuffle::kUp:
      source = lane - b;
      x.in_range = source >= max_lane;
      break;
    case Shuffle::kDown:
      source = lane + b;
      x.in_range = source <= max_lane;
      break;
    case Shuffle::kButterfly:
      source = lane ^ b;
      x.in_range = source <= max_lane;
      break;
    case Shuffle::kIndex:
      source = min_lane | (b & ~segment);
      x.in_range = source <= max_lane;
      break;
  }
  return x.in_range ? source : lane;
}

void resolve_shuffle(Fiber* const* lanes, uint32_t mask) {
  counts.shuffles++;
  for_lanes(mask, [&](int lane) {
    auto& x = operands<ShuffleOperands>(lanes, lane);
    const int source = shuffle_source(lane, x);
    if (mask >> source & 1) {
      x.result = operands<ShuffleOperands>(lanes, source).value;
      return;
    }
    x.result = ~0u;
    const RunAs reader(*lanes[lane]);
    report("shfl-inactive", lanes[lane]->site, kNoSite,
           text("lane %d reads lane %d, which is not in the mask 0x%08x", lane, source, mask));
  });
}

struct VoteOperands {
  Vote mode;
  bool p;
  uint32_t result;
};

void resolve_vote(Fiber* const* lanes, uint32_t mask) {
  uint32_t ballot = 0;
  for_lanes(mask, [&](int lane) {
    ballot |= static_cast<uint32_t>(operands<VoteOperands>(lanes, lane).p) << lane;
  });
  for_lanes(mask, [&](int lane) {
    auto& x = operands<VoteOperands>(lanes, lane);
    switch (x.mode) {
      case Vote::kBallot:
        x.result = ballot;
        break;
      case Vote::kAll:
        x.result = ballot == mask;
        break;
      case Vote::kAny:
        x.result = ballot != 0;
        break;
      case Vote::kUniform:
        x.result = ballot == 0 || ballot == mask;
        break;
    }
  });
}

struct ReduxOperands {
  Redux operation;
  uint32_t value, result;
};

uint32_t reduce(Redux operation, uint32_t x, uint32_t y) {
  const auto signed_x = static_cast<int32_t>(x), signed_y = static_cast<int32_t>(y);
  const auto float_x = std::bit_cast<float>(x), float_y = std::bit_cast<float>(y);
  switch (operation) {
    case Redux::kAdd:
      return x + y;
    case Redux::kMinS:
      return static_cast<uint32_t>(std::min(signed_x, signed_y));
    case Redux::kMaxS:
      return static_cast<uint32_t>(std::max(signed_x, signed_y));
    case Redux::kMinU:
      return std::min(x, y);
    case Redux::kMaxU:
      return std::max(x, y);
    case Redux::kAnd:
      return x & y;
    case Redux::kOr:
      return x | y;
    case Redux::kXor:
      return x ^ y;
    case Redux::kMinF:  // the other operand where one is NaN; −0 is below +0
      if (float_x == float_y) return std::signbit(float_x) ? x : y;
      return std::bit_cast<uint32_t>(std::fmin(float_x, float_y));
    case Redux::kMaxF:
      if (float_x == float_y) return std::signbit(float_x) ? y : x;
      return std::bit_cast<uint32_t>(std::fmax(float_x, float_y));
  }
  return 0;
}

void resolve_redux(Fiber* const* lanes, uint32_t mask) {
  const int first = first_lane(mask);
  uint32_t result = operands<ReduxOperands>(lanes, first).value;
  for_lanes(mask & (mask - 1), [&](int lane) {
    const auto& x = operands<ReduxOperands>(lanes, lane);
    result = reduce(x.operation, result, x.value);
  });
  for_lanes(mask, [&](int lane) { operands<ReduxOperands>(lanes, lane).result = result; });
}

struct MatchOperands {
  uint64_t value;
  uint32_t equal;  // lanes of the mask with the same value
};

void resolve_match(Fiber* const* lanes, uint32_t mask) {
  for_lanes(mask, [&](int lane) {
    auto& x = operands<MatchOperands>(lanes, lane);
    x.equal = 0;
    for_lanes(mask, [&](int other) {
      const bool same = operands<MatchOperands>(lanes, other).value == x.value;
      x.equal |= static_cast<uint32_t>(same) << other;
    });
  });
}

void resolve_elect(Fiber* const* lanes, uint32_t mask) {
  // The ISA leaves open which lane leads. It is the first one here, because Triton's kernels
  // initialise an mbarrier in the elected lane and arrive at it in lane 0 with nothing in between.
  const uint32_t leader = static_cast<uint32_t>(first_lane(mask));
  for_lanes(mask, [&](int lane) { operands<uint32_t>(lanes, lane) = leader; });
}

}  // namespace

void syncwarp(uint32_t mask, uint32_t site) {
  collective("bar.warp.sync", mask, site, nullptr, resolve_syncwarp);
}

uint32_t shuffle(Shuffle mode, uint32_t mask, uint32_t value, uint32_t b, uint32_t c, uint32_t site,
                 bool* in_range) {
  ShuffleOperands x{mode, value, b, c, 0, false};
  collective("shfl.sync", mask, site, &x, resolve_shuffle);
  if (in_range) *in_range = x.in_range;
  return x.result;
}

uint32_t vote(Vote mode, uint32_t mask, bool p, uint32_t site) {
  VoteOperands x{mode, p, 0};
  collective("vote.sync", mask, site, &x, resolve_vote);
  return x.result;
}

uint32_t redux(Redux operation, uint32_t mask, uint32_t value, uint32_t site) {
  ReduxOperands x{operation, value, 0};
  collective("redux.sync", mask, site, &x, resolve_redux);
  return x.result;
}

uint32_t match_any(uint32_t mask, uint64_t value, uint32_t site) {
  MatchOperands x{value, 0};
  collective("match.any.sync", mask, site, &x, resolve_match);
  return x.equal;
}

uint32_t match_all(uint32_t mask, uint64_t value, bool* all, uint32_t site) {
  MatchOperands x{value, 0};
  collective("match.all.sync", mask, site, &x, resolve_match);
  if (all) *all = x.equal == mask;
  return x.equal == mask ? mask : 0;
}

uint32_t elect(uint32_t mask, bool* elected, uint32_t site) {
  uint32_t leader = 0;
  collective("elect.sync", mask, site, &leader, resolve_elect);
  if (elected) *elected = leader == current->lane;
  return leader;
}

uint32_t active_mask(uint32_t) { return live_lanes(); }

}  // namespace ptx
