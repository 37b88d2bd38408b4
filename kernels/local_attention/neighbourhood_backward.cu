// Neighbourhood attention, backward, in two passes that both recompute the probabilities from lse.
//
//   p = exp(s - lse), dp = do v^T, delta = sum over elements of do o, ds = p (dp - delta) / sqrt(D)
//   dq = ds k, dk = ds^T q, dv = p^T do; with dropout dv takes the kept p, and dp of the dropped is 0
//
// First pass, by queries: delta (kept for the second pass) and dq, by the walk of the forward kernel.
// Second pass, by keys: dk and dv; a block owns 8x8 keys of a source, a warp a 4x4 patch, and walks
// over the queries that see it: S^T = K Q^T, so that P^T and dS^T feed the products for dV and dK
// straight from registers. No atomics, so the same bits in each run.
//
// Napkin math, 60x60 queries, 9x5 window, B = 4, H = 48, D = 64: q, k, v, o, do, dq, dk, dv are 708 MB,
// 236 us at 3.0 TB/s; 28 GF exact in seven products, 59 GF computed, 75 us at 790 TFLOP/s:
// memory-bound. Text keys are seen by all Q queries: their blocks are few and long and go first.
// Cells of a coarser grid are seen by ratio^2 times as many queries as keys of the queries' own grid.
// Shared memory, D = 64, 9x5: 64 KiB by queries, 66 KiB by keys; three blocks on a multiprocessor.
#include "neighbourhood.cuh"

namespace megavideo {
namespace {

template <int HeadSize>
constexpr float kScaleLog2 = kScale<HeadSize> * kLog2e;

// ---- by queries ----

// Read lse of a lane's two queries, as a power of two, and write their delta.
__device__ __forceinline__ void exchange_statistics(const QueryBlock& block,
                                                    const float (&delta)[2], float (&lse)[2]) {
  const int64_t offset = statistics_offset(block.p, block.sample, block.head);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int slot = block.slot_at(kPatch * warp_index() + 8 * half + lane_index() / 4);
    lse[half] = slot >= 0 ? load_global(block.p.lse + offset + slot) * kLog2e : 0.0f;
    if (slot >= 0 && lane_index() % 4 == 0) store_global(block.p.delta + offset + slot, delta[half]);
  }
}

template <class Variant>
__global__ void __launch_bounds__(kThreads, Variant::kHeadSize == 64 ? 3 : 1)
    neighbourhood_backward_queries(const __grid_constant__ NeighbourhoodProblem p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;
  constexpr int kRowBytes = 2 * kHeadSize;

  const QueryBlock block(p);
  const int head = block.head, sample = block.sample, warp_row = kPatch * warp_index();
  const Shared query_tile = shared_base();
  const Shared grad_tile = query_tile + kBlockRows * kRowBytes;
  const Shared key_tile = grad_tile + kBlockRows * kRowBytes;
  const Shared value_tile = key_tile + p.key_strip * kRowBytes;
  const Shared out_tile = key_tile;  // Until keys arrive.

  const auto* out = static_cast<const Element*>(p.out);
  const auto* grad_out = static_cast<const Element*>(p.grad_out);
  gather<kHeadSize, kBlockRows>({query_tile, grad_tile, out_tile},
                                {query_rows<Element>(p, sample, head),
                                 output_rows(p, grad_out, sample, head),
                                 output_rows(p, out, sample, head)},
                                block.slot_at);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  LeftRows<kHeadSize> queries, grads, outs;
  queries.load(query_tile, warp_row);
  grads.load(grad_tile, warp_row);
  outs.load(out_tile, warp_row);
  float delta[2], lse[2];
  dot_rows<Element>(delta, grads, outs);
  exchange_statistics(block, delta, lse);

  const DropoutKey draw = dropout_key(p.seed, sample * p.heads + head);
  float grad_queries[1][kHeadSize / 8][4];
  set_zero(grad_queries);
  block.for_each_key<Element, kHeadSize>(
      key_tile, value_tile, [&](const Source& source, Range real, const auto& chunk) {
        float scores[1][2][4], grad_scores[1][2][4];
        set_zero(scores);
        set_zero(grad_scores);
        multiply_cells<Element>(scores[0], queries, key_tile, chunk.row_by_cell());
        block.mask(scores[0], source, real, chunk);
        multiply_cells<Element>(grad_scores[0], grads, value_tile, chunk.row_by_cell());
        if constexpr (Variant::kDropout) {
          const float kept_factor = kept_scale(p.dropout);
          block.visit_dropout(draw, source, chunk, [&](int n, int i, bool kept) {
            grad_scores[0][n][i] *= kept ? kept_factor : 0.0f;
          });
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float p = exp2_fast(scores[0][n][i] * kScaleLog2<kHeadSize> - lse[i / 2]);
            grad_scores[0][n][i] = p * (grad_scores[0][n][i] - delta[i / 2]);
          }
        }
        multiply_elements<Element, kHeadSize>(grad_queries[0], grad_scores[0], key_tile,
                                              chunk.row_by_element());
      });

  const float scale[2] = {kScale<kHeadSize>, kScale<kHeadSize>};
  scale_rows(grad_queries[0], scale);
  store_tile<Element, kHeadSize>(query_tile, warp_row, grad_queries[0]);  // Its own rows.
  sync_warp();
  scatter<kHeadSize, kPatch>(
      query_tile, warp_row, output_rows(p, static_cast<Element*>(p.grad_query), sample, head),
      block.slot_at);
}

// ---- by keys ----

// Shared memory of a block: its keys and values, which stay because registers are short, then the
// queries, gradients of outputs, lse and delta of a strip.
template <int HeadSize>
struct KeyShape {
  static constexpr int kRowBytes = 2 * HeadSize;
  static constexpr int kTileBytes = kBlockRows * kRowBytes;

  static int shared_bytes(int strip) { return 2 * kTileBytes + 2 * strip * (kRowBytes + 4); }
};

// The source and the number of the 8x8 keys of a block; blocks of all sources form one row.
struct KeyBlock {
  int source, index;

  __device__ __forceinline__ explicit KeyBlock(const NeighbourhoodProblem& p)
      : source(0), index(blockIdx.x) {
    while (index >= p.sources[source].blocks) index -= p.sources[source++].blocks;
  }
};

// lse (as a power of two) and delta of the queries of a strip, in shared memory.
struct Statistics {
  Shared lse, delta;

  template <class Strip>
  __device__ __forceinline__ void load(const NeighbourhoodProblem& p, int64_t offset,
                                       const Strip& strip) const {
    const Cells cells(strip.area);
    for (int i = threadIdx.x; i < strip.area.count(); i += kThreads) {
      const Cell query = cells(i);
      const int64_t slot = offset + query.row * p.columns + query.column;
      store_shared(lse + 4 * i, load_global(p.lse + slot) * kLog2e);
      store_shared(delta + 4 * i, load_global(p.delta + slot));
    }
  }
};

// What a warp knows of its patch of keys.
struct KeyPatch {
  const NeighbourhoodProblem& p;
  const Source& source;
  Range real;
  PatchSlots slot_at;

  // Key of row `group` (half 0) or `group + 8` of the warp's accumulators.
  __device__ __forceinline__ Cell key(int half) const {
    return slot_at.cell(kPatch * warp_index() + 8 * half + lane_index() / 4);
  }
  __device__ __forceinline__ Rectangle that_see(const Rectangle& keys) const {
    return {source.rows.that_see(keys.rows), source.columns.that_see(keys.columns)};
  }

  // Unsee the scores of what is not visible; columns are the queries of the chunk.
  template <class Chunk>
  __device__ __forceinline__ void mask(float (&scores)[2][4], const Chunk& chunk) const {
    const Cell keys[2] = {key(0), key(1)};
    const bool exist[2] = {real.has(keys[0].row * slot_at.columns + keys[0].column),
                           real.has(keys[1].row * slot_at.columns + keys[1].column)};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, odd = i % 2, column = column_of(n, odd);
      const Cell cell = cell_of(source, chunk.cell(column));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool visible = chunk.has(column) && exist[half] && sees(source, cell, keys[half]);
        if (!visible) scores[n][2 * half + odd] = kMasked;
      }
    }
  }

  // Scores become probabilities, and gradients of probabilities those of scores.
  template <int HeadSize, bool Dropout>
  __device__ __forceinline__ void differentiate(float (&scores)[2][4], float (&grads)[2][4],
                                                const Statistics& statistics, DropoutKey draw,
                                                const Chunk<HeadSize>& chunk) const {
    const int k = source.number + patch_number(key(0), source.columns.size);
    const float kept_factor = kept_scale(p.dropout);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int n = i / 2, odd = i % 2;
      const Cell query = chunk.cell(column_of(n, odd));
      const int number = chunk.strip.number(query);
      const float lse = load_shared<float>(statistics.lse + 4 * number);
      const float delta = load_shared<float>(statistics.delta + 4 * number);
      const int q = patch_number(query, p.columns);
      const uint32_t word = Dropout ? dropout_word(draw, q, k) : 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &score = scores[n][2 * half + odd], &grad = grads[n][2 * half + odd];
        const bool kept = !Dropout || dropout_keeps(word, q >> 3 & 1, half, p.dropout);
        const float probability = exp2_fast(score * kScaleLog2<HeadSize> - lse);
        grad = probability * ((kept ? grad * kept_factor : 0.0f) - delta);
        score = kept ? probability : 0.0f;
      }
    }
  }
};

template <class Variant>
__global__ void __launch_bounds__(kThreads, Variant::kHeadSize == 64 ? 3 : 1)
    neighbourhood_backward_keys(const __grid_constant__ NeighbourhoodProblem p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;
  using Shape = KeyShape<kHeadSize>;

  const KeyBlock block(p);
  const Source& source = p.sources[block.source];
  const int head = blockIdx.y, sample = blockIdx.z, warp_row = kPatch * warp_index();
  const int rows = source.rows.size, columns = source.columns.size;
  const Range real = real_slots(p, source, sample);
  const KeyPatch patch{p, source, real, PatchSlots(block.index, rows, columns, {0, source.slots})};
  const Shared key_tile = shared_base();
  const Shared value_tile = key_tile + Shape::kTileBytes;
  const Shared query_tile = value_tile + Shape::kTileBytes;
  const Shared grad_tile = query_tile + p.query_strip * Shape::kRowBytes;
  const Shared lse = grad_tile + p.query_strip * Shape::kRowBytes;
  const Statistics statistics{lse, lse + 4 * p.query_strip};

  const auto* kv = static_cast<const Element*>(source.kv);
  gather<kHeadSize, kBlockRows>({key_tile, value_tile},
                                {rows_of(kv, source.strides, 0, sample, head),
                                 rows_of(kv, source.strides, 1, sample, head)},
                                PatchSlots(block.index, rows, columns, real));
  cp_async_commit();
  LeftRowsInTile<kHeadSize> keys, values;
  keys.load(key_tile, warp_row);
  values.load(value_tile, warp_row);

  const auto queries = query_rows<Element>(p, sample, head);
  const auto grads = output_rows(p, static_cast<const Element*>(p.grad_out), sample, head);
  const DropoutKey draw = dropout_key(p.seed, sample * p.heads + head);
  float grad_keys[1][kHeadSize / 8][4], grad_values[1][kHeadSize / 8][4];
  set_zero(grad_keys);
  set_zero(grad_values);
  const Rectangle wanted = patch.that_see(patch.slot_at.patch(warp_index()));
  for_each_strip<kHeadSize>(
      patch.that_see(patch.slot_at.block()), p.query_strip, source.query_pitch,
      [&](const auto& strip) {
        sync_block();  // The last strip has been read.
        strip.load({query_tile, grad_tile}, {queries, grads}, p.columns, {0, p.queries()});
        cp_async_commit();
        statistics.load(p, statistics_offset(p, sample, head), strip);
        cp_async_wait<0>();
        sync_block();
        for_each_chunk(strip, wanted, [&](const auto& chunk) {
          float scores[1][2][4], grad_scores[1][2][4];
          set_zero(scores);
          set_zero(grad_scores);
          multiply_cells<Element>(scores[0], keys, query_tile, chunk.row_by_cell());
          multiply_cells<Element>(grad_scores[0], values, grad_tile, chunk.row_by_cell());
          patch.mask(scores[0], chunk);
          patch.template differentiate<kHeadSize, Variant::kDropout>(scores[0], grad_scores[0],
                                                                     statistics, draw, chunk);
          multiply_elements<Element, kHeadSize>(grad_values[0], scores[0], grad_tile,
                                                chunk.row_by_element());
          multiply_elements<Element, kHeadSize>(grad_keys[0], grad_scores[0], query_tile,
                                                chunk.row_by_element());
        });
      });

  const float key_scale[2] = {kScale<kHeadSize>, kScale<kHeadSize>};
  const float value_scale[2] = {kept_scale(p.dropout), kept_scale(p.dropout)};
  scale_rows(grad_keys[0], key_scale);
  scale_rows(grad_values[0], value_scale);
  sync_warp();  // The warp's own keys and values have been read.
  store_tile<Element, kHeadSize>(key_tile, warp_row, grad_keys[0]);
  store_tile<Element, kHeadSize>(value_tile, warp_row, grad_values[0]);
  sync_warp();
  // grad_kv [B, slots, 2, H, D], contiguous.
  const int64_t part = static_cast<int64_t>(p.heads) * kHeadSize;
  auto* first = static_cast<Element*>(source.grad_kv) + sample * 2 * part * source.slots +
                head * kHeadSize;
  scatter<kHeadSize, kPatch>(key_tile, warp_row, Rows<Element>{first, 2 * part}, patch.slot_at);
  scatter<kHeadSize, kPatch>(value_tile, warp_row, Rows<Element>{first + part, 2 * part},
                             patch.slot_at);
}

template <class Variant>
int launch_by_queries(const NeighbourhoodProblem& p, void* stream) {
  const dim3 grid(squares(p.rows, p.columns, kBlockSide), p.heads, p.batch);
  const int shared_bytes = 2 * (kBlockRows + p.key_strip) * Variant::kHeadSize * 2;
  return launch(neighbourhood_backward_queries<Variant>, grid, kThreads, shared_bytes, stream, p);
}

template <class Variant>
int launch_by_keys(const NeighbourhoodProblem& p, void* stream) {
  int blocks = 0;
  for (int s = 0; s < p.num_sources; ++s) blocks += p.sources[s].blocks;
  if (blocks == 0) return 0;
  const int shared_bytes = KeyShape<Variant::kHeadSize>::shared_bytes(p.query_strip);
  return launch(neighbourhood_backward_keys<Variant>, dim3(blocks, p.heads, p.batch), kThreads,
                shared_bytes, stream, p);
}

}  // namespace
}  // namespace megavideo

extern "C" int megavideo_neighbourhood_backward(const MegavideoNeighbourhoodAttention* given,
                                                void* stream) {
  using namespace megavideo;
  NeighbourhoodProblem p;
  if (!describe(*given, p)) return MEGAVIDEO_INVALID;
  return with_variant(p, [&](auto variant) {
    using Variant = decltype(variant);
    const int status = launch_by_queries<Variant>(p, stream);
    return status ? status : launch_by_keys<Variant>(p, stream);
  });
}
