// Fetches rows that will be read soon into the L2 cache while products are computed.
//
// Reading 64 KiB from the L3 cache takes a core about as long as the products of a whole block, and
// a burst of requests holds up every other load that misses L1: so they go out one by one.
#pragma once
#include "common/cpu/simd.h"

namespace kernels::ISA::attention {

constexpr int kStepsPerLine = 2;  // of a product, 24 cycles: a line from L3 takes about 20

class Fetcher {
 public:
  struct Lines {  // one of each of so many rows
    const char* first;
    int64_t stride;
    int count;
  };

  // Adds rows of so many bytes; what does not fit is left to whoever reads it.
  void add(const void* rows, int64_t stride, int count, int64_t bytes) {
    if (end_ == kMost || count <= 0) return;
    const char* first = static_cast<const char*>(rows);
    const int64_t offset = int64_t(uintptr_t(first) % kLine);
    waiting_[end_++] = {first - offset, stride, count, int((offset + bytes + kLine - 1) / kLine)};
  }
  bool empty() const { return begin_ == end_; }

  // The next lines, at most `most`.
  Lines take(int64_t most) {
    const Rows& rows = waiting_[begin_];
    const int64_t left = rows.count - row_;
    const Lines lines{rows.first + row_ * rows.stride + line_ * kLine, rows.stride,
                      int(left < most ? left : most)};
    row_ += lines.count;
    if (row_ == rows.count) {
      row_ = 0;
      if (++line_ == rows.lines) {
        line_ = 0;
        if (++begin_ == end_) begin_ = end_ = 0;
      }
    }
    return lines;
  }

 private:
  static constexpr int kMost = 16, kLine = 64;
  struct Rows {
    const char* first;
    int64_t stride;
    int count, lines;
  };
  Rows waiting_[kMost];
  int begin_ = 0, end_ = 0;  // of those waiting
  int row_ = 0, line_ = 0;   // to come of the first
};

}  // namespace kernels::ISA::attention
