// A launch with more shared memory than a kernel may use unasked, and its good twin.
extern "C" __global__ void fill_shared(float* y) {
  extern __shared__ float tile[];
  tile[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = tile[threadIdx.x];
}

// 60 KB; returns the cudaError_t of the launch.
extern "C" __attribute__((visibility("default"))) int launch(float* y, bool ask) {
  constexpr int kBytes = 60 * 1024;
  if (ask) {
    cudaFuncSetAttribute(fill_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  }
  fill_shared<<<1, 128, kBytes>>>(y);
  return cudaGetLastError();
}
