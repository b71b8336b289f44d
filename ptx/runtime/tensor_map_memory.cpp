// Tensor maps where kernels keep them: reading one for a copy, and making one on the device.
//
// Device-made maps as Triton and CUTLASS make them: zeros or a copied map in shared memory, fields
// set by tensormap.replace, the 128 bytes moved to global memory by tensormap.cp_fenceproxy, and a
// fence.proxy.tensormap with acquire before the first copy that uses them.
#include "tensor_map_memory.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "async_state.h"
#include "launch.h"
#include "registry.h"

namespace ptx {

namespace {

constexpr uint32_t kMapBytes = sizeof(TensorMap), kMapAlignment = 64;

// Maps in global memory that this launch has written; true: acquired by a fence since.
std::unordered_map<const void*, bool> made_maps;

[[noreturn]] void bad_map(const void* p, uint32_t site, const char* why) {
  report_and_abort("wild-access", site, kNoSite,
                   text("tensor map at %s: %s", where(p).c_str(), why));
}

// The map to change; memory filled with zeros becomes an empty map.
TensorMap load_for_change(const void* p, uint32_t site) {
  TensorMap map;
  std::memcpy(&map, p, kMapBytes);
  const auto* bytes = static_cast<const unsigned char*>(p);
  if (std::all_of(bytes, bytes + kMapBytes, [](unsigned char byte) { return byte == 0; })) {
    map.magic = kTensorMapMagic;
  }
  if (map.magic != kTensorMapMagic) bad_map(p, site, "neither a tensor map nor zeros");
  return map;
}

void set_field(TensorMap& map, TensorField field, uint32_t ordinal, uint64_t value, const void* p,
               uint32_t site) {
  const uint32_t limit = field == TensorField::kGlobalStride ? kMaxTensorDims - 1 : kMaxTensorDims;
  if (ordinal >= limit) bad_map(p, site, "tensormap.replace of a dimension it does not have");
  const auto small = static_cast<uint8_t>(std::min<uint64_t>(value, 0xff));
  switch (field) {
    case TensorField::kGlobalAddress:
      map.address = value;
      return;
    case TensorField::kRank:  // PTX gives the rank less one
      map.dims = static_cast<uint8_t>(small + 1);
      return;
    case TensorField::kBoxDim:
      map.box[ordinal] = static_cast<uint32_t>(value);
      return;
    case TensorField::kGlobalDim:
      map.sizes[ordinal] = static_cast<uint32_t>(value);
      return;
    case TensorField::kGlobalStride:
      map.strides[ordinal] = value;
      return;
    case TensorField::kElementStride:
      map.element_strides[ordinal] = small;
      return;
    case TensorField::kElementType:
      map.element = static_cast<TensorElement>(small);
      return;
    case TensorField::kInterleaveLayout:
      map.interleave = small;
      return;
    case TensorField::kSwizzleMode:
      map.swizzle = static_cast<TensorSwizzle>(small);
      return;
    case TensorField::kSwizzleAtomicity:
      if (value != 0) fatal("unsupported", "a swizzle atomicity other than 16 bytes", site);
      return;
    case TensorField::kFillMode:
      map.fill_nan = small;
      return;
  }
}

struct CopyOperands {
  unsigned char* to;
  const unsigned char* from;
};

// The lanes wait for each other, and Triton relies on it for the fields that lane 0 has set.
void resolve_copy_fence(Fiber* const* lanes, uint32_t mask) {
  join_lanes(lanes[0]->warp, mask);
  const auto& x = operands<CopyOperands>(lanes, 0);
  const uint32_t site = lanes[0]->site;
  const Span from = span(x.from, kMapBytes, Space::kShared, site, /*writes=*/false, kMapAlignment);
  const Span to = span(x.to, kMapBytes, Space::kGlobal, site, /*writes=*/true, kMapAlignment);
  touch(from, Access::kRead, site);
  touch(to, Access::kWrite, site);
  std::memcpy(x.to, x.from, kMapBytes);
  made_maps[x.to] = false;
}

}  // namespace

TensorMap read_tensor_map(const void* p, int dims, uint32_t site) {
  if (!in_parameters(p, kMapBytes)) {
    const Span map = span(p, kMapBytes, Space::kGlobal, site, /*writes=*/false, kMapAlignment);
    touch(map, Access::kRead, site);
    const auto made = made_maps.find(p);
    if (made != made_maps.end() && !made->second) {
      report("missing-proxy-fence", site, kNoSite,
             "this launch made the tensor map at " + where(p) +
                 ", and no fence.proxy.tensormap has acquired it since");
    }
  }
  TensorMap map;
  std::memcpy(&map, p, kMapBytes);
  if (const char* error = tensor_map_error(map)) bad_map(p, site, error);
  if (map.dims != dims) bad_map(p, site, "its rank differs from the instruction's");
  const TensorElement e = map.element;
  if (e == TensorElement::kF32Ftz || e == TensorElement::kTf32 || e == TensorElement::kTf32Ftz) {
    fatal("unsupported", "tensor maps of type f32.ftz, tf32 and tf32.ftz", site);
  }
  return map;
}

void tensor_map_replace(TensorField field, void* p, uint32_t ordinal, uint64_t value,
                        uint32_t site) {
  const Span bytes = span(p, kMapBytes, Space::kGeneric, site, /*writes=*/true, kMapAlignment);
  touch(bytes, Access::kRead, site);
  TensorMap map = load_for_change(p, site);
  set_field(map, field, ordinal, value, p, site);
  touch(bytes, Access::kWrite, site);
  std::memcpy(p, &map, kMapBytes);
  if (!bytes.shared) made_maps[p] = false;
}

void tensor_map_copy_fence(void* global_map, const void* shared_map, uint32_t site) {
  CopyOperands x{static_cast<unsigned char*>(global_map),
                 static_cast<const unsigned char*>(shared_map)};
  collective("tensormap.cp_fenceproxy", ~0u, site, &x, resolve_copy_fence);
}

void fence_proxy_tensormap(const void* map, uint32_t) {
  const auto made = made_maps.find(map);
  if (made != made_maps.end()) made->second = true;
}

void tensor_map_launch_start() { made_maps.clear(); }

}  // namespace ptx
