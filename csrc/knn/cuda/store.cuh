// Memories that keep their keys packed.
#pragma once

#include "knn/cuda/pack.cuh"

namespace eaml::knn {
namespace {

// Keys and bias that go to slots, of several memories; `rebuild`: what is derived of them all is made rebuild.
struct Writing {
  PackedKeysView<float> store;  // of the first memory
  bool rebuild;
  int64_t memories, count;  // slots of each
  const int64_t* slots;
  const void *keys, *bias;
  Packed packed;
  int64_t depth, parts;
  double* partial;  // (memories, parts, features + 2): changes of the state's sums
  uint32_t* moved;  // (memories): whether the centre has
  int64_t blocks;

  EAML_MEMBER KeyRows rows(const void* data, int64_t first) const {
    const KeyRows all{static_cast<const char*>(data), store.features, store.half};
    return {static_cast<const char*>(all.row(first)), store.features, store.half};
  }
  EAML_MEMBER KeyRows stored(int64_t memory) const { return rows(store.keys, memory * store.capacity); }
  EAML_MEMBER KeyRows given(int64_t memory) const {
    return rebuild ? stored(memory) : rows(keys, keys == nullptr ? 0 : memory * count);
  }
  // Who has claimed a slot last, less the claims of those before: 0 between two calls.
  EAML_MEMBER uint32_t* claim(int64_t memory, int64_t slot) const { return packed.norm(memory, slot) + 3 * kPanel; }
  EAML_MEMBER int64_t slot(int64_t memory, int64_t i) const { return rebuild ? i : slots[memory * count + i]; }
  // Whether entry i is the last one to its slot, which exists.
  EAML_MEMBER bool counts(int64_t memory, int64_t i) const {
    const int64_t s = slot(memory, i);
    return s >= 0 && s < store.capacity && (rebuild || *claim(memory, s) == uint32_t(i + 1));
  }
  EAML_MEMBER bool live(int64_t memory, int64_t slot) const { return store.live[memory * store.capacity + slot]; }
  EAML_MEMBER double* state(int64_t memory) const { return store.state + memory * state_size(store.features); }
  EAML_MEMBER float scale(const KeyRows& keys, int64_t row) const {
    return store.metric == Metric::kCosine ? scale_of(keys.square(row)) : 1.0f;
  }
};

template <bool kTake>
EAML_KERNEL(kThreads)
claim_kernel(EAML_CONSTANT Writing p) {
  const int64_t i = cuda::block() * kThreads + cuda::thread();
  if (i >= p.memories * p.count) return;
  const int64_t memory = i / p.count, slot = p.slots[i];
  if (slot < 0 || slot >= p.store.capacity) return;
  if constexpr (kTake)
    cuda::max_for_all(p.claim(memory, slot), uint32_t(i % p.count + 1));
  else
    *p.claim(memory, slot) = 0;
}

// A block gives a memory that has no keys a centre: of those that are written.
EAML_KERNEL(kThreads)
begin_kernel(EAML_CONSTANT Writing p) {
  const int64_t memory = cuda::block(), features = p.store.features;
  double* const state = p.state(memory);
  const bool empty = state[2 * features + 1] == 0;
  cuda::sync_block();
  if (!p.rebuild && (!empty || p.keys == nullptr)) return;
  for (int64_t i = cuda::thread(); i < state_size(features); i += kThreads) state[i] = 0;
  cuda::sync_block();
  if (p.rebuild) return;
  find_centre(p.given(memory), p.count, nullptr, p.store.metric, {reinterpret_cast<float*>(cuda::shared_memory())},
              state);
}

// A block sums what a part of the slots change in a memory's sums, each feature by one thread, in order.
constexpr int kTallied = 32;  // at a time
EAML_KERNEL(kThreads)
tally_kernel(EAML_CONSTANT Writing p) {
  const int64_t memory = cuda::block() / p.parts, part = cuda::block() % p.parts, features = p.store.features;
  const int64_t begin = p.count * part / p.parts, end = p.count * (part + 1) / p.parts;
  const int warp = cuda::thread() / cuda::kWarp, lane = cuda::thread() % cuda::kWarp;
  // Of the key that goes and of the one that comes: its scale, NaN where it is none that counts, and its square.
  const Shared<float> scales{reinterpret_cast<float*>(cuda::shared_memory())};
  const Shared<float> squares = scales.at(2 * kTallied);
  const KeyRows both[2] = {p.stored(memory), p.given(memory)};
  const double* const centre = p.state(memory);
  double* const sums = p.partial + (memory * p.parts + part) * (features + 2);
  for (int64_t f = cuda::thread(); f < features + 2; f += kThreads) sums[f] = 0;
  for (int64_t first = begin; first < end; first += kTallied) {
    cuda::sync_block();
    for (int i = warp; i < 2 * kTallied; i += kWarps) {
      const int64_t at = first + i / 2;
      bool used = at < end && p.counts(memory, at);
      const int64_t slot = used ? p.slot(memory, at) : 0;
      if (used)
        used = i % 2 == 0 ? !p.rebuild && p.live(memory, slot) : p.rebuild ? p.live(memory, slot) : p.keys != nullptr;
      float scale = kNaN<float>, square = 0;
      if (used) {
        const int64_t row = i % 2 == 0 ? slot : at;
        scale = p.scale(both[i % 2], row);
        for (int64_t f = lane; f < features; f += cuda::kWarp) {
          const float x = both[i % 2].get(row, f) * scale - float(centre[f]);
          square += x * x;
        }
        square = sum_of_warp(square);
        if (!(square <= kMostNorm * kMostNorm)) scale = kNaN<float>;  // no centre serves it
      }
      if (lane == 0) scales.set(i, scale), squares.set(i, square);
    }
    cuda::sync_block();
    for (int64_t f = cuda::thread(); f < features + 2; f += kThreads) {
      double sum = sums[f];
      for (int i = 0; i < 2 * kTallied; ++i) {
        const float scale = scales.get(i);
        if (scale != scale) continue;
        const double sign = i % 2 == 0 ? -1 : 1;
        const int64_t at = first + i / 2, row = i % 2 == 0 ? p.slot(memory, at) : at;
        sum += sign * (f < features    ? double(both[i % 2].get(row, f) * scale - float(centre[f]))
                       : f == features ? double(squares.get(i))
                                       : 1.0);
      }
      sums[f] = sum;
    }
  }
}

// A warp writes a slot.
EAML_KERNEL(kThreads)
put_kernel(EAML_CONSTANT Writing p) {
  const int lane = cuda::thread() % cuda::kWarp;
  const int64_t index = cuda::block() * kWarps + cuda::thread() / cuda::kWarp, features = p.store.features;
  if (index >= p.memories * p.count) return;
  const int64_t memory = index / p.count, i = index % p.count;
  if (!p.counts(memory, i)) return;
  const int64_t slot = p.slot(memory, i), at = memory * p.store.capacity + slot;
  if (lane == 0) p.store.live[at] = p.keys != nullptr;
  if (p.keys == nullptr) return;
  const KeyRows given = p.given(memory);
  const auto copy = [&](auto* to, const auto* from, int64_t to_row, int64_t from_row, int64_t count) {
    for (int64_t f = lane; f < count; f += cuda::kWarp)
      to[to_row * count + f] = from == nullptr ? 0 : from[from_row * count + f];
  };
  if (p.store.half == Half::kNone) {
    copy(static_cast<uint32_t*>(p.store.keys), static_cast<const uint32_t*>(p.keys), at, index, features);
    copy(static_cast<uint32_t*>(p.store.bias), static_cast<const uint32_t*>(p.bias), at, index, 1);
  } else {
    copy(static_cast<uint16_t*>(p.store.keys), static_cast<const uint16_t*>(p.keys), at, index, features);
    copy(static_cast<uint16_t*>(p.store.bias), static_cast<const uint16_t*>(p.bias), at, index, 1);
  }
  const Bound bound(features);
  const float bias = p.bias == nullptr ? 0.0f : read_number<float>(p.bias, index, p.store.half);
  const float square = pack_key(given, i, p.state(memory), p.store.metric, bound, p.depth,
                                p.packed.key(memory, slot, p.depth), p.packed.norm(memory, slot));
  const int64_t bounds = p.packed.bounds_at(memory, slot);
  if (lane == 0) set_bounds(square, bias, p.store.metric, bound, p.packed.start + bounds, p.packed.width + bounds);
}

// A block brings a memory's state up to date. Where the mean is farther from the centre than keys are from the mean, or
// everything is made rebuild, the mean becomes the centre.
EAML_KERNEL(kThreads)
finish_kernel(EAML_CONSTANT Writing p) {
  const int64_t memory = cuda::block(), features = p.store.features;
  const Shared<double> totals{reinterpret_cast<double*>(cuda::shared_memory())};  // [2][kThreads]
  double *const centre = p.state(memory), *const sum = centre + features;
  const double* const parts = p.partial + memory * p.parts * (features + 2);
  double about[3] = {sum[features], sum[features + 1], sum[features + 2]};  // squares, keys, changes
  for (int64_t part = 0; part < p.parts; ++part)
    for (int i = 0; i < 2; ++i) about[i] += parts[part * (features + 2) + features + i];
  about[2] += double(p.count);
  const double count = about[1] > 0 ? about[1] : 1;
  double offset = 0,
         change = 0;  // |sum|², and what moving the centre by d takes from the squares: 2 sum.d - count |d|²
  for (int64_t f = cuda::thread(); f < features; f += kThreads) {
    double s = sum[f];
    for (int64_t part = 0; part < p.parts; ++part) s += parts[part * (features + 2) + f];
    sum[f] = s;
    const float mean = float(centre[f] + s / count);
    const double d = (std::abs(mean) <= kMostNorm ? double(mean) : 0.0) - centre[f];
    offset += s * s, change += 2 * s * d - count * d * d;
  }
  totals.set(cuda::thread(), offset), totals.set(kThreads + cuda::thread(), change);
  cuda::sync_block();
  offset = change = 0;
  for (int i = 0; i < kThreads; ++i) offset += totals.get(i), change += totals.get(kThreads + i);
  const bool moves = p.rebuild || (8 * about[2] >= about[1] && about[1] > 0 && 2 * offset > about[0] * about[1]);
  if (moves) {
    for (int64_t f = cuda::thread(); f < features; f += kThreads) {
      const float mean = float(centre[f] + sum[f] / count);
      const double to = std::abs(mean) <= kMostNorm ? double(mean) : 0.0;
      sum[f] -= about[1] * (to - centre[f]), centre[f] = to;
    }
    about[0] = about[0] > change ? about[0] - change : 0, about[2] = 0;
  }
  if (cuda::thread() != 0) return;
  for (int i = 0; i < 3; ++i) sum[features + i] = about[i];
  p.moved[memory] = moves;
}

// Live keys around a centre that has moved.
EAML_KERNEL(kThreads)
repack_kernel(EAML_CONSTANT Writing p) {
  const int64_t panels = panel_count(p.store.capacity), features = p.store.features;
  const Bound bound(features);
  for (int64_t unit = cuda::block(); unit < p.memories * panels; unit += p.blocks) {
    const int64_t memory = unit / panels, first = unit % panels * kPanel;
    if (p.moved[memory] == 0) continue;
    for (int64_t i = cuda::thread() / cuda::kWarp; i < kPanel && first + i < p.store.capacity; i += kWarps) {
      const int64_t slot = first + i, bounds = p.packed.bounds_at(memory, slot);
      if (!p.live(memory, slot)) continue;
      const float bias = read_number<float>(p.store.bias, memory * p.store.capacity + slot, p.store.half);
      const float square = pack_key(p.stored(memory), slot, p.state(memory), p.store.metric, bound, p.depth,
                                    p.packed.key(memory, slot, p.depth), p.packed.norm(memory, slot));
      if (cuda::thread() % cuda::kWarp == 0)
        set_bounds(square, bias, p.store.metric, bound, p.packed.start + bounds, p.packed.width + bounds);
    }
  }
}

// ---- what runs on the host ----

inline Writing plan_write(const PackedKeysView<float>& first, int64_t memories, bool rebuild, int64_t count,
                          Pieces& pieces) {
  Writing p{};
  p.store = first, p.memories = memories, p.rebuild = rebuild, p.count = rebuild ? first.capacity : count;
  p.packed = panels_at(first.panels, first.capacity, first.features), p.depth = depth_of(first.features);
  p.parts = between<int64_t>(1, p.count / (2 * kTallied), between<int64_t>(1, kManyBlocks / memories, 64));
  p.blocks = between<int64_t>(1, memories * panel_count(first.capacity), 4 * kManyBlocks);
  pieces.take(p.partial, memories * p.parts * (first.features + 2));
  pieces.take(p.moved, memories);
  return p;
}

inline const char* launch_write(const Writing& p, void* stream) {
  const int64_t entries = p.memories * p.count, blocks = ceil_div(entries, kThreads);
  const char* error = nullptr;
  const auto then = [&](auto kernel, int64_t blocks, std::size_t bytes) {
    if (error == nullptr) error = cuda::launch(kernel, blocks, kThreads, bytes, stream, p);
  };
  if (!p.rebuild) then(claim_kernel<true>, blocks, 0);
  then(begin_kernel, p.memories, kSampled * sizeof(float));
  then(tally_kernel, p.memories * p.parts, 4 * kTallied * sizeof(float));
  if (!p.rebuild) then(put_kernel, ceil_div(entries, kWarps), 0);
  then(finish_kernel, p.memories, 2 * kThreads * sizeof(double));
  if (!p.rebuild) then(claim_kernel<false>, blocks, 0);
  then(repack_kernel, p.blocks, 0);
  return error;
}

}  // namespace
}  // namespace eaml::knn
