// All of CUDA that kernels and their launchers use, each thing under one name. Compiled by nvcc it is CUDA; compiled
// with EAML_CUDA_ON_CPU, by a host compiler, it is the stand-in of tests/cuda_on_cpu/machine.h, which runs the same
// kernels on a CPU, a fiber a thread.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "common/simd.h"

#if defined(EAML_CUDA_ON_CPU)
#include "machine.h"
#define EAML_KERNEL(...) void
#define EAML_CONSTANT
#define EAML_UNROLL_BY(times)
#else
#include <cuda_runtime.h>
#define EAML_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads of a block, blocks of a processor
#define EAML_CONSTANT const __grid_constant__  // arguments of a kernel that stay in constant memory
#define EAML_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define EAML_UNROLL_BY(times) EAML_PRAGMA(unroll times)
#endif

namespace eaml::cuda {

constexpr int kWarp = 32;

// What runs on the host.

// Leaves a kernel on a stream; returns nullptr, or what went wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                   void* stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "too many blocks for one launch";
#if defined(EAML_CUDA_ON_CPU)
  return machine::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  constexpr std::size_t kWithoutAsking = 48 << 10;
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // torch is not to find it behind some other kernel
  return cudaGetErrorString(error);
#endif
}

// What runs on the device. The host's pass of nvcc sees it too, and never calls it.

#if defined(EAML_CUDA_ON_CPU)
#define EAML_DEVICE inline
#define EAML_MEMBER
#define EAML_DEVICE_CODE(cuda, host) host
#else
#define EAML_DEVICE static __device__ __forceinline__
#define EAML_MEMBER __device__ __forceinline__
#define EAML_DEVICE_CODE(cuda, host) cuda
#endif

EAML_DEVICE int thread() {
  return EAML_DEVICE_CODE(threadIdx.x, machine::thread());
}
EAML_DEVICE std::int64_t block() {
  return EAML_DEVICE_CODE(blockIdx.x, machine::block());
}
EAML_DEVICE void sync_block() {
  EAML_DEVICE_CODE(__syncthreads(), machine::sync_block());
}
EAML_DEVICE void sync_warp() {
  EAML_DEVICE_CODE(__syncwarp(), machine::sync_warp());
}
// The value of the thread of the warp whose number differs by the bits of `mask`. All threads take part.
template <class T>
EAML_DEVICE T shuffle_xor(T value, int mask) {
  return EAML_DEVICE_CODE(__shfl_xor_sync(0xffffffffu, value, mask), machine::shuffle_xor(value, mask));
}
// Bit i: whether thread i of the warp says so.
EAML_DEVICE std::uint32_t ballot(bool yes) {
  return EAML_DEVICE_CODE(__ballot_sync(0xffffffffu, yes), machine::ballot(yes));
}
// Read from memory that nothing writes while the kernel runs.
template <class T>
EAML_DEVICE T load(const T* from) {
  return EAML_DEVICE_CODE(__ldg(from), *from);
}

// 2^t: single precision within 2 ulp, denormal numbers are 0.
EAML_INLINE float exp2(float t) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(t));
  return out;
#else
  const float out = std::exp2(t);
  return out < 1.17549435e-38f ? 0.0f : out;
#endif
}
EAML_INLINE double exp2(double t) {
#if defined(__CUDA_ARCH__)
  return ::exp2(t);
#else
  return std::exp2(t);
#endif
}

// An array in the shared memory of the block.
template <class T>
struct Shared {
  T* data;
  EAML_MEMBER T get(int i) const {
    EAML_DEVICE_CODE(, machine::touch(data + i, sizeof(T), false));
    return data[i];
  }
  EAML_MEMBER void set(int i, T x) const {
    EAML_DEVICE_CODE(, machine::touch(data + i, sizeof(T), true));
    data[i] = x;
  }
  EAML_MEMBER Shared at(int i) const { return {data + i}; }

  // K numbers side by side, from a multiple of K on: one access of 16 bytes or few.
  template <int K>
  struct alignas(K * sizeof(T) < 16 ? K * sizeof(T) : 16) Row {
    T x[K];
  };
  template <int K>
  EAML_MEMBER void get_row(T (&to)[K], int i) const {
    EAML_DEVICE_CODE(, machine::touch(data + i, K * sizeof(T), false));
    const Row<K> row = *reinterpret_cast<const Row<K>*>(data + i);
    EAML_UNROLL
    for (int k = 0; k < K; ++k) to[k] = row.x[k];
  }
};

// The shared memory that the launch asked for, aligned to 16 bytes.
EAML_DEVICE char* shared_memory() {
#if defined(EAML_CUDA_ON_CPU)
  return machine::shared_memory();
#else
  extern __shared__ __align__(16) char memory[];
  return memory;
#endif
}

}  // namespace eaml::cuda
