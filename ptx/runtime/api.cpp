// The C interface for hosts: Python through ctypes, and the stand-in CUDA runtime library.
#include <cstring>
#include <map>
#include <string>

#include "arena.h"
#include "launch.h"
#include "registry.h"
#include "result.h"
#include "shadow.h"
#include "state.h"
#include "tensor_map.h"

using namespace ptx;

namespace {

std::string result_text;

using Setter = void (*)(int64_t value);
const std::map<std::string, Setter> setters = {
    {"race", [](int64_t value) { options.race = value; }},
    {"init", [](int64_t value) { options.init = value; }},
    {"count", [](int64_t value) { options.count = value; }},
    {"schedule", [](int64_t value) { options.schedule = static_cast<Schedule>(value); }},
    {"seed", [](int64_t value) { options.seed = value; }},
    {"preempt", [](int64_t value) { options.preempt = value; }},
    {"async_early", [](int64_t value) { options.async_early = value; }},
    {"mma_rounding", [](int64_t value) { options.mma_rounding = value; }},
    {"jitter", [](int64_t value) { options.jitter = value; }},
    {"shared_limit", [](int64_t value) { options.shared_limit = value; }},
    {"max_reports", [](int64_t value) { options.max_reports = value; }},
    {"sample", [](int64_t value) { options.sample = value; }},
    {"poison_races", [](int64_t value) { options.poison_races = value; }},
    {"spin_limit", [](int64_t value) { options.spin_limit = value; }},
};

// The flags of bytes of the arena; null: not (wholly) in it.
uint8_t* flags_at(const void* p, size_t n) {
  if (!in_arena(p)) return nullptr;
  size_t offset = static_cast<const unsigned char*>(p) - arena;
  return n <= kArenaBytes - offset ? arena_flags + offset : nullptr;
}

// Sets one flag of each byte to the given value; values null: to 1.
void set_flag(void* p, size_t n, Flag flag, const uint8_t* values) {
  uint8_t* flags = flags_at(p, n);
  if (!flags) return;
  for (size_t i = 0; i < n; i++)
    flags[i] = !values || values[i] ? flags[i] | flag : flags[i] & ~flag;
}

}  // namespace

extern "C" {

// The options are described in state.h. 0, or -1: no such option.
int ptx_set_option(const char* name, int64_t value) {
  auto setter = setters.find(name);
  if (setter == setters.end()) return -1;
  setter->second(value);
  return 0;
}

// Guard zones of at least 1 MiB lie around an allocation. Unwritten memory is filled with 0xff.
// NULL: the arena is full (or the system gives no address space).
void* ptx_alloc(size_t bytes, const char* name, size_t align, int written) {
  return allocate(bytes, name, align, written);
}
void ptx_free(void* p) { release_allocation(p); }
void ptx_free_all() { release_all_allocations(); }

// Which bytes were written before, one byte per byte; NULL: all.
void ptx_set_written(void* p, size_t n, const uint8_t* flags) { set_flag(p, n, kWritten, flags); }
void ptx_get_written(const void* p, size_t n, uint8_t* flags) {
  const uint8_t* from = flags_at(p, n);
  for (size_t i = 0; from && i < n; i++) flags[i] = (from[i] & kWritten) != 0;
}
// Bytes that no view passed to the kernel covers are out of bounds though allocated.
void ptx_set_accessible(void* p, size_t n, const uint8_t* flags) {
  set_flag(p, n, kAllocated, flags);
}

// Of the last launch: bytes read, bytes written, 32-byte sectors read, written, touched; and the
// sectors that requests for reading and for writing asked for (of the whole allocation).
void ptx_footprint(const void* p, size_t n, uint64_t out[7]) { footprint(p, n, out); }

// The kernel's index; -1: not registered.
int ptx_find_kernel(const char* name) { return find_kernel(name); }
int ptx_kernel_count() { return static_cast<int>(kernel_count()); }
const char* ptx_kernel_name(int index) {
  const Kernel* kernel = kernel_at(index);
  return kernel ? kernel->name : nullptr;
}
// Static shared bytes, local bytes, parameters, parameter bytes, most threads, required x, y, z.
void ptx_kernel_info(int index, uint64_t out[8]) {
  std::memset(out, 0, 8 * sizeof *out);
  const Kernel* kernel = kernel_at(index);
  if (!kernel) return;
  const uint64_t info[8] = {kernel->static_shared,       kernel->local_bytes,
                            kernel->parameter_count,     kernel->parameter_bytes,
                            kernel->max_threads,         kernel->required_threads[0],
                            kernel->required_threads[1], kernel->required_threads[2]};
  std::memcpy(out, info, sizeof info);
}
// Offset and bytes of a parameter.
void ptx_kernel_parameter(int index, int i, uint32_t out[2]) {
  out[0] = out[1] = 0;
  const Kernel* kernel = kernel_at(index);
  if (!kernel || i < 0 || static_cast<uint32_t>(i) >= kernel->parameter_count) return;
  out[0] = kernel->parameters[i].offset;
  out[1] = kernel->parameters[i].bytes;
}

// The number of reports, or -1: no such kernel.
int ptx_launch(int index, const uint32_t grid[3], const uint32_t block[3], uint64_t dynamic_shared,
               const void* parameters) {
  const Kernel* kernel = kernel_at(index);
  if (!kernel) return -1;
  launch(*kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_shared,
         static_cast<const unsigned char*>(parameters));
  return static_cast<int>(reports.size());
}
// JSON; valid until the next call.
const char* ptx_result() {
  result_text = result_json();
  return result_text.c_str();
}

// cuTensorMapEncodeTiled (tensor_map.h). Null, or one sentence saying what is refused.
const char* ptx_encode_tensor_map(void* map, int data_type, uint32_t rank, const void* address,
                                  const uint64_t* sizes, const uint64_t* strides,
                                  const uint32_t* box, const uint32_t* element_strides,
                                  int interleave, int swizzle, int fill) {
  return encode_tensor_map(map, data_type, rank, address, sizes, strides, box, element_strides,
                           interleave, swizzle, fill);
}

}  // extern "C"
