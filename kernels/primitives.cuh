// The hardware instructions that the kernels use, one thin function each. The kernels touch memory,
// other threads and the tensor cores only through these names, so that the same kernel source also
// runs on a CPU: tests/kernels/emulator/ has the same names with the same meaning and more checks.
//
// Needs sm_80. Shared memory is addressed by 32-bit byte addresses (`Shared`), global memory by
// pointers. A fragment is what one lane of a warp holds of a matrix (PTX ISA, "Matrix Fragments"):
// with g = lane / 4 and t = lane % 4, an 8x8 matrix of 16-bit elements gives a lane the word of
// elements (g, 2t) and (g, 2t + 1).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace megavideo {

// 16-bit elements in memory. Arithmetic is done on words of two (`pack`, `unpack`) and in float.
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Byte address in the shared memory of a block.
using Shared = uint32_t;

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- global memory ----

// Read of memory that no thread writes during the launch (ld.global.nc).
template <class T>
__device__ __forceinline__ T load_global(const T* address) {
  return __ldg(address);
}

template <class T>
__device__ __forceinline__ void store_global(T* address, T value) {
  *address = value;
}

// Add to four floats, at a multiple of 16 bytes, that other threads add to: in whatever order.
__device__ __forceinline__ void add_global(float* address, float4 x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
#else
  asm volatile(
      "red.relaxed.gpu.global.add.f32 [%0], %1;\n\t"
      "red.relaxed.gpu.global.add.f32 [%0 + 4], %2;\n\t"
      "red.relaxed.gpu.global.add.f32 [%0 + 8], %3;\n\t"
      "red.relaxed.gpu.global.add.f32 [%0 + 12], %4;" ::"l"(address),
      "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
      : "memory");
#endif
}

// ---- shared memory ----

// First byte of the block's dynamic shared memory, aligned to 128 bytes.
__device__ __forceinline__ Shared shared_base() {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(shared_memory));
}

// T has 4, 8 or 16 bytes, and the address is a multiple of its size.
template <class T>
__device__ __forceinline__ T load_shared(Shared address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load instruction");
  if constexpr (sizeof(T) == 4) {
    uint32_t x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return bits_as<T>(x);
  } else if constexpr (sizeof(T) == 8) {
    uint2 x;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                 : "=r"(x.x), "=r"(x.y)
                 : "r"(address)
                 : "memory");
    return bits_as<T>(x);
  } else {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return bits_as<T>(x);
  }
}

template <class T>
__device__ __forceinline__ void store_shared(Shared address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one store instruction");
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(bits_as<uint32_t>(value))
                 : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2 x = bits_as<uint2>(value);
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(address), "r"(x.x), "r"(x.y) : "memory");
  } else {
    uint4 x = bits_as<uint4>(value);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y),
                 "r"(x.z), "r"(x.w)
                 : "memory");
  }
}

// ---- asynchronous copies ----

// Start to copy 16 bytes (both addresses multiples of 16); if not `valid`, write 16 zero bytes and
// do not read. Past L1 (.cg): a tile is read once per block. Nothing may read the destination until
// its group has been waited for and, for other threads than this one, a barrier has been passed.
__device__ __forceinline__ void cp_async_16(Shared destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Close this thread's group of copies; a group may be empty.
__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most the `Pending` newest groups of this thread are unfinished.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// ---- threads ----

// Barrier of all threads of the block.
__device__ __forceinline__ void sync_block() { __syncthreads(); }

// Barrier of the warp: what its lanes wrote to memory before, its lanes may read after.
__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// T has 4 bytes; all 32 lanes take part.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}

// ---- matrices ----

// Load four 8x8 matrices of 16-bit elements. Lane 8i + r gives the address of row r of matrix i
// (16 bytes, 16-byte aligned); word i of the result is this lane's fragment of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// The same, of the transposed matrices: the word holds elements (2t, g) and (2t + 1, g).
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// d[16x8] += a[16x16] b[16x8], float accumulators; a is row-major, b is column-major. In 8x8 parts:
//   a[0] rows 0-7 of columns 0-7, a[1] rows 8-15 of columns 0-7, a[2] and a[3] of columns 8-15;
//   b0 rows (k) 0-7, b1 rows 8-15: their words hold elements (2t, g) and (2t + 1, g);
//   d[0], d[1] elements (g, 2t), (g, 2t + 1); d[2], d[3] those of row g + 8.
// So the accumulators of two neighbouring products, packed, are an `a` of the next product.
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void mma_m16n8k16<Bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                       uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<Float16>(float (&d)[4], const uint32_t (&a)[4],
                                                      uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ----

// Two floats, rounded to nearest even, as one word: `low` in bits 0-15.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

// The float values of a word's two elements.
template <class Element>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high);

template <>
__device__ __forceinline__ void unpack<Bfloat16>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}

template <>
__device__ __forceinline__ void unpack<Float16>(uint32_t word, float& low, float& high) {
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(low), "=f"(high)
      : "r"(word));
}

// 2^x and log2(x): relative error of exp2 about 2^-22, subnormals are zero, exp2(-inf) = 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- launching (host) ----

// Run `kernel(params)` on grid x `threads` threads. Returns 0 or a cudaError_t.
template <class Params>
int launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, void* stream,
           const Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  // Above 48 KiB a kernel must ask, once per device; asking again costs less than a microsecond.
  if (cudaError_t error = cudaFuncSetAttribute(
          function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) {
    return error;
  }
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(function, grid, dim3(threads), arguments, shared_bytes,
                          static_cast<cudaStream_t>(stream));
}

// What a status of `launch` means.
inline const char* error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace megavideo
