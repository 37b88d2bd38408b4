// What all kernels share above single instructions: swizzled tiles, quad reductions, dropout bits.
#pragma once

#ifdef MEGAVIDEO_EMULATE
#include "emulated_primitives.h"
#else
#include "primitives.cuh"
#endif

namespace megavideo {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// "No score": finite, so that a difference of two of them is 0 and not NaN.
constexpr float kMasked = -1e30f;

__device__ __forceinline__ int lane_index() { return threadIdx.x & 31; }
__device__ __forceinline__ int warp_index() { return threadIdx.x >> 5; }

// Byte offset of 16-byte chunk `chunk` of row `row` in a tile of RowBytes-byte rows. The chunk
// number is XORed with the row number, so that the eight rows of an 8x8 matrix at one column lie in
// eight different groups of four banks: ldmatrix and the copies into the tile have no bank conflict.
template <int RowBytes>
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  static_assert(RowBytes % 128 == 0, "a row must cover all 32 banks");
  return row * RowBytes + ((chunk ^ (row & 7)) << 4);
}

// Maximum and sum over the four lanes that hold one row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}

// ---- dropout ----
// Which probabilities are dropped is a hash of (seed, head, query slot, key slot): forward and
// backward agree without storing a mask. One 32-bit hash serves the four pairs {q, q^8} x {k, k^8}
// with a byte each, because bit 3 of both numbers is what one lane holds of an accumulator of
// S = Q K^T and equally of S^T = K Q^T. A probability is dropped if its byte < `threshold`, that is
// with probability threshold / 256 (0.1 becomes 26 / 256, as in FlashAttention-2).

struct DropoutKey {
  uint32_t first, second;
};

// The finaliser of MurmurHash3 (public domain, A. Appleby), with `key` mixed in half-way so that
// two keys never give shifted copies of one mask.
__device__ __forceinline__ uint32_t mix(uint32_t x, uint32_t key) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13) ^ key) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Once per block: `head` numbers all heads of the batch, batch * H + head.
__device__ __forceinline__ DropoutKey dropout_key(uint64_t seed, uint32_t head) {
  uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  uint32_t first = mix(low ^ mix(head, 0x9e3779b9u), high);
  return {first, mix(first ^ high, low + head)};
}

// Four bytes for {q, q^8} x {k, k^8}; slots are below 65536.
__device__ __forceinline__ uint32_t dropout_word(DropoutKey key, int q, int k) {
  return mix(((q & ~8) << 16 | (k & ~8)) ^ key.first, key.second);
}

// Whether the pair (q, k) of that word is kept; `q_bit`, `k_bit` are bit 3 of q and k.
__device__ __forceinline__ bool dropout_keeps(uint32_t word, int q_bit, int k_bit, int threshold) {
  return static_cast<int>(word >> (16 * q_bit + 8 * k_bit) & 0xff) >= threshold;
}

}  // namespace megavideo
