// What the forward and the backward kernels of interval attention share: whose rows are gathered
// from where, which key tiles a block of queries visits, and which template serves a problem.
//
// Words used here: a slot is a row of an input, a place is a position in the layout's order
// (megavideo/layout/intervals.py), a tile is 64 keys. Text keys have tiles of their own, visited
// before the image's: since every query sees some text, running maxima are finite from then on.
#pragma once

#include "attention.cuh"

namespace megavideo {

using Problem = MegavideoIntervalAttention;

constexpr int kTile = MEGAVIDEO_TILE;

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }

__host__ __device__ inline int tiles_of(int slots) { return (slots + kTile - 1) / kTile; }

// Rows of part `part` of a contiguous [B, slots, parts, H, D] tensor.
template <int HeadSize, class Element>
__device__ __forceinline__ Rows<Element> packed_rows(const Problem& p, Element* base, int slots,
                                                     int parts, int part, int sample, int head) {
  const int64_t stride = static_cast<int64_t>(parts) * p.heads * HeadSize;
  base += static_cast<int64_t>(sample) * slots * stride + (part * p.heads + head) * HeadSize;
  return {base, stride};
}

template <class Element>
__device__ __forceinline__ Rows<const Element> query_rows(const Problem& p, int sample, int head) {
  return rows_of(static_cast<const Element*>(p.image_qkv), p.image, 0, sample, head);
}

// Rows of a [B, V, H, D] tensor, contiguous.
template <int HeadSize, class Element>
__device__ __forceinline__ Rows<Element> output_rows(const Problem& p, Element* base, int sample,
                                                     int head) {
  return packed_rows<HeadSize>(p, base, p.image_slots, 1, 0, sample, head);
}

// Offset of the head's V numbers in a [B, H, V] tensor.
__device__ __forceinline__ int64_t statistics_offset(const Problem& p, int sample, int head) {
  return (static_cast<int64_t>(sample) * p.heads + head) * p.image_slots;
}

// A half-open run of keys.
struct Run {
  int begin, end;

  __device__ __forceinline__ bool has(int key) const { return begin <= key && key < end; }
  // Whether it has some, or all, of `count` keys.
  __device__ __forceinline__ bool meets(int first, int count) const {
    return first < end && first + count > begin;
  }
  __device__ __forceinline__ bool covers(int first, int count) const {
    return begin <= first && first + count <= end;
  }
};

// Slots of consecutive places; -1 past the end and where the layout is padded.
struct PlacesFrom {
  const int32_t* slots;
  int count;

  __device__ __forceinline__ PlacesFrom(const Problem& p, int first)
      : slots(p.slots + first), count(p.places - first) {}
  __device__ __forceinline__ int operator()(int row) const {
    return row < count ? load_global(slots + row) : -1;
  }
};

// Slots of consecutive text keys; -1 outside `run`.
struct TextFrom {
  Run run;
  int first;

  __device__ __forceinline__ int operator()(int row) const {
    return run.has(first + row) ? first + row : -1;
  }
};

// Text slots that hold a real token: text is left-padded.
__device__ __forceinline__ Run real_text(const Problem& p, int sample) {
  const int length = static_cast<int>(load_global(p.text_length + sample));
  return {p.text_slots - length, p.text_slots};
}

// The key tiles that a block of queries visits: those with real text, then the run of image tiles
// that any of its queries sees.
struct KeyTiles {
  int first_text, num_text, first_image, count;

  __device__ __forceinline__ KeyTiles(const Problem& p, Run text, int first_query, int queries) {
    first_text = text.begin / kTile;
    num_text = tiles_of(p.text_slots) - first_text;
    int begin = p.places, end = 0;
    const int last_query = least(first_query + queries, p.places);
    for (int tile = first_query / kTile; tile * kTile < last_query; ++tile) {
      begin = least(begin, load_global(p.bounds + 4 * tile));
      end = most(end, load_global(p.bounds + 4 * tile + 1));
    }
    first_image = begin / kTile;
    count = num_text + tiles_of(end) - first_image;
  }

  __device__ __forceinline__ bool is_text(int step) const { return step < num_text; }
  // First text slot or image place of the tile.
  __device__ __forceinline__ int first_key(int step) const {
    return kTile * (is_text(step) ? first_text + step : first_image + step - num_text);
  }
};

// Keys and values of one head of one sample, gathered tile by tile. Text that is not real is not
// read: whatever it holds, even infinities, counts as zero.
template <class Element, int HeadSize>
struct KeysAndValues {
  Rows<const Element> image_k, image_v, text_k, text_v;
  Run text;

  __device__ __forceinline__ KeysAndValues(const Problem& p, Run text, int sample, int head)
      : text(text) {
    const auto* image = static_cast<const Element*>(p.image_qkv);
    const auto* prompt = static_cast<const Element*>(p.text_kv);
    image_k = rows_of(image, p.image, 1, sample, head);
    image_v = rows_of(image, p.image, 2, sample, head);
    text_k = rows_of(prompt, p.text, 0, sample, head);
    text_v = rows_of(prompt, p.text, 1, sample, head);
  }

  __device__ __forceinline__ void gather_tile(const Problem& p, Shared k, Shared v, bool is_text,
                                              int first_key) const {
    if (is_text) {
      gather<HeadSize, kTile>({k, v}, {text_k, text_v}, TextFrom{text, first_key});
    } else {
      gather<HeadSize, kTile>({k, v}, {image_k, image_v}, PlacesFrom(p, first_key));
    }
  }
};

// By value: a reference to one of two structures would have to live in memory.
__device__ __forceinline__ Run choose(bool first, Run a, Run b) {
  return {first ? a.begin : b.begin, first ? a.end : b.end};
}

// What the queries of a warp see: text, the same for all, and places, M row tiles of 16 queries of
// which a lane holds rows `group` and `group + 8`.
template <int M>
struct Sight {
  Run text;
  Run places[M][2];
  Run some;   // A place outside is seen by no query of the warp,
  Run every;  // a place inside by all of them.

  // Of the warp whose first query is at place `first`.
  __device__ __forceinline__ Sight(const Problem& p, Run text, int first)
      : text(text), some{p.places, 0}, every{0, p.places} {
#pragma unroll
    for (int i = 0; i < 2 * M; ++i) {
      const int place = first + 8 * i + lane_index() / 4;
      const bool real = place < p.places;
      Run& run = places[i / 2][i % 2];
      run = {real ? load_global(p.begin + place) : 0, real ? load_global(p.end + place) : 0};
      some = {least(some.begin, run.begin), most(some.end, run.end)};
      every = {most(every.begin, run.begin), least(every.end, run.end)};
    }
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) {  // The other lanes of a quad hold the same rows.
      some = {least(some.begin, shuffle_xor(some.begin, lanes)),
              most(some.end, shuffle_xor(some.end, lanes))};
      every = {most(every.begin, shuffle_xor(every.begin, lanes)),
               least(every.end, shuffle_xor(every.end, lanes))};
    }
  }

  // Whether some query sees some key of the tile.
  __device__ __forceinline__ bool any(bool is_text, int first_key) const {
    return choose(is_text, text, some).meets(first_key, kTile);
  }
  // Whether every query sees every key of the tile.
  __device__ __forceinline__ bool all(bool is_text, int first_key) const {
    return choose(is_text, text, every).covers(first_key, kTile);
  }

  // Unsee the scores of what is not visible; the columns are keys from `first_key` on.
  __device__ __forceinline__ void mask(float (&scores)[M][kTile / 8][4], bool is_text,
                                       int first_key) const {
    const int column = first_key + 2 * (lane_index() % 4);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Run run = choose(is_text, text, places[m][half]);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
          if (!run.has(column + 8 * n)) scores[m][n][2 * half] = kMasked;
          if (!run.has(column + 8 * n + 1)) scores[m][n][2 * half + 1] = kMasked;
        }
      }
    }
  }
};

// Key number by which dropout is drawn: text tiles come first, then places.
__device__ __forceinline__ int dropout_column(const Problem& p, bool is_text, int first_key) {
  return is_text ? first_key : kTile * tiles_of(p.text_slots) + first_key;
}

// Call visit(n, i, kept) for each element d[n][i] of a 16 x 8N accumulator whose rows are queries
// from `query` on and whose columns are keys from `key` on, or the reverse if Transposed.
template <int N, bool Transposed, class Visit>
__device__ __forceinline__ void visit_dropout(DropoutKey draw, int query, int key, int threshold,
                                              const Visit& visit) {
  const int row = lane_index() / 4, column = 2 * (lane_index() % 4);
#pragma unroll
  for (int n = 0; n < N; n += 2) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int along = 8 * n + column + odd;
      const uint32_t word = Transposed ? dropout_word(draw, query + along, key + row)
                                       : dropout_word(draw, query + row, key + along);
#pragma unroll
      for (int row_bit = 0; row_bit < 2; ++row_bit) {
#pragma unroll
        for (int column_bit = 0; column_bit < 2; ++column_bit) {
          const int query_bit = Transposed ? column_bit : row_bit;
          const int key_bit = Transposed ? row_bit : column_bit;
          visit(n + column_bit, 2 * row_bit + odd,
                dropout_keeps(word, query_bit, key_bit, threshold));
        }
      }
    }
  }
}

// ---- host ----

inline bool is_supported(const Problem& p) {
  constexpr int kMost = 65472;  // Dropout numbers queries and keys with 16 bits.
  const bool sizes = p.batch > 0 && p.heads > 0 && p.image_slots > 0 && p.text_slots > 0;
  const bool grid = p.batch <= 65535 && p.heads <= 65535;
  const bool places = p.places >= p.image_slots && p.places % kTile == 0;
  const bool numbers = p.places <= kMost && p.text_slots <= kMost - p.places;
  return has_variant(p) && sizes && grid && places && numbers;
}

}  // namespace megavideo
