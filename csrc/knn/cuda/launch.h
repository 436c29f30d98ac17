// The CUDA kernels of knn, seen from outside. Launchers return nullptr, or what went wrong, and leave the work on the
// stream, a cudaStream_t.
#pragma once

#include <cstdint>

#include "knn/params.h"

namespace eaml::knn {

constexpr std::int64_t kMostNeighbors = 1024;        // that there are: k may exceed the keys
constexpr std::int64_t kMostKeys = (1ll << 32) - 2;  // of a memory

// Panels of 32 keys, for tensor cores: the centred keys as bfloat16 numbers, [32][depth], of which the last columns are
// norms; then rows of 32 words: the norms, where bounds start, their widths, and a word that writing uses.
EAML_INLINE std::int64_t depth_of(std::int64_t features) {
  return (features + 2 + 15) / 16 * 16;
}
EAML_INLINE std::int64_t panel_words(std::int64_t features) {
  return kPanel * (depth_of(features) / 2 + 4);
}

// Bytes of memory that a search needs for itself.
template <class T>
std::int64_t search_bytes(const KnnParams<T>& problem);
template <class T>
const char* search(const KnnParams<T>& problem, KnnOutput<T> found, void* scratch, void* stream);

// Writes keys (memories, count, features) and their bias (none: 0) to slots (memories, count) of memories that lie one
// behind the other; the last of those to one slot stays, slots that do not exist are left out. Without keys the slots
// become dead. `rebuild`: derives panels and state of what is there.
std::int64_t write_bytes(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, std::int64_t count);
const char* write(const PackedKeysView<float>& first, std::int64_t memories, bool rebuild, const std::int64_t* slots,
                  std::int64_t count, const void* keys, const void* bias, void* scratch, void* stream);

}  // namespace eaml::knn
