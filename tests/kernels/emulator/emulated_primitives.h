// The names of kernels/primitives.cuh, which documents them, for a CPU: same meaning, checked.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "runtime.h"

// CUDA's words that need no meaning here.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define threadIdx (megavideo::emulator::thread_index)
#define blockIdx (megavideo::emulator::block_index)
#define gridDim (megavideo::emulator::grid_size)

namespace megavideo {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- memory ----

template <class T>
T load_global(const T* address) {
  emulator::check_global_read(address, sizeof(T));
  emulator::counters.loaded += sizeof(T);
  return *address;
}

template <class T>
void store_global(T* address, T value) {
  emulator::check_global_write(address, sizeof(T));
  emulator::counters.stored += sizeof(T);
  *address = value;
}

inline void add_global(float* address, float4 x) {
  emulator::check_global_add(address, sizeof(float4));
  emulator::counters.added += sizeof(float4);
  const float values[4] = {x.x, x.y, x.z, x.w};
  for (int i = 0; i < 4; ++i) address[i] += values[i];
}

inline Shared shared_base() { return emulator::shared_begin(); }

template <class T>
T load_shared(Shared address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one load instruction");
  T value;
  emulator::read_shared(&value, address, sizeof(T));
  return value;
}

template <class T>
void store_shared(Shared address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "one store instruction");
  emulator::write_shared(address, &value, sizeof(T));
}

inline void cp_async_16(Shared destination, const void* source, bool valid) {
  emulator::copy_async(destination, source, valid);
}

inline void cp_async_commit() { emulator::commit_copies(); }

template <int Pending>
void cp_async_wait() {
  emulator::wait_copies(Pending);
}

// ---- threads ----

inline void sync_block() { emulator::sync_block(); }
inline void sync_warp() { emulator::sync_warp(); }

namespace emulator {

struct Shuffle {
  uint32_t value;
  int lane_mask;
};

inline void run_shuffle_xor(const Lane (&lanes)[kWarp]) {
  for (int lane = 0; lane < kWarp; ++lane) {
    int from = lane ^ static_cast<const Shuffle*>(lanes[lane].in)->lane_mask;
    *static_cast<uint32_t*>(lanes[lane].out) = static_cast<const Shuffle*>(lanes[from].in)->value;
  }
}

}  // namespace emulator

template <class T>
T shuffle_xor(T value, int lane_mask) {
  emulator::Shuffle in{bits_as<uint32_t>(value), lane_mask & 31};
  uint32_t out;
  emulator::collective("shuffle_xor", emulator::run_shuffle_xor, &in, &out);
  return bits_as<T>(out);
}

// ---- numbers ----

namespace emulator {

float float_of_half(uint16_t bits);
uint16_t half_of_float(float value);

inline float widen(Bfloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float widen(Float16 x) { return float_of_half(x.bits); }

template <class Element>
Element narrow(float value);

template <>
inline Bfloat16 narrow<Bfloat16>(float value) {
  uint32_t bits = bits_as<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <>
inline Float16 narrow<Float16>(float value) {
  return {half_of_float(value)};
}

template <class Element>
float low_of(uint32_t word) {
  return widen(Element{static_cast<uint16_t>(word)});
}

template <class Element>
float high_of(uint32_t word) {
  return widen(Element{static_cast<uint16_t>(word >> 16)});
}

}  // namespace emulator

template <class Element>
uint32_t pack(float low, float high) {
  return emulator::narrow<Element>(low).bits |
         static_cast<uint32_t>(emulator::narrow<Element>(high).bits) << 16;
}

template <class Element>
void unpack(uint32_t word, float& low, float& high) {
  low = emulator::low_of<Element>(word);
  high = emulator::high_of<Element>(word);
}

inline float exp2_fast(float x) {
  float y = exp2f(x);
  return y < 1.1754944e-38f ? 0.0f : y;  // .ftz
}

inline float log2_fast(float x) { return log2f(x); }

// ---- matrices ----

namespace emulator {

// Rows of one 8x8 matrix that lie in the same four banks are read in different passes.
inline void count_bank_conflicts(const Shared (&rows)[8]) {
  int passes = 1;
  for (int i = 0; i < 8; ++i) {
    int same = 0;
    for (int j = 0; j < 8; ++j) {
      bool repeated = false;
      for (int k = 0; k < j; ++k) repeated |= rows[k] == rows[j];
      same += !repeated && rows[j] / 16 % 8 == rows[i] / 16 % 8;
    }
    if (same > passes) passes = same;
  }
  counters.bank_conflicts += passes - 1;
}

template <bool Transposed>
void run_ldmatrix(const Lane (&lanes)[kWarp]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    Shared rows[8];
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      rows[row] = *static_cast<const Shared*>(lanes[8 * matrix + row].in);
      read_shared_by_warp(elements[row], rows[row], 16);
    }
    count_bank_conflicts(rows);
    for (int lane = 0; lane < kWarp; ++lane) {
      int g = lane / 4, t = lane % 4;
      uint32_t low = Transposed ? elements[2 * t][g] : elements[g][2 * t];
      uint32_t high = Transposed ? elements[2 * t + 1][g] : elements[g][2 * t + 1];
      static_cast<uint32_t*>(lanes[lane].out)[matrix] = low | high << 16;
    }
  }
  ++counters.ldmatrix;
}

struct Product {
  const uint32_t* a;
  uint32_t b0, b1;
};

template <class Element>
void run_mma(const Lane (&lanes)[kWarp]) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& in = *static_cast<const Product*>(lanes[lane].in);
    int g = lane / 4, t = lane % 4;
    for (int part = 0; part < 4; ++part) {
      float* to = &a[g + 8 * (part & 1)][2 * t + 8 * (part >> 1)];
      unpack<Element>(in.a[part], to[0], to[1]);
    }
    unpack<Element>(in.b0, b[2 * t][g], b[2 * t + 1][g]);
    unpack<Element>(in.b1, b[2 * t + 8][g], b[2 * t + 9][g]);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<float*>(lanes[lane].out);
    int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const float* row = a[g + 8 * (i >> 1)];
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += row[k] * b[k][2 * t + (i & 1)];
      d[i] += sum;
    }
  }
  ++counters.mma;
}

}  // namespace emulator

inline void ldmatrix_x4(uint32_t (&words)[4], Shared row) {
  emulator::collective("ldmatrix_x4", emulator::run_ldmatrix<false>, &row, words);
}

inline void ldmatrix_x4_trans(uint32_t (&words)[4], Shared row) {
  emulator::collective("ldmatrix_x4_trans", emulator::run_ldmatrix<true>, &row, words);
}

template <class Element>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulator::Product in{a, b0, b1};
  emulator::collective("mma_m16n8k16", emulator::run_mma<Element>, &in, d);
}

// ---- launching ----

template <class Params>
int launch(void (*kernel)(Params), dim3 grid, int threads, int shared_bytes, void*,
           const Params& params) {
  return emulator::launch([&] { kernel(params); }, {grid.x, grid.y, grid.z}, threads,
                          shared_bytes);
}

inline const char* error_text(int status) {
  return status == emulator::kFault ? emulator::last_fault() : "no such error";
}

}  // namespace megavideo
