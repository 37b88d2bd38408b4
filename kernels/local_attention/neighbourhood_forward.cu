// Neighbourhood attention, forward: a query sees a window of cells around its own in one or two
// grids of keys, and the real text; one softmax goes over all of them.
//
//   o = softmax(q k^T / sqrt(D)) v over the keys that q sees, lse = log of the softmax's sum
//   query [B, Q, H, D], grids [B, K, 2, H, D], text [B, T, 2, H, D] -> out [B, Q, H, D], lse [B, H, Q]
//
// Algorithm: a block owns 8x8 queries of one head and brings the keys that they see to shared memory,
// source by source. A warp owns a 4x4 patch of them, one m16 tile, and visits only the cells that its
// patch sees, 16 at a time: ldmatrix takes an address per row, so that a rectangle of cells is as good
// an operand as consecutive rows. With 9x5 windows a warp computes 96 scores per query, of which 45
// count (2.1x); a tile that all 64 queries share would compute 4.3x.
//
// Napkin math, 60x60 queries, 9x5 window, B = 4, H = 48, D = 64: 8 GF exact, 17 GF computed, 21 us at
// 790 TFLOP/s; q, k, v and o are 354 MB, 118 us at 3.0 TB/s: memory-bound. A block reads 16x12 keys for
// its 64 queries, so L2 delivers K and V three times, 530 MB, at the same time. Shared memory: 56 KiB
// for 9x5 and D = 64, so that four blocks share a multiprocessor and hide each other's loads; there
// is no pipeline inside a block.
#include "neighbourhood.cuh"

namespace megavideo {
namespace {

template <class Variant>
__global__ void __launch_bounds__(kThreads, Variant::kHeadSize == 64 ? 4 : 2)
    neighbourhood_forward(const __grid_constant__ NeighbourhoodProblem p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;
  constexpr int kRowBytes = 2 * kHeadSize;

  const QueryBlock block(p);
  const int head = block.head, sample = block.sample, warp_row = kPatch * warp_index();
  const Shared query_tile = shared_base();
  const Shared key_tile = query_tile + kBlockRows * kRowBytes;
  const Shared value_tile = key_tile + p.key_strip * kRowBytes;

  gather<kHeadSize, kBlockRows>({query_tile}, {query_rows<Element>(p, sample, head)}, block.slot_at);
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  LeftRows<kHeadSize> queries;
  queries.load(query_tile, warp_row);

  const DropoutKey draw = dropout_key(p.seed, sample * p.heads + head);
  RunningRows running;
  float out[1][kHeadSize / 8][4];
  set_zero(out);
  block.for_each_key<Element, kHeadSize>(
      key_tile, value_tile, [&](const Source& source, Range real, const auto& chunk) {
        float scores[1][2][4];
        set_zero(scores);
        multiply_cells<Element>(scores[0], queries, key_tile, chunk.row_by_cell());
        block.mask(scores[0], source, real, chunk);
        update_softmax<kHeadSize>(scores[0], running, out[0]);
        if constexpr (Variant::kDropout) {
          block.visit_dropout(draw, source, chunk, [&](int n, int i, bool kept) {
            if (!kept) scores[0][n][i] = 0.0f;
          });
        }
        multiply_elements<Element, kHeadSize>(out[0], scores[0], value_tile,
                                              chunk.row_by_element());
      });

  float* lse = p.lse + statistics_offset(p, sample, head);
  finish_rows<kHeadSize>(running, out[0], kept_scale(p.dropout), lse, block.slot_at, warp_row);
  store_tile<Element, kHeadSize>(query_tile, warp_row, out[0]);  // Only this warp reads these rows.
  sync_warp();
  scatter<kHeadSize, kPatch>(
      query_tile, warp_row, output_rows(p, static_cast<Element*>(p.out), sample, head),
      block.slot_at);
}

}  // namespace
}  // namespace megavideo

extern "C" int megavideo_neighbourhood_forward(const MegavideoNeighbourhoodAttention* given,
                                               void* stream) {
  using namespace megavideo;
  NeighbourhoodProblem p;
  if (!describe(*given, p)) return MEGAVIDEO_INVALID;
  return with_variant(p, [&](auto variant) {
    const dim3 grid(squares(p.rows, p.columns, kBlockSide), p.heads, p.batch);
    const int shared_bytes = (kBlockRows + 2 * p.key_strip) * p.head_size * 2;
    return launch(neighbourhood_forward<decltype(variant)>, grid, kThreads, shared_bytes, stream, p);
  });
}
