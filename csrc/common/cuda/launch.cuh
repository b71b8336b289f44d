// What every launch needs: the right device selected, a legal grid, and its error turned into text.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace kernels {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Directly after a <<<>>>: throws std::runtime_error that names the kernel.
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

// Selects `device` for the calling thread and puts the previous one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    changed_ = previous_ != device;
    if (changed_) check_cuda(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `blocks` as gridDim.x; the callers have already returned where there is nothing to launch.
inline unsigned checked_grid(int64_t blocks, const char* kernel) {
  if (blocks < 1 || blocks > INT32_MAX) {
    throw std::runtime_error(std::string(kernel) + ": a grid of " + std::to_string(blocks) +
                             " blocks is not between 1 and 2147483647");
  }
  return static_cast<unsigned>(blocks);
}

// Blocks of a persistent grid that shares `units` of work: at most `most`, and no more than are
// needed to finish in the same number of rounds.
inline int64_t balanced_blocks(int64_t units, int64_t most) {
  return ceil_div(units, ceil_div(units, std::max<int64_t>(most, 1)));
}

}  // namespace kernels
