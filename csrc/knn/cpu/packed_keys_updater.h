// Writes keys to a memory with panels, and updates its centre.
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
  explicit PackedKeysUpdater(const PackedKeysView<T>& view)
      : view_(view),
        rows_{view.keys, view.features, view.half},
        biases_{view.bias, 1, view.half},
        packer_(ErrorBound<T>(view.features), view.metric),
        sum_(view.state + view.features),
        square_(sum_[view.features]),
        count_(sum_[view.features + 1]),
        stale_(sum_[view.features + 2]),
        centre_(view.features) {
    for (std::int64_t i = 0; i < view.features; ++i) centre_[i] = T(view.state[i]);
  }

  void write(const std::int64_t* slots, std::int64_t count, const void* keys, const void* bias) {
    if (keys && count_ == 0) {
      Centre<T> centre(view_.features, view_.metric);
      const Rows<T> given{keys, view_.features, view_.half};
      for (std::int64_t i = 0; i < count; i += std::max<std::int64_t>(1, count / kSampledKeys))
        centre.add(given.read(i, 1, converted_));
      centre.write(centre_.data());
      restart();
    }
    for (std::int64_t i = 0, run; i < count; i += run) {
      const std::int64_t slot = slots[i];
      run = keys ? run_length(slots + i, count - i) : 1;
      for (std::int64_t s = slot; s < slot + run; ++s) {
        if (view_.live[s]) tally(s, -1);
        view_.live[s] = keys != nullptr;
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
    return {view_.panels + slot / kPanel * panel_size<T>(view_.features), view_.features};
  }

  void pack_panel_at(std::int64_t slot) {
    const auto count = std::min<std::int64_t>(kPanel, view_.capacity - slot);
    pack_panel(rows_.read(slot, count, converted_), biases_.read(slot, count, converted_bias_), int(count),
               view_.features, centre_.data(), view_.metric, packer_, unrounded_, panel_at(slot));
  }

  void pack_slot(std::int64_t slot) {
    const std::int64_t features = view_.features;
    const int lane = int(slot % kPanel);
    const T* key = rows_.read(slot, 1, converted_);
    const T scale = scale_of(key, features, view_.metric);
    const Panel<T> panel = panel_at(slot);
    T square = 0, rounding_square = 0;
    for (std::int64_t i = 0; i < features; ++i) {
      const T x = key[i] * scale - centre_[i];
      square += x * x;
      if (has_pairs(sizeof(T) == 4)) {
        const std::uint32_t bits = to_bfloat16(float(x));
        const T rounding = x - T(low(bits));
        const auto number = std::uint16_t(bits);
        std::memcpy(reinterpret_cast<std::byte*>(panel.keys + i / 2 * kPanel + lane) + 2 * (i % 2), &number, 2);
        rounding_square += rounding * rounding;
      } else {
        panel.keys[i * kPanel + lane] = x;
      }
    }
    const T bias = *biases_.read(slot, 1, converted_bias_);
    if (!packer_.set_bounds(square, rounding_square, bias, panel, lane)) clear(panel, lane);
  }

  void restart() {
    std::fill(sum_, sum_ + view_.features + 3, 0.0);
    std::copy(centre_.begin(), centre_.end(), view_.state);
  }

  // Adds a key to the sums (sign 1) or subtracts it (-1). Keys that are too large for every centre are skipped.
  void tally(std::int64_t slot, int sign) {
    const T* key = rows_.read(slot, 1, converted_);
    const T scale = scale_of(key, view_.features, view_.metric);
    const double square = offset_square(key, scale, centre_.data(), view_.features);
    if (!(square <= double(Limits<T>::kMaxNorm) * double(Limits<T>::kMaxNorm))) return;
    accumulate(key, scale, centre_.data(), T(sign), view_.features, sum_);
    square_ += sign * square;
    count_ += sign;
  }
  void tally_all() {
    for (std::int64_t slot = 0; slot < view_.capacity; ++slot)
      if (view_.live[slot]) tally(slot, 1);
  }

  // Whether the mean is farther from the centre than the keys are from the mean.
  bool drifted() const {
    double offset = 0;
    for (std::int64_t i = 0; i < view_.features; ++i) offset += sum_[i] * sum_[i];
    return count_ > 0 && 2 * offset > square_ * count_;
  }

  void recentre() {
    for (std::int64_t i = 0; i < view_.features; ++i) {
      const T mean = T(centre_[i] + sum_[i] / std::max(count_, 1.0));
      centre_[i] = std::abs(mean) <= Limits<T>::kMaxNorm ? mean : 0;
    }
    restart();
    for (std::int64_t slot = 0; slot < view_.capacity; slot += kPanel) {
      const auto count = std::min<std::int64_t>(kPanel, view_.capacity - slot);
      if (std::memchr(view_.live + slot, 1, count)) pack_panel_at(slot);
    }
    tally_all();
  }

  const PackedKeysView<T>& view_;
  const Rows<T> rows_, biases_;
  const KeyPacker<T> packer_;
  double *sum_, &square_, &count_, &stale_;
  std::vector<T> centre_, converted_, converted_bias_, unrounded_;
};

}  // namespace
}  // namespace eaml::knn
