// Writes keys to a memory that keeps its panels, and chooses its centre.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "knn/cpu/memory.h"
#include "knn/cpu/panels.h"

namespace eaml::knn {
namespace {

template <class T>
class PackedKeysUpdater {
 public:
  explicit PackedKeysUpdater(const PackedKeysView<T>& store)
      : store_(store),
        rows_{store.keys, store.features, store.half},
        biases_{store.bias, 1, store.half},
        bounds_(Bound<T>(store.features), store.metric),
        sum_(store.state + store.features),
        square_(sum_[store.features]),
        count_(sum_[store.features + 1]),
        stale_(sum_[store.features + 2]),
        centre_(store.features) {
    for (std::int64_t i = 0; i < store.features; ++i) centre_[i] = T(store.state[i]);
  }

  void write(const std::int64_t* slots, std::int64_t count, const void* keys, const void* bias) {
    if (keys && count_ == 0) {
      Centre<T> centre(store_.features, store_.metric);
      const Rows<T> given{keys, store_.features, store_.half};
      for (std::int64_t i = 0; i < count; i += std::max<std::int64_t>(1, count / kSample))
        centre.add(given.read(i, 1, wide_));
      centre.write(centre_.data());
      restart();
    }
    for (std::int64_t i = 0, run; i < count; i += run) {
      const std::int64_t slot = slots[i];
      run = keys ? run_length(slots + i, count - i) : 1;
      for (std::int64_t s = slot; s < slot + run; ++s) {
        if (store_.live[s]) tally(s, -1);
        store_.live[s] = keys != nullptr;
      }
      if (!keys) continue;
      copy(rows_, slot, keys, i, run);
      copy(biases_, slot, bias, i, run);
      if (run == kPanel)
        pack_panel_at(slot);
      else
        pack_slot(slot);
      for (std::int64_t s = slot; s < slot + run; ++s) tally(s, 1);
    }
    stale_ += double(count);
    if (8 * stale_ >= count_ && drifted()) recentre();
  }

  void repack() {
    std::fill(centre_.begin(), centre_.end(), T(0));
    restart();
    tally_all();
    recentre();
  }

 private:
  // The number of slots to pack together: kPanel if the next slots are a whole panel, else 1.
  std::int64_t run_length(const std::int64_t* slots, std::int64_t left) const {
    if (slots[0] % kPanel != 0 || left < kPanel) return 1;
    for (int l = 1; l < kPanel; ++l)
      if (slots[l] != slots[0] + l) return 1;
    return kPanel;
  }

  // Copies rows, or zeroes them if `from` is null.
  static void copy(const Rows<T>& to, std::int64_t row, const void* from, std::int64_t first, std::int64_t count) {
    const auto bytes = std::size_t(to.address(row + count) - to.address(row));
    void* target = const_cast<std::byte*>(to.address(row));
    if (from)
      std::memcpy(target, Rows<T>{from, to.features, to.half}.address(first), bytes);
    else
      std::memset(target, 0, bytes);
  }

  Panel<T> panel_at(std::int64_t slot) const {
    return {store_.panels + slot / kPanel * panel_size<T>(store_.features), store_.features};
  }

  void pack_panel_at(std::int64_t slot) {
    const auto count = std::min<std::int64_t>(kPanel, store_.capacity - slot);
    pack_panel(rows_.read(slot, count, wide_), biases_.read(slot, count, wide_bias_), int(count), store_.features,
               centre_.data(), store_.metric, bounds_, wide_panel_, panel_at(slot));
  }

  void pack_slot(std::int64_t slot) {
    const std::int64_t features = store_.features;
    const int lane = int(slot % kPanel);
    const T* key = rows_.read(slot, 1, wide_);
    const T scale = scale_of(key, features, store_.metric);
    const Panel<T> panel = panel_at(slot);
    T square = 0, lost = 0;
    for (std::int64_t i = 0; i < features; ++i) {
      const T x = key[i] * scale - centre_[i];
      square += x * x;
      if (has_pairs(sizeof(T) == 4)) {
        const std::uint32_t bits = to_pairs(float(x));
        const T rest = x - T(std::bit_cast<float>(bits << 16));
        const auto part = std::uint16_t(bits);
        std::memcpy(reinterpret_cast<std::byte*>(panel.keys + i / 2 * kPanel + lane) + 2 * (i % 2), &part, 2);
        lost += rest * rest;
      } else {
        panel.keys[i * kPanel + lane] = x;
      }
    }
    const T bias = *biases_.read(slot, 1, wide_bias_);
    if (!bounds_.set(square, lost, bias, panel, lane)) clear(panel, lane);
  }

  void restart() {
    std::fill(sum_, sum_ + store_.features + 3, 0.0);
    std::copy(centre_.begin(), centre_.end(), store_.state);
  }

  // Adds a key to the sums (sign 1) or subtracts it (-1). Keys too large for every centre are left out.
  void tally(std::int64_t slot, int sign) {
    const T* key = rows_.read(slot, 1, wide_);
    const T scale = scale_of(key, store_.features, store_.metric);
    const double square = offset_square(key, scale, centre_.data(), store_.features);
    if (!(square <= double(Limits<T>::kNorm) * double(Limits<T>::kNorm))) return;
    accumulate(key, scale, centre_.data(), T(sign), store_.features, sum_);
    square_ += sign * square;
    count_ += sign;
  }
  void tally_all() {
    for (std::int64_t slot = 0; slot < store_.capacity; ++slot)
      if (store_.live[slot]) tally(slot, 1);
  }

  // Whether the mean is farther from the centre than the keys are from the mean.
  bool drifted() const {
    double offset = 0;
    for (std::int64_t i = 0; i < store_.features; ++i) offset += sum_[i] * sum_[i];
    return count_ > 0 && 2 * offset > square_ * count_;
  }

  void recentre() {
    for (std::int64_t i = 0; i < store_.features; ++i) {
      const T mean = T(centre_[i] + sum_[i] / std::max(count_, 1.0));
      centre_[i] = std::abs(mean) <= Limits<T>::kNorm ? mean : 0;
    }
    restart();
    for (std::int64_t slot = 0; slot < store_.capacity; slot += kPanel) {
      const auto count = std::min<std::int64_t>(kPanel, store_.capacity - slot);
      if (std::memchr(store_.live + slot, 1, count)) pack_panel_at(slot);
    }
    tally_all();
  }

  const PackedKeysView<T>& store_;
  const Rows<T> rows_, biases_;
  const KeyBounds<T> bounds_;
  double *sum_, &square_, &count_, &stale_;
  std::vector<T> centre_, wide_, wide_bias_, wide_panel_;
};

}  // namespace
}  // namespace eaml::knn
