// A bulk or tensor copy on its way between global and shared memory.
#pragma once
#include "async_state.h"
#include "tensor_map.h"

namespace ptx {

// What tensor_reduce does with a byte's element: PTX's .add .min .max .inc .dec .and .or .xor.
enum class BulkReduction : uint32_t { kAdd, kMin, kMax, kInc, kDec, kAnd, kOr, kXor, kNone };

// A plain bulk copy is one of a one-dimensional tensor of bytes.
struct BulkBox {
  TensorMap map;
  int32_t coordinates[kMaxTensorDims];  // innermost first, as in PTX
  uint32_t shared;                      // offset of the box in shared memory
  uint32_t bytes;                       // of the whole box
};

struct BulkLoad {
  BulkBox box;
  uint32_t mbarrier, site;
  SyncTimes issued;  // what the issuing thread's warp had done
};

struct BulkStore {
  BulkBox box;
  BulkReduction reduction;
  uint32_t site;
  bool source_read, finished;  // wait_group.read, wait_group has covered it
};

}  // namespace ptx
