// Bookkeeping shared by the asynchronous operations, and their hooks in the scheduler.
#include "async_state.h"

#include <cstring>
#include <deque>

#include "mbarrier.h"

namespace ptx {

namespace {

std::deque<AsyncState> states;  // reused from block to block; a deque keeps addresses
size_t states_used;
uint16_t readers[kSharedBytes / kChunkBytes];  // asynchronous ones of each chunk
bool have_readers;

}  // namespace

AsyncState& async_state() {
  Fiber& me = *running();
  if (!me.async) {
    if (states_used == states.size()) states.emplace_back();
    AsyncState& state = states[states_used++];
    state.copies.clear();
    state.copies_completed = 0;
    state.arrivals.clear();
    state.stores.clear();
    state.wgmma.clear();
    state.wgmma_fenced = false;
    state.proxy_fenced = {};
    state.polled_mbarrier = ~0u;
    me.async = &state;
  }
  return *me.async;
}

Span shared_span(uint32_t offset, uint32_t bytes) {
  return span(shared_window + offset, bytes, Space::kShared, kNoSite, /*writes=*/false, 1);
}

void add_async_reader(uint32_t offset) {
  have_readers = true;
  if (readers[offset / kChunkBytes]++ == 0) mark(shared_span(offset, kChunkBytes), kAsyncRead);
}

void remove_async_reader(uint32_t offset) {
  if (--readers[offset / kChunkBytes] == 0) unmark(shared_span(offset, kChunkBytes), kAsyncRead);
}

void check_proxy_fence(const Span& bytes, const char* reader, uint32_t site) {
  // Registers are stored in 4 bytes or more, or as runs of narrower elements.
  for (uint32_t i = 0; i < bytes.bytes; i += 4) {
    const Record& record = record_of(bytes, i);
    if (!unfenced_write(record)) continue;
    if (had_happened(record, async_state().proxy_fenced)) continue;
    report("missing-proxy-fence", site, record.write_site,
           text("%s %s, written by thread %u without a later fence.proxy.async", reader,
                where(bytes.data + i).c_str(), static_cast<unsigned>(record.writer)));
    return;
  }
}

void fence_proxy_async() {
  running()->proxy_fences++;
  async_state().proxy_fenced = knowledge();
}

Fiber& async_engine() {
  static Fiber engine = [] {
    Fiber fiber = {};
    fiber.linear = kMaxThreads;
    fiber.warp = kAsyncWarp;
    fiber.clock = 1;
    return fiber;
  }();
  return engine;
}

void async_launch_start() {
  tensor_map_launch_start();
  async_block_start();
}

void async_block_start() {
  states_used = 0;
  if (have_readers) std::memset(readers, 0, sizeof readers);
  have_readers = false;
  bulk_block_start();
  wgmma_block_start();
  mbarrier_block_start();
}

void async_thread_exit(Fiber& fiber) {
  if (fiber.async) {
    cp_async_thread_exit(fiber);
    wgmma_thread_exit(fiber);
  }
  bulk_thread_exit(fiber);
}

bool land_asynchronous_copies() {
  const uint32_t mbarrier = awaited_mbarrier();
  if (mbarrier == kNoMbarrier) return false;
  // Not `||`: both kinds may be on their way to one mbarrier.
  const bool copies = land_cp_async_for(mbarrier), bulk = land_bulk_for(mbarrier);
  return copies || bulk;
}

}  // namespace ptx
