// What Hopper moves and multiplies behind the threads' backs (mbarriers, bulk copies, wgmma), each
// kernel beside its good twin; sm_90a. `// BUG name` marks the line that the report on kernel name
// has to point at.
#include "tensor_core.cuh"

#define KERNEL extern "C" __global__ void __launch_bounds__(128)

// ---- mbarriers
__device__ __forceinline__ void init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}

__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0]; }" ::"r"(
                   shared_address(barrier))
               : "memory");
}

__device__ __forceinline__ void arrive_expecting(uint64_t* barrier, int bytes) {
  asm volatile(
      "{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void fence_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Warp 0 writes, the others read when it has arrived.
template <bool kWait>
__device__ __forceinline__ void produce_and_consume(float* y) {
  __shared__ float tile[32];
  __shared__ uint64_t full;
  const int t = threadIdx.x;
  if (t == 0) init(&full, 32);
  __syncthreads();
  if (t < 32) {
    tile[t] = t;
    arrive(&full);
    y[t] = t;
  } else {
    if constexpr (kWait) wait(&full, 0);
    y[t] = tile[t % 32];  // BUG mbarrier_without_wait
  }
}
KERNEL mbarrier_with_wait(float* y, const float*) { produce_and_consume<true>(y); }
KERNEL mbarrier_without_wait(float* y, const float*) { produce_and_consume<false>(y); }

// ---- bulk copies: 128 floats of x come in, are doubled in place, and go out to y
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ __forceinline__ void wait_until_stored() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

enum class Copy { kRight, kNoWait, kExpectsMore, kNoFence, kReusedTooEarly };

template <Copy kBug>
__device__ __forceinline__ void double_in_bulk(float* y, const float* x) {
  __shared__ __align__(128) float tile[128];
  __shared__ uint64_t full;
  const int t = threadIdx.x;
  if (t == 0) {
    init(&full, 1);
    fence_proxy();
  }
  __syncthreads();
  if (t == 0) {
    arrive_expecting(&full, sizeof(tile) + (kBug == Copy::kExpectsMore ? 16 : 0));
    bulk_load(tile, x, sizeof(tile), &full);
  }
  if constexpr (kBug != Copy::kNoWait) {
    wait(&full, 0);  // BUG bulk_copy_expects_more
  }
  tile[t] *= 2.f;  // BUG bulk_copy_without_wait
  if constexpr (kBug != Copy::kNoFence) fence_proxy();
  __syncthreads();
  if (t == 0) {
    bulk_store(y, tile, sizeof(tile));  // BUG bulk_store_without_fence
    if constexpr (kBug != Copy::kReusedTooEarly) wait_until_stored();
    tile[0] = 0.f;  // BUG bulk_store_reused_too_early
    if constexpr (kBug == Copy::kReusedTooEarly) wait_until_stored();
  }
}
KERNEL bulk_copy(float* y, const float* x) { double_in_bulk<Copy::kRight>(y, x); }
KERNEL bulk_copy_without_wait(float* y, const float* x) { double_in_bulk<Copy::kNoWait>(y, x); }
KERNEL bulk_copy_expects_more(float* y, const float* x) {
  double_in_bulk<Copy::kExpectsMore>(y, x);
}
KERNEL bulk_store_without_fence(float* y, const float* x) { double_in_bulk<Copy::kNoFence>(y, x); }
KERNEL bulk_store_reused_too_early(float* y, const float* x) {
  double_in_bulk<Copy::kReusedTooEarly>(y, x);
}

// ---- wgmma: y[64, 8] = sum over two tiles of A[64, 16] B[8, 16]^T, both tiles in one buffer.
// A lies in shared memory as cores of 8 rows x 16 bytes, the two of a row block side by side.
constexpr int kCoreBytes = 128;

__device__ __forceinline__ uint64_t descriptor(const void* tile) {
  const uint64_t leading = kCoreBytes / 16, stride = 2 * kCoreBytes / 16;
  return shared_address(tile) / 16 | leading << 16 | stride << 32;
}

__device__ __forceinline__ void multiply(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "l"(a), "l"(b));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wait_for_wgmma() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

enum class Product { kRight, kNoWait, kNoFence };

// x: two tiles, each 64 rows of A and then 8 rows of B, 16 bf16 (8 words) per row.
template <Product kBug>
__device__ __forceinline__ void warpgroup_product(float* y, const float* x) {
  __shared__ __align__(128) uint32_t tile[72 * 8];
  const int t = threadIdx.x, lane = t % 32, warp = t / 32;
  float d[4] = {};
  for (int k = 0; k < 2; ++k) {
    for (int i = t; i < 72 * 8; i += 128) {
      const int row = i / 8, word = i % 8;
      const int core = row / 8 * 2 + word / 4, at = core * kCoreBytes / 4 + row % 8 * 4 + word % 4;
      tile[at] = reinterpret_cast<const uint32_t*>(x)[k * 72 * 8 + i];  // BUG wgmma_without_wait
    }
    if constexpr (kBug != Product::kNoFence) fence_proxy();
    __syncthreads();
    multiply(d, descriptor(tile), descriptor(tile + 64 * 8));  // BUG wgmma_without_fence
    if constexpr (kBug != Product::kNoWait) wait_for_wgmma();
    __syncthreads();
  }
  wait_for_wgmma();
  const int row = warp * 16 + lane / 4, col = lane % 4 * 2;
  for (int i = 0; i < 4; ++i) y[(row + i / 2 * 8) * 8 + col + i % 2] = d[i];
}
KERNEL wgmma(float* y, const float* x) { warpgroup_product<Product::kRight>(y, x); }
KERNEL wgmma_without_wait(float* y, const float* x) { warpgroup_product<Product::kNoWait>(y, x); }
KERNEL wgmma_without_fence(float* y, const float* x) { warpgroup_product<Product::kNoFence>(y, x); }
