// Interface of the CUDA kernels of knn. A launcher enqueues its kernels on `stream`, a cudaStream_t, and returns
// nullptr or an error message.
#pragma once

#include <cstdint>

#include "knn/params.h"

namespace eaml::knn {

constexpr std::int64_t kMaxNeighbors = 1024;        // neighbours of a query that exist; k may exceed the keys
constexpr std::int64_t kMaxKeys = (1ll << 32) - 2;  // keys of a memory

// Panels of kPanel keys for tensor cores: the centred keys as bfloat16 numbers, [kPanel][depth], with norms in the last
// columns. Then come rows of kPanel words: norms, starts and widths of the bounds, and a word for updates.
EAML_INLINE std::int64_t depth_of(std::int64_t features) {
  return (features + 2 + 15) / 16 * 16;
}
EAML_INLINE std::int64_t panel_words(std::int64_t features) {
  return kPanel * (depth_of(features) / 2 + 4);
}

// Bytes of scratch memory of a search.
template <class T>
std::int64_t search_bytes(const KnnParams<T>& params);
template <class T>
const char* search(const KnnParams<T>& params, KnnOutput<T> found, void* scratch, void* stream);

// Updates consecutive memories: slots: (memories, count), keys: (memories, count, features), bias: (memories, count) or
// null for 0. The last write to a slot wins, and slots outside a memory are skipped. Without keys the slots are erased.
// With `rebuild`, panels and state are computed from keys, bias and live.
std::int64_t write_bytes(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, std::int64_t count);
const char* write(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, const std::int64_t* slots,
                  std::int64_t count, const void* keys, const void* bias, void* scratch, void* stream);

}  // namespace eaml::knn
