// The functions of CUDA that kernels and their launchers use. nvcc compiles them to CUDA. With EAML_CUDA_EMULATOR, a
// host compiler compiles them to calls of tests/cuda_emulator/cuda_emulator.h, which runs the same kernels on a CPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/fp16.h"
#include "common/simd.h"

#if defined(EAML_CUDA_EMULATOR)
#include "cuda_emulator.h"
#define EAML_KERNEL(...) void
#define EAML_CONSTANT
#define EAML_UNROLL_BY(times)
#else
#include <cuda_runtime.h>
#define EAML_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)  // threads per block, blocks per multiprocessor
#define EAML_CONSTANT const __grid_constant__                            // kernel arguments, read from constant memory
#define EAML_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define EAML_UNROLL_BY(times) EAML_PRAGMA(unroll times)
#endif

namespace eaml::cuda {

constexpr int kWarp = 32;

// ---- host ----

#if !defined(EAML_CUDA_EMULATOR)
// An attribute of the current device; 0 if there is no device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess && cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess;
  return known ? value : 0;
}
#endif
// The largest shared memory of a block on the current device, in bytes.
inline std::size_t max_shared_bytes() {
#if defined(EAML_CUDA_EMULATOR)
  return SIZE_MAX;
#else
  return static_cast<std::size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
#endif
}

// Enqueues a kernel on a stream; returns nullptr or an error message.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, std::size_t shared_bytes,
                   void* stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffff) return "too many blocks for one launch";
#if defined(EAML_CUDA_EMULATOR)
  return emulator::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  constexpr std::size_t kDefaultSharedBytes = 48 << 10;
  cudaError_t error = cudaSuccess;
  // Always the device's maximum, because other threads may launch the kernel with another size.
  if (shared_bytes > kDefaultSharedBytes)
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(max_shared_bytes()));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks)), config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clears the error, which torch would else report for a later kernel
  return cudaGetErrorString(error);
#endif
}

// The ratio of the current device's throughput in single precision to that in double precision. On the emulator it is
// huge, so that tests reach the kernels that avoid double precision.
inline int singles_to_a_double() {
#if defined(EAML_CUDA_EMULATOR)
  return 1 << 20;
#else
  const int ratio = device_attribute(cudaDevAttrSingleToDoublePrecisionPerfRatio);
  return ratio > 0 ? ratio : 2;
#endif
}
// Whether the current device has the instructions of multiply_add and copy_async.
inline bool multiplies_bfloat16() {
#if defined(EAML_CUDA_EMULATOR)
  return true;
#else
  return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
#endif
}

// ---- device ---- nvcc compiles these functions in its host pass, too, where nothing calls them.

#if defined(EAML_CUDA_EMULATOR)
#define EAML_DEVICE inline
#define EAML_MEMBER
#define EAML_DEVICE_CODE(cuda, host) host
#else
#define EAML_DEVICE static __device__ __forceinline__
#define EAML_MEMBER __device__ __forceinline__
#define EAML_DEVICE_CODE(cuda, host) cuda
#endif

EAML_DEVICE int thread() {
  return EAML_DEVICE_CODE(threadIdx.x, emulator::thread());
}
EAML_DEVICE std::int64_t block() {
  return EAML_DEVICE_CODE(blockIdx.x, emulator::block());
}
EAML_DEVICE void sync_block() {
  EAML_DEVICE_CODE(__syncthreads(), emulator::sync_block());
}
EAML_DEVICE void sync_warp() {
  EAML_DEVICE_CODE(__syncwarp(), emulator::sync_warp());
}
// The value of the thread of the warp whose number is this thread's xor `mask`. All threads of the warp must call it.
template <class T>
EAML_DEVICE T shuffle_xor(T value, int mask) {
  return EAML_DEVICE_CODE(__shfl_xor_sync(0xffffffffu, value, mask), emulator::shuffle_xor(value, mask));
}
// Bit i is `yes` of thread i of the warp.
EAML_DEVICE std::uint32_t ballot(bool yes) {
  return EAML_DEVICE_CODE(__ballot_sync(0xffffffffu, yes), emulator::ballot(yes));
}
// The least x of the warp. All threads of the warp must call it.
EAML_DEVICE std::uint32_t min_of_warp(std::uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  return __reduce_min_sync(0xffffffffu, x);
#else
  for (int mask = 1; mask < kWarp; mask *= 2) {
    const std::uint32_t other = shuffle_xor(x, mask);
    x = other < x ? other : x;
  }
  return x;
#endif
}
// Reads memory that no thread writes while the kernel runs.
template <class T>
EAML_DEVICE T load(const T* from) {
  return EAML_DEVICE_CODE(__ldg(from), *from);
}
// Reads K adjacent numbers: 8 bytes or a multiple of 16, aligned to their size or to 16 bytes.
template <int K, class T>
EAML_DEVICE void load_row(T (&to)[K], const T* from) {
#if defined(EAML_CUDA_EMULATOR)
  std::memcpy(to, from, sizeof to);
#else
  if constexpr (sizeof to == 8) {
    const uint2 row = __ldg(reinterpret_cast<const uint2*>(from));
    memcpy(to, &row, 8);
  } else {
    static_assert(sizeof to % 16 == 0);
    uint4 row[sizeof to / 16];
    EAML_UNROLL
    for (int i = 0; i < int(sizeof to / 16); ++i) row[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
    memcpy(to, row, sizeof to);
  }
#endif
}
// Writes K adjacent numbers: 8 bytes or a multiple of 16, aligned to their size or to 16 bytes.
template <int K, class T>
EAML_DEVICE void store_row(T* to, const T (&from)[K]) {
#if defined(EAML_CUDA_EMULATOR)
  std::memcpy(to, from, sizeof from);
#else
  std::uint32_t words[sizeof from / 4];
  memcpy(words, from, sizeof from);
  if constexpr (sizeof from == 8) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]), "r"(words[1])
                 : "memory");
  } else {
    static_assert(sizeof from % 16 == 0);
    EAML_UNROLL
    for (int i = 0; i < int(sizeof from / 16); ++i)
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(
                       __cvta_generic_to_global(reinterpret_cast<char*>(to) + 16 * i)),
                   "r"(words[4 * i]), "r"(words[4 * i + 1]), "r"(words[4 * i + 2]), "r"(words[4 * i + 3])
                   : "memory");
  }
#endif
}

// The two numbers of a word of half precision, and back with rounding to nearest even.
template <Half kHalf>
EAML_DEVICE float widen_low(std::uint32_t pair) {
#if defined(__CUDA_ARCH__)
  if constexpr (kHalf == Half::kFloat16) {
    float out;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(out) : "r"(pair));
    return out;
  }
#endif
  return widen<kHalf, float>(pair & 0xffffu);
}
template <Half kHalf>
EAML_DEVICE float widen_high(std::uint32_t pair) {
#if defined(__CUDA_ARCH__)
  if constexpr (kHalf == Half::kFloat16) {
    float out;
    asm("{.reg .f16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(out) : "r"(pair));
    return out;
  }
#endif
  if constexpr (kHalf == Half::kBfloat16) return __builtin_bit_cast(float, pair & 0xffff0000u);
  return widen<kHalf, float>(pair >> 16);
}
template <Half kHalf>
EAML_DEVICE std::uint32_t narrow_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  std::uint32_t out;
  if constexpr (kHalf == Half::kFloat16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
#else
  return narrow<kHalf, std::uint32_t>(low) | narrow<kHalf, std::uint32_t>(high) << 16;
#endif
}

// Returns the 64-bit product by one instruction.
EAML_DEVICE std::int64_t multiply_wide(int a, int b) {
#if defined(__CUDA_ARCH__)
  std::int64_t out;
  asm("mul.wide.s32 %0, %1, %2;" : "=l"(out) : "r"(a), "r"(b));
  return out;
#else
  return std::int64_t{a} * b;
#endif
}
// Returns x, and keeps the compiler from hoisting values derived from it, which would occupy registers.
EAML_DEVICE int recomputed(int x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

EAML_DEVICE int count_bits(std::uint32_t x) {
  return EAML_DEVICE_CODE(__popc(x), __builtin_popcount(x));
}
#if defined(EAML_CUDA_EMULATOR)
// x, a product that the compiler does not fuse with the following sum. clang fuses only within an expression.
inline double rounded(double x) {
#if defined(__clang__)
#elif defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}
#endif
// a b, rounded before it is added to anything.
EAML_DEVICE double multiply(double a, double b) {
  return EAML_DEVICE_CODE(__dmul_rn(a, b), rounded(a * b));
}
EAML_DEVICE float multiply(float a, float b) {
  return EAML_DEVICE_CODE(__fmul_rn(a, b), static_cast<float>(double(a) * double(b)));
}
// Adds atomically for all threads of the grid; returns the number before the addition. The order is undefined.
EAML_DEVICE std::uint32_t add_for_all(std::uint32_t* to, std::uint32_t x) {
#if defined(EAML_CUDA_EMULATOR)
  const std::uint32_t before = *to;
  *to += x;
  return before;
#else
  return atomicAdd(to, x);
#endif
}
EAML_DEVICE void max_for_all(std::uint32_t* to, std::uint32_t x) {
#if defined(EAML_CUDA_EMULATOR)
  *to = *to < x ? x : *to;
#else
  atomicMax(to, x);
#endif
}

// c += a b on matrices, a: (16, 16) and b: (16, 8) bfloat16 numbers in pairs, c: (16, 8) floats. They are distributed
// over the threads of a warp as PTX defines for mma.m16n8k16. Products are exact, except that subnormal numbers may be
// read as zero. A step adds 4 to 16 products, aligned to the largest term and cut at 24 bits or more, in any order.
EAML_DEVICE void multiply_add(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
#if defined(EAML_CUDA_EMULATOR)
  emulator::multiply_add(c, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#elif defined(__CUDA_ARCH__)
  __trap();  // the device has the instruction, but the library has only code for older ones
#endif
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
    EAML_DEVICE_CODE(, emulator::touch(data + i, sizeof(T), false));
    return data[i];
  }
  EAML_MEMBER void set(int i, T x) const {
    EAML_DEVICE_CODE(, emulator::touch(data + i, sizeof(T), true));
    data[i] = x;
  }
  EAML_MEMBER Shared at(int i) const { return {data + i}; }

  // K adjacent numbers from a multiple of K on, in accesses of up to 16 bytes.
  template <int K>
  struct alignas(K * sizeof(T) < 16 ? K * sizeof(T) : 16) Row {
    T x[K];
  };
  template <int K>
  EAML_MEMBER void get_row(T (&to)[K], int i) const {
    EAML_DEVICE_CODE(, emulator::touch(data + i, K * sizeof(T), false));
    const Row<K> row = *reinterpret_cast<const Row<K>*>(data + i);
    EAML_UNROLL
    for (int k = 0; k < K; ++k) to[k] = row.x[k];
  }

  template <int K>
  EAML_MEMBER void set_row(const T (&from)[K], int i) const {
    EAML_DEVICE_CODE(, emulator::touch(data + i, K * sizeof(T), true));
    Row<K> row;
    EAML_UNROLL
    for (int k = 0; k < K; ++k) row.x[k] = from[k];
    *reinterpret_cast<Row<K>*>(data + i) = row;
  }

  // Copies 16 aligned bytes from global memory; complete after wait_for_copies. All threads must end a group of copies.
  EAML_MEMBER void copy_async(int i, const void* from) const {
#if defined(EAML_CUDA_EMULATOR)
    emulator::touch(data + i, 16, true);
    std::memcpy(data + i, from, 16);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const auto to = static_cast<std::uint32_t>(__cvta_generic_to_shared(data + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
  }
};

EAML_DEVICE void end_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits for all of this thread's copies except the last kPending groups.
template <int kPending>
EAML_DEVICE void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// The shared memory of the block, aligned to 16 bytes.
EAML_DEVICE char* shared_memory() {
#if defined(EAML_CUDA_EMULATOR)
  return emulator::shared_memory();
#else
  extern __shared__ __align__(16) char memory[];
  return memory;
#endif
}

}  // namespace eaml::cuda
