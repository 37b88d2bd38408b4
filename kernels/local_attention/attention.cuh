// What all attention kernels share, whatever queries see: rows of a tensor and their ways to and
// from tiles, the running softmax, and which template serves a problem.
#pragma once

#include "../include/megavideo.h"
#include "fragments.cuh"

namespace megavideo {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

template <int HeadSize>
constexpr float kScale = HeadSize == 64 ? 0.125f : 0.08838834764831845f;  // HeadSize^-0.5

// ---- rows ----

// Where the rows of one head of one sample begin in a tensor, and how far apart they are.
template <class Element>
struct Rows {
  Element* first;
  int64_t stride;
};

template <class Element>
__device__ __forceinline__ Rows<Element> rows_of(Element* base, const MegavideoStrides& strides,
                                                 int part, int sample, int head) {
  base += sample * strides.sample + part * strides.part + head * strides.head;
  return {base, strides.slot};
}

// Start to gather `NumRows` rows of each of N tensors into a tile of its own: row i is slot_at(i), or
// zeros where that is -1. A row of 64 elements is one 128-byte line, so no byte is read in vain.
template <int HeadSize, int NumRows, int N, class Element, class SlotAt>
__device__ __forceinline__ void gather(const Shared (&tiles)[N], const Rows<Element> (&from)[N],
                                       const SlotAt& slot_at) {
  constexpr int kChunks = HeadSize / 8;
  const int chunk = threadIdx.x % kChunks;
#pragma unroll
  for (int i = 0; i < NumRows; i += kThreads / kChunks) {
    const int row = i + threadIdx.x / kChunks;
    const int slot = slot_at(row);
    const bool real = slot >= 0;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Element* source = from[n].first + (real ? slot : 0) * from[n].stride + 8 * chunk;
      cp_async_16(row_address<HeadSize>(tiles[n], row, chunk), source, real);
    }
  }
}

// Copy `NumRows` rows of a tile, from row `first` on, to the slots of a tensor; by one warp, to
// whose lanes the rows must be visible.
template <int HeadSize, int NumRows, class Element, class SlotAt>
__device__ __forceinline__ void scatter(Shared tile, int first, const Rows<Element>& to,
                                        const SlotAt& slot_at) {
  constexpr int kChunks = HeadSize / 8;
  const int chunk = lane_index() % kChunks;
#pragma unroll
  for (int i = 0; i < NumRows; i += 32 / kChunks) {
    const int row = first + i + lane_index() / kChunks;
    const int slot = slot_at(row);
    if (slot < 0) continue;
    const uint4 words = load_shared<uint4>(row_address<HeadSize>(tile, row, chunk));
    store_global(reinterpret_cast<uint4*>(to.first + slot * to.stride + 8 * chunk), words);
  }
}

// ---- softmax ----

// Running softmax of 16 queries; a lane holds rows `group` and `group + 8`.
struct RunningRows {
  float maximum[2] = {kMasked, kMasked};  // Of raw scores.
  float sum[2] = {0.0f, 0.0f};            // Of this lane's columns.
};

// Scores become probabilities relative to the running maximum, which may rise: then the output so
// far shrinks.
template <int HeadSize, int N>
__device__ __forceinline__ void update_softmax(float (&scores)[N][4], RunningRows& rows,
                                               float (&out)[HeadSize / 8][4]) {
  constexpr float kScaleLog2 = kScale<HeadSize> * kLog2e;
  float shrink[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float maximum = rows.maximum[half];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      maximum = fmaxf(maximum, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    maximum = quad_max(maximum);
    shrink[half] = exp2_fast((rows.maximum[half] - maximum) * kScaleLog2);
    rows.maximum[half] = maximum;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = exp2_fast(scores[n][i] * kScaleLog2 - maximum * kScaleLog2);
        sum += scores[n][i];
      }
    }
    rows.sum[half] = rows.sum[half] * shrink[half] + sum;
  }
  scale_rows(out, shrink);
}

// Divide the output by its softmax's sum, row `first` + 8 * half + group, and write the log of that
// sum to lse[slot] of the row.
template <int HeadSize, class SlotAt>
__device__ __forceinline__ void finish_rows(const RunningRows& rows, float (&out)[HeadSize / 8][4],
                                            float kept, float* lse, const SlotAt& slot_at,
                                            int first) {
  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(rows.sum[half]);
    scale[half] = kept / sum;
    const int slot = slot_at(first + 8 * half + lane_index() / 4);
    if (lane_index() % 4 == 0 && slot >= 0) {
      const float log_sum = log2_fast(sum) * kLn2;
      store_global(lse + slot, rows.maximum[half] * kScale<HeadSize> + log_sum);
    }
  }
  scale_rows(out, scale);
}

// Sum over elements of a times b, for rows `group` and `group + 8` of two left operands.
template <class Element, int HeadSize>
__device__ __forceinline__ void dot_rows(float (&sum)[2], const LeftRows<HeadSize>& a,
                                         const LeftRows<HeadSize>& b) {
  sum[0] = sum[1] = 0.0f;
#pragma unroll
  for (int k = 0; k < HeadSize / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // Words 0 and 2 are of row `group`.
      float a_low, a_high, b_low, b_high;
      unpack<Element>(a.words[k][i], a_low, a_high);
      unpack<Element>(b.words[k][i], b_low, b_high);
      sum[i % 2] += a_low * b_low + a_high * b_high;
    }
  }
  sum[0] = quad_sum(sum[0]);
  sum[1] = quad_sum(sum[1]);
}

// What a kept probability is multiplied by where `dropout` of 256 are dropped.
__device__ __forceinline__ float kept_scale(int dropout) { return 256.0f / (256 - dropout); }

// ---- host ----

// Template arguments as a value.
template <class Element_, int HeadSize_, bool Dropout_>
struct Variant {
  using Element = Element_;
  static constexpr int kHeadSize = HeadSize_;
  static constexpr bool kDropout = Dropout_;
};

template <class Element, int HeadSize, class Problem, class Run>
int with_dropout(const Problem& p, const Run& run) {
  return p.dropout ? run(Variant<Element, HeadSize, true>()) : run(Variant<Element, HeadSize, false>());
}

template <class Element, class Problem, class Run>
int with_head_size(const Problem& p, const Run& run) {
  return p.head_size == 64 ? with_dropout<Element, 64>(p, run) : with_dropout<Element, 128>(p, run);
}

// Returns run(Variant) for the variant that serves `p`.
template <class Problem, class Run>
int with_variant(const Problem& p, const Run& run) {
  return p.element == MEGAVIDEO_BFLOAT16 ? with_head_size<Bfloat16>(p, run)
                                         : with_head_size<Float16>(p, run);
}

template <class Problem>
bool has_variant(const Problem& p) {
  const bool element = p.element == MEGAVIDEO_BFLOAT16 || p.element == MEGAVIDEO_FLOAT16;
  const bool head_size = p.head_size == 64 || p.head_size == 128;
  return element && head_size && 0 <= p.dropout && p.dropout < 256;
}

}  // namespace megavideo
