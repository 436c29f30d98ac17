// Divides one call among threads: by units and, if those are few and long, by time segments.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/arena.h"
#include "selective_scan/cpu/kernel.h"
#include "selective_scan/cpu/packed_sequence.h"

namespace eaml::selective_scan {
namespace {

using std::int64_t;

// The backward pass of few units sums over time in partitions, one partial sum each, so that threads can share a unit.
// Their number is a function of the shape, because results must not depend on the number of threads.
inline int64_t num_time_partitions(const ScanParams& s) {
  constexpr int64_t kPartitionSteps = 2048, kMaxPartitions = 32, kFewUnits = 8, kWorthwhile = int64_t{1} << 20;
  if (s.cu_seqlens || s.batch * units(s) >= kFewUnits || s.dim * s.length * s.dstate < kWorthwhile) return 1;
  return std::clamp<int64_t>(s.length / kPartitionSteps, 1, kMaxPartitions);
}

// Calls f(begin, end) on ranges of [0, total). An index is `work_each` state updates. Several threads share the
// indices if each gets at least kMinThreadWork.
template <class F>
void parallel(int64_t total, int64_t work_each, F f) {
  constexpr int64_t kMinThreadWork = int64_t{1} << 16;
  const int64_t grain = std::max<int64_t>(1, kMinThreadWork / std::max<int64_t>(work_each, 1));
  if (total <= grain) {
    if (total > 0) f(0, total);
  } else {
    torch::stable::parallel_for(0, total, grain, f);
  }
}

// Calls f(index, unit) for `count` jobs on each unit. Each thread takes the next job when it has finished one: ranges
// fixed in advance would wait for the slowest thread.
template <class F>
void for_each_unit(const ScanParams& s, int64_t count, F f) {
  const int64_t total = s.batch * units(s) * count;
  if (total == 0) return;
  std::atomic<int64_t> next{0};
  parallel(total, s.batch * s.dim * s.length * s.dstate / total, [&](int64_t, int64_t) {
    for (int64_t i = next++; i < total; i = next++) f(i % count, i / count);
  });
}

template <class T>
ScanParams with_units(ScanParams s) {
  s.unit_channels = sum_channels<T>(s), s.all_length = s.length;
  return s;
}
// The same call with narrower units, if there are too few for the threads. No sum of the forward pass is over channels,
// so results do not depend on the width.
template <class T>
ScanParams with_forward_units(ScanParams s) {
  constexpr int64_t kNarrowest = 64 / sizeof(T), kUnitsPerThread = 2;
  const int64_t threads = torch::stable::get_num_threads();
  while (threads > 1 && s.batch * units(s) < kUnitsPerThread * threads && s.unit_channels > kNarrowest)
    s.unit_channels = (s.unit_channels / 2 + kNarrowest - 1) / kNarrowest * kNarrowest;  // whole vectors
  return s;
}

// Scratch memory of one call. The thread keeps it for the next call: fresh pages would cost a tenth of the backward
// pass.
class Scratch {
 public:
  Scratch() : arena_(arena()) {}
  ~Scratch() { arena_.reset(); }
  Scratch(const Scratch&) = delete;
  template <class T>
  T* take(int64_t count) {
    return arena_.take<T>(count);
  }

 private:
  static Arena& arena() {
    static thread_local Arena a;
    return a;
  }
  Arena& arena_;
};

int64_t chunks(const ScanParams& s) {
  return (s.length + kChunk - 1) / kChunk;
}

// The kernels on one unit. With tangents they run on Duals.
template <class T>
void forward(const ScanParams& s, const Inputs<T>& in, const Inputs<T>* tangents, const Outputs<T>& out, int64_t unit) {
  if (s.cu_seqlens) {
    const PackedSequence<T> sequence(s, unit);
    const Inputs<T> tangent_in = tangents ? sequence.of(*tangents) : Inputs<T>{};
    return forward(sequence.params, sequence.of(in), tangents ? &tangent_in : nullptr, sequence.of(out), sequence.unit);
  }
  if (s.num_components == 1)
    real_states::forward(s, in, tangents, out, unit, unit + 1);
  else
    complex_states::forward(s, in, tangents, out, unit, unit + 1);
}
template <class T>
void backward(const ScanParams& s, const Inputs<T>& in, const Inputs<T>* tangents, const Gradients<T>& out,
              int64_t unit) {
  if (s.cu_seqlens) {
    const PackedSequence<T> sequence(s, unit);
    const Inputs<T> tangent_in = tangents ? sequence.of(*tangents) : Inputs<T>{};
    return backward(sequence.params, sequence.of(in), tangents ? &tangent_in : nullptr, sequence.of(out),
                    sequence.unit);
  }
  if (s.num_components == 1)
    real_states::backward(s, in, tangents, out, unit, unit + 1);
  else
    complex_states::backward(s, in, tangents, out, unit, unit + 1);
}

// The states of all batch rows, or their gradients, at the boundary of two time segments. A Dual run has their tangents
// too.
template <class T>
struct Carry {
  T* value = nullptr;
  T* tangent = nullptr;
  int64_t size = 0;

  Carry() = default;
  Carry(Scratch& scratch, const ScanParams& s, bool dual) : size(s.batch * s.dstate * s.num_components * s.dim) {
    value = scratch.take<T>(size), tangent = dual ? scratch.take<T>(size) : nullptr;
  }
  void fill(T number) const {
    std::fill_n(value, size, number);
    if (tangent) std::fill_n(tangent, size, T(0));
  }
  void copy(const Carry& from) const {
    std::copy_n(from.value, size, value);
    if (tangent) std::copy_n(from.tangent, size, tangent);
  }
  bool same_bits(const Carry& other) const {
    const std::size_t bytes = size * sizeof(T);
    return !std::memcmp(value, other.value, bytes) && (!tangent || !std::memcmp(tangent, other.tangent, bytes));
  }
};

// The first chunk of a partition.
inline int64_t partition_begin(const ScanParams& s, int64_t partition) {
  return chunks(s) * partition / num_time_partitions(s);
}

// Divides time into segments of one or more partitions and runs them on several threads. The results have the same bits
// as on one thread.
//
// Every segment but the first starts from a guess: a warm-up starts from zeros some chunks before the segment. If
// states decay quickly, the guess equals the true state bit for bit. It is used only if a second warm-up, from ones,
// ends in the same bits. Afterwards it is compared with the state in which the previous segment ended. If they differ,
// the segment runs again from that state.
//
// Returns false, with nothing written, if there are too few partitions or the states decay too slowly.
// `warm_up(params, carry, unit)` advances a carry through some chunks; `run(begin, end, from, to, unit)` computes
// the partitions [begin, end).
template <class T, class Warm, class Run>
bool run_time_segments(Scratch& scratch, const ScanParams& s, const Inputs<T>& in, bool dual, bool backward,
                       Warm warm_up, Run run) {
  constexpr int64_t kProbeChunks = 2;
  // The warm-up must halve a difference of states this often. That is twice the digits, because a difference in the
  // last digit can persist.
  constexpr int64_t kHalvings = 2 * std::numeric_limits<T>::digits;
  const int64_t partitions = num_time_partitions(s), threads = torch::stable::get_num_threads();
  if (partitions < 2 || threads <= s.batch * units(s)) return false;
  int64_t count = std::min(partitions, threads);
  const auto first_partition = [&](int64_t i) { return partitions * (backward ? count - i - 1 : i) / count; };
  const auto end_partition = [&](int64_t i) { return partitions * (backward ? count - i : i + 1) / count; };
  const auto chunks_before = [&](int64_t i,
                                 int64_t length) {  // `length` chunks before segment i, in the scan's direction
    ScanParams part = s;
    const int64_t edge = partition_begin(s, backward ? end_partition(i) : first_partition(i));
    part.first_chunk = backward ? edge : edge - length, part.end_chunk = part.first_chunk + length;
    return part;
  };
  // One carry for each segment but the first.
  const auto carries = [&](bool with_tangents, T number) {
    std::vector<Carry<T>> all;
    for (int64_t i = 1; i < count; ++i) all.emplace_back(scratch, s, with_tangents), all.back().fill(number);
    return all;
  };

  // Without B, states that start at 1 end as the products of their decays, here over kProbeChunks chunks.
  const std::vector<Carry<T>> decay_products = carries(false, 1);
  for_each_unit(s, count - 1, [&](int64_t i, int64_t unit) {
    Inputs<T> decays = in;
    decays.B = {}, decays.carry = decay_products[i].value;
    Outputs<T> to;
    to.carry = decay_products[i].value;
    forward<T>(chunks_before(i + 1, kProbeChunks), decays, nullptr, to, unit);
  });
  double slowest_decay = 0;
  for (const Carry<T>& decays : decay_products)
    for (int64_t i = 0; i < decays.size; ++i) {
      if (!(std::abs(decays.value[i]) < 1)) return false;
      slowest_decay = std::max<double>(slowest_decay, std::abs(decays.value[i]));
    }
  const int64_t length = kProbeChunks + static_cast<int64_t>(kProbeChunks * kHalvings / -std::log2(slowest_decay));
  constexpr int64_t kWorthwhile = 4;  // a segment has at least this many times the chunks of its warm-up
  count = std::min(count, chunks(s) / (kWorthwhile * length));
  if (count < 2) return false;

  const std::vector<Carry<T>> guess = carries(dual, 0), from_ones = carries(dual, 1), end_states = carries(dual, 0);
  for_each_unit(s, 2 * (count - 1), [&](int64_t i, int64_t unit) {
    warm_up(chunks_before(i / 2 + 1, length), (i % 2 ? from_ones : guess)[i / 2], unit);
  });
  for (int64_t i = 1; i < count; ++i)
    if (!guess[i - 1].same_bits(from_ones[i - 1])) return false;

  const auto segment = [&](int64_t i, int64_t unit) {
    const Carry<T>& last = from_ones[0];  // the last segment writes its end state here; none reads it
    run(first_partition(i), end_partition(i), i > 0 ? guess[i - 1] : Carry<T>{}, i + 1 < count ? end_states[i] : last,
        unit);
  };
  for_each_unit(s, count, segment);
  for (int64_t i = 1; i < count; ++i)
    if (!guess[i - 1].same_bits(end_states[i - 1])) {
      guess[i - 1].copy(end_states[i - 1]);
      for_each_unit(s, 1, [&](int64_t, int64_t unit) { segment(i, unit); });
    }
  return true;
}

}  // namespace
}  // namespace eaml::selective_scan
