// Lanes are steps of one channel. A part of kernel_inl.h.
//
// A unit goes through its channels one by one, and through the runs of its segment. A line has the inputs of a run
// after the width - 1 inputs before it, so that a tap is a shifted line.

// Whether steps are adjacent in memory and fill vectors.
template <class T>
bool lanes_are_steps(const ConvParams<T>& p) {
  constexpr int64_t kMinSteps = 16;
  return p.width > 1 && p.x.inner == 1 && p.x.channel != 1 && p.runs.length >= kMinSteps;
}

// The steps of a run in a segment, from `at` on.
struct RunPart {
  Position at;
  int64_t count;
  int64_t after;  // steps of the run after the segment, at most width - 1
};

template <class T>
struct StepScratch {
  static constexpr int64_t kLine = kSegment + 2 * kMaxWidth + kAlignment;
  RunPart* runs;
  int64_t num_runs = 0;
  T *x, *grad, *out;

  explicit StepScratch(Arena& arena)
      : runs(arena.take<RunPart>(kSegment)),
        x(arena.take<T>(kLine)),
        grad(arena.take<T>(kLine)),
        out(arena.take<T>(kLine)) {}

  void start(const ConvParams<T>& p, const Unit<T>& u) {
    with_width(p.width, [&](auto width) {
      Position at = position<width()>(p.runs, u.row, u.begin);
      runs[0] = {at, 1, 0}, num_runs = 1;
      while (at.t + 1 < u.end) {
        advance<width()>(p.runs, u.row, at);
        if (at.past == 0)
          runs[num_runs++] = {at, 1, 0};
        else
          ++runs[num_runs - 1].count;
      }
      int64_t& after = runs[num_runs - 1].after;
      while (after < width() - 1 && at.t + 1 < p.runs.length) {
        advance<width()>(p.runs, u.row, at);
        if (at.past == 0) break;
        ++after;
      }
    });
  }
};

// The filter of one channel.
template <int kWidth, class T>
struct Taps {
  T weight[kWidth], bias;
};
template <int kWidth, class T>
EAML_INLINE Taps<kWidth, T> taps_of(const ConvParams<T>& p, const Unit<T>& u, int64_t c) {
  const int64_t at = u.row / p.rows_per_task * p.dim + u.first + c;
  Taps<kWidth, T> w;
  for (int k = 0; k < kWidth; ++k) w.weight[k] = p.weight[at * kWidth + k];
  w.bias = p.bias ? p.bias[at] : T(0);
  return w;
}

// The inputs of a run's first `count` steps, after the width - 1 inputs before them; zeros up to a full vector follow.
template <int kWidth, class T>
EAML_SHARED void load_inputs(T* line, const ConvParams<T>& p, const Unit<T>& u, int64_t c, const Position& at,
                             int64_t count) {
  const int64_t row = u.row * p.x.outer + (u.first + c) * p.x.channel;
  const int missing = kWidth - 1 - at.past;
  const In<T>& s = p.states;
  if (at.zero || s.data == nullptr)
    std::fill_n(line, missing, T(0));
  else
    load_line(line, s, u.row * s.outer + at.sequence * s.sequence + (u.first + c) * s.channel + at.past * s.inner,
              s.inner, missing);
  load_line(line + missing, p.x, row + at.t - at.past, 1, at.past + count);
  std::fill_n(line + kWidth - 1 + count, Lanes<VectorOf<T>>::count, T(0));
}

template <int kWidth, class V, class T>
EAML_INLINE V filter(const T* line, const Taps<kWidth, T>& w) {
  V sum = load<V>(line) * w.weight[0] + w.bias;
  EAML_UNROLL
  for (int k = 1; k < kWidth; ++k) sum = load<V>(line + k) * w.weight[k] + sum;
  return sum;
}

template <int kWidth, bool kSilu, class T>
EAML_SHARED void filter_line(T* y, const T* line, const Taps<kWidth, T>& w, int64_t count) {
  using V = VectorOf<T>;
  for (int64_t i = 0; i < count; i += Lanes<V>::count) {
    const V sum = filter<kWidth, V>(line + i, w);
    store(y + i, kSilu ? sum * sigmoid(sum) : sum);
  }
}

template <int kWidth, class T>
EAML_SHARED void gate_line(T* grad, const T* line, const Taps<kWidth, T>& w, int64_t count) {
  using V = VectorOf<T>;
  for (int64_t i = 0; i < count; i += Lanes<V>::count)
    store(grad + i, gated(load<V>(grad + i), filter<kWidth, V>(line + i, w)));
}

// sums[k] += the sum of grad times the line shifted by k steps, sums[width] += the sum of grad, lane by lane.
template <int kWidth, class V, class T>
EAML_INLINE void accumulate_line(V (&sums)[kWidth + 1], const T* grad, const T* line, int64_t count) {
  constexpr int64_t W = Lanes<V>::count;
  const auto add = [&](auto load_at) EAML_LAMBDA {
    const V g = load_at(grad);
    EAML_UNROLL
    for (int k = 0; k < kWidth; ++k) sums[k] = fused(g, load_at(line + k), sums[k]);
    sums[kWidth] = sums[kWidth] + g;
  };
  int64_t i = 0;
  for (; i + W <= count; i += W) add([&](const T* from) EAML_LAMBDA { return load<V>(from + i); });
  if (i == count) return;
  // The steps after the segment belong to the next one. Their inputs count as zeros, too: 0 times infinity is NaN.
  add([&](const T* from) EAML_LAMBDA {
    alignas(kAlignment) T last[W] = {};
    std::copy_n(from + i, count - i, last);
    return load<V>(last);
  });
}

// The gradient of an input, of which the first `count` of the sums from grad on have a tap, newest first.
template <int kWidth, class V, class T>
EAML_INLINE V transposed(const T* grad, const T (&weight)[kWidth], int count, int newest) {
  V sum = load<V>(grad) * weight[newest] + T(0);
  for (int j = 1; j < count && j <= newest; ++j) sum = load<V>(grad + j) * weight[newest - j] + sum;
  return sum;
}
// One such gradient, with the rounding of a vector's: gcc rounds the products of a loop over numbers.
template <int kWidth, class T>
EAML_INLINE T transposed_one(const T* grad, const T (&weight)[kWidth], int count, int newest) {
  using V = VectorOf<T>;
  return transposed<kWidth, V>(grad, weight, count, newest)[0];
}

template <int kWidth, class T>
EAML_SHARED void transposed_line(T* to, const T* grad, const Taps<kWidth, T>& w, int64_t count, int64_t with_after) {
  using V = VectorOf<T>;
  const int64_t whole = std::min(count, with_after - (kWidth - 1));  // inputs with `width` sums
  for (int64_t i = 0; i < whole; i += Lanes<V>::count)
    store(to + i, transposed<kWidth, V>(grad + i, w.weight, kWidth, kWidth - 1));
  for (int64_t i = std::max<int64_t>(whole, 0); i < count; ++i)
    to[i] = transposed_one(grad + i, w.weight, static_cast<int>(with_after - i), kWidth - 1);
}

template <int kWidth, class T>
EAML_SHARED void forward_unit(StepScratch<T>& scratch, const ConvParams<T>& p, const Unit<T>& u) {
  for (int64_t c = 0; c < u.channels; ++c) {
    const auto w = taps_of<kWidth>(p, u, c);
    const int64_t y_row = u.row * p.y.outer + (u.first + c) * p.y.channel;
    for (int64_t r = 0; r < scratch.num_runs; ++r) {
      const RunPart& run = scratch.runs[r];
      load_inputs<kWidth>(scratch.x, p, u, c, run.at, run.count);
      p.silu ? filter_line<kWidth, true>(scratch.out, scratch.x, w, run.count)
             : filter_line<kWidth, false>(scratch.out, scratch.x, w, run.count);
      store_line(p.y, y_row + run.at.t * p.y.inner, p.y.inner, scratch.out, run.count);
    }
  }
}

template <int kWidth, class T>
EAML_SHARED void backward_unit(StepScratch<T>& scratch, const ConvParams<T>& p, const Unit<T>& u) {
  using V = VectorOf<T>;
  constexpr int64_t W = Lanes<V>::count;
  T* const grad = scratch.grad;
  T* const partial = p.partial + (u.row * p.segments + u.segment) * (kWidth + 1) * p.dim + u.first;
  for (int64_t c = 0; c < u.channels; ++c) {
    const auto w = taps_of<kWidth>(p, u, c);
    const int64_t y_row = u.row * p.y.outer + (u.first + c) * p.y.channel;
    const int64_t grad_row = u.row * p.grad_y.outer + (u.first + c) * p.grad_y.channel;
    V sums[kWidth + 1] = {};
    for (int64_t r = 0; r < scratch.num_runs; ++r) {
      const RunPart& run = scratch.runs[r];
      const int64_t with_after = run.count + run.after;
      load_inputs<kWidth>(scratch.x, p, u, c, run.at, with_after);
      load_line(grad, p.grad_y, grad_row + run.at.t * p.grad_y.inner, p.grad_y.inner, with_after);
      std::fill_n(grad + with_after, W + kWidth - 1, T(0));
      if (p.silu) gate_line<kWidth>(grad, scratch.x, w, with_after);
      accumulate_line<kWidth>(sums, grad, scratch.x, run.count);
      transposed_line<kWidth>(scratch.out, grad, w, run.count, with_after);
      store_line(p.y, y_row + run.at.t * p.y.inner, p.y.inner, scratch.out, run.count);
      if (p.grad_states.data == nullptr || !starts_from_state(run.at)) continue;
      const Out<T>& s = p.grad_states;
      for (int k = 0; k < kWidth - 1; ++k)  // the input width - 1 - k steps before the run
        scratch.out[k] = transposed_one(grad, w.weight, static_cast<int>(std::min<int64_t>(with_after, k + 1)), k);
      store_line(s, u.row * s.outer + run.at.sequence * s.sequence + (u.first + c) * s.channel, s.inner, scratch.out,
                 kWidth - 1);
    }
    for (int k = 0; k <= kWidth; ++k) {
      T sum = T(0);
      for (int64_t i = 0; i < W; ++i) sum += sums[k][i];
      partial[k * p.dim + c] = sum;
    }
  }
}
