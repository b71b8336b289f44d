// Registered modules: kernels, the texts of their sites, and their module-scope variables.
#pragma once
#include <cstdint>
#include <string>

#include "device.h"

namespace ptx {

// "file.cu:12<caller.cuh:70|opcode|ptx line", taken apart.
struct SiteText {
  std::string source, opcode;
  int64_t ptx_line;  // -1: none given
};
SiteText site_text(uint32_t site);
std::string site_source(uint32_t site);  // "file.cu:12 (opcode)", for messages

struct SiteRange {
  uint32_t first, count;
};
SiteRange sites_of(const Kernel&);  // of the kernel's module

uint32_t kernel_count();
const Kernel* kernel_at(int index);          // null: there is none
int find_kernel(const char* name);           // its index, or -1: not registered
const Variable* variable_at(const void* p);  // null: p is in no module-scope variable

}  // namespace ptx
