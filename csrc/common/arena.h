// Scratch memory of one thread, kept between calls: fresh pages would cost more than the arithmetic on them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "common/simd.h"

namespace eaml {

class Arena {
 public:
  // Ends the lifetime of all arrays; keeps the memory unless it exceeds kKeep.
  void reset() {
    current_ = 0, used_ = 0;
    if (size_ > kKeep) blocks_.clear(), size_ = 0;
  }

  // Uninitialised, aligned to a full vector, valid until reset().
  template <class T>
  T* take(std::size_t count) {
    return reinterpret_cast<T*>(take_bytes((count * sizeof(T) + kAlign - 1) / kAlign * kAlign));
  }

 private:
  static constexpr std::size_t kAlign = 64;
#ifdef __SANITIZE_ADDRESS__  // one allocation per array, so that accesses beyond its end are reported
  static constexpr std::size_t kBlock = 0, kKeep = 0;
#else
  static constexpr std::size_t kBlock = std::size_t{1} << 18, kKeep = std::size_t{1} << 26;
#endif
  struct Delete {
    void operator()(std::byte* p) const { ::operator delete(p, std::align_val_t{kAlign}); }
  };
  struct Block {
    explicit Block(std::size_t n)
        : data(static_cast<std::byte*>(::operator new(n, std::align_val_t{kAlign}))), size(n) {}
    std::unique_ptr<std::byte, Delete> data;
    std::size_t size;
  };
  EAML_NOINLINE std::byte* take_bytes(std::size_t bytes) {
    while (current_ < blocks_.size() && used_ + bytes > blocks_[current_].size) ++current_, used_ = 0;
    if (current_ == blocks_.size()) {
      blocks_.emplace_back(bytes > kBlock ? bytes : kBlock);
      size_ += blocks_.back().size;
    }
    std::byte* const out = blocks_[current_].data.get() + used_;
    used_ += bytes;
    return out;
  }
  std::vector<Block> blocks_;
  std::size_t current_ = 0, used_ = 0, size_ = 0;
};

}  // namespace eaml
