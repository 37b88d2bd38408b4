// What the host derives from a neighbourhood problem before it launches kernels.
#include "neighbourhood.cuh"

namespace megavideo {
namespace {

bool is_side(int size) { return 0 < size && size <= kMaxSide; }

bool is_odd(int size) { return size > 0 && size % 2 == 1; }

bool is_grid(const MegavideoKeyGrid& grid, int rows, int columns) {
  return is_side(grid.rows) && is_side(grid.columns) && rows % grid.rows == 0 &&
         columns % grid.columns == 0 && is_odd(grid.window_rows) && is_odd(grid.window_columns);
}

bool is_problem(const MegavideoNeighbourhoodAttention& given) {
  if (!has_variant(given)) return false;
  if (given.batch < 1 || given.batch > 65535 || given.heads < 1 || given.heads > 65535) return false;
  if (!is_side(given.rows) || !is_side(given.columns)) return false;
  if (given.text_slots < 0 || given.text_slots > kMaxSide * kTextColumns) return false;
  if (given.num_grids < 1 || given.num_grids > 2) return false;
  for (int i = 0; i < given.num_grids; ++i) {
    if (!is_grid(given.grids[i], given.rows, given.columns)) return false;
  }
  return true;
}

Axis axis_of(int queries, int size, int ratio, int before, int after) {
  return {queries, size, ratio, before, after, inverse_of(ratio)};
}

Source source_of(const MegavideoKeyGrid& grid, int rows, int columns) {
  const int up = grid.window_rows / 2, left = grid.window_columns / 2;
  Source source{};
  source.rows = axis_of(rows, grid.rows, rows / grid.rows, up, grid.causal ? 0 : up);
  source.columns = axis_of(columns, grid.columns, columns / grid.columns, left, left);
  source.slots = grid.rows * grid.columns;
  source.causal = grid.causal;
  source.kv = grid.kv;
  source.grad_kv = grid.grad_kv;
  source.strides = grid.strides;
  return source;
}

// Text as a grid whose first key is the cell of all queries, and which all of them see whole.
Source text_source(const MegavideoNeighbourhoodAttention& given) {
  const int rows = (given.text_slots + kTextColumns - 1) / kTextColumns;
  Source source{};
  source.rows = axis_of(given.rows, rows, given.rows, 0, rows);
  source.columns = axis_of(given.columns, kTextColumns, given.columns, 0, kTextColumns);
  source.slots = given.text_slots;
  source.is_text = true;
  source.kv = given.text_kv;
  source.grad_kv = given.grad_text;
  source.strides = given.text_strides;
  return source;
}

int least(int a, int b) { return a < b ? a : b; }
int most(int a, int b) { return a > b ? a : b; }

// The greatest number of keys that `queries` neighbours see.
int most_seen(const Axis& axis, int queries) {
  const int cells = (queries + axis.ratio - 2) / axis.ratio + 1;
  return least(axis.size, cells + axis.before + axis.after);
}

// The greatest number of queries that see some of `keys` neighbours.
int most_seeing(const Axis& axis, int keys) {
  return least(axis.queries, (keys + axis.before + axis.after) * axis.ratio);
}

// Add a source, and grow the tiles to what it needs.
void add(NeighbourhoodProblem& p, Source source, int& number) {
  const int keys = most_seen(source.rows, kBlockSide) * most_seen(source.columns, kBlockSide);
  const int queries =
      most_seeing(source.rows, kBlockSide) * most_seeing(source.columns, kBlockSide);
  p.key_strip = most(p.key_strip, least(kMaxStrip, keys));
  p.query_strip = most(p.query_strip, least(kMaxStrip, queries));
  source.key_pitch = most_seen(source.columns, kPatchSide);
  source.query_pitch = most_seeing(source.columns, kPatchSide);
  const int rows = source.rows.size, columns = source.columns.size;
  source.blocks = source.grad_kv ? squares(rows, columns, kBlockSide) : 0;
  source.number = number;
  number += squares(rows, columns, kPatchSide) * kPatch;
  p.sources[p.num_sources++] = source;
}

}  // namespace

// Text comes first: its keys are seen by all queries, so the blocks of their gradients are longest.
bool describe(const MegavideoNeighbourhoodAttention& given, NeighbourhoodProblem& p) {
  if (!is_problem(given)) return false;
  static_cast<MegavideoNeighbourhoodAttention&>(p) = given;
  p.num_sources = 0;
  p.key_strip = p.query_strip = kBlockRows;  // Tiles also hold a block's own rows for a while.
  int number = 0;
  if (given.text_slots) add(p, text_source(given), number);
  for (int i = 0; i < given.num_grids; ++i) {
    add(p, source_of(given.grids[i], given.rows, given.columns), number);
  }
  return !given.dropout || number <= 65536;
}

}  // namespace megavideo
