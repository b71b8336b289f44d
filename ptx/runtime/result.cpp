// The last launch's result as JSON: counts, reports, memory instructions, instruction mix.
#include "result.h"

#include <cstdlib>
#include <map>

#include "launch.h"
#include "registry.h"
#include "state.h"

namespace ptx {

namespace {

// Appends to a JSON text; separators are set where they are needed.
class Json {
 public:
  Json& open(char bracket) {
    separate();
    out_ += bracket;
    fresh_ = true;
    return *this;
  }
  Json& close(char bracket) {
    out_ += bracket;
    fresh_ = false;
    return *this;
  }
  Json& key(const std::string& name) {
    string(name);
    out_ += ':';
    fresh_ = true;
    return *this;
  }
  Json& string(const std::string& value) {
    separate();
    out_ += '"';
    for (char c : value) {
      if (c == '"' || c == '\\') out_ += '\\';
      out_ += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
    }
    out_ += '"';
    return *this;
  }
  Json& number(int64_t value) { return raw(std::to_string(value)); }
  Json& raw(const std::string& value) {
    separate();
    out_ += value;
    return *this;
  }
  Json& numbers(std::initializer_list<int64_t> values) {
    open('[');
    for (int64_t value : values) number(value);
    return close(']');
  }
  Json& field(const std::string& name, const std::string& value) { return key(name).string(value); }
  Json& field(const std::string& name, uint64_t value) { return key(name).number(value); }
  std::string text() const { return out_; }

 private:
  void separate() {
    if (!fresh_) out_ += ',';
    fresh_ = false;
  }
  std::string out_;
  bool fresh_ = true;
};

using Mix = std::map<std::string, uint64_t>;

// Thread-instructions by opcode, from the executions of each basic block and the block's mix.
Mix instruction_mix(const Kernel& kernel) {
  Mix mix;
  for (uint32_t i = 0; i < kernel.block_count; i++) {
    if (!kernel.block_hits[i]) continue;
    const std::string block = kernel.block_mix[i];
    for (size_t at = 0; at < block.size();) {
      size_t end = std::min(block.find(' ', at), block.size()), equals = block.rfind('=', end);
      mix[block.substr(at, equals - at)] +=
          std::strtoull(block.c_str() + equals + 1, nullptr, 10) * kernel.block_hits[i];
      at = end + 1;
    }
  }
  return mix;
}

void add_access_counts(Json& json) {
  struct Total {
    uint64_t requests = 0, bytes = 0, sectors = 0;
  };
  Total global[3], shared;
  uint64_t wavefronts = 0, ideal = 0;
  for (const SiteCounts& site : site_counts) {
    Total& total = site.shared ? shared : global[static_cast<int>(site.access)];
    total.requests += site.requests;
    total.bytes += site.bytes;
    total.sectors += site.sectors;
    wavefronts += site.wavefronts;
    ideal += site.ideal_wavefronts;
  }
  const char* names[3] = {"global_load_", "global_store_", "global_atomic_"};
  for (int i = 0; i < 3; i++) {
    json.field(std::string(names[i]) + "requests", global[i].requests);
    json.field(std::string(names[i]) + "bytes", global[i].bytes);
    json.field(std::string(names[i]) + "sectors", global[i].sectors);
  }
  json.field("shared_requests", shared.requests).field("shared_bytes", shared.bytes);
  json.field("shared_wavefronts", wavefronts).field("shared_ideal_wavefronts", ideal);
}

void add_counts(Json& json, const Mix& mix) {
  uint64_t instructions = 0;
  for (const auto& entry : mix) instructions += entry.second;
  json.key("counts").open('{');
  add_access_counts(json);
  json.field("mma", counts.mma).field("wgmma", counts.wgmma);
  json.field("ldmatrix", counts.ldmatrix).field("stmatrix", counts.stmatrix);
  json.field("shuffles", counts.shuffles).field("barriers", counts.barriers);
  json.field("warp_syncs", counts.warp_syncs).field("async_copies", counts.async_copies);
  json.field("bulk_copies", counts.bulk_copies).field("load_phases", counts.load_phases);
  json.field("blocks", counts.blocks).field("blocks_run", counts.blocks_run);
  json.field("switches", counts.switches).field("accesses", counts.accesses);
  json.field("same_value_writes", counts.same_value_writes).field("instructions", instructions);
  json.close('}');
}

void add_reports(Json& json, const std::string& kernel) {
  json.key("reports").open('[');
  for (const Report& report : reports) {
    SiteText site = site_text(report.site);
    json.open('{').field("kind", report.kind).field("message", report.message);
    json.field("count", report.count).field("kernel", kernel);
    json.field("source", site.source).field("opcode", site.opcode);
    json.key("ptx_line").number(site.ptx_line).key("other_source");
    if (report.other_site == kNoSite)
      json.raw("null");
    else
      json.string(site_text(report.other_site).source);
    json.key("block").numbers({report.block[0], report.block[1], report.block[2]});
    json.key("thread").number(report.thread).close('}');
  }
  json.close(']');
}

void add_sites(Json& json) {
  const char* accesses[] = {"read", "write", "atomic"};
  json.key("sites").open('[');
  for (const SiteCounts& counted : site_counts) {
    SiteText site = site_text(counted.site);
    json.open('{').field("source", site.source).field("opcode", site.opcode);
    json.key("ptx_line").number(site.ptx_line);
    json.field("space", counted.shared ? "shared" : "global");
    json.field("access", accesses[static_cast<int>(counted.access)]);
    json.field("bytes_per_lane", counted.bytes_per_lane).field("requests", counted.requests);
    json.field("lanes", counted.lanes).field("bytes", counted.bytes);
    json.field("distinct_bytes", counted.distinct_bytes).field("sectors", counted.sectors);
    json.field("wavefronts", counted.wavefronts);
    json.field("ideal_wavefronts", counted.ideal_wavefronts).close('}');
  }
  json.close(']');
}

}  // namespace

std::string result_json() {
  const Launch& launch = last_launch;
  if (!launch.kernel) return "{}";
  const Mix mix = instruction_mix(*launch.kernel);
  Json json;
  json.open('{').field("kernel", launch.kernel->name);
  json.key("grid").numbers({launch.grid.x, launch.grid.y, launch.grid.z});
  json.key("block").numbers({launch.block.x, launch.block.y, launch.block.z});
  json.field("dynamic_shared", launch.dynamic_shared);
  json.field("static_shared", launch.kernel->static_shared);
  json.key("seconds").raw(text("%.9g", launch.seconds));
  add_counts(json, mix);
  add_reports(json, launch.kernel->name);
  add_sites(json);
  json.key("instructions").open('{');
  for (const auto& [opcode, executed] : mix) json.field(opcode, executed);
  json.close('}').close('}');
  return json.text();
}

}  // namespace ptx
