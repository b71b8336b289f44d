// wgmma.mma_async m64nNkK: the product of tiles in shared memory by the 4 warps of a warpgroup.
//
// A comes from registers or, as B always does, from shared memory through a descriptor. The values
// are computed when the last warp comes. The bytes read stay marked until every warp's
// wgmma.wait_group covers the operation: overwriting them before is a hazard.
#include <deque>
#include <limits>

#include "accumulate.h"
#include "async_state.h"
#include "fragments.h"
#include "wgmma_descriptor.h"

namespace ptx {

// The chunks of shared memory that one wgmma reads.
struct WgmmaReads {
  std::vector<uint32_t> chunks;
  int waiting;  // warps whose wait_group has not covered it yet
};

namespace {

constexpr int kWgmmaM = 64, kWgmmaMaxN = 256, kWgmmaMaxK = 32, kWarps = 4, kThreads = 128;

std::deque<WgmmaReads> operations;  // of the running block; a deque keeps addresses
std::vector<WgmmaReads*> unused;    // of them, finished

struct WgmmaOperands {
  const Wgmma* shape;
  uint32_t* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

int k_of(const Wgmma& shape) { return 256 / bits_of(shape.a); }

// ---- Operands from shared memory

WgmmaReads& new_operation() {
  if (unused.empty()) {
    operations.emplace_back();
    unused.push_back(&operations.back());
  }
  WgmmaReads& operation = *unused.back();
  unused.pop_back();
  operation.chunks.clear();
  operation.waiting = kWarps;
  return operation;
}

// Checks one 16-byte row as read by a thread, and marks it as being read.
const unsigned char* read_chunk(uint32_t offset, Fiber& reader, WgmmaReads& operation) {
  const RunAs as_reader(reader);
  const Span chunk = span(shared_window + offset, kChunkBytes, Space::kShared, reader.site,
                          /*writes=*/false, kChunkBytes);
  touch(chunk, Access::kRead, reader.site);
  check_proxy_fence(chunk, "wgmma reads", reader.site);
  add_async_reader(offset);
  operation.chunks.push_back(offset);
  return chunk.data;
}

// `count` rows (of A) or columns (of B) into tile[mn * mn_stride + k * k_stride]. Each of the 4
// warps is checked against its own quarter of A, or of the columns of B in turn.
template <typename Value>
void gather(const WgmmaDescriptor& descriptor, Element element, int count, int k,
            Fiber* const* threads, bool is_a, WgmmaReads& operation, Value* tile, int mn_stride,
            int k_stride) {
  const int bytes = bits_of(element) / 8, per_chunk = static_cast<int>(kChunkBytes) / bytes;
  const bool mn_major = descriptor.mn_major();
  const int outer = mn_major ? k : count, inner = (mn_major ? count : k) / per_chunk;
  for (int i = 0; i < outer; i++) {
    for (int j = 0; j < inner; j++) {
      const uint32_t at = static_cast<uint32_t>(j) * kChunkBytes;
      const uint32_t offset = mn_major ? descriptor.mn_major_row(static_cast<uint32_t>(i), at)
                                       : descriptor.k_major_row(static_cast<uint32_t>(i), at);
      const int mn = mn_major ? j * per_chunk : i, first_k = mn_major ? i : j * per_chunk;
      const int warp = is_a ? mn / 16 : (mn_major ? i : mn / 2) % kWarps;
      const unsigned char* chunk = read_chunk(offset, *threads[warp * kLanes], operation);
      Value values[kChunkBytes];
      for (uint32_t word = 0; word < kChunkBytes / 4; word++) {
        uint32_t bits;
        __builtin_memcpy(&bits, chunk + 4 * word, sizeof bits);
        unpack(element, bits, values + static_cast<int>(word) * per_chunk / 4);
      }
      const int step = mn_major ? mn_stride : k_stride;
      for (int e = 0; e < per_chunk; e++) {
        tile[mn * mn_stride + first_k * k_stride + e * step] = values[e];
      }
    }
  }
}

template <typename Value>
struct WgmmaTiles {
  alignas(16) Value a[kWgmmaM * kWgmmaMaxK];     // [m][k]
  alignas(16) Value b[kWgmmaMaxK * kWgmmaMaxN];  // [k][n]

  void gather_all(Fiber* const* threads) {
    const WgmmaOperands& x = operands<WgmmaOperands>(threads, 0);
    const Wgmma& shape = *x.shape;
    const int k = k_of(shape);
    WgmmaReads& operation = new_operation();
    if (x.a) {
      for (int i = 0; i < kThreads; i++) {
        unpack_a(shape.a, operands<WgmmaOperands>(threads, i).a, i % kLanes, k,
                 a + i / kLanes * 16 * kWgmmaMaxK, kWgmmaMaxK);
      }
    } else {
      gather(WgmmaDescriptor(x.a_descriptor, shape.transpose_a), shape.a, kWgmmaM, k, threads, true,
             operation, a, kWgmmaMaxK, 1);
    }
    gather(WgmmaDescriptor(x.b_descriptor, shape.transpose_b), shape.b, shape.n, k, threads, false,
           operation, b, 1, kWgmmaMaxN);
    if (shape.sign_a * shape.sign_b < 0) {
      for (Value& value : a) value = static_cast<Value>(-value);
    }
    for (int warp = 0; warp < kWarps; warp++) {
      const RunAs owner(*threads[warp * kLanes]);
      async_state().wgmma.add(&operation);
    }
  }
};

// ---- Products

// The 4 threads that hold row `row`, two columns of every 8 each: the first of them.
int first_thread(int row) { return row / 16 * kLanes + row % 8 * 4; }

void multiply_float(Fiber* const* threads) {
  static WgmmaTiles<double> tiles;
  tiles.gather_all(threads);
  const WgmmaOperands& x = operands<WgmmaOperands>(threads, 0);
  const bool packed = x.shape->d == Element::kF16;
  for (int row = 0; row < kWgmmaM; row++) {
    const int first = first_thread(row), low = row % 16 >= 8;
    for (int column = 0; column < x.shape->n; column += kColumns) {
      // In 8 columns a thread has 4 registers of f32 or 2 of f16, half of them of this row.
      const int r = column / 8 * (packed ? 2 : 4) + low * (packed ? 1 : 2);
      double sums[kColumns] = {};
      for (int j = 0; x.accumulate && j < kColumns; j++) {
        const uint32_t* d = operands<WgmmaOperands>(threads, first + j / 2).d;
        sums[j] = accumulator(x.shape->d, d[packed ? r : r + j % 2], j % 2);
      }
      accumulate(tiles.a + row * kWgmmaMaxK, tiles.b + column, kWgmmaMaxN, k_of(*x.shape), sums,
                 options.mma_rounding);
      for (int j = 0; j < kColumns; j += packed ? 2 : 1) {
        uint32_t* d = operands<WgmmaOperands>(threads, first + j / 2).d;
        d[packed ? r : r + j % 2] = result_word(x.shape->d, sums + j);
      }
    }
  }
}

void multiply_integer(Fiber* const* threads) {
  static WgmmaTiles<int16_t> tiles;
  tiles.gather_all(threads);
  const WgmmaOperands& x = operands<WgmmaOperands>(threads, 0);
  for (int row = 0; row < kWgmmaM; row++) {
    const int first = first_thread(row), low = row % 16 >= 8;
    for (int column = 0; column < x.shape->n; column += kColumns) {
      const int r = column / 8 * 4 + low * 2;
      int64_t sums[kColumns] = {};
      for (int j = 0; x.accumulate && j < kColumns; j++) {
        sums[j] =
            static_cast<int32_t>(operands<WgmmaOperands>(threads, first + j / 2).d[r + j % 2]);
      }
      accumulate(tiles.a + row * kWgmmaMaxK, tiles.b + column, kWgmmaMaxN, k_of(*x.shape), sums);
      for (int j = 0; j < kColumns; j++) {
        operands<WgmmaOperands>(threads, first + j / 2).d[r + j % 2] =
            static_cast<uint32_t>(sums[j]);
      }
    }
  }
}

void resolve_wgmma(Fiber* const* threads) {
  counts.wgmma++;
  const WgmmaOperands& x = operands<WgmmaOperands>(threads, 0);
  for (int i = 1; i < kThreads; i++) {
    const WgmmaOperands& y = operands<WgmmaOperands>(threads, i);
    if (y.b_descriptor != x.b_descriptor || y.accumulate != x.accumulate ||
        (!x.a && y.a_descriptor != x.a_descriptor)) {
      report_and_abort("divergent-warp-op", threads[i]->site, kNoSite,
                       text("threads 0 and %d of the warpgroup give wgmma different descriptors or "
                            "scale-d",
                            i));
    }
  }
  if (is_integer(x.shape->a)) {
    multiply_integer(threads);
  } else {
    multiply_float(threads);
  }
}

// ---- What is accepted

bool supported_types(const Wgmma& shape) {
  const bool f32 = shape.d == Element::kF32, f16 = shape.d == Element::kF16;
  switch (shape.a) {
    case Element::kF16:
      return shape.b == Element::kF16 && (f32 || f16);
    case Element::kBf16:
    case Element::kTf32:
      return shape.b == shape.a && f32;
    case Element::kE4m3:
    case Element::kE5m2:
      return is_fp8(shape.b) && (f32 || f16);
    case Element::kS8:
    case Element::kU8:
      return (shape.b == Element::kS8 || shape.b == Element::kU8) && shape.d == Element::kS32;
    default:
      return false;
  }
}

void check_supported(const Wgmma& shape, const uint32_t* a, uint64_t a_descriptor,
                     uint64_t b_descriptor, uint32_t site) {
  const bool transposed = shape.transpose_a || shape.transpose_b;
  if (!supported_types(shape) || shape.n < 8 || shape.n > kWgmmaMaxN || shape.n % 8 != 0) {
    fatal("unsupported",
          "this wgmma; accepted: f16 (into f32, f16), bf16, tf32 (into f32), e4m3, e5m2 (into f32, "
          "f16), s8, u8 (into s32), n a multiple of 8 up to 256",
          site);
  }
  if (transposed && bits_of(shape.a) != 16) {
    fatal("unsupported", "wgmma with an MN-major operand that is not f16 or bf16", site);
  }
  if (shape.transpose_a && a) {
    fatal("unsupported", "wgmma with A transposed in registers", site);
  }
  if (is_integer(shape.a) && (shape.sign_a != 1 || shape.sign_b != 1)) {
    fatal("unsupported", "wgmma of integers with a negated operand", site);
  }
  if (!WgmmaDescriptor(b_descriptor, false).supported() ||
      (!a && !WgmmaDescriptor(a_descriptor, false).supported())) {
    fatal("unsupported", "a wgmma descriptor with a base offset", site);
  }
}

void finish_operation(WgmmaReads* operation) {
  if (--operation->waiting > 0) return;
  for (uint32_t chunk : operation->chunks) remove_async_reader(chunk);
  unused.push_back(operation);
}

bool keeps_groups() { return current->lane == 0; }

}  // namespace

void wgmma(const Wgmma& shape, uint32_t* d, const uint32_t* a_registers, uint64_t a_descriptor,
           uint64_t b_descriptor, bool accumulate, uint32_t site) {
  check_supported(shape, a_registers, a_descriptor, b_descriptor, site);
  if (keeps_groups() && !async_state().wgmma_fenced) {
    report("wgmma-hazard", site, kNoSite,
           "the first wgmma without a wgmma.fence before it: registers may not be ready");
  }
  WgmmaOperands x{&shape, d, a_registers, a_descriptor, b_descriptor, accumulate};
  warpgroup_collective("wgmma.mma_async", site, &x, resolve_wgmma);
}

void wgmma_fence(uint32_t) {
  if (keeps_groups()) async_state().wgmma_fenced = true;
}

void wgmma_commit() {
  if (keeps_groups()) async_state().wgmma.commit();
}

void wgmma_wait(uint32_t pending) {
  if (keeps_groups()) async_state().wgmma.wait(pending, finish_operation);
}

void wgmma_thread_exit(Fiber& fiber) {
  auto& operations_left = fiber.async->wgmma.all();
  if (operations_left.empty()) return;
  report("wgmma-hazard", fiber.site, kNoSite,
         "the thread returns with a wgmma under way: wgmma.wait_group is missing");
  for (WgmmaReads* operation : operations_left) finish_operation(operation);
  fiber.async->wgmma.clear();
}

void wgmma_block_start() {
  unused.clear();
  operations.clear();
}

}  // namespace ptx
