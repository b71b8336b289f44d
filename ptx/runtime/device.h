// What a generated kernel calls: the executor's device interface. Light on purpose (a kernel
// compiles in about a second). A `site` is the id of the instruction in the registered table of
// site texts.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ptx {

struct Dim3 {
  uint32_t x, y, z;
};

// A CUDA thread as its kernel sees it.
struct Thread {
  Dim3 index;            // %tid
  uint32_t linear;       // number of the thread in its block
  uint32_t lane, warp;   // linear % 32, linear / 32
  unsigned char* local;  // this thread's local memory window
};

extern Thread* current;                        // the running thread; null outside a launch
extern Dim3 block_index, block_dim, grid_dim;  // %ctaid %ntid %nctaid; clusters are of one block
extern unsigned char* shared_window;  // shared address 0 of the running block: static, then dynamic
uint32_t dynamic_shared();            // offset of the dynamic part
uint32_t total_shared();              // bytes of both parts

// ---- Memory. Each call checks (bounds, alignment, written, races) and counts one lane's access;
// a fatal report ends the launch and does not return.

enum class Space : uint8_t { kGeneric, kGlobal, kShared };

// Where to read from: p, or a poisoned copy for a racing read under the option poison_races.
const void* read(const void* p, uint32_t bytes, Space, uint32_t site);
// Checks, then stores the bytes at `data`.
void write(void* p, uint32_t bytes, Space, uint32_t site, const void* data);
// Checks; the caller reads and writes p at once (no other thread runs in between).
void* atomic(void* p, uint32_t bytes, Space, uint32_t site);
// ld.global.nc, on top of read(): nobody may write these bytes in this launch.
void read_only(const void* p, uint32_t bytes, uint32_t site);
// Bounds and alignment of an access to the running thread's local window.
unsigned char* local(uint32_t offset, uint32_t bytes, uint32_t site);
// A predicated-off lane passes an access: keeps the lanes' n-th executions of a site aligned.
void skip(Space, uint32_t site);

// ---- Block. count 0: every live thread of the block.

// aligned (bar.sync): the threads of a block are meant to meet at the same instruction.
void barrier(uint32_t id, uint32_t count, uint32_t site, bool aligned = true);
void barrier_arrive(uint32_t id, uint32_t count, uint32_t site);
struct Reduced {
  uint32_t count;
  bool any, all;
};
Reduced barrier_reduce(uint32_t id, uint32_t count, bool p, uint32_t site);

// ---- Warp

void syncwarp(uint32_t mask, uint32_t site);
enum class Shuffle : uint8_t { kUp, kDown, kButterfly, kIndex };
uint32_t shuffle(Shuffle, uint32_t mask, uint32_t value, uint32_t b, uint32_t c, uint32_t site,
                 bool* in_range = nullptr);
enum class Vote : uint8_t { kBallot, kAll, kAny, kUniform };
uint32_t vote(Vote, uint32_t mask, bool p, uint32_t site);
enum class Redux : uint8_t { kAdd, kMinS, kMaxS, kMinU, kMaxU, kAnd, kOr, kXor, kMinF, kMaxF };
uint32_t redux(Redux, uint32_t mask, uint32_t value, uint32_t site);
uint32_t match_any(uint32_t mask, uint64_t value, uint32_t site);
uint32_t match_all(uint32_t mask, uint64_t value, bool* all, uint32_t site);
uint32_t elect(uint32_t mask, bool* elected, uint32_t site);
uint32_t active_mask(uint32_t site);

// ---- Matrices. Registers as 32-bit words in PTX order.

void ldmatrix(uint32_t* d, int count, bool transposed, const void* row, uint32_t site);
void stmatrix(const uint32_t* d, int count, bool transposed, void* row, uint32_t site);
enum class Element : uint8_t { kF16, kBf16, kTf32, kS8, kU8, kE4m3, kE5m2, kF32, kS32 };
struct Mma {  // .row.col; d is also the type of c
  int m, n, k;
  Element a, b, d;
  bool saturate;
};
void mma(const Mma&, uint32_t* d, const uint32_t* a, const uint32_t* b, const uint32_t* c,
         uint32_t site);
struct Wgmma {  // m64
  int n;
  Element a, b, d;
  bool transpose_a, transpose_b;
  int sign_a, sign_b;
};
// a_registers: this thread's fragment of A, or null where A lies in shared memory (a_descriptor).
void wgmma(const Wgmma&, uint32_t* d, const uint32_t* a_registers, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate, uint32_t site);
void wgmma_fence(uint32_t site);
void wgmma_commit();
void wgmma_wait(uint32_t pending);

// ---- Asynchronous copies

void cp_async(void* shared, const void* global, uint32_t bytes, uint32_t source_bytes,
              uint32_t site);
void cp_async_commit();
void cp_async_wait(uint32_t pending);
void cp_async_wait_all();
void cp_async_mbarrier_arrive(void* mbarrier, bool no_increment, uint32_t site);

void mbarrier_init(void*, uint32_t count, uint32_t site);
void mbarrier_invalidate(void*, uint32_t site);
uint64_t mbarrier_arrive(void*, uint32_t count, bool drop, uint32_t site);  // the state token
uint64_t mbarrier_arrive_expect(void*, uint32_t bytes, uint32_t site);
void mbarrier_expect(void*, uint32_t bytes, uint32_t site);
bool mbarrier_test(void*, uint64_t state, uint32_t site);
bool mbarrier_test_parity(void*, uint32_t parity, uint32_t site);
// The try forms may give way to other threads, so that a wait loop ends; a wait that nobody can end
// is a deadlock report.
bool mbarrier_try_parity(void*, uint32_t parity, uint32_t site);
bool mbarrier_try(void*, uint64_t state, uint32_t site);
uint32_t mbarrier_pending_count(uint64_t state);

// cp.async.bulk.shared::cluster.global.mbarrier and cp.async.bulk.global.shared::cta.bulk_group
void bulk_load(void* shared, const void* global, uint32_t bytes, void* mbarrier, uint32_t site);
void bulk_store(void* global, const void* shared, uint32_t bytes, uint32_t site);
void tensor_load(int dims, void* shared, const void* map, const int32_t* coordinates,
                 void* mbarrier, uint32_t site);
void tensor_store(int dims, const void* map, const int32_t* coordinates, const void* shared,
                  uint32_t site);
void tensor_reduce(int dims, uint32_t operation, const void* map, const int32_t* coordinates,
                   const void* shared, uint32_t site);
void bulk_commit();
void bulk_wait(uint32_t pending, bool only_reads);
void fence_proxy_async();
void fence_proxy_tensormap(const void* map, uint32_t site);

// tensormap.replace.tile.FIELD [map], {ordinal,} value: the map lies in shared or global memory.
enum class TensorField : uint8_t {
  kGlobalAddress,
  kRank,
  kBoxDim,
  kGlobalDim,
  kGlobalStride,
  kElementStride,
  kElementType,
  kInterleaveLayout,
  kSwizzleMode,
  kSwizzleAtomicity,
  kFillMode
};
void tensor_map_replace(TensorField, void* map, uint32_t ordinal, uint64_t value, uint32_t site);
// tensormap.cp_fenceproxy.global.shared::cta…sync.aligned: the whole warp copies one map.
void tensor_map_copy_fence(void* global_map, const void* shared_map, uint32_t site);

// ---- Approximate arithmetic (.approx): deterministic; under the option jitter anywhere within the
// documented error bound, as a function of the value.

float approx_exp2(float);
float approx_log2(float);
float approx_rsqrt(float);
float approx_rcp(float);
float approx_sqrt(float);
float approx_sin(float);
float approx_cos(float);
float approx_tanh(float);
float approx_div(float, float);

// A report that ends the launch: "unsupported", "trap", "device-assert".
[[noreturn]] void fatal(const char* kind, const char* message, uint32_t site);

// ---- Registration: one static object per generated file

struct Parameter {
  uint32_t offset, bytes;
};
struct Kernel {
  const char* name;
  void (*body)(const unsigned char* parameters);
  uint32_t static_shared, local_bytes, parameter_count, parameter_bytes;
  const Parameter* parameters;
  uint32_t max_threads, required_threads[3];  // .maxntid, .reqntid; 0: none
  uint32_t block_count;                       // basic blocks
  uint64_t* block_hits;                       // executions of each, by all threads
  const char* const* block_mix;               // "ld.global.v4.b32=2 add.f32=1", one per basic block
};
struct Variable {  // a module-scope .global or .const table
  void* data;
  uint32_t bytes;
};
struct Module {
  const char* const* sites;  // "file.cu:12<caller.cuh:70|opcode|ptx line"
  uint32_t site_count;
  const Kernel* kernels;
  uint32_t kernel_count;
  const Variable* variables;
  uint32_t variable_count;
};
// The id of the module's site 0; generated code adds its own index.
uint32_t register_module(const Module&);

}  // namespace ptx
