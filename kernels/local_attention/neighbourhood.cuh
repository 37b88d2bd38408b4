// What the forward and the backward kernels of neighbourhood attention share: sources of keys, the
// rectangles of keys and queries that see each other, and tiles of them in shared memory.
//
// Words used here: a source is a grid of keys (text is one too: eight columns, seen whole); a cell
// is the key that a query lies in; a block of threads owns 8x8 queries or keys, a warp a patch of
// 4x4 of them, and walks over the rectangle of keys or queries that its patch sees or is seen by. A
// block brings such rectangles to shared memory in strips of whole rows.
#pragma once

#include "../include/megavideo.h"
#include "attention.cuh"

namespace megavideo {

constexpr int kBlockSide = 8;
constexpr int kPatchSide = 4;
constexpr int kPatch = kPatchSide * kPatchSide;  // The m16 of a product.
constexpr int kBlockRows = kBlockSide * kBlockSide;
constexpr int kMaxSources = 3;
constexpr int kTextColumns = 8;
// Rows of a tile at most: 8x8 queries with 9x5 windows make one strip, 56 KiB with D = 64.
constexpr int kMaxStrip = 192;
// Greatest number of rows or columns of a grid: a strip has at least one row. All products of
// coordinates and ratios are below 65536, which the divisions by multiplication rely on.
constexpr int kMaxSide = kMaxStrip;

struct Range {
  int begin, end;

  __host__ __device__ int size() const { return end > begin ? end - begin : 0; }
  __host__ __device__ bool has(int x) const { return begin <= x && x < end; }
};

__host__ __device__ inline Range common(Range a, Range b) {
  return {a.begin > b.begin ? a.begin : b.begin, a.end < b.end ? a.end : b.end};
}

// What divides by `by` with one multiplication: x / by = x * inverse_of(by) >> 16 for x * by < 65536.
__host__ __device__ inline unsigned inverse_of(int by) { return 65535u / by + 1; }
__host__ __device__ inline int divided(int x, unsigned inverse) { return x * inverse >> 16; }

// One axis of a source: `size` keys, each the cell of `ratio` queries; a query sees the keys from
// `before` before its cell to `after` after it.
struct Axis {
  int queries, size, ratio, before, after;
  unsigned inverse;  // of the ratio

  __host__ __device__ int cell(int query) const { return divided(query, inverse); }
  // Keys that some of the queries see; nothing is seen by none.
  __host__ __device__ Range seen_by(Range queries) const {
    if (queries.size() == 0) return {0, 0};
    return common({cell(queries.begin) - before, cell(queries.end - 1) + after + 1}, {0, size});
  }
  // Queries that see some of the keys.
  __host__ __device__ Range that_see(Range keys) const {
    if (keys.size() == 0) return {0, 0};
    return common({(keys.begin - after) * ratio, (keys.end + before) * ratio}, {0, queries});
  }
};

// A grid of keys and which of them a query sees.
struct Source {
  Axis rows, columns;
  int slots;    // Of the tensors: text may leave the end of its last row empty.
  int number;   // By which dropout numbers its first key.
  int blocks;   // Of keys that need a gradient: all or none.
  // Columns of keys that a patch of queries sees, and of queries that see a patch of keys, at most.
  int key_pitch, query_pitch;
  bool causal;  // No keys after the cell, in raster order.
  bool is_text;
  const void* kv;
  void* grad_kv;
  MegavideoStrides strides;
};

// What the kernels get.
struct NeighbourhoodProblem : MegavideoNeighbourhoodAttention {
  int num_sources;
  int key_strip, query_strip;  // Rows of a tile for strips of keys, and for strips of queries.
  Source sources[kMaxSources];

  __host__ __device__ int queries() const { return rows * columns; }
};

struct Cell {
  int row, column;
};

// Rows and columns of a grid, in raster order.
struct Rectangle {
  Range rows, columns;

  __host__ __device__ int count() const { return rows.size() * columns.size(); }
};

// The cells of a rectangle by number.
struct Cells {
  Rectangle area;
  unsigned inverse;

  __device__ __forceinline__ explicit Cells(const Rectangle& area)
      : area(area), inverse(inverse_of(area.columns.size())) {}
  __device__ __forceinline__ Cell operator()(int number) const {
    const int row = divided(number, inverse);
    return {area.rows.begin + row, area.columns.begin + number - row * area.columns.size()};
  }
};

// Keys that hold something: all, or the real text at the end of its slots.
__device__ __forceinline__ Range real_slots(const NeighbourhoodProblem& p, const Source& source,
                                            int sample) {
  if (!source.is_text) return {0, source.slots};
  return {source.slots - static_cast<int>(load_global(p.text_length + sample)), source.slots};
}

__device__ __forceinline__ Cell cell_of(const Source& source, Cell query) {
  return {source.rows.cell(query.row), source.columns.cell(query.column)};
}

// Whether a query in cell `cell` sees the key at `key`.
__device__ __forceinline__ bool sees(const Source& source, Cell cell, Cell key) {
  const int below = key.row - cell.row, right = key.column - cell.column;
  const bool near = -source.rows.before <= below && below <= source.rows.after &&
                    -source.columns.before <= right && right <= source.columns.after;
  return near && (!source.causal || below < 0 || (below == 0 && right <= 0));
}

// ---- patches ----

// A block's 8x8 cells of a grid, patch by patch: row 16 w + 4 y + x of the block's tiles is cell
// (y, x) of warp w's patch. Cells outside the grid or the given slots have slot -1.
struct PatchSlots {
  Cell first;
  int rows, columns;
  Range slots;

  // The cells of block `index`, in raster order of blocks.
  __device__ __forceinline__ PatchSlots(int index, int rows, int columns, Range slots)
      : rows(rows), columns(columns), slots(slots) {
    const int across = (columns + kBlockSide - 1) / kBlockSide;
    first = {index / across * kBlockSide, index % across * kBlockSide};
  }
  __device__ __forceinline__ Cell cell(int row) const {
    const int patch = row / kPatch, inside = row % kPatch;
    return {first.row + patch / 2 * kPatchSide + inside / kPatchSide,
            first.column + patch % 2 * kPatchSide + inside % kPatchSide};
  }
  __device__ __forceinline__ int operator()(int row) const {
    const Cell at = cell(row);
    const int slot = at.row * columns + at.column;
    return at.row < rows && at.column < columns && slots.has(slot) ? slot : -1;
  }
  // The part of the grid that this block, or the patch of one of its warps, covers; maybe nothing.
  __device__ __forceinline__ Rectangle block() const { return square(first, kBlockSide); }
  __device__ __forceinline__ Rectangle patch(int warp) const {
    return square(cell(warp * kPatch), kPatchSide);
  }

 private:
  __device__ __forceinline__ Rectangle square(Cell at, int side) const {
    return {common({at.row, at.row + side}, {0, rows}),
            common({at.column, at.column + side}, {0, columns})};
  }
};

// Number of a cell for dropout: patches one after the other, so that bit 3 tells the upper from the
// lower half of a patch, which is what one lane holds of an accumulator with a patch's 16 rows.
__host__ __device__ inline int patch_number(Cell cell, int columns) {
  const int across = (columns + kPatchSide - 1) / kPatchSide;
  const int patch = cell.row / kPatchSide * across + cell.column / kPatchSide;
  return patch * kPatch + cell.row % kPatchSide * kPatchSide + cell.column % kPatchSide;
}

// ---- strips ----

// A row of a swizzled tile: where 16-byte chunks of it lie, from the tile's start.
struct TileRow {
  uint32_t start, swizzle;

  __device__ __forceinline__ uint32_t chunk(int index) const {
    return start + ((index ^ swizzle) << 4);
  }
};

// Cells of a grid whose rows lie in tiles of shared memory. The swizzle follows `pitch`, the width of
// what a warp reads away from borders, and not the strip's: then eight cells that follow each other
// in a warp's rectangle have eight swizzles, also across the end of a row, and ldmatrix has no bank
// conflict.
template <int HeadSize>
struct Strip {
  Rectangle area;
  int pitch;

  __device__ __forceinline__ int number(Cell cell) const {
    return (cell.row - area.rows.begin) * area.columns.size() + cell.column - area.columns.begin;
  }
  __device__ __forceinline__ TileRow row(Cell cell) const {
    const uint32_t swizzle = (cell.row * pitch + cell.column) & 7;
    return {static_cast<uint32_t>(number(cell) * HeadSize * 2), swizzle};
  }

  // Start to copy the cells' rows of N tensors to tiles; zeros for cells that are not in `slots`.
  template <int N, class Element>
  __device__ __forceinline__ void load(const Shared (&tiles)[N], const Rows<Element> (&from)[N],
                                       int columns, Range slots) const {
    constexpr int kChunks = HeadSize / 8;
    const int chunk = threadIdx.x % kChunks;
    const Cells cells(area);
    for (int i = threadIdx.x / kChunks; i < area.count(); i += kThreads / kChunks) {
      const Cell cell = cells(i);
      const int slot = cell.row * columns + cell.column;
      const bool valid = slots.has(slot);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const Element* source = from[n].first + (valid ? slot : 0) * from[n].stride + 8 * chunk;
        cp_async_16(tiles[n] + row(cell).chunk(chunk), source, valid);
      }
    }
  }
};

// Call visit(strip) for strips of at most `tile_rows` cells that make up `area`; by all threads.
template <int HeadSize, class Visit>
__device__ __forceinline__ void for_each_strip(const Rectangle& area, int tile_rows, int pitch,
                                               const Visit& visit) {
  const int height = tile_rows / area.columns.size();
  for (int row = area.rows.begin; row < area.rows.end; row += height) {
    const Range rows = common({row, row + height}, area.rows);
    visit(Strip<HeadSize>{{rows, area.columns}, pitch});
  }
}

// Sixteen cells, from number `first` on, of a warp's part of a strip. The last chunk may run past
// the end: then the last cell is read again, and `has` is false.
template <int HeadSize>
struct Chunk {
  const Strip<HeadSize>& strip;
  const Cells& cells;
  int first, count;

  __device__ __forceinline__ bool has(int i) const { return first + i < count; }
  __device__ __forceinline__ Cell cell(int i) const { return cells(has(i) ? first + i : count - 1); }

  // The row whose address this lane gives in `multiply_cells` and in `multiply_elements`.
  __device__ __forceinline__ TileRow row_by_cell() const {
    return strip.row(cell((lane_index() & 7) + (lane_index() >> 4) * 8));
  }
  __device__ __forceinline__ TileRow row_by_element() const {
    return strip.row(cell(lane_index() & 15));
  }
};

// Call visit(chunk) for all cells of `strip` that are `wanted`; by one warp.
template <int HeadSize, class Visit>
__device__ __forceinline__ void for_each_chunk(const Strip<HeadSize>& strip,
                                               const Rectangle& wanted, const Visit& visit) {
  const Rectangle part{common(wanted.rows, strip.area.rows), wanted.columns};
  const int count = part.count();
  if (count == 0) return;
  const Cells cells(part);
  for (int first = 0; first < count; first += 16) {
    visit(Chunk<HeadSize>{strip, cells, first, count});
  }
}

// ---- products of a patch, 16 rows, with the 16 cells of a chunk ----

// d[n] += left times the rows of cells 8n..8n+7.
template <class Element, int HeadSize, template <int> class Left>
__device__ __forceinline__ void multiply_cells(float (&d)[2][4], const Left<HeadSize>& left,
                                               Shared tile, TileRow row) {
  const int odd = lane_index() >> 3 & 1;
#pragma unroll
  for (int k = 0; k < HeadSize / 16; ++k) {
    uint32_t words[4], right[4];
    left.get(words, k);
    ldmatrix_x4(right, tile + row.chunk(2 * k + odd));
    mma_m16n8k16<Element>(d[0], words, right[0], right[1]);
    mma_m16n8k16<Element>(d[1], words, right[2], right[3]);
  }
}

// d[n] += left (16 x 16 numbers in accumulator layout, rounded to Element here) times elements
// 8n..8n+7 of the cells' rows.
template <class Element, int HeadSize>
__device__ __forceinline__ void multiply_elements(float (&d)[HeadSize / 8][4],
                                                  const float (&left)[2][4], Shared tile,
                                                  TileRow row) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack<Element>(left[i / 2][i % 2 * 2], left[i / 2][i % 2 * 2 + 1]);
  }
#pragma unroll
  for (int n = 0; n < HeadSize / 8; n += 2) {
    uint32_t right[4];
    ldmatrix_x4_trans(right, tile + row.chunk(n + (lane_index() >> 4)));
    mma_m16n8k16<Element>(d[n], words, right[0], right[1]);
    mma_m16n8k16<Element>(d[n + 1], words, right[2], right[3]);
  }
}

// Column of element d[n][i] of an accumulator, for even and odd i.
__device__ __forceinline__ int column_of(int n, int odd) {
  return 8 * n + 2 * (lane_index() % 4) + odd;
}

// ---- a block of queries ----

// Where a block of queries and each of its warps find their keys, forward and backward.
struct QueryBlock {
  const NeighbourhoodProblem& p;
  PatchSlots slot_at;
  Rectangle block, patch;
  int head, sample;

  __device__ __forceinline__ explicit QueryBlock(const NeighbourhoodProblem& p)
      : p(p), slot_at(blockIdx.x, p.rows, p.columns, {0, p.queries()}), block(slot_at.block()),
        patch(slot_at.patch(warp_index())), head(blockIdx.y), sample(blockIdx.z) {}

  // Query of row `group` (half 0) or `group + 8` of the warp's accumulators.
  __device__ __forceinline__ Cell query(int half) const {
    return slot_at.cell(kPatch * warp_index() + 8 * half + lane_index() / 4);
  }

  // Bring the keys and values that the block sees to two tiles, strip by strip, and call
  // visit(source, real slots, chunk) for those that this warp's patch sees.
  template <class Element, int HeadSize, class Visit>
  __device__ __forceinline__ void for_each_key(Shared key_tile, Shared value_tile,
                                               const Visit& visit) const {
    for (int s = 0; s < p.num_sources; ++s) {
      const Source& source = p.sources[s];
      const Range real = real_slots(p, source, sample);
      const auto* kv = static_cast<const Element*>(source.kv);
      const auto keys = rows_of(kv, source.strides, 0, sample, head);
      const auto values = rows_of(kv, source.strides, 1, sample, head);
      const auto seen_by = [&](const Rectangle& queries) {
        return Rectangle{source.rows.seen_by(queries.rows), source.columns.seen_by(queries.columns)};
      };
      const Rectangle wanted = seen_by(patch);
      for_each_strip<HeadSize>(seen_by(block), p.key_strip, source.key_pitch, [&](const auto& strip) {
        sync_block();  // The last strip has been read.
        strip.load({key_tile, value_tile}, {keys, values}, source.columns.size, real);
        cp_async_commit();
        cp_async_wait<0>();
        sync_block();
        for_each_chunk(strip, wanted, [&](const auto& chunk) { visit(source, real, chunk); });
      });
    }
  }

  // Unsee the scores of keys that are not visible.
  template <class Chunk>
  __device__ __forceinline__ void mask(float (&scores)[2][4], const Source& source, Range real,
                                       const Chunk& chunk) const {
    const Cell cells[2] = {cell_of(source, query(0)), cell_of(source, query(1))};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, odd = i % 2, column = column_of(n, odd);
      const Cell key = chunk.cell(column);
      const bool exists =
          chunk.has(column) && real.has(key.row * source.columns.size + key.column);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (!exists || !sees(source, cells[half], key)) scores[n][2 * half + odd] = kMasked;
      }
    }
  }

  // Call visit(n, i, kept) for the elements d[n][i] of the accumulator of a chunk.
  template <class Chunk, class Visit>
  __device__ __forceinline__ void visit_dropout(DropoutKey draw, const Source& source,
                                                const Chunk& chunk, const Visit& visit) const {
    const int q = patch_number(query(0), p.columns);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, odd = i % 2;
      const int k = source.number + patch_number(chunk.cell(column_of(n, odd)), source.columns.size);
      const uint32_t word = dropout_word(draw, q, k);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        visit(n, 2 * half + odd, dropout_keeps(word, half, k >> 3 & 1, p.dropout));
      }
    }
  }
};

// Rows of the head's part of a contiguous [B, queries, H, D] tensor.
template <class Element>
__device__ __forceinline__ Rows<Element> output_rows(const NeighbourhoodProblem& p, Element* base,
                                                     int sample, int head) {
  const int64_t stride = static_cast<int64_t>(p.heads) * p.head_size;
  return {base + sample * stride * p.queries() + head * p.head_size, stride};
}

template <class Element>
__device__ __forceinline__ Rows<const Element> query_rows(const NeighbourhoodProblem& p, int sample,
                                                          int head) {
  const auto* base = static_cast<const Element*>(p.query);
  return rows_of(base, p.query_strides, 0, sample, head);
}

// Offset of the head's numbers in a [B, H, queries] tensor.
__device__ __forceinline__ int64_t statistics_offset(const NeighbourhoodProblem& p, int sample,
                                                     int head) {
  return (static_cast<int64_t>(sample) * p.heads + head) * p.queries();
}

// ---- host ----

// Fill in what the kernels derive from `given`; false if it is outside the limits of megavideo.h.
bool describe(const MegavideoNeighbourhoodAttention& given, NeighbourhoodProblem& p);

// Number of squares of `side` that cover a grid.
inline int squares(int rows, int columns, int side) {
  return (rows + side - 1) / side * ((columns + side - 1) / side);
}

}  // namespace megavideo
