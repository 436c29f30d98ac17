// The kernels of knn, in both precisions.
#include "knn/cuda/launch.cuh"

namespace eaml::knn {
EAML_DEFINE(float)
EAML_DEFINE(double)

std::int64_t write_bytes(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, std::int64_t count) {
  Pieces pieces{nullptr};
  plan_write(first, memories, rebuild, count, pieces);
  return pieces.used + 1;
}

const char* write(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, const std::int64_t* slots,
                  std::int64_t count, const void* keys, const void* bias, void* scratch, void* stream) {
  Pieces pieces{static_cast<char*>(scratch)};
  Writing p = plan_write(first, memories, rebuild, count, pieces);
  p.slots = slots, p.keys = keys, p.bias = bias;
  return launch_write(p, stream);
}

}  // namespace eaml::knn
