// A stand-in for CUDA's execution model, for tests: the very kernels of the GPU run on a CPU, a fiber a thread.
//
// Blocks run one after the other in a shuffled order, their threads in turns of a shuffled order, each up to its next
// barrier or exchange. Shared memory starts as NaN in every block. What CUDA leaves undefined is an error: two threads
// that touch one word of shared memory with no barrier between, of which one writes; a barrier or an exchange that not
// all threads come to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

namespace eaml::cuda::machine {

// nullptr, or what went wrong.
const char* run(std::int64_t blocks, int threads, std::size_t shared_bytes, const std::function<void()>& kernel);

int thread();
std::int64_t block();
void sync_block();
void sync_warp();
std::uint32_t ballot(bool yes);
std::uint64_t exchange(std::uint64_t value, int mask);
char* shared_memory();
void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]);
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

}  // namespace eaml::cuda::machine
