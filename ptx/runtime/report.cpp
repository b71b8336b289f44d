// Reports: one entry per kind and pair of instructions, with a count.
#include "report.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace ptx {

std::vector<Report> reports;

void clear_reports() { reports.clear(); }

Report* new_report(const char* kind, uint32_t site, uint32_t other_site) {
  for (Report& known : reports) {
    if (known.site != site || known.other_site != other_site || std::strcmp(known.kind, kind))
      continue;
    known.count++;
    return nullptr;
  }
  if (reports.size() >= options.max_reports) return nullptr;
  reports.push_back({kind,
                     "",
                     1,
                     site,
                     other_site,
                     {block_index.x, block_index.y, block_index.z},
                     current ? int64_t{current->linear} : -1});
  return &reports.back();
}

void report(const char* kind, uint32_t site, uint32_t other_site, const std::string& message) {
  if (Report* r = new_report(kind, site, other_site)) r->message = message;
}

void report_and_abort(const char* kind, uint32_t site, uint32_t other_site,
                      const std::string& message) {
  report(kind, site, other_site, message);
  abort_launch();
}

void fatal(const char* kind, const char* message, uint32_t site) {
  report(kind, site, kNoSite, message);
  abort_launch();
}

std::string text(const char* format, ...) {
  char buffer[600];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace ptx
