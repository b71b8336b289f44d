// cp.async.bulk and cp.async.bulk.tensor: boxes between global and shared memory, moved by an
// engine of its own through the async proxy.
//
// A load is complete when its bytes have reached its mbarrier, a store when the issuing thread's
// wait_group covers it. Until then the destination is in flight, and so is the source of a store
// until wait_group.read: touching those bytes is a hazard. Loads land when nobody could go on
// without them, stores when they are waited for; option async_early: loads when they are issued.
#include "bulk_copy.h"

#include <cstring>
#include <deque>
#include <vector>

#include "mbarrier.h"
#include "shadow.h"
#include "tensor_box.h"
#include "tensor_map_memory.h"
#include "tensor_reduce.h"

namespace ptx {

namespace {

constexpr uint32_t kBulkAlignment = 16, kTensorAlignment = 128;

std::vector<BulkLoad> loads;   // in flight in the running block, oldest first
std::deque<BulkStore> stores;  // of the running block; a deque keeps addresses

Span global_row(const BoxRow& row, bool writes, uint32_t site) {
  return span(row.global, row.inside_bytes, Space::kGlobal, site, writes, 1);
}

template <typename F>
void for_each_inside_row(const BulkBox& box, F visit) {
  for_each_row(box, [&](const BoxRow& row) {
    if (row.inside_bytes) visit(row);
  });
}

// Takes the marks off the box's global memory, which may have been freed since.
void forget_marks(const BulkBox& box) {
  for_each_inside_row(box, [](const BoxRow& row) {
    if (!in_arena(row.global)) return;
    const size_t offset = static_cast<size_t>(row.global - arena);
    unmark({row.global, arena_flags + offset, offset, row.inside_bytes, false},
           kAsyncWrite | kAsyncRead);
  });
}

// The 16-byte chunks of shared memory that a store reads.
template <typename F>
void for_each_source_chunk(const BulkBox& box, F visit) {
  for_each_inside_row(box, [&](const BoxRow& row) {
    const uint32_t first = row.inside / kChunkBytes * kChunkBytes;
    for (uint32_t at = first; at < row.inside + row.inside_bytes; at += kChunkBytes) {
      visit(swizzled(box.map.swizzle, row.shared + at));
    }
  });
}

bool covers(const BulkBox& box, const unsigned char* p) {
  if (in_shared_window(p)) return static_cast<size_t>(p - shared_window) - box.shared < box.bytes;
  bool found = false;
  for_each_inside_row(box, [&](const BoxRow& row) {
    found |= static_cast<size_t>(p - row.global) < row.inside_bytes;
  });
  return found;
}

// ---- Boxes

BulkBox plain_box(const void* global, uint32_t bytes, const void* shared, uint32_t site) {
  if (bytes % kBulkAlignment != 0) {
    report_and_abort("misaligned", site, kNoSite,
                     text("a bulk copy of %u bytes: the size must be a multiple of 16", bytes));
  }
  if (reinterpret_cast<uintptr_t>(global) % kBulkAlignment != 0) {
    report_and_abort("misaligned", site, kNoSite,
                     "a bulk copy's global address must be 16-byte aligned: " + where(global));
  }
  BulkBox box = {};
  box.map.address = reinterpret_cast<uint64_t>(global);
  box.map.dims = 1;
  box.map.sizes[0] = box.map.box[0] = bytes;
  box.map.element = TensorElement::kU8;
  box.shared = static_cast<uint32_t>(
      span(shared, bytes, Space::kShared, site, /*writes=*/false, kBulkAlignment).offset);
  box.bytes = bytes;
  return box;
}

BulkBox tensor_box(int dims, const void* map, const int32_t* coordinates, const void* shared,
                   uint32_t site) {
  BulkBox box = {};
  box.map = read_tensor_map(map, dims, site);
  box.bytes = element_bytes(box.map.element);
  for (int i = 0; i < dims; i++) {
    box.coordinates[i] = coordinates[i];
    box.bytes *= box_count(box.map, i);
  }
  const uint32_t row = box.map.box[0] * element_bytes(box.map.element);
  if (box.map.swizzle != TensorSwizzle::kNone && row != 16u << static_cast<int>(box.map.swizzle)) {
    fatal("unsupported", "a swizzled box narrower than its swizzle", site);
  }
  box.shared = static_cast<uint32_t>(
      span(shared, box.bytes, Space::kShared, site, /*writes=*/false, kTensorAlignment).offset);
  return box;
}

// ---- Loads

uint32_t nan_bits(TensorElement element) {
  return element_bytes(element) == 2 ? 0x7fff7fffu : 0x7fffffffu;
}

void move_in(const BulkBox& box) {
  const uint32_t fill = box.map.fill_nan ? nan_bits(box.map.element) : 0;
  for_each_row(box, [&](const BoxRow& row) {
    for_each_piece(
        box.map.swizzle, row, 0, row.bytes, [&](uint32_t at, uint32_t shared, uint32_t bytes) {
          unsigned char* to = shared_window + shared;
          for (uint32_t i = 0; i < bytes; i++) {
            const uint32_t from = at + i - row.inside;  // wraps: outside
            to[i] = from < row.inside_bytes ? row.global[from]
                                            : static_cast<unsigned char>(fill >> i % 4 * 8);
          }
        });
  });
}

void land(const BulkLoad& load) {
  const RunAs engine(async_engine());
  acquire(load.issued);
  const Span to = shared_span(load.box.shared, load.box.bytes);
  unmark(to, kAsyncWrite);
  for_each_inside_row(
      load.box, [&](const BoxRow& row) { unmark(global_row(row, false, load.site), kAsyncRead); });
  move_in(load.box);
  touch(to, Access::kWrite, load.site);
  mbarrier_copy_landed(load.mbarrier, load.box.bytes, load.site);
}

void issue(const BulkBox& box, const void* mbarrier, uint32_t site) {
  counts.bulk_copies++;
  BulkLoad load = {box, mbarrier_offset(mbarrier, site), site, {}};
  const Span to = shared_span(box.shared, box.bytes);
  // Overwriting what the generic proxy wrote wants a proxy fence too, but Triton's specialised
  // warps do without where the shared memory last held a tensor map or mbarriers: not checked.
  touch(to, Access::kWrite, site);
  for_each_inside_row(box, [&](const BoxRow& row) {
    const Span from = global_row(row, /*writes=*/false, site);
    touch(from, Access::kRead, site);
    if (options.count) count_bulk(from, Access::kRead, site);
    mark(from, kAsyncRead);
  });
  if (!options.async_early) std::memset(to.data, 0xff, to.bytes);
  mark(to, kAsyncWrite);
  release(load.issued);
  mbarrier_copy_issued(load.mbarrier, box.bytes, site);
  if (options.async_early) {
    land(load);
  } else {
    loads.push_back(load);
  }
}

// ---- Stores

void move_out(const BulkStore& store) {
  static std::vector<unsigned char> values;  // of one row
  for_each_inside_row(store.box, [&](const BoxRow& row) {
    values.resize(row.inside_bytes);
    for_each_piece(store.box.map.swizzle, row, row.inside, row.inside_bytes,
                   [&](uint32_t at, uint32_t shared, uint32_t bytes) {
                     std::memcpy(&values[at - row.inside], shared_window + shared, bytes);
                   });
    if (store.reduction == BulkReduction::kNone) {
      std::memcpy(row.global, values.data(), row.inside_bytes);
    } else {
      reduce_row(store.box.map.element, store.reduction, row.global, values.data(),
                 row.inside_bytes, store.site);
    }
  });
}

// The engine has read the source: it may be overwritten.
void finish_reading(BulkStore& store) {
  if (store.source_read) return;
  store.source_read = true;
  move_out(store);
  for_each_source_chunk(store.box, [](uint32_t chunk) { remove_async_reader(chunk); });
}

void finish(BulkStore& store) {
  finish_reading(store);
  store.finished = true;
  for_each_inside_row(store.box, [&](const BoxRow& row) {
    unmark(global_row(row, /*writes=*/true, store.site), kAsyncWrite);
  });
}

void issue(const BulkBox& box, BulkReduction reduction, uint32_t site) {
  counts.bulk_copies++;
  const bool atomic = reduction != BulkReduction::kNone;
  for_each_inside_row(box, [&](const BoxRow& row) {
    for_each_piece(box.map.swizzle, row, row.inside, row.inside_bytes,
                   [&](uint32_t, uint32_t shared, uint32_t bytes) {
                     const Span from = shared_span(shared, bytes);
                     touch(from, Access::kRead, site);
                     check_proxy_fence(from, "a bulk copy reads", site);
                   });
    const Span to = global_row(row, /*writes=*/true, site);
    touch(to, atomic ? Access::kAtomic : Access::kWrite, site);
    if (options.count) count_bulk(to, atomic ? Access::kAtomic : Access::kWrite, site);
    if (!atomic) mark(to, kAsyncWrite);
  });
  for_each_source_chunk(box, [](uint32_t chunk) { add_async_reader(chunk); });
  stores.push_back({box, reduction, site, false, false});
  async_state().stores.add(&stores.back());
}

}  // namespace

void bulk_load(void* shared, const void* global, uint32_t bytes, void* mbarrier, uint32_t site) {
  issue(plain_box(global, bytes, shared, site), mbarrier, site);
}

void bulk_store(void* global, const void* shared, uint32_t bytes, uint32_t site) {
  issue(plain_box(global, bytes, shared, site), BulkReduction::kNone, site);
}

void tensor_load(int dims, void* shared, const void* map, const int32_t* coordinates,
                 void* mbarrier, uint32_t site) {
  issue(tensor_box(dims, map, coordinates, shared, site), mbarrier, site);
}

void tensor_store(int dims, const void* map, const int32_t* coordinates, const void* shared,
                  uint32_t site) {
  issue(tensor_box(dims, map, coordinates, shared, site), BulkReduction::kNone, site);
}

void tensor_reduce(int dims, uint32_t operation, const void* map, const int32_t* coordinates,
                   const void* shared, uint32_t site) {
  if (operation >= static_cast<uint32_t>(BulkReduction::kNone)) {
    fatal("unsupported", "this reduction of cp.reduce.async.bulk", site);
  }
  issue(tensor_box(dims, map, coordinates, shared, site), static_cast<BulkReduction>(operation),
        site);
}

void bulk_commit() { async_state().stores.commit(); }

void bulk_wait(uint32_t pending, bool only_reads) {
  if (!running()->async) return;
  auto& groups = async_state().stores;
  if (only_reads) {
    groups.peek(pending, [](BulkStore* store) { finish_reading(*store); });
  } else {
    groups.wait(pending, [](BulkStore* store) { finish(*store); });
  }
}

uint32_t bulk_copy_of(const unsigned char* p, bool writes) {
  const bool shared = in_shared_window(p);
  if (shared == writes) {  // a load writes shared memory and reads global memory
    for (const BulkLoad& load : loads)
      if (covers(load.box, p)) return load.site;
  } else {
    for (const BulkStore& store : stores)
      if (!(writes ? store.finished : store.source_read) && covers(store.box, p)) return store.site;
  }
  return kNoSite;
}

bool land_bulk_for(uint32_t mbarrier) {
  bool any = false;
  for (size_t i = 0; i < loads.size();) {
    if (loads[i].mbarrier != mbarrier) {
      i++;
      continue;
    }
    const BulkLoad load = loads[i];
    loads.erase(loads.begin() + static_cast<ptrdiff_t>(i));
    land(load);
    any = true;
  }
  return any;
}

void bulk_thread_exit(Fiber& fiber) {
  if (fiber.async) {
    for (BulkStore* store : fiber.async->stores.all()) {
      if (!store->source_read) {
        report("bulk-copy-hazard", store->site, kNoSite,
               "the thread returns while its bulk copy still reads shared memory: "
               "cp.async.bulk.wait_group.read is missing");
      }
      finish(*store);
    }
    fiber.async->stores.clear();
  }
  if (live_threads == 1 && !loads.empty()) {  // the last thread of the block
    report("bulk-copy-hazard", loads.front().site, kNoSite,
           "the block ends while a bulk copy still writes its shared memory: nobody has waited "
           "for it");
    for (const BulkLoad& load : loads) forget_marks(load.box);
    loads.clear();
  }
}

void bulk_block_start() {
  // What is left is of a launch that was aborted; its marks must not outlive it.
  for (const BulkLoad& load : loads) forget_marks(load.box);
  for (const BulkStore& store : stores) {
    if (!store.finished) forget_marks(store.box);
  }
  loads.clear();
  stores.clear();
}

}  // namespace ptx
