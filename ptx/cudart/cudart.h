// The stand-in CUDA runtime library: what its files share.
//
// It is linked into host code that nvcc compiled for the CUDA 13 runtime. Kernels are found and
// launched through Python (ptx/host.py), memory is the executor's, and what is not here does not
// link. Streams are in order and done at once; nothing is timed.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace ptx::cudart {

// The GPU that this library pretends to be.
struct Device {
  int major, minor, multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes
};
extern Device device;

constexpr int kSharedWithoutAsking = 48 << 10;  // bytes per block, without cudaFuncSetAttribute
constexpr int kThreadsPerBlock = 1024, kThreadsPerMultiprocessor = 2048;
constexpr int kBlocksPerMultiprocessor = 32, kSystemSharedPerBlock = 1 << 10;

extern cudaError_t last_error;  // until cudaGetLastError reads it

inline cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Has Python raise the sentence once the host code has returned.
cudaError_t refused(const char* sentence);

}  // namespace ptx::cudart

extern "C" {  // runtime/api.cpp
int ptx_set_option(const char* name, int64_t value);
void* ptx_alloc(size_t bytes, const char* name, size_t align, int written);
void ptx_free(void*);
void ptx_set_written(void* p, size_t n, const uint8_t* flags);
void ptx_kernel_info(int kernel, uint64_t out[8]);
void ptx_kernel_parameter(int kernel, int index, uint32_t out[2]);
const char* ptx_encode_tensor_map(void* map, int data_type, uint32_t rank, const void* address,
                                  const uint64_t* sizes, const uint64_t* strides,
                                  const uint32_t* box, const uint32_t* element_strides,
                                  int interleave, int swizzle, int fill);
}
