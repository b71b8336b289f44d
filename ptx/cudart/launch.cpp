// Stubs, kernels and launches: nvcc's registration calls and everything that names a kernel.
#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>
#include <vector>

#include "cudart.h"

namespace ptx::cudart {

Device device;
cudaError_t last_error = cudaSuccess;

namespace {

// ptx/host.py. `find` gives a kernel's number or -1; `launch` runs it and gives a cudaError_t;
// `refuse` raises a sentence in Python once the host code has returned.
using Find = int (*)(const char* name);
using Launch = int (*)(int kernel, const uint32_t* grid, const uint32_t* block, uint64_t shared,
                       const void* parameters);
using Refuse = void (*)(const char* sentence);

Find find_kernel;
Launch launch_kernel;
Refuse refuse;

struct Function {
  std::string name;              // mangled
  int dynamic_shared_limit = 0;  // bytes; 0: cudaFuncSetAttribute was not asked for any
};

// By the address of the host's stub. A function's static object, for others' constructors use it.
std::unordered_map<const void*, Function>& functions() {
  static std::unordered_map<const void*, Function> all;
  return all;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
Configuration pushed;  // by <<<...>>>, for the stub that is called next

struct KernelInfo {  // ptx_kernel_info
  uint64_t static_shared, local_bytes, parameter_count, parameter_bytes, max_threads, required[3];
};

// The kernel behind a stub and its facts; an error where there is none.
cudaError_t look_up(const void* stub, Function** function, int* kernel, KernelInfo* info) {
  const auto found = functions().find(stub);
  if (found == functions().end()) return cudaErrorInvalidDeviceFunction;
  *function = &found->second;
  *kernel = find_kernel(found->second.name.c_str());
  if (*kernel < 0) return cudaErrorInvalidDeviceFunction;
  static_assert(sizeof(KernelInfo) == 8 * sizeof(uint64_t));
  ptx_kernel_info(*kernel, &info->static_shared);
  return cudaSuccess;
}

// What is wrong with a launch (too many threads, too much shared memory) the runtime reports.
cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared) {
  Function* function = nullptr;
  int kernel = 0;
  KernelInfo info;
  if (const cudaError_t error = look_up(stub, &function, &kernel, &info)) return answer(error);
  std::vector<unsigned char> parameters(info.parameter_bytes);
  for (uint64_t i = 0; i < info.parameter_count; ++i) {
    uint32_t place[2];  // offset, bytes
    ptx_kernel_parameter(kernel, static_cast<int>(i), place);
    std::memcpy(parameters.data() + place[0], arguments[i], place[1]);
  }
  const uint32_t grid_size[3] = {grid.x, grid.y, grid.z};
  const uint32_t block_size[3] = {block.x, block.y, block.z};
  const int64_t limit = function->dynamic_shared_limit + static_cast<int64_t>(info.static_shared);
  const bool asked = function->dynamic_shared_limit > 0;
  ptx_set_option("shared_limit",
                 asked ? std::min<int64_t>(limit, device.shared_per_block) : kSharedWithoutAsking);
  const int error = launch_kernel(kernel, grid_size, block_size, shared, parameters.data());
  ptx_set_option("shared_limit", device.shared_per_block);
  return answer(static_cast<cudaError_t>(error));
}

// Null where an attribute changes nothing here, else what is not modelled.
const char* refusal(const cudaLaunchAttribute& attribute) {
  switch (attribute.id) {
    case cudaLaunchAttributeIgnore:
    case cudaLaunchAttributePriority:
    case cudaLaunchAttributeAccessPolicyWindow:
    case cudaLaunchAttributePreferredSharedMemoryCarveout:
    case cudaLaunchAttributeProgrammaticStreamSerialization:  // a launch begins when all is done
      return nullptr;
    case cudaLaunchAttributeClusterDimension:
      if (attribute.val.clusterDim.x * attribute.val.clusterDim.y * attribute.val.clusterDim.z == 1)
        return nullptr;
      return "cudaLaunchKernelExC: clusters of more than one block are not modelled";
    case cudaLaunchAttributeCooperative:
      if (!attribute.val.cooperative) return nullptr;
      return "cudaLaunchKernelExC: cooperative launches are not modelled, blocks run one by one";
    default:
      return "cudaLaunchKernelExC: a launch attribute that is not modelled";
  }
}

}  // namespace

cudaError_t refused(const char* sentence) {
  refuse(sentence);
  return answer(cudaErrorNotSupported);
}

}  // namespace ptx::cudart

using namespace ptx::cudart;

extern "C" {

// A session begins: from now on its GPU, and no error pending.
__attribute__((visibility("default"))) void ptx_cudart_connect(Find find, Launch launch,
                                                               Refuse refuse_it,
                                                               const Device* session_device) {
  find_kernel = find;
  launch_kernel = launch;
  refuse = refuse_it;
  device = *session_device;
  last_error = cudaSuccess;
}

// ---- What nvcc generates calls of

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  functions()[stub].name = name;
}
// Variables live in the kernels' PTX; host code reaches them by cudaMemcpyToSymbol, which is
// absent.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<cudaStream_t*>(stream) = pushed.stream;
  return cudaSuccess;
}

// ---- Launches. A kernel's handle is the address of its stub.

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments,
                             size_t shared, cudaStream_t) {
  return launch(stub, grid, block, arguments, shared);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub,
                                void** arguments) {
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (const char* sentence = refusal(config->attrs[i])) return refused(sentence);
  }
  return launch(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  Function* function = nullptr;
  int kernel = 0;
  KernelInfo info;
  if (const cudaError_t error = look_up(stub, &function, &kernel, &info)) return answer(error);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return refused("cudaFuncSetAttribute: an attribute that is not modelled");
  }
  if (value < 0 || value + static_cast<int64_t>(info.static_shared) > device.shared_per_block) {
    return answer(cudaErrorInvalidValue);
  }
  function->dynamic_shared_limit = value;
  return cudaSuccess;
}

// numRegs stays 0: registers are given out by ptxas, which does not run here.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  Function* function = nullptr;
  int kernel = 0;
  KernelInfo info;
  if (const cudaError_t error = look_up(stub, &function, &kernel, &info)) return answer(error);
  *attributes = {};
  attributes->sharedSizeBytes = info.static_shared;
  attributes->localSizeBytes = info.local_bytes;
  attributes->maxThreadsPerBlock = info.max_threads ? static_cast<int>(info.max_threads) : 1024;
  attributes->ptxVersion = attributes->binaryVersion = device.major * 10 + device.minor;
  const int unasked = kSharedWithoutAsking - static_cast<int>(info.static_shared);
  attributes->maxDynamicSharedSizeBytes =
      function->dynamic_shared_limit > 0 ? function->dynamic_shared_limit : unasked;
  return cudaSuccess;
}

// By threads and shared memory; what the registers would allow is not known before ptxas.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub,
                                                          int threads, size_t dynamic_shared) {
  Function* function = nullptr;
  int kernel = 0;
  KernelInfo info;
  if (const cudaError_t error = look_up(stub, &function, &kernel, &info)) return answer(error);
  if (threads < 1 || threads > kThreadsPerBlock) return answer(cudaErrorInvalidValue);
  const int warps_threads = (threads + 31) / 32 * 32;
  const uint64_t shared = info.static_shared + dynamic_shared + kSystemSharedPerBlock;
  const int by_shared = static_cast<int>(device.shared_per_multiprocessor / shared);
  *blocks =
      std::min({kBlocksPerMultiprocessor, kThreadsPerMultiprocessor / warps_threads, by_shared});
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, stub, threads, shared);
}

}  // extern "C"
