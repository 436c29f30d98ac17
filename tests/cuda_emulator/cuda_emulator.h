// Emulates CUDA's execution model for tests: the kernels of the GPU run on a CPU, one fiber per thread.
//
// Blocks run one after the other in a shuffled order. The threads of a block take turns in a shuffled order, each up to
// its next barrier or exchange. Shared memory is NaN at the start of every block. Undefined behaviour of CUDA is an
// error: two accesses of different threads to a word of shared memory without a barrier in between, one of them a
// write. A barrier or an exchange that some threads do not reach is an error, too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace eaml::cuda::emulator {

// Runs a kernel; returns nullptr or an error message.
const char* run(std::int64_t blocks, int threads, std::size_t shared_bytes, const std::function<void()>& kernel);

int thread();
std::int64_t block();
void sync_block();
void sync_warp();
std::uint32_t ballot(bool yes);
std::uint64_t exchange(std::uint64_t value, int mask);
char* shared_memory();
// The instructions of common/cuda_compat.h.
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
// Checks and records an access to shared memory.
void touch(const void* data, std::size_t bytes, bool write);

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits, mask);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace eaml::cuda::emulator
