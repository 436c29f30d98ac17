// The search of one unit of work: fast scores select candidates, exact scores order them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "knn/cpu/candidate_list.h"
#include "knn/cpu/memory.h"
#include "knn/cpu/panels.h"

namespace eaml::knn {
namespace {

template <class T>
class CandidateFilter {
 public:
  CandidateFilter(const KnnParams<T>& params, const Plan& plan)
      : params_(params),
        plan_(plan),
        bound_(params.features),
        packer_(bound_, params.metric),
        pairs_(has_pairs(sizeof(T) == 4)),
        depth_(key_rows(params.features, pairs_) + 1) {}

  void run(std::int64_t unit, KnnOutput<T> output) {
    const std::int64_t key_block = unit % plan_.key_blocks, rest = unit / plan_.key_blocks;
    const std::int64_t memory_index = rest / plan_.query_blocks, query_block = rest % plan_.query_blocks;
    const Memory<T> memory(params_, memory_index);
    begin_ = key_block * plan_.key_block;
    end_ = std::min(begin_ + plan_.key_block, params_.size);
    const std::int64_t first = query_block * plan_.query_block;
    count_ = std::min(plan_.query_block, params_.queries_each - first);
    const std::int64_t row = memory_index * params_.queries_each + first;
    queries_ = params_.queries + row * params_.features;

    lists_.resize(std::max<std::size_t>(lists_.size(), count_));
    if (count_ <= max_row_queries()) {
      for (std::int64_t q = 0; q < count_; ++q) search_rows(memory, q);
    } else {
      search_panels(memory, memory_index / params_.keys_share);
      for (std::int64_t q = 0; q < count_; ++q)
        if (lists_[q].overflowed()) search_rows(memory, q);
    }

    const std::int64_t out = (key_block * params_.memories * params_.queries_each + row) * params_.k;
    for (std::int64_t q = 0; q < count_; ++q)
      finish(memory, q, output.values + out + q * params_.k, output.indices + out + q * params_.k);
  }

 private:
  // The number of queries up to which keys are searched row by row. So few queries do not repay packing. With packed
  // keys, only one query on a large memory is searched so: reading dominates, and candidates are evaluated from the
  // cache.
  std::int64_t max_row_queries() const {
    constexpr std::int64_t kFew = 4, kCached = std::int64_t(1) << 25;
    if (!params_.panels) return kFew;
    const std::int64_t keys = params_.memories / params_.keys_share * params_.size * params_.features;
    return !pairs_ && params_.half == Half::kNone && keys * std::int64_t(sizeof(T)) > kCached ? 1 : 0;
  }

  bool cosine() const { return params_.metric == Metric::kCosine; }
  bool sqeuclidean() const { return params_.metric == Metric::kSqeuclidean; }

  // Searches one query against keys that are not packed. Differences of a squared distance are computed directly,
  // without a centre, so errors are relative: g (|q - x|² + |b|), g (|q||x| + |b|), and 2g (1 + |b|), because |x| is
  // rounded like q.x.
  void search_rows(const Memory<T>& memory, std::int64_t q) {
    using L = Limits<T>;
    constexpr T kInfinity = L::kInfinity;
    const std::int64_t features = params_.features;
    const T g = T(bound_.key), underflow = T(bound_.underflow);
    CandidateList<T>& list = lists_[q];
    list.reset(params_.k, 2 * underflow);
    const T* query = queries_ + q * features;
    if (cosine()) {
      const T factor = scale_of(query, features, params_.metric);
      row_query_.resize(features);
      for (std::int64_t i = 0; i < features; ++i) row_query_[i] = query[i] * factor;
      query = row_query_.data();
    }
    const T norm = T(std::sqrt(product(query, query, features)));
    if (!bound_.holds() || !(norm <= L::kMaxNorm)) return list.overflow();
    T sum[kPanel] = {}, square[kPanel] = {}, extent[kPanel] = {}, lower[kPanel], upper[kPanel];
    for (std::int64_t slot = begin_; slot < end_; slot += kPanel) {
      const int count = int(std::min<std::int64_t>(kPanel, end_ - slot));
      if (live_bits(memory, slot, count) == 0) continue;
      const T* keys = memory.keys.read(slot, count, converted_);
      if (sqeuclidean())
        difference_rows(query, keys, count, features, sum);
      else
        product_rows(query, keys, count, features, sum, square);
      T bias[kPanel] = {}, clamped_width[kPanel] = {};
      for (int l = 0; memory.bias && l < count; ++l) {
        bias[l] = memory.bias[slot + l];
        if (bias[l] < -L::kMaxBias) bias[l] = -L::kMaxBias, clamped_width[l] = kInfinity;  // as in key_bounds
      }
      if (cosine()) {
        for (int l = 0; l < count; ++l) {
          const bool safe = square[l] >= T(1e-30) && square[l] <= T(1e30);
          sum[l] *= safe ? -1 / std::sqrt(square[l]) : -scale_of(keys + l * features, features, params_.metric);
          extent[l] = 2 + std::abs(bias[l]);
        }
      } else if (sqeuclidean()) {
        std::copy(sum, sum + kPanel, extent);
      } else {
        for (int l = 0; l < kPanel; ++l)
          sum[l] = -sum[l], extent[l] = norm * std::sqrt(square[l] + underflow) * (1 + g);
      }
      for (int l = 0; l < kPanel; ++l) {
        const T value = sum[l] - bias[l], error = g * (extent[l] + std::abs(bias[l]));
        const bool finite = std::abs(value) + error <= L::kMax / 4;
        lower[l] = finite ? value - error : -L::kMax;
        upper[l] = finite ? value + error + clamped_width[l] : kInfinity;
      }
      for (int l = count; l < kPanel; ++l) lower[l] = kInfinity;
      if (memory.valid)
        for (int l = 0; l < count; ++l) lower[l] = memory.valid[slot + l] ? lower[l] : kInfinity;
      if (!any_below(lower, list.threshold)) continue;
      for (int l = 0; l < count; ++l) list.add(lower[l], upper[l], std::int32_t(slot + l - begin_));
    }
  }

  // Bit l is whether key `slot + l` is live.
  static std::uint32_t live_bits(const Memory<T>& memory, std::int64_t slot, int count) {
    const std::uint32_t all = ~std::uint32_t(0) >> (kPanel - count);
    if (!memory.valid) return all;
    bool live[kPanel] = {};
    std::copy_n(memory.valid + slot, count, live);
    std::uint32_t bits = 0;
    for (int l = 0; l < kPanel; l += 8) {
      std::uint64_t eight;
      std::memcpy(&eight, live + l, 8);
      bits |= std::uint32_t(eight * 0x0102040810204080u >> 56) << l;  // the byte of a true bool is 1
    }
    return bits;
  }

  void search_panels(const Memory<T>& memory, std::int64_t keys_block) {
    const std::int64_t features = params_.features;
    centre_.resize(features);
    const T* panels = nullptr;
    if (params_.panels) {
      panels = params_.panels + keys_block * panel_count(params_.size) * panel_size<T>(features);
      const double* state = params_.state + keys_block * state_size(features);
      for (std::int64_t i = 0; i < features; ++i) centre_[i] = T(state[i]);
    } else {
      const std::int64_t step = std::max<std::int64_t>(1, (end_ - begin_) / kSampledKeys);
      Centre<T> centre(features, params_.metric);
      for (std::int64_t slot = begin_; slot < end_; slot += step)
        if (memory.live(slot)) centre.add(memory.keys.read(slot, 1, converted_));
      centre.write(centre_.data());
      panel_.resize(panel_size<T>(features));
    }
    pack_queries();
    for (std::int64_t slot = begin_; slot < end_; slot += kPanel) {
      const int count = int(std::min<std::int64_t>(kPanel, end_ - slot));
      const std::uint32_t live = live_bits(memory, slot, count);
      if (live == 0) continue;
      if (panels) {
        const T* panel = panels + slot / kPanel * panel_size<T>(features);
        filter_panel(slot, live, panel, slot + kPanel < end_ ? panel + panel_size<T>(features) : panel);
      } else {
        const T* keys = memory.keys.read(slot, count, converted_);
        pack_panel(keys, memory.bias ? memory.bias + slot : nullptr, count, features, centre_.data(), params_.metric,
                   packer_, unrounded_, Panel<T>(panel_.data(), features));
        filter_panel(slot, live, panel_.data(), panel_.data());
      }
    }
  }

  // The queries are divided into tiles of nearly equal heights.
  std::int64_t tiles() const { return (count_ + kRows - 1) / kRows; }
  std::int64_t tile_begin(std::int64_t tile) const { return tile * count_ / tiles(); }

  // Packs the queries, negated and transposed, into tiles [features + 1][rows]; the last row is g|q|.
  void pack_queries() {
    const std::int64_t features = params_.features;
    double centre_square = 0;
    for (const T x : centre_) centre_square += double(x) * double(x);
    packed_.resize(count_ * depth_);
    slope_.resize(count_);
    extent_.resize(count_);
    thresholds_.resize(count_);
    for (std::int64_t tile = 0; tile < tiles(); ++tile) {
      const std::int64_t first = tile_begin(tile), rows = tile_begin(tile + 1) - first;
      for (std::int64_t q = first; q < first + rows; ++q) {
        const T* query = queries_ + q * features;
        T* column = packed_.data() + first * depth_ + (q - first);
        const T factor = scale_of(query, features, params_.metric);
        double squares[4] = {}, rounding_square = 0;
        for (std::int64_t i = 0; i < features; ++i) {
          const T x = sqeuclidean() ? query[i] - centre_[i] : query[i] * factor;
          squares[i % 4] += double(x) * double(x);
          if (pairs_)
            rounding_square += put_pair(column + i / 2 * rows, i % 2, float(-x));
          else
            column[i * rows] = -x;
        }
        if (pairs_ && features % 2) put_pair(column + features / 2 * rows, 1, 0);
        const double norm = std::sqrt((squares[0] + squares[1]) + (squares[2] + squares[3]));
        T* last = column + (depth_ - 1) * rows;
        slope_[q] = T(bound_.key * norm), extent_[q] = 0;
        *last = -slope_[q];
        if constexpr (sizeof(T) == 4) {
          if (pairs_) {
            const QueryPair pair = query_pair(norm, rounding_square, bound_.key);
            slope_[q] = low(pair.slope), extent_[q] = low(pair.norm);
            *last = std::bit_cast<float>(pair.slope | pair.norm << 16 | 0x80008000u);  // negated
          }
        }
        lists_[q].reset(params_.k, margin_of(bound_, norm, centre_square, params_.metric));
        if (!bound_.holds() || !(norm <= Limits<T>::kMaxNorm)) {
          lists_[q].overflow();
          for (std::int64_t i = 0; i < depth_; ++i) column[i * rows] = 0;
        }
        thresholds_[q] = lists_[q].threshold;
      }
    }
  }

  // Stores half of a pair of bfloat16 numbers and returns the squared rounding error.
  static double put_pair(T* pair, int half, float x) {
    const std::uint32_t bits = to_bfloat16(x);
    const auto number = std::uint16_t(bits);
    std::memcpy(reinterpret_cast<std::byte*>(pair) + 2 * half, &number, 2);
    const double rounding = double(x) - double(low(bits));
    return rounding * rounding;
  }

  // The part of the width of bounds in |q||x|.
  T norm_width(std::int64_t q, T norm) const {
    if constexpr (sizeof(T) == 4) {
      if (pairs_) {
        const auto pair = std::bit_cast<std::uint32_t>(norm);
        return 2 * (slope_[q] * low(pair) + extent_[q] * high(pair));
      }
    }
    return 2 * slope_[q] * norm;
  }

  std::uint32_t products(int rows, const Tile<T>& tile) const {
    if constexpr (sizeof(T) == 4) {
      if (pairs_) return tile_of_pairs(rows, tile);
    }
    return knn::tile(rows, tile);
  }

  // Scores all queries against one panel and prefetches the next panel. Dead keys are skipped when they pass the
  // threshold, because masking all of them would cost as much time as the products of a few queries.
  void filter_panel(std::int64_t slot, std::uint32_t live, const T* at, const T* ahead) {
    const Panel<const T> panel(at, params_.features);
    alignas(kAlignment) T scores[kRows * kPanel];
    std::uint32_t hits[kRows];
    Tile<T> tile{nullptr, panel.keys, panel.start, nullptr, ahead, depth_, scores, hits};
    for (std::int64_t t = 0; t < tiles(); ++t, tile.ahead = at) {
      const std::int64_t first = tile_begin(t);
      const int rows = int(tile_begin(t + 1) - first);
      tile.queries = packed_.data() + first * depth_;
      tile.thresholds = thresholds_.data() + first;
      if (products(rows, tile) == 0) continue;
      for (int r = 0; r < rows; ++r) {
        if ((hits[r] & live) == 0) continue;
        CandidateList<T>& list = lists_[first + r];
        for (std::uint32_t bits = hits[r] & live; bits != 0; bits &= bits - 1) {
          const int l = std::countr_zero(bits);
          const T lower = scores[r * kPanel + l];
          list.add(lower, lower + panel.width[l] + norm_width(first + r, panel.norms[l]),
                   std::int32_t(slot + l - begin_));
        }
        thresholds_[first + r] = list.threshold;
      }
    }
  }

  void finish(const Memory<T>& memory, std::int64_t q, T* values, std::int64_t* indices) {
    const T* query = queries_ + q * params_.features;
    const double norm = cosine() ? std::sqrt(product(query, query, params_.features)) : 0;
    CandidateList<T>& list = lists_[q];
    ranked_.clear();
    list.prune();
    if (!list.overflowed()) {
      for (const auto& entry : list.entries) memory.keys.prefetch(begin_ + entry.slot);
      for (const auto& entry : list.entries) {
        const std::int64_t slot = begin_ + entry.slot;
        ranked_.push_back({memory.score(query, norm, slot, converted_), slot});
      }
    } else {
      const std::size_t k = std::size_t(params_.k);
      for (std::int64_t slot = begin_; slot < end_; ++slot) {
        if (!memory.live(slot)) continue;
        const Ranked<T> next{memory.score(query, norm, slot, converted_), slot};
        if (ranked_.size() < k) {
          ranked_.push_back(next);
          std::push_heap(ranked_.begin(), ranked_.end());
        } else if (next < ranked_.front()) {
          std::pop_heap(ranked_.begin(), ranked_.end());
          ranked_.back() = next;
          std::push_heap(ranked_.begin(), ranked_.end());
        }
      }
    }
    write_best(ranked_, params_.k, params_.metric, values, indices);
  }

  const KnnParams<T>& params_;
  const Plan& plan_;
  const ErrorBound<T> bound_;
  const KeyPacker<T> packer_;
  const bool pairs_;
  const std::int64_t depth_;  // rows of a panel in the products
  std::int64_t begin_ = 0, end_ = 0, count_ = 0;
  const T* queries_ = nullptr;
  std::vector<T> centre_, packed_, slope_, extent_, thresholds_, panel_, unrounded_, row_query_, converted_;
  std::vector<CandidateList<T>> lists_;
  std::vector<Ranked<T>> ranked_;
};

}  // namespace
}  // namespace eaml::knn
