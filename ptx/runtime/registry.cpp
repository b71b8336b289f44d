// Registered modules. Generated files register themselves while their shared object is loaded, so
// nothing here may depend on the order of static initialisation.
#include "registry.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

namespace ptx {

namespace {

struct Registered {
  const Kernel* kernel;
  SiteRange sites;
};

struct Registry {
  std::vector<const char*> sites{""};  // ids begin at 1: 0 is "no site"
  std::vector<Registered> kernels;
  std::map<const unsigned char*, const Variable*> variables;  // by address
};

Registry& registry() {
  static Registry instance;
  return instance;
}

}  // namespace

uint32_t register_module(const Module& module) {
  Registry& r = registry();
  SiteRange range{static_cast<uint32_t>(r.sites.size()), module.site_count};
  r.sites.insert(r.sites.end(), module.sites, module.sites + module.site_count);
  for (uint32_t i = 0; i < module.kernel_count; i++)
    r.kernels.push_back({&module.kernels[i], range});
  for (uint32_t i = 0; i < module.variable_count; i++)
    r.variables[static_cast<unsigned char*>(module.variables[i].data)] = &module.variables[i];
  return range.first;
}

SiteText site_text(uint32_t site) {
  const auto& sites = registry().sites;
  std::string whole = site < sites.size() ? sites[site] : "";
  size_t first = whole.find('|');
  if (first == std::string::npos) return {whole, "", -1};
  size_t second = whole.find('|', first + 1);
  SiteText result{whole.substr(0, first), whole.substr(first + 1, second - first - 1), -1};
  if (second != std::string::npos) result.ptx_line = std::atoll(whole.c_str() + second + 1);
  return result;
}

std::string site_source(uint32_t site) {
  SiteText parts = site_text(site);
  if (parts.source.empty() && parts.opcode.empty()) return "an unknown place";
  return parts.source + " (" + parts.opcode + ")";
}

SiteRange sites_of(const Kernel& kernel) {
  for (const Registered& registered : registry().kernels)
    if (registered.kernel == &kernel) return registered.sites;
  return {0, 0};
}

uint32_t kernel_count() { return registry().kernels.size(); }

const Kernel* kernel_at(int index) {
  const auto& kernels = registry().kernels;
  return index >= 0 && static_cast<size_t>(index) < kernels.size() ? kernels[index].kernel
                                                                   : nullptr;
}

int find_kernel(const char* name) {
  const auto& kernels = registry().kernels;
  for (size_t i = kernels.size(); i-- > 0;)  // the latest of that name
    if (!std::strcmp(kernels[i].kernel->name, name)) return static_cast<int>(i);
  return -1;
}

const Variable* variable_at(const void* p) {
  const auto& variables = registry().variables;
  const auto* u = static_cast<const unsigned char*>(p);
  auto after = variables.upper_bound(u);
  if (after == variables.begin()) return nullptr;
  const Variable* variable = std::prev(after)->second;
  return u < static_cast<unsigned char*>(variable->data) + variable->bytes ? variable : nullptr;
}

}  // namespace ptx
