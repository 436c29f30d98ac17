// Updates of PackedKeys: writes, erasures, and the centre.
#pragma once

#include "knn/cuda/panels.cuh"

namespace eaml::knn {
namespace {

// An update of several memories. With `rebuild`, the entries are all slots and panels and state are computed from them.
struct UpdateTask {
  PackedKeysView<float> view;  // the first memory
  bool rebuild;
  int64_t memories, count;  // entries per memory
  const int64_t* slots;     // (memories, count)
  const void* keys;         // (memories, count, features) or null: erase
  const void* bias;         // (memories, count) or null: 0
  Packed packed;
  int64_t depth, parts;
  double* partial;  // (memories, parts, features + 2): changes of the state's sums
  uint32_t* moved;  // (memories,): whether the centre moved
  int64_t blocks;

  EAML_MEMBER KeyRows rows(const void* data, int64_t first) const {
    const KeyRows all{static_cast<const char*>(data), view.features, view.half};
    return {static_cast<const char*>(all.row(first)), view.features, view.half};
  }
  EAML_MEMBER KeyRows stored(int64_t memory) const { return rows(view.keys, memory * view.capacity); }
  EAML_MEMBER KeyRows given(int64_t memory) const {
    return rebuild ? stored(memory) : rows(keys, keys == nullptr ? 0 : memory * count);
  }
  // 1 + the last entry that writes a slot; 0 between two calls.
  EAML_MEMBER uint32_t* claim(int64_t memory, int64_t slot) const { return packed.norm(memory, slot) + 3 * kPanel; }
  EAML_MEMBER int64_t slot(int64_t memory, int64_t i) const { return rebuild ? i : slots[memory * count + i]; }
  // Whether entry i is the last one that writes its slot, and the slot exists.
  EAML_MEMBER bool counts(int64_t memory, int64_t i) const {
    const int64_t s = slot(memory, i);
    return s >= 0 && s < view.capacity && (rebuild || *claim(memory, s) == uint32_t(i + 1));
  }
  EAML_MEMBER bool live(int64_t memory, int64_t slot) const { return view.live[memory * view.capacity + slot]; }
  EAML_MEMBER double* state(int64_t memory) const { return view.state + memory * state_size(view.features); }
  EAML_MEMBER float scale(const KeyRows& keys, int64_t row) const {
    return view.metric == Metric::kCosine ? inverse_norm<float>(keys.square(row)) : 1.0f;
  }
};

// With kClaim, a thread claims the slot of its entry; otherwise it clears the claim.
template <bool kClaim>
EAML_KERNEL(kThreads)
claim_kernel(EAML_CONSTANT UpdateTask p) {
  const int64_t i = cuda::block() * kThreads + cuda::thread();
  if (i >= p.memories * p.count) return;
  const int64_t memory = i / p.count, slot = p.slots[i];
  if (slot < 0 || slot >= p.view.capacity) return;
  if constexpr (kClaim)
    cuda::max_for_all(p.claim(memory, slot), uint32_t(i % p.count + 1));
  else
    *p.claim(memory, slot) = 0;
}

// A block clears the state of a rebuilt or empty memory; an empty memory gets a centre from the keys that are written.
EAML_KERNEL(kThreads)
initialise_kernel(EAML_CONSTANT UpdateTask p) {
  const int64_t memory = cuda::block(), features = p.view.features;
  double* const state = p.state(memory);
  const bool empty = state[2 * features + 1] == 0;
  cuda::sync_block();
  if (!p.rebuild && (!empty || p.keys == nullptr)) return;
  for (int64_t i = cuda::thread(); i < state_size(features); i += kThreads) state[i] = 0;
  cuda::sync_block();
  if (p.rebuild) return;
  find_centre(p.given(memory), p.count, nullptr, p.view.metric, {reinterpret_cast<float*>(cuda::shared_memory())},
              [&](int64_t i, float mean) { state[i] = mean; });
}

// A block computes the changes that a part of the entries makes to the sums of a memory. Each feature is summed by one
// thread, in order.
constexpr int kTallyKeys = 32;  // entries in shared memory at the same time
EAML_KERNEL(kThreads)
tally_kernel(EAML_CONSTANT UpdateTask p) {
  const int64_t memory = cuda::block() / p.parts, part = cuda::block() % p.parts, features = p.view.features;
  const int64_t begin = p.count * part / p.parts, end = p.count * (part + 1) / p.parts;
  const int warp = cuda::thread() / cuda::kWarp, lane = cuda::thread() % cuda::kWarp;
  // Two per entry, for the old and the new key: its scale, NaN if the key does not count, and |x - centre|².
  const Shared<float> scales{reinterpret_cast<float*>(cuda::shared_memory())};
  const Shared<float> squares = scales.at(2 * kTallyKeys);
  const KeyRows keys[2] = {p.stored(memory), p.given(memory)};
  const double* const centre = p.state(memory);
  double* const sums = p.partial + (memory * p.parts + part) * (features + 2);
  for (int64_t f = cuda::thread(); f < features + 2; f += kThreads) sums[f] = 0;
  for (int64_t first = begin; first < end; first += kTallyKeys) {
    cuda::sync_block();
    for (int i = warp; i < 2 * kTallyKeys; i += kWarps) {
      const int64_t at = first + i / 2;
      bool used = at < end && p.counts(memory, at);
      const int64_t slot = used ? p.slot(memory, at) : 0;
      if (used)
        used = i % 2 == 0 ? !p.rebuild && p.live(memory, slot) : p.rebuild ? p.live(memory, slot) : p.keys != nullptr;
      float scale = kNaN<float>, square = 0;
      if (used) {
        const int64_t row = i % 2 == 0 ? slot : at;
        scale = p.scale(keys[i % 2], row);
        for (int64_t f = lane; f < features; f += cuda::kWarp) {
          const float x = keys[i % 2].get(row, f) * scale - float(centre[f]);
          square += x * x;
        }
        square = sum_of_warp(square);
        if (!(square <= Limits<float>::kMaxNorm * Limits<float>::kMaxNorm))
          scale = kNaN<float>;  // too large for every centre
      }
      if (lane == 0) scales.set(i, scale), squares.set(i, square);
    }
    cuda::sync_block();
    for (int64_t f = cuda::thread(); f < features + 2; f += kThreads) {
      double sum = sums[f];
      for (int i = 0; i < 2 * kTallyKeys; ++i) {
        const float scale = scales.get(i);
        if (scale != scale) continue;
        const double sign = i % 2 == 0 ? -1 : 1;
        const int64_t at = first + i / 2, row = i % 2 == 0 ? p.slot(memory, at) : at;
        sum += sign * (f < features    ? double(keys[i % 2].get(row, f) * scale - float(centre[f]))
                       : f == features ? double(squares.get(i))
                                       : 1.0);
      }
      sums[f] = sum;
    }
  }
}

// A warp writes the slot of an entry.
EAML_KERNEL(kThreads)
write_kernel(EAML_CONSTANT UpdateTask p) {
  const int lane = cuda::thread() % cuda::kWarp;
  const int64_t index = cuda::block() * kWarps + cuda::thread() / cuda::kWarp, features = p.view.features;
  if (index >= p.memories * p.count) return;
  const int64_t memory = index / p.count, i = index % p.count;
  if (!p.counts(memory, i)) return;
  const int64_t slot = p.slot(memory, i), at = memory * p.view.capacity + slot;
  if (lane == 0) p.view.live[at] = p.keys != nullptr;
  if (p.keys == nullptr) return;
  const KeyRows given = p.given(memory);
  const auto copy = [&](auto* to, const auto* from, int64_t to_row, int64_t from_row, int64_t count) {
    for (int64_t f = lane; f < count; f += cuda::kWarp)
      to[to_row * count + f] = from == nullptr ? 0 : from[from_row * count + f];
  };
  if (p.view.half == Half::kNone) {
    copy(static_cast<uint32_t*>(p.view.keys), static_cast<const uint32_t*>(p.keys), at, index, features);
    copy(static_cast<uint32_t*>(p.view.bias), static_cast<const uint32_t*>(p.bias), at, index, 1);
  } else {
    copy(static_cast<uint16_t*>(p.view.keys), static_cast<const uint16_t*>(p.keys), at, index, features);
    copy(static_cast<uint16_t*>(p.view.bias), static_cast<const uint16_t*>(p.bias), at, index, 1);
  }
  const TensorCoreBound bound(features);
  const float bias = p.bias == nullptr ? 0.0f : read_number<float>(p.bias, index, p.view.half);
  const float square = pack_key(given, i, p.state(memory), p.view.metric, bound, p.depth,
                                p.packed.key(memory, slot, p.depth), p.packed.norm(memory, slot));
  const int64_t bounds = p.packed.bounds_at(memory, slot);
  if (lane == 0) set_bounds(square, bias, p.view.metric, bound, p.packed.start + bounds, p.packed.width + bounds);
}

// A block updates the state of a memory. The mean becomes the centre after a rebuild, or if it is farther from the
// centre than the keys are from the mean.
EAML_KERNEL(kThreads)
update_state_kernel(EAML_CONSTANT UpdateTask p) {
  const int64_t memory = cuda::block(), features = p.view.features;
  const Shared<double> totals{reinterpret_cast<double*>(cuda::shared_memory())};  // [2][kThreads]
  double *const centre = p.state(memory), *const sum = centre + features;
  const double* const parts = p.partial + memory * p.parts * (features + 2);
  double summary[3] = {sum[features], sum[features + 1], sum[features + 2]};  // sum of squares, number of keys, changes
  for (int64_t part = 0; part < p.parts; ++part)
    for (int i = 0; i < 2; ++i) summary[i] += parts[part * (features + 2) + features + i];
  summary[2] += double(p.count);
  const double count = summary[1] > 0 ? summary[1] : 1;
  // |sum|², and the decrease of the sum of squares when the centre moves by d: 2 sum.d - count |d|².
  double offset = 0, change = 0;
  for (int64_t f = cuda::thread(); f < features; f += kThreads) {
    double s = sum[f];
    for (int64_t part = 0; part < p.parts; ++part) s += parts[part * (features + 2) + f];
    sum[f] = s;
    const float mean = float(centre[f] + s / count);
    const double d = (std::abs(mean) <= Limits<float>::kMaxNorm ? double(mean) : 0.0) - centre[f];
    offset += s * s, change += 2 * s * d - count * d * d;
  }
  totals.set(cuda::thread(), offset), totals.set(kThreads + cuda::thread(), change);
  cuda::sync_block();
  offset = change = 0;
  for (int i = 0; i < kThreads; ++i) offset += totals.get(i), change += totals.get(kThreads + i);
  const bool moves =
      p.rebuild || (8 * summary[2] >= summary[1] && summary[1] > 0 && 2 * offset > summary[0] * summary[1]);
  if (moves) {
    for (int64_t f = cuda::thread(); f < features; f += kThreads) {
      const float mean = float(centre[f] + sum[f] / count);
      const double to = std::abs(mean) <= Limits<float>::kMaxNorm ? double(mean) : 0.0;
      sum[f] -= summary[1] * (to - centre[f]), centre[f] = to;
    }
    summary[0] = summary[0] > change ? summary[0] - change : 0, summary[2] = 0;
  }
  if (cuda::thread() != 0) return;
  for (int i = 0; i < 3; ++i) sum[features + i] = summary[i];
  p.moved[memory] = moves;
}

// Packs the live keys of memories whose centre moved.
EAML_KERNEL(kThreads)
repack_kernel(EAML_CONSTANT UpdateTask p) {
  const int64_t panels = panel_count(p.view.capacity), features = p.view.features;
  const TensorCoreBound bound(features);
  for (int64_t unit = cuda::block(); unit < p.memories * panels; unit += p.blocks) {
    const int64_t memory = unit / panels, first = unit % panels * kPanel;
    if (p.moved[memory] == 0) continue;
    for (int64_t i = cuda::thread() / cuda::kWarp; i < kPanel && first + i < p.view.capacity; i += kWarps) {
      const int64_t slot = first + i, bounds = p.packed.bounds_at(memory, slot);
      if (!p.live(memory, slot)) continue;
      const float bias = read_number<float>(p.view.bias, memory * p.view.capacity + slot, p.view.half);
      const float square = pack_key(p.stored(memory), slot, p.state(memory), p.view.metric, bound, p.depth,
                                    p.packed.key(memory, slot, p.depth), p.packed.norm(memory, slot));
      if (cuda::thread() % cuda::kWarp == 0)
        set_bounds(square, bias, p.view.metric, bound, p.packed.start + bounds, p.packed.width + bounds);
    }
  }
}

// ---- host ----

inline UpdateTask plan_update(const PackedKeysView<float>& first, int64_t memories, bool rebuild, int64_t count,
                              Workspace& workspace) {
  UpdateTask p{};
  p.view = first, p.memories = memories, p.rebuild = rebuild, p.count = rebuild ? first.capacity : count;
  p.packed = panels_at(first.panels, first.capacity, first.features), p.depth = depth_of(first.features);
  p.parts = between<int64_t>(1, p.count / (2 * kTallyKeys), between<int64_t>(1, kManyBlocks / memories, 64));
  p.blocks = between<int64_t>(1, memories * panel_count(first.capacity), 4 * kManyBlocks);
  workspace.take(p.partial, memories * p.parts * (first.features + 2));
  workspace.take(p.moved, memories);
  return p;
}

inline const char* launch_update(const UpdateTask& p, void* stream) {
  const int64_t entries = p.memories * p.count, blocks = ceil_div(entries, kThreads);
  const char* error = nullptr;
  const auto launch_next = [&](auto kernel, int64_t blocks, std::size_t bytes) {
    if (error == nullptr) error = cuda::launch(kernel, blocks, kThreads, bytes, stream, p);
  };
  if (!p.rebuild) launch_next(claim_kernel<true>, blocks, 0);
  launch_next(initialise_kernel, p.memories, kSampledKeys * sizeof(float));
  launch_next(tally_kernel, p.memories * p.parts, 4 * kTallyKeys * sizeof(float));
  if (!p.rebuild) launch_next(write_kernel, ceil_div(entries, kWarps), 0);
  launch_next(update_state_kernel, p.memories, 2 * kThreads * sizeof(double));
  if (!p.rebuild) launch_next(claim_kernel<false>, blocks, 0);
  launch_next(repack_kernel, p.blocks, 0);
  return error;
}

}  // namespace
}  // namespace eaml::knn
