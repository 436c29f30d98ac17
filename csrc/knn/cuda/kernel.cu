// The CUDA kernels of knn, in both precisions.
#include "knn/cuda/launch.cuh"

namespace eaml::knn {
EAML_DEFINE(float)
EAML_DEFINE(double)

std::int64_t write_bytes(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, std::int64_t count) {
  Workspace workspace{nullptr};
  plan_update(first, memories, rebuild, count, workspace);
  return workspace.used + 1;
}

const char* write(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, const std::int64_t* slots,
                  std::int64_t count, const void* keys, const void* bias, void* scratch, void* stream) {
  Workspace workspace{static_cast<char*>(scratch)};
  UpdateTask p = plan_update(first, memories, rebuild, count, workspace);
  p.slots = slots, p.keys = keys, p.bias = bias;
  return launch_update(p, stream);
}

}  // namespace eaml::knn
