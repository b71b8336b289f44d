// Counters per memory instruction: the lanes' accesses are put together to requests of a warp.
#include "counters.h"

#include <algorithm>
#include <deque>

#include "arena.h"
#include "state.h"

namespace ptx {

Counts counts;
std::vector<SiteCounts> site_counts;

namespace {

constexpr uint32_t kBank = 4, kBanks = 32;

// The n-th execution of an instruction by the lanes of a warp. Lanes come one after another, and
// through several executions before the next lane starts.
struct Request {
  uint32_t passed;       // lanes that have executed it or were predicated off
  uint32_t lanes;        // lanes that have accessed memory
  uint32_t address[32];  // in the arena or the shared window: both fit in 32 bits
};

// One warp at one instruction: its requests in order, those before `first` being complete.
struct Stream {
  uint32_t instruction, warp;
  uint32_t executed[32];
  uint32_t first;  // number of the request at `head`
  size_t head;     // in `requests`
  std::vector<Request> requests;
};

uint32_t first_site;
std::vector<SiteCounts> instructions;  // 2 per site: global and shared side (cp.async has both)
std::vector<Stream*> streams;          // per instruction and warp; null until used
std::deque<Stream> pool;
bool load_phase_open;  // a plain global load was seen since the last barrier

uint32_t instruction_of(uint32_t site, bool shared) { return (site - first_site) * 2 + shared; }

// ---- A complete request

struct Addresses {
  uint32_t of[32];
  int count;
};

// Distinct values, ascending. Lanes mostly come in order, so that this is one pass.
int distinct(uint32_t* values, int count) {
  if (!std::is_sorted(values, values + count)) std::sort(values, values + count);
  return std::unique(values, values + count) - values;
}

Addresses distinct_addresses(const Request& request) {
  Addresses result{{}, 0};
  for (uint32_t lanes = request.lanes; lanes; lanes &= lanes - 1)
    result.of[result.count++] = request.address[__builtin_ctz(lanes)];
  result.count = distinct(result.of, result.count);
  return result;
}

// An aligned access of at most 32 bytes lies in one sector.
uint32_t count_sectors(const Addresses& addresses) {
  uint32_t result = 0, last = ~0u;
  for (int i = 0; i < addresses.count; i++) {
    result += addresses.of[i] / kSector != last;
    last = addresses.of[i] / kSector;
  }
  return result;
}

// Passes through the banks for the words of these numbers: the most different ones in one bank.
uint32_t bank_passes(uint32_t* words, int count) {
  uint8_t in_bank[kBanks] = {};
  uint32_t most = 0;
  count = distinct(words, count);
  for (int i = 0; i < count; i++) most = std::max<uint32_t>(most, ++in_bank[words[i] % kBanks]);
  return most;
}

// Accesses of 4 bytes or less are served for the whole warp at once, of 8 bytes for 16 lanes, of
// 16 bytes for 8 lanes.
void count_wavefronts(SiteCounts& site, const Request& request) {
  uint32_t words_each = std::max(1u, site.bytes_per_lane / kBank), together = 32 / words_each;
  for (uint32_t first = 0; first < 32; first += together) {
    uint32_t words[32], count = 0;
    for (uint32_t lane = first; lane < first + together; lane++) {
      if (!(request.lanes >> lane & 1)) continue;
      for (uint32_t i = 0; i < words_each; i++) words[count++] = request.address[lane] / kBank + i;
    }
    if (!count) continue;
    site.wavefronts += bank_passes(words, count);
    site.ideal_wavefronts++;
  }
}

void add_requested_sectors(size_t offset, uint32_t sectors, Access kind) {
  if (Allocation* allocation = allocation_at(offset))
    allocation->requested_sectors[kind != Access::kRead] += sectors;
}

void count_request(uint32_t instruction, const Request& request) {
  if (!request.lanes) return;  // predicated off as a whole
  SiteCounts& site = instructions[instruction];
  uint32_t lanes = __builtin_popcount(request.lanes);
  site.requests++;
  site.lanes += lanes;
  site.bytes += uint64_t{lanes} * site.bytes_per_lane;
  Addresses addresses = distinct_addresses(request);
  site.distinct_bytes += uint64_t(addresses.count) * site.bytes_per_lane;
  if (site.shared) {
    count_wavefronts(site, request);
  } else {
    uint32_t sectors = count_sectors(addresses);
    site.sectors += sectors;
    add_requested_sectors(addresses.of[0], sectors, site.access);
  }
}

// ---- Putting requests together

Stream& stream_of(uint32_t instruction) {
  Stream*& stream = streams[instruction * kMaxWarps + current->warp];
  if (!stream) {
    pool.emplace_back();
    stream = &pool.back();
    stream->instruction = instruction;
    stream->warp = current->warp;
  }
  return *stream;
}

Request& next_request(Stream& stream) {
  size_t index = stream.executed[current->lane]++ - stream.first + stream.head;
  if (index >= stream.requests.size()) stream.requests.resize(index + 1);
  Request& request = stream.requests[index];
  request.passed |= 1u << current->lane;
  return request;
}

void count_complete(Stream& stream) {
  const uint32_t all = lanes_of_warp(stream.warp);
  while (stream.head < stream.requests.size() && stream.requests[stream.head].passed == all) {
    count_request(stream.instruction, stream.requests[stream.head]);
    stream.head++;
    stream.first++;
  }
  if (stream.head != stream.requests.size()) return;
  stream.requests.clear();
  stream.head = 0;
}

SiteCounts& instruction_counts(uint32_t instruction, Access kind, uint32_t bytes, uint32_t site,
                               bool shared) {
  SiteCounts& result = instructions[instruction];
  result.site = site;
  result.access = kind;
  result.shared = shared;
  result.bytes_per_lane = bytes;
  return result;
}

}  // namespace

void count_access(const Span& span, Access kind, uint32_t site) {
  uint32_t instruction = instruction_of(site, span.shared);
  if (instruction >= instructions.size()) return;  // a site of the host side's own
  instruction_counts(instruction, kind, span.bytes, site, span.shared);
  Stream& stream = stream_of(instruction);
  Request& request = next_request(stream);
  request.lanes |= 1u << current->lane;
  request.address[current->lane] = span.offset;
  if (request.passed == lanes_of_warp(current->warp)) count_complete(stream);
}

void count_load_phase() {
  if (!load_phase_open) counts.load_phases++;
  load_phase_open = true;
}

void skip(Space space, uint32_t site) {
  if (!options.count) return;
  uint32_t instruction = instruction_of(site, space == Space::kShared);
  if (instruction >= instructions.size()) return;
  Stream& stream = stream_of(instruction);
  if (next_request(stream).passed == lanes_of_warp(current->warp)) count_complete(stream);
}

void count_rows(const uint32_t* offsets, int rows, Access kind, uint32_t site) {
  constexpr int kTogether = 8, kRowBytes = 16;
  uint32_t instruction = instruction_of(site, true);
  if (!options.count || instruction >= instructions.size()) return;
  SiteCounts& counted = instruction_counts(instruction, kind, kRowBytes, site, true);
  counted.requests++;
  counted.lanes += rows;
  counted.bytes += rows * kRowBytes;
  uint32_t all[32];
  std::copy_n(offsets, rows, all);
  counted.distinct_bytes += distinct(all, rows) * kRowBytes;
  for (int first = 0; first < rows; first += kTogether) {
    uint32_t words[32], count = 0;
    for (int row = first; row < std::min(first + kTogether, rows); row++)
      for (uint32_t i = 0; i < kRowBytes / kBank; i++) words[count++] = offsets[row] / kBank + i;
    counted.wavefronts += bank_passes(words, count);
    counted.ideal_wavefronts++;
  }
}

void count_bulk(const Span& global, Access kind, uint32_t site) {
  uint32_t instruction = instruction_of(site, false);
  if (!options.count || instruction >= instructions.size() || !global.bytes) return;
  SiteCounts& counted = instruction_counts(instruction, kind, global.bytes, site, false);
  size_t first = global.offset / kSector, last = (global.offset + global.bytes - 1) / kSector;
  counted.requests++;
  counted.lanes++;
  counted.bytes += global.bytes;
  counted.distinct_bytes += global.bytes;
  counted.sectors += last - first + 1;
  add_requested_sectors(global.offset, last - first + 1, kind);
}

void counters_barrier() { load_phase_open = false; }

void counters_launch_start(uint32_t first, uint32_t site_count) {
  counts = Counts{};
  first_site = first;
  instructions.assign(site_count * 2, SiteCounts{});
  streams.assign(size_t{site_count} * 2 * kMaxWarps, nullptr);
  pool.clear();
  site_counts.clear();
}

void counters_block_end() {
  for (Stream& stream : pool) {
    for (size_t i = stream.head; i < stream.requests.size(); i++)
      count_request(stream.instruction, stream.requests[i]);
    stream.requests.clear();
    stream.head = 0;
    stream.first = 0;
    std::fill_n(stream.executed, 32, 0);
  }
  load_phase_open = false;
}

void counters_launch_end() {
  for (const SiteCounts& site : instructions)
    if (site.requests) site_counts.push_back(site);
  std::stable_sort(site_counts.begin(), site_counts.end(),
                   [](const SiteCounts& a, const SiteCounts& b) {
                     return a.sectors + a.wavefronts > b.sectors + b.wavefronts;
                   });
}

}  // namespace ptx
