// Reports: what the executor found wrong, once per kind and pair of instructions.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace ptx {

constexpr uint32_t kNoSite = 0;  // ids of registered sites begin at 1

struct Report {
  const char* kind;
  std::string message;
  uint64_t count;
  uint32_t site, other_site;  // kNoSite: none
  uint32_t block[3];
  int64_t thread;  // -1: found outside any thread
};

extern std::vector<Report> reports;  // of the last launch
void clear_reports();

// Counts a finding. Returns null if this kind was already reported for this pair of sites (or if
// there are max_reports already); otherwise the new report, whose message the caller fills in.
Report* new_report(const char* kind, uint32_t site, uint32_t other_site);
void report(const char* kind, uint32_t site, uint32_t other_site, const std::string& message);

// Leaves the running thread and every other one for good. Destructors of the fibers' frames do not
// run: own no heap memory in a frame that may call this.
[[noreturn]] void abort_launch();
[[noreturn]] void report_and_abort(const char* kind, uint32_t site, uint32_t other_site,
                                   const std::string& message);

// "global 'x'+4000 of 4000 bytes", "shared+16 of 128 bytes", "local+8 of 64 bytes"
std::string where(const void* p);
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));  // as printf

}  // namespace ptx
