// Small kernels and their launchers for test_session.py; the ones named *_bug are wrong on purpose.
#include <cuda_runtime.h>

__global__ void scale_kernel(const float* x, float* y, int n, float factor) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = factor * x[i];  // right
}

__global__ void scale_bug_kernel(const float* x, float* y, int n, float factor) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i <= n) y[i] = factor * x[i];  // <= for <
}

__global__ void reverse_bug_kernel(const float* x, float* y) {  // __syncthreads is missing
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[63 - threadIdx.x];
}

__global__ void architecture_kernel(int* out) {
#ifdef __CUDA_ARCH__
  *out = __CUDA_ARCH__;
#endif
}

extern __shared__ float dynamic_tile[];
__global__ void dynamic_shared_kernel(float* y, int last) {
  dynamic_tile[last] = 1.f;
  *y = dynamic_tile[last];
}

extern "C" {

int scale(const float* x, float* y, int n, float factor) {
  scale_kernel<<<(n + 127) / 128, 128>>>(x, y, n, factor);
  return cudaGetLastError();
}

int scale_bug(const float* x, float* y, int n, float factor) {
  scale_bug_kernel<<<(n + 127) / 128 + 1, 128>>>(x, y, n, factor);
  return cudaGetLastError();
}

int reverse_bug(const float* x, float* y) {
  reverse_bug_kernel<<<1, 64>>>(x, y);
  return cudaGetLastError();
}

int architecture(int* out) {
  architecture_kernel<<<1, 1>>>(out);
  return cudaGetLastError();
}

// A block needs `floats` of dynamic shared memory; asks for them first where it is told to.
int dynamic_shared(float* y, int floats, int ask) {
  const int bytes = floats * static_cast<int>(sizeof(float));
  if (ask) {
    const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (const int error = cudaFuncSetAttribute(dynamic_shared_kernel, attribute, bytes)) {
      return error;
    }
  }
  dynamic_shared_kernel<<<1, 1, bytes>>>(y, floats - 1);
  return cudaPeekAtLastError();
}

int too_many_threads(const float* x, float* y) {
  scale_kernel<<<1, 2048>>>(x, y, 1, 1.f);
  return cudaPeekAtLastError();
}

int read_error() { return cudaGetLastError(); }

int clustered(const float* x, float* y) {
  cudaLaunchAttribute cluster[1];
  cluster[0].id = cudaLaunchAttributeClusterDimension;
  cluster[0].val.clusterDim = {2, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(2);
  config.blockDim = dim3(32);
  config.attrs = cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, scale_kernel, x, y, 64, 1.f);
}

// y = 3 x by way of memory of its own; a stream and events as code for a GPU would have them.
int own_memory(const float* x, float* y, int n, float factor) {
  cudaStream_t stream;
  cudaEvent_t event;
  cudaStreamCreate(&stream);
  cudaEventCreate(&event);
  float* copy;
  if (const int error = cudaMalloc(&copy, n * sizeof(float))) return error;
  cudaMemcpyAsync(copy, x, n * sizeof(float), cudaMemcpyDeviceToDevice, stream);
  scale_kernel<<<(n + 127) / 128, 128, 0, stream>>>(copy, y, n, factor);
  cudaEventRecord(event, stream);
  cudaStreamWaitEvent(stream, event, 0);
  const int error = cudaStreamSynchronize(stream);
  cudaFree(copy);
  cudaEventDestroy(event);
  cudaStreamDestroy(stream);
  return error;
}

// multiprocessors, capability, threads per block, blocks of 1024 threads that fit a multiprocessor
int device_facts(int* facts) {
  cudaDeviceProp properties;
  if (const int error = cudaGetDeviceProperties(&properties, 0)) return error;
  cudaDeviceGetAttribute(&facts[0], cudaDevAttrMultiProcessorCount, 0);
  facts[1] = properties.major * 10 + properties.minor;
  facts[2] = properties.maxThreadsPerBlock;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(&facts[3], scale_kernel, 1024, 0);
}
}
