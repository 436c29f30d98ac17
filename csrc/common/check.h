// Argument checks in C++: one sentence in the form of Python's checks, without file and line.
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
