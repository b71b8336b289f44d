// What threads have started and not yet waited for: cp.async, bulk stores and wgmma in groups.
#pragma once
#include <cstdint>
#include <vector>

#include "state.h"

namespace ptx {

// Operations in commit groups, completed oldest group first, as commit_group and wait_group say.
template <typename Operation>
class Groups {
 public:
  void add(const Operation& operation) { operations_.push_back(operation); }
  void commit() { ends_.push_back(operations_.size()); }

  // Calls complete(operation) for the operations of all groups but the `pending` newest ones.
  template <typename F>
  void wait(uint32_t pending, F complete) {
    if (ends_.size() <= pending) return;
    const size_t groups = ends_.size() - pending, finished = ends_[groups - 1];
    for (size_t i = 0; i < finished; i++) complete(operations_[i]);
    operations_.erase(operations_.begin(), operations_.begin() + static_cast<ptrdiff_t>(finished));
    ends_.erase(ends_.begin(), ends_.begin() + static_cast<ptrdiff_t>(groups));
    for (size_t& end : ends_) end -= finished;
  }

  // The same without completing them: for a wait that leaves them partly unfinished.
  template <typename F>
  void peek(uint32_t pending, F visit) {
    if (ends_.size() <= pending) return;
    for (size_t i = 0; i < ends_[ends_.size() - pending - 1]; i++) visit(operations_[i]);
  }

  // All operations, committed or not.
  std::vector<Operation>& all() { return operations_; }
  void clear() {
    operations_.clear();
    ends_.clear();
  }

 private:
  std::vector<Operation> operations_;
  std::vector<size_t> ends_;  // of each committed group, in operations_
};

struct CpAsync {
  Span destination;
  const unsigned char* source;
  uint32_t source_bytes;  // the rest of the destination becomes zero
  uint32_t site;
  bool landed;
};

// cp.async.mbarrier.arrive: an arrival due when the thread's first `copies` cp.async have landed.
struct DeferredArrival {
  uint32_t mbarrier;  // offset in shared memory
  uint32_t site;
  uint64_t copies;
  SyncTimes issued;  // what the thread had done
};

struct BulkStore;   // bulk_copy.h
struct WgmmaReads;  // wgmma.cpp

struct AsyncState {
  Groups<CpAsync> copies;
  uint64_t copies_completed = 0;  // how many have left `copies`
  std::vector<DeferredArrival> arrivals;
  Groups<BulkStore*> stores;
  Groups<WgmmaReads*> wgmma;       // of a warp: kept by its lane 0
  bool wgmma_fenced = false;       // has executed wgmma.fence
  Knowledge proxy_fenced = {};     // at its last fence.proxy.async
  uint32_t polled_mbarrier = ~0u;  // the unfinished phase that its last wait has seen
  uint64_t polled_phase = 0;
};

// The running thread's, made on first use.
AsyncState& async_state();

// A run of bytes in shared memory of which the bounds have been checked.
Span shared_span(uint32_t offset, uint32_t bytes);

// Asynchronous readers of shared memory overlap (two wgmma in flight read one tile): the mark
// kAsyncRead of a 16-byte chunk goes only with its last reader.
constexpr uint32_t kChunkBytes = 16;
void add_async_reader(uint32_t offset);
void remove_async_reader(uint32_t offset);

// Reports missing-proxy-fence if the running block wrote some of these bytes of shared memory
// through the generic proxy and no fence.proxy.async lies between: neither one by the writer after
// it wrote, nor one by the running thread after it learnt of the write (both ways are in use).
void check_proxy_fence(const Span&, const char* reader, uint32_t site);

// What asynchronous engines do is recorded as done by this thread, of warp kAsyncWarp.
Fiber& async_engine();

// ---- One function per concern, for async_state.cpp

void cp_async_thread_exit(Fiber&);
bool land_cp_async_for(uint32_t mbarrier);  // those that a deferred arrival at it waits for
void bulk_thread_exit(Fiber&);
void bulk_block_start();
bool land_bulk_for(uint32_t mbarrier);
void wgmma_thread_exit(Fiber&);
void wgmma_block_start();
void mbarrier_block_start();
void tensor_map_launch_start();

}  // namespace ptx
