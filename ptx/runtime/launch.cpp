// A kernel launch: the checks a driver makes, then the grid's blocks one after another.
#include "launch.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "arena.h"
#include "barriers.h"
#include "fibers.h"
#include "registry.h"
#include "shadow.h"
#include "state.h"

namespace ptx {

Options options;
Dim3 block_index, block_dim, grid_dim;
Launch last_launch;

namespace {

constexpr uint32_t kSharedAlignment = 128, kLocalAlignment = 16;
constexpr uint32_t kMaxGrid[3] = {0x7fffffff, 65535, 65535}, kMaxBlock[3] = {1024, 1024, 64};
constexpr char kAxes[] = "xyz";

const unsigned char* launch_parameters;
uint32_t shared_static, shared_total, local_window_bytes, local_stride;
std::vector<unsigned char> local_windows;  // one per thread

bool refuse(const std::string& message) {
  report("bad-launch", kNoSite, kNoSite, message);
  return false;
}

bool sizes_are_legal(const Kernel& kernel, const uint32_t grid[3], const uint32_t block[3]) {
  for (int i = 0; i < 3; i++) {
    if (grid[i] == 0 || grid[i] > kMaxGrid[i])
      return refuse(text("gridDim.%c is %u, must be 1 to %u", kAxes[i], grid[i], kMaxGrid[i]));
    if (block[i] == 0 || block[i] > kMaxBlock[i])
      return refuse(text("blockDim.%c is %u, must be 1 to %u", kAxes[i], block[i], kMaxBlock[i]));
    if (kernel.required_threads[i] && block[i] != kernel.required_threads[i])
      return refuse(text("blockDim.%c is %u, the kernel was compiled for %u (.reqntid)", kAxes[i],
                         block[i], kernel.required_threads[i]));
  }
  uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  if (threads > kMaxThreads)
    return refuse(
        text("%llu threads in a block, at most %u", (unsigned long long)threads, kMaxThreads));
  if (kernel.max_threads && threads > kernel.max_threads)
    return refuse(text("%llu threads in a block, the kernel was compiled for at most %u (.maxntid)",
                       (unsigned long long)threads, kernel.max_threads));
  return true;
}

bool launch_is_legal(const Kernel& kernel, Dim3 grid, Dim3 block, uint64_t dynamic,
                     const unsigned char* parameters) {
  const uint32_t g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  if (!sizes_are_legal(kernel, g, b)) return false;
  uint64_t limit = std::min<uint64_t>(options.shared_limit, kSharedBytes);
  if (shared_static + dynamic > limit)
    return refuse(text("%llu bytes of shared memory (%u static), at most %llu",
                       (unsigned long long)(shared_static + dynamic), shared_static,
                       (unsigned long long)limit));
  if (kernel.parameter_bytes && !parameters)
    return refuse(text("no parameters given, the kernel takes %u (%u bytes)",
                       kernel.parameter_count, kernel.parameter_bytes));
  return true;
}

// The blocks to run, in the order to run them.
std::vector<uint64_t> block_order(Dim3 grid) {
  uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  std::vector<uint64_t> order;
  if (options.sample && options.sample < blocks) {
    for (uint64_t i = 0; i < options.sample; i++) order.push_back(i * blocks / options.sample);
  } else {
    for (uint64_t i = 0; i < blocks; i++) order.push_back(i);
  }
  if (options.schedule == Schedule::kReverse) std::reverse(order.begin(), order.end());
  if (options.schedule >= Schedule::kPriorities)
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  return order;
}

void start_threads() {
  std::fill(local_windows.begin(), local_windows.end(), 0xff);
  Dim3 index{0, 0, 0};
  for (uint32_t i = 0; i < thread_count; i++) {
    Fiber& fiber = fibers[i];
    fiber.index = index;
    fiber.linear = i;
    fiber.lane = i % 32;
    fiber.warp = i / 32;
    fiber.local = local_windows.data() + size_t{i} * local_stride;
    fiber.site = kNoSite;
    fiber.waits_for = nullptr;
    fiber.clock = 1;  // nobody knows of anything yet: the others' clocks for it are 0
    fiber.proxy_fences = 0;
    fiber.async = nullptr;
    if (++index.x == block_dim.x) {
      index.x = 0;
      if (++index.y == block_dim.y) index.y = 0, index.z++;
    }
  }
}

bool run(uint64_t number, const Kernel& kernel, const unsigned char* parameters) {
  block_index = {uint32_t(number % grid_dim.x), uint32_t(number / grid_dim.x % grid_dim.y),
                 uint32_t(number / grid_dim.x / grid_dim.y)};
  shadow_block_start();
  races_block_start();
  barriers_block_start();
  meetings_block_start();
  start_threads();
  async_block_start();
  bool finished = run_block(kernel.body, parameters);
  counters_block_end();
  counts.blocks_run++;
  return finished;
}

void prepare(const Kernel& kernel, Dim3 grid, Dim3 block) {
  grid_dim = grid;
  block_dim = block;
  thread_count = block.x * block.y * block.z;
  warp_count = (thread_count + 31) / 32;
  local_window_bytes = kernel.local_bytes;
  local_stride = (local_window_bytes + kLocalAlignment - 1) / kLocalAlignment * kLocalAlignment;
  local_windows.resize(size_t{local_stride} * thread_count);
  std::fill_n(kernel.block_hits, kernel.block_count, 0);
  races_launch_start();
  async_launch_start();
  scheduler_launch_start();
}

}  // namespace

uint32_t dynamic_shared() { return shared_static; }
uint32_t total_shared() { return shared_total; }
uint32_t local_bytes() { return local_window_bytes; }

bool in_parameters(const void* p, uint32_t bytes) {
  const uint32_t total = last_launch.kernel->parameter_bytes;
  const size_t offset = static_cast<const unsigned char*>(p) - launch_parameters;
  return offset < total && bytes <= total - offset;
}

const Thread* local_window_owner(const void* p) {
  size_t offset = static_cast<const unsigned char*>(p) - local_windows.data();
  return offset < local_windows.size() ? &fibers[offset / local_stride] : nullptr;
}

void launch(const Kernel& kernel, Dim3 grid, Dim3 block, uint64_t dynamic,
            const unsigned char* parameters) {
  auto begin = std::chrono::steady_clock::now();
  last_launch = {&kernel, grid, block, dynamic, 0};
  launch_parameters = parameters;
  clear_reports();
  SiteRange sites = sites_of(kernel);
  counters_launch_start(sites.first, sites.count);
  arena_launch_start();
  shadow_launch_start();
  std::fill_n(kernel.block_hits, kernel.block_count, 0);
  if (!reserve_memory() || !reserve_stacks()) {
    refuse("the system gives no address space for the executor's memory and stacks");
    return;
  }
  shared_static = kernel.static_shared;
  if (dynamic) shared_static = (shared_static + kSharedAlignment - 1) & ~(kSharedAlignment - 1);
  if (!launch_is_legal(kernel, grid, block, dynamic, parameters)) return;
  shared_total = shared_static + dynamic;
  prepare(kernel, grid, block);
  counts.blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t number : block_order(grid))
    if (!run(number, kernel, parameters)) break;
  counters_launch_end();
  last_launch.seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace ptx
