// The CPU kernels as templates on a vector of lanes. kernel.cpp includes this file once per instruction set.
//
// Lanes are channels or, where steps are adjacent in memory, steps. Every element has the same sum in the same order in
// both: the bias, then the taps from the oldest to the newest. A gradient of an input goes from the newest tap of the
// first sum to the oldest of the last.

namespace EAML_ISA {
namespace {

// clang-format off: each file uses those before it
#include "causal_conv1d/cpu/layout_inl.h"
#include "causal_conv1d/cpu/channels_inl.h"
#include "causal_conv1d/cpu/steps_inl.h"
// clang-format on

template <bool kBackward, class T>
EAML_INLINE void run(const ConvParams<T>& p, int64_t begin, int64_t end) {
  static thread_local Arena arena;
  arena.reset();
  const auto run_units = [&](auto scratch) EAML_LAMBDA {
    with_width(p.width, [&](auto width) EAML_LAMBDA {
      for (int64_t index = begin; index < end; ++index) {
        const Unit<T> u = unit(p, index);
        scratch.start(p, u);
        if constexpr (kBackward)
          backward_unit<width()>(scratch, p, u);
        else
          forward_unit<width()>(scratch, p, u);
      }
    });
  };
  lanes_are_steps(p) ? run_units(StepScratch<T>(arena)) : run_units(ChannelScratch<T>(arena));
}

}  // namespace

EAML_ENTRY void forward(const ConvParams<float>& p, int64_t begin, int64_t end) {
  run<false>(p, begin, end);
}
EAML_ENTRY void forward(const ConvParams<double>& p, int64_t begin, int64_t end) {
  run<false>(p, begin, end);
}
EAML_ENTRY void backward(const ConvParams<float>& p, int64_t begin, int64_t end) {
  run<true>(p, begin, end);
}
EAML_ENTRY void backward(const ConvParams<double>& p, int64_t begin, int64_t end) {
  run<true>(p, begin, end);
}

}  // namespace EAML_ISA
