// Kernels with faults that the emulator must report.
#include "common/cuda_compat.h"

namespace {

using namespace eaml::cuda;

// Each thread writes a word and reads its neighbour's. `fault` selects what is wrong with it.
void neighbours(int fault, int* out) {
  const Shared<int> words{reinterpret_cast<int*>(shared_memory())};
  const int i = thread();
  words.set(i, i);
  if (fault != 1) sync_block();
  const int other = words.get(i ^ 1);
  if (fault == 2) words.set(i, other);  // the neighbour may still read it
  if (fault == 3 && i % 2) return sync_block();
  if (fault == 4) words.get(1 << 20);
  sync_warp();
  out[block() * 64 + i] = words.get(i) + other + shuffle_xor(i, 32 / 2);
}

// Stores whether shared memory holds numbers from the previous block.
void uninitialised(int* out) {
  const Shared<float> words{reinterpret_cast<float*>(shared_memory())};
  const float x = words.get(thread());
  words.set(thread(), 1);
  out[thread()] = x == x;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* eaml_fault(int fault, int* out) {
  if (fault == 5) return launch(uninitialised, 2, 64, 64 * 4, nullptr, out);
  return launch(neighbours, 3, 64, 64 * 4, nullptr, fault, out);
}
