// Argument checks of the C++ side: one sentence, the same as Python's, without file and line.
#pragma once

#include <sstream>
#include <stdexcept>

namespace eaml {

template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::invalid_argument(message.str());
}

}  // namespace eaml

#define EAML_CHECK(condition, ...)               \
  do {                                           \
    if (!(condition)) ::eaml::fail(__VA_ARGS__); \
  } while (0)
