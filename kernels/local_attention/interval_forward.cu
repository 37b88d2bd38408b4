// Interval attention, forward: each query sees the real text and one interval of image places.
//
//   o = softmax(q k^T / sqrt(D)) v over the keys that q sees, lse = log of the softmax's sum
//   image_qkv [B, V, 3, H, D], text_kv [B, T, 2, H, D] -> out [B, V, H, D], lse [B, H, V]
//
// Algorithm: FlashAttention-2. A block of four warps owns 128 queries (64 for D = 128) and walks
// over the 64-key tiles that any of them sees, with softmax kept online in registers. Rows are
// gathered from the packed QKV product by the layout's slots, so windows, shifts and interleaved
// frames cost no copy. A warp skips tiles that none of its queries sees, and masks only tiles that
// some of them do not see whole; padding and text length are masked in text tiles alone.
//
// Napkin math, CogVideo's stage 1 (B = 4, H = 48, D = 64, V = 2000, T = 64) on an H100 at 790
// TFLOP/s and 3.0 TB/s; q, k, v and o are 203 MB together, 68 us. FLOPs as the mask needs:
//   spatial, 26 GF: 33 us, memory-bound;  dense causal, 105 GF: 132 us, bound by arithmetic;
//   shifted windows, 20-40 GF: 26-50 us, memory-bound.
// Each warp has 32 queries for D = 64, because a fragment of keys that is read from shared memory
// (256 B) then feeds two products; with 16 queries shared memory would be the bound.
// Two stages of keys and values: 48 KiB (D = 64), 80 KiB (128), and at most 255 and 238 registers for
// two blocks on a multiprocessor. No spills.
#include "interval.cuh"

namespace megavideo {
namespace {

template <int HeadSize>
struct ForwardShape {
  static constexpr int kM = HeadSize == 64 ? 2 : 1;  // Row tiles of 16 queries per warp.
  static constexpr int kQueries = 16 * kM * kWarps;
  static constexpr int kTileBytes = kTile * HeadSize * 2;
  static constexpr int kQueryBytes = kQueries * HeadSize * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStageBytes;
};

// Set the probabilities to zero that dropout takes; the softmax's sum keeps them.
template <int M>
__device__ __forceinline__ void drop(float (&probabilities)[M][kTile / 8][4], DropoutKey draw,
                                     int query, int key, int threshold) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    visit_dropout<kTile / 8, false>(draw, query + 16 * m, key, threshold,
                                    [&](int n, int i, bool kept) {
                                      if (!kept) probabilities[m][n][i] = 0.0f;
                                    });
  }
}

template <class Variant>
__global__ void __launch_bounds__(kThreads, 2) interval_forward(const __grid_constant__ Problem p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;
  using Shape = ForwardShape<kHeadSize>;
  constexpr int kM = Shape::kM;

  const int head = blockIdx.y, sample = blockIdx.z;
  // Late queries see most: they go first, so that no long block is left at the end.
  const int first_query = (gridDim.x - 1 - blockIdx.x) * Shape::kQueries;
  const int warp_row = 16 * kM * warp_index();
  const Shared query_tile = shared_base();
  const Shared stages = query_tile + Shape::kQueryBytes;

  const Run text = real_text(p, sample);
  const KeyTiles tiles(p, text, first_query, Shape::kQueries);
  const KeysAndValues<Element, kHeadSize> keys(p, text, sample, head);
  const auto gather_step = [&](int step) {
    const Shared stage = stages + step % 2 * Shape::kStageBytes;
    keys.gather_tile(p, stage, stage + Shape::kTileBytes, tiles.is_text(step),
                     tiles.first_key(step));
    cp_async_commit();
  };

  const PlacesFrom slot_at(p, first_query);
  gather<kHeadSize, Shape::kQueries>({query_tile}, {query_rows<Element>(p, sample, head)}, slot_at);
  cp_async_commit();
  gather_step(0);
  cp_async_wait<1>();
  sync_block();

  LeftRows<kHeadSize> queries[kM];
#pragma unroll
  for (int m = 0; m < kM; ++m) queries[m].load(query_tile, warp_row + 16 * m);
  const Sight<kM> sight(p, text, first_query + warp_row);
  const DropoutKey draw = dropout_key(p.seed, sample * p.heads + head);
  RunningRows running[kM];
  float out[kM][kHeadSize / 8][4];
  set_zero(out);

  for (int step = 0; step < tiles.count; ++step) {
    cp_async_wait<0>();
    sync_block();  // This step's tiles are there, and the last step's may be overwritten.
    if (step + 1 < tiles.count) gather_step(step + 1);
    const bool is_text = tiles.is_text(step);
    const int first_key = tiles.first_key(step);
    if (!sight.any(is_text, first_key)) continue;

    const Shared stage = stages + step % 2 * Shape::kStageBytes;
    float scores[kM][kTile / 8][4];
    set_zero(scores);
    multiply_rows<Element>(scores, queries, stage);
    if (!sight.all(is_text, first_key)) sight.mask(scores, is_text, first_key);
#pragma unroll
    for (int m = 0; m < kM; ++m) update_softmax<kHeadSize>(scores[m], running[m], out[m]);
    if constexpr (Variant::kDropout) {
      drop(scores, draw, first_query + warp_row, dropout_column(p, is_text, first_key), p.dropout);
    }
    multiply_columns<Element, kHeadSize>(out, scores, stage + Shape::kTileBytes);
  }

  float* lse = p.lse + statistics_offset(p, sample, head);
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    const int row = warp_row + 16 * m;
    finish_rows<kHeadSize>(running[m], out[m], kept_scale(p.dropout), lse, slot_at, row);
    store_tile<Element, kHeadSize>(query_tile, row, out[m]);  // Only this warp reads these rows.
  }
  sync_warp();
  scatter<kHeadSize, 16 * kM>(
      query_tile, warp_row, output_rows<kHeadSize>(p, static_cast<Element*>(p.out), sample, head),
      slot_at);
}

}  // namespace
}  // namespace megavideo

extern "C" int megavideo_interval_forward(const MegavideoIntervalAttention* problem, void* stream) {
  using namespace megavideo;
  if (!is_supported(*problem)) return MEGAVIDEO_INVALID;
  return with_variant(*problem, [&](auto variant) {
    using Variant = decltype(variant);
    using Shape = ForwardShape<Variant::kHeadSize>;
    const int blocks = (problem->places + Shape::kQueries - 1) / Shape::kQueries;
    return launch(interval_forward<Variant>, dim3(blocks, problem->heads, problem->batch), kThreads,
                  Shape::kSharedBytes, stream, *problem);
  });
}
