// Products of a warp on the tensor cores, between accumulators in registers and tiles in shared
// memory. A tile is rows of HeadSize 16-bit elements, swizzled (common.cuh).
//
// Attention needs two products, forward and backward: one over the elements of a row
// (multiply_rows: Q K^T, dO V^T and their transposes) and one over the rows
// (multiply_columns: P V, P^T dO, dS^T Q, dS K; multiply_transposed: dS K where dS^T is at hand).
#pragma once

#include "../common.cuh"

namespace megavideo {

template <int HeadSize>
__device__ __forceinline__ Shared row_address(Shared tile, int row, int chunk) {
  return tile + swizzled<2 * HeadSize>(row, chunk);
}

// Rows row..row+15, elements 16k..16k+15, as the left operand of a product.
template <int HeadSize>
__device__ __forceinline__ void load_left(uint32_t (&words)[4], Shared tile, int row, int k) {
  const int lane = lane_index();
  ldmatrix_x4(words, row_address<HeadSize>(tile, row + (lane & 15), 2 * k + (lane >> 4)));
}

// Sixteen rows of a tile as left operands, kept in HeadSize / 4 registers.
template <int HeadSize>
struct LeftRows {
  uint32_t words[HeadSize / 16][4];

  __device__ __forceinline__ void load(Shared tile, int row) {
#pragma unroll
    for (int k = 0; k < HeadSize / 16; ++k) load_left<HeadSize>(words[k], tile, row, k);
  }
  __device__ __forceinline__ void get(uint32_t (&to)[4], int k) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = words[k][i];
  }
};

// The same where registers are short: read again at each use, so the tile must stay.
template <int HeadSize>
struct LeftRowsInTile {
  Shared tile;
  int row;

  __device__ __forceinline__ void load(Shared tile_, int row_) { tile = tile_, row = row_; }
  __device__ __forceinline__ void get(uint32_t (&to)[4], int k) const {
    load_left<HeadSize>(to, tile, row, k);
  }
};

// d[m][n] += sum over elements of left[m] (16 rows each) times rows 8n..8n+7 of the tile.
template <class Element, int HeadSize, template <int> class Left, int M, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[M][N][4], const Left<HeadSize> (&left)[M],
                                              Shared tile) {
  const int lane = lane_index();
  const int row = (lane & 7) + (lane >> 4) * 8, chunk = lane >> 3 & 1;
#pragma unroll
  for (int k = 0; k < HeadSize / 16; ++k) {
    uint32_t words[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) left[m].get(words[m], k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t right[4];  // Rows 8n..8n+7 in words 0 and 1, the next eight in 2 and 3.
      ldmatrix_x4(right, row_address<HeadSize>(tile, 8 * n + row, 2 * k + chunk));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16<Element>(d[m][n], words[m], right[0], right[1]);
        mma_m16n8k16<Element>(d[m][n + 1], words[m], right[2], right[3]);
      }
    }
  }
}

// d[m][n] += left[m] (16 x 8K numbers in accumulator layout, rounded to Element here) times
// elements 8n..8n+7 of the first 8K rows of the tile.
template <class Element, int HeadSize, int M, int K>
__device__ __forceinline__ void multiply_columns(float (&d)[M][HeadSize / 8][4],
                                                 const float (&left)[M][K][4], Shared tile) {
  const int lane = lane_index();
#pragma unroll
  for (int k = 0; k < K; k += 2) {
    uint32_t words[M][4];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&part)[4] = left[m][k + i / 2];
        words[m][i] = pack<Element>(part[i % 2 * 2], part[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < HeadSize / 8; n += 2) {
      uint32_t right[4];
      ldmatrix_x4_trans(right,
                        row_address<HeadSize>(tile, 8 * k + (lane & 15), n + (lane >> 4)));
#pragma unroll
      for (int m = 0; m < M; ++m) {
        mma_m16n8k16<Element>(d[m][n], words[m], right[0], right[1]);
        mma_m16n8k16<Element>(d[m][n + 1], words[m], right[2], right[3]);
      }
    }
  }
}

// d[n] += (16 x 16 elements of `left`, transposed) times elements 8n..8n+7 of 16 rows of `right`.
// Both tiles from row `row` on, and from 16-byte chunks `left_chunk` and `right_chunk` on.
template <class Element, int LeftSize, int RightSize, int N>
__device__ __forceinline__ void multiply_transposed(float (&d)[N][4], Shared left, int left_chunk,
                                                    Shared right, int right_chunk, int row) {
  const int lane = lane_index();
  uint32_t words[4];  // Of `left`, rows become columns: chunks alternate before rows do.
  ldmatrix_x4_trans(words, row_address<LeftSize>(left, row + (lane & 7) + (lane >> 4) * 8,
                                                 left_chunk + (lane >> 3 & 1)));
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    uint32_t pair[4];
    ldmatrix_x4_trans(pair, row_address<RightSize>(right, row + (lane & 15),
                                                   right_chunk + n + (lane >> 4)));
    mma_m16n8k16<Element>(d[n], words, pair[0], pair[1]);
    mma_m16n8k16<Element>(d[n + 1], words, pair[2], pair[3]);
  }
}

template <int M, int N>
__device__ __forceinline__ void set_zero(float (&d)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[m][n][i] = 0.0f;
    }
  }
}

// Write an accumulator (16 rows of 8N), rounded, to the left of rows row..row+15 of a tile.
template <class Element, int HeadSize, int N>
__device__ __forceinline__ void store_tile(Shared tile, int row, const float (&d)[N][4]) {
  const int group = lane_index() / 4, thread = lane_index() % 4;
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = pack<Element>(d[n][2 * half], d[n][2 * half + 1]);
      const Shared address = row_address<HeadSize>(tile, row + 8 * half + group, n);
      store_shared(address + 4 * thread, word);
    }
  }
}

// Multiply row `group + 8 * half` of an accumulator by scale[half].
template <int N>
__device__ __forceinline__ void scale_rows(float (&d)[N][4], const float (&scale)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) d[n][i] *= scale[i / 2];
  }
}

}  // namespace megavideo
