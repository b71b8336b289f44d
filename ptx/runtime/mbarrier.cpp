// mbarrier: phases ended by arrivals and by bytes of asynchronous copies (PTX ISA, "mbarrier").
//
// Arriving publishes what the thread's warp has done, a wait that succeeds learns what all arrivals
// of the phase published. The object in shared memory holds its counts, so that a kernel that
// overwrites it is caught; what else the runtime must know is kept beside it.
#include "mbarrier.h"

#include <cstring>
#include <map>

#include "async_state.h"

namespace ptx {

namespace {

constexpr uint32_t kObjectBytes = 8, kMaxCount = (1u << 20) - 1;
constexpr int64_t kMaxTransaction = (1 << 20) - 1;

struct Mbarrier {
  bool valid, used;            // used: since it was initialised
  uint32_t expected, pending;  // arrivals: of every phase, still missing in this one
  int64_t transaction;         // bytes expected less bytes landed
  uint64_t phase;              // phases completed
  int64_t bytes_in_flight;
  uint32_t arrivals_in_flight;  // of cp.async.mbarrier.arrive
  uint32_t waiting;             // threads parked in a try_wait
  SyncTimes arrived;            // published by arrivals up to now …
  SyncTimes completed;          // … and by those up to the end of the last phase
  char description[128];        // for a deadlock report
};

std::map<uint32_t, Mbarrier> mbarriers;  // of the running block, by offset

[[noreturn]] void misuse(uint32_t offset, uint32_t site, const std::string& what) {
  report_and_abort("mbarrier-misuse", site, kNoSite, where(shared_window + offset) + ": " + what);
}

// The object's bits, and a state token: pending, expected, phase.
uint64_t word_of(const Mbarrier& m) {
  return m.pending | uint64_t{m.expected} << 20 | m.phase << 40;
}

void store(uint32_t offset, const Mbarrier& m) {
  const uint64_t word = word_of(m);
  std::memcpy(shared_window + offset, &word, kObjectBytes);
}

uint32_t checked_offset(const void* p, uint32_t site) {
  if (reinterpret_cast<uintptr_t>(p) % kObjectBytes != 0) {
    report_and_abort("mbarrier-misuse", site, kNoSite,
                     where(p) + ": an mbarrier must be 8-byte aligned");
  }
  return static_cast<uint32_t>(
      span(p, kObjectBytes, Space::kShared, site, /*writes=*/true, kObjectBytes).offset);
}

Mbarrier& find(const void* p, uint32_t site) {
  const uint32_t offset = checked_offset(p, site);
  const auto found = mbarriers.find(offset);
  if (found == mbarriers.end() || !found->second.valid) {
    misuse(offset, site, "no mbarrier has been initialised here");
  }
  // Concurrent operations on an mbarrier are no race, but its initialisation must come before.
  access(p, kObjectBytes, Access::kAtomic, Space::kShared, site, nullptr, /*counted=*/false);
  uint64_t word = 0;
  std::memcpy(&word, p, kObjectBytes);
  if (word != word_of(found->second)) misuse(offset, site, "the mbarrier has been overwritten");
  found->second.used = true;
  return found->second;
}

// A write that needs no fence before the memory's next use: mbarriers belong to both proxies.
void write_object(void* p, const uint64_t* word, uint32_t site) {
  running()->proxy_fences--;  // as if the thread had fenced since
  access(p, kObjectBytes, Access::kWrite, Space::kShared, site, word, /*counted=*/false);
  running()->proxy_fences++;
}

uint32_t offset_of(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - shared_window);
}

// Ends the phase if nothing is missing.
void settle(uint32_t offset, Mbarrier& m, uint32_t site) {
  if (m.pending == 0 && m.transaction < 0) {
    misuse(offset, site,
           text("%lld more bytes have landed than expect_tx announced for phase %llu",
                static_cast<long long>(-m.transaction), static_cast<unsigned long long>(m.phase)));
  }
  if (m.pending == 0 && m.transaction == 0) {
    if (m.bytes_in_flight > 0) {
      misuse(offset, site,
             text("phase %llu ends while %lld bytes are on their way that no expect_tx announced",
                  static_cast<unsigned long long>(m.phase),
                  static_cast<long long>(m.bytes_in_flight)));
    }
    m.phase++;
    m.pending = m.expected;
    m.completed = m.arrived;
    progress();
  }
  store(offset, m);
}

void expect_bytes(uint32_t offset, Mbarrier& m, uint32_t bytes, uint32_t site) {
  m.transaction += bytes;
  if (m.transaction > kMaxTransaction) {
    misuse(offset, site, text("the transaction count passes 2^20 - 1 with %u more bytes", bytes));
  }
}

uint64_t arrive(uint32_t offset, Mbarrier& m, uint32_t count, uint32_t site) {
  const uint64_t state = word_of(m);
  if (count == 0 || count > m.pending) {
    misuse(offset, site,
           text("%u arrivals where phase %llu expects %u more (of %u)", count,
                static_cast<unsigned long long>(m.phase), m.pending, m.expected));
  }
  m.pending -= count;
  release(m.arrived);
  settle(offset, m, site);
  return state;
}

const char* describe(uint32_t offset, Mbarrier& m) {
  std::snprintf(m.description, sizeof m.description,
                "mbarrier.try_wait on shared+%u (phase %llu: %u arrivals and %lld bytes missing)",
                offset, static_cast<unsigned long long>(m.phase), m.pending,
                static_cast<long long>(m.transaction));
  return m.description;
}

// One look at a phase. The first look at an unfinished one fails at once, as the ISA allows: a wait
// without its loop must not get by. The next one gives way to other threads.
template <typename Done>
bool look(void* p, uint32_t site, Done done) {
  Mbarrier& m = find(p, site);
  if (!done(m)) {
    AsyncState& state = async_state();
    const uint32_t offset = offset_of(p);
    if (state.polled_mbarrier != offset || state.polled_phase != m.phase) {
      state.polled_mbarrier = offset;
      state.polled_phase = m.phase;
      return false;
    }
    m.waiting++;
    give_way(describe(offset, m), site);
    m.waiting--;
    if (!m.valid || !done(m)) return false;
  }
  acquire(m.completed);
  return true;
}

// The parity of a completed phase differs from that of the one under way.
auto parity_done(uint32_t parity) {
  return [parity](const Mbarrier& m) { return (m.phase & 1) != (parity & 1); };
}

auto state_done(uint64_t state) {
  return [state](const Mbarrier& m) { return (m.phase & 0xffffff) != state >> 40; };
}

}  // namespace

void mbarrier_init(void* p, uint32_t count, uint32_t site) {
  const uint32_t offset = checked_offset(p, site);
  if (count == 0 || count > kMaxCount) {
    misuse(offset, site, text("initialised for %u arrivals; accepted: 1 to 2^20 - 1", count));
  }
  Mbarrier& m = mbarriers[offset];
  // Twice in a row is harmless: Triton does it where it specialises warps.
  if (m.valid && m.used) {
    misuse(offset, site, "initialised again while in use: mbarrier.inval is missing");
  }
  m = {};
  m.valid = true;
  m.expected = m.pending = count;
  const uint64_t word = word_of(m);
  write_object(p, &word, site);
  store(offset, m);
}

void mbarrier_invalidate(void* p, uint32_t site) {
  Mbarrier& m = find(p, site);
  if (m.waiting || m.bytes_in_flight || m.arrivals_in_flight) {
    misuse(offset_of(p), site, "invalidated while threads or copies still use it");
  }
  write_object(p, nullptr, site);
  m.valid = false;
}

uint64_t mbarrier_arrive(void* p, uint32_t count, bool drop, uint32_t site) {
  Mbarrier& m = find(p, site);
  if (drop) m.expected -= count <= m.pending ? count : 0;  // else arrive reports it
  return arrive(offset_of(p), m, count, site);
}

uint64_t mbarrier_arrive_expect(void* p, uint32_t bytes, uint32_t site) {
  Mbarrier& m = find(p, site);
  expect_bytes(offset_of(p), m, bytes, site);
  return arrive(offset_of(p), m, 1, site);
}

void mbarrier_expect(void* p, uint32_t bytes, uint32_t site) {
  Mbarrier& m = find(p, site);
  expect_bytes(offset_of(p), m, bytes, site);
}

bool mbarrier_test(void* p, uint64_t state, uint32_t site) {
  return look(p, site, state_done(state));
}
bool mbarrier_test_parity(void* p, uint32_t parity, uint32_t site) {
  return look(p, site, parity_done(parity));
}
bool mbarrier_try(void* p, uint64_t state, uint32_t site) {
  return look(p, site, state_done(state));
}
bool mbarrier_try_parity(void* p, uint32_t parity, uint32_t site) {
  return look(p, site, parity_done(parity));
}

uint32_t mbarrier_pending_count(uint64_t state) { return state & kMaxCount; }

uint32_t mbarrier_offset(const void* p, uint32_t site) {
  find(p, site);
  return offset_of(p);
}

void mbarrier_copy_issued(uint32_t offset, uint32_t bytes, uint32_t) {
  mbarriers[offset].bytes_in_flight += bytes;
}

void mbarrier_copy_landed(uint32_t offset, uint32_t bytes, uint32_t site) {
  Mbarrier& m = mbarriers[offset];
  m.bytes_in_flight -= bytes;
  m.transaction -= bytes;
  release(m.arrived);
  settle(offset, m, site);
}

uint32_t mbarrier_expect_arrival(const void* p, bool no_increment, uint32_t site) {
  Mbarrier& m = find(p, site);
  if (!no_increment && ++m.pending > kMaxCount) {
    misuse(offset_of(p), site, "more than 2^20 - 1 pending arrivals");
  }
  m.arrivals_in_flight++;
  store(offset_of(p), m);
  return offset_of(p);
}

void mbarrier_arrive_async(uint32_t offset, uint32_t site) {
  Mbarrier& m = mbarriers[offset];
  m.arrivals_in_flight--;
  arrive(offset, m, 1, site);
}

uint32_t awaited_mbarrier() {
  for (const auto& [offset, m] : mbarriers) {
    if (m.waiting && (m.bytes_in_flight || m.arrivals_in_flight)) return offset;
  }
  return kNoMbarrier;
}

void mbarrier_block_start() { mbarriers.clear(); }

}  // namespace ptx
