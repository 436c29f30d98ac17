// What benchmarks measure the scan against: how many exponentials a second one thread does in registers.
#pragma once

namespace eaml {

double exp_rate();

}  // namespace eaml
