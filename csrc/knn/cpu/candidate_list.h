// The candidates of one query: keys that the fast scores do not exclude.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace eaml::knn {
namespace {

// Keys that may be among the k best of one query: k keys are proven better than every excluded key. `margin` is the
// part of the bounds' width that all keys share.
template <class T>
struct CandidateList {
  struct Entry {
    T lower;
    std::int32_t slot;
  };
  std::vector<Entry> entries;
  std::vector<T> best;  // the k least upper bounds so far, ascending
  T threshold, margin;
  std::size_t k, limit, max_entries;

  void reset(std::int64_t k_, T margin_) {
    entries.clear();
    best.clear();
    threshold = std::numeric_limits<T>::max();
    margin = margin_;
    k = k_, limit = 2 * k + 256, max_entries = 8 * k + 4096;
  }
  // Marks a query with too many candidates, which is then searched without fast scores.
  void overflow() {
    entries.clear();
    threshold = -std::numeric_limits<T>::infinity();
  }
  bool overflowed() const { return threshold == -std::numeric_limits<T>::infinity(); }

  void add(T lower, T upper, std::int32_t slot) {
    if (!(lower <= threshold)) return;
    if (entries.size() >= limit) {
      prune();
      if (entries.size() > max_entries) return overflow();
      limit = std::max(limit, 2 * entries.size());
    }
    entries.push_back({lower, slot});
    if (best.size() == k) {
      if (!(upper < best.back())) return;
      best.pop_back();
    }
    best.insert(std::upper_bound(best.begin(), best.end(), upper), upper);
    if (best.size() == k) threshold = std::min(threshold, best.back() + margin);
  }
  void prune() {
    std::erase_if(entries, [this](const Entry& e) { return !(e.lower <= threshold); });
  }
};

}  // namespace
}  // namespace eaml::knn
