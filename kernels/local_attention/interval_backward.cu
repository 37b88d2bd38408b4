// Interval attention, backward, in two passes (or one) that recompute the probabilities from lse.
//
//   p = exp(s - lse), dp = do v^T, delta = sum over elements of do o, ds = p (dp - delta) / sqrt(D)
//   dq = ds k, dk = ds^T q, dv = p^T do; with dropout dv takes the kept p, and dp of the dropped is 0
//
// First pass, by queries: delta (kept for the second pass) and dq; a block of four warps owns 64
// queries and walks over key tiles as the forward kernel does. Second pass, by keys: dk and dv; a
// block owns one tile of 64 keys, 16 to a warp, and walks over the queries that see it. It computes
// S^T = K Q^T, because then P^T and dS^T feed the products for dV and dK straight from registers.
// Seven products instead of the five of a single pass, but no float32 buffer of dQ, no atomics, no
// conversion, and the same bits in each run.
//
// Napkin math, CogVideo's stage 1 as in interval_forward.cu: q, k, v, o, do, dq, dk, dv are 406 MB,
// read and written once 135 us, and 68 us more because the second pass reads q, k, v and do again;
// products of both passes 92 GF (spatial, 116 us) to 367 GF (dense causal, 465 us at 790 TFLOP/s).
//
// Text keys are seen by all V queries, image keys by at most as many as their block has: text tiles
// are the longest blocks and go first. Where text needs no gradient (the frozen channel) they are
// not launched.
//
// By queries: 168 registers and 48 KiB (D = 64), 255 and 96 KiB (128); three and two blocks on a
// multiprocessor. By keys: 249 and 50 KiB, 255 and 65 KiB; two. No spills.
//
// Where the caller gives a workspace, one pass does all, by keys: a block's warps exchange dS^T
// through shared memory, each makes dQ = dS K for 16 queries and adds it to float32 sums with atomics,
// so dQ's last bits vary. A small kernel before it writes delta and clears the sums, one after it
// rounds them. 246 registers and 58 KiB (D = 64), 255 and 73 KiB (128); two blocks. No spills.
// Five products, but 16 KiB of reductions for each pair of tiles: in dense causal stage 1 it saves
// 113 of 394 GF computed (0.49 ms at 230 TFLOP/s) for 1.76 GB that L2 must retire at 1.4 TB/s to hide
// behind the rest. The sums move through DRAM up to four times (cleared, fetched, written back,
// rounded: 403 MB, 134 us), where the first pass's reading of q, k and v cost 49 us. So it may win
// where arithmetic is the bound, and gains nothing where memory is (frames, windows).
#include <type_traits>

#include "interval.cuh"

namespace megavideo {
namespace {

// Scores become probabilities; rows are queries with the given log-sum-exp (in powers of two).
template <int HeadSize, int N>
__device__ __forceinline__ void probabilities_of_rows(float (&scores)[N][4],
                                                      const float (&lse)[2]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      scores[n][i] = exp2_fast(scores[n][i] * (kScale<HeadSize> * kLog2e) - lse[i / 2]);
    }
  }
}

// ---- by queries ----

template <int HeadSize>
struct QueryShape {
  static constexpr int kBlocks = HeadSize == 64 ? 3 : 2;  // Per multiprocessor.
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kTileBytes = kTile * HeadSize * 2;
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kSharedBytes = 2 * kTileBytes + 2 * kStageBytes;
};

// Read lse of a lane's two queries, as a power of two.
__device__ __forceinline__ void load_lse(float (&lse)[2], const float* from,
                                         const PlacesFrom& slot_at, int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int slot = slot_at(row + 8 * half + lane_index() / 4);
    lse[half] = slot >= 0 ? load_global(from + slot) * kLog2e : 0.0f;
  }
}

__device__ __forceinline__ void store_delta(const float (&delta)[2], float* to,
                                            const PlacesFrom& slot_at, int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int slot = slot_at(row + 8 * half + lane_index() / 4);
    if (slot >= 0 && lane_index() % 4 == 0) store_global(to + slot, delta[half]);
  }
}

// Write a warp's 16 gradients of queries, so far without the scale of scores, by way of a tile.
template <class Element, int HeadSize>
__device__ __forceinline__ void write_query_gradients(const Problem& p,
                                                      float (&grads)[HeadSize / 8][4], Shared tile,
                                                      int row, int sample, int head,
                                                      const PlacesFrom& slot_at) {
  const float scale[2] = {kScale<HeadSize>, kScale<HeadSize>};
  scale_rows(grads, scale);
  store_tile<Element, HeadSize>(tile, row, grads);  // Its own rows.
  sync_warp();
  scatter<HeadSize, 16>(
      tile, row,
      packed_rows<HeadSize>(p, static_cast<Element*>(p.grad_image), p.image_slots, 3, 0, sample, head),
      slot_at);
}

template <class Variant>
__global__ void __launch_bounds__(kThreads, QueryShape<Variant::kHeadSize>::kBlocks)
    interval_backward_queries(const __grid_constant__ Problem p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;
  using Shape = QueryShape<kHeadSize>;

  const int head = blockIdx.y, sample = blockIdx.z;
  const int first_query = (gridDim.x - 1 - blockIdx.x) * Shape::kQueries;  // Longest first.
  const int warp_row = 16 * warp_index();
  const Shared query_tile = shared_base();
  const Shared grad_tile = query_tile + Shape::kTileBytes;
  const Shared stages = grad_tile + Shape::kTileBytes;
  const Shared out_tile = stages + Shape::kStageBytes;  // Until the second stage is needed.

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
  const auto* out = static_cast<const Element*>(p.out);
  const auto* grad_out = static_cast<const Element*>(p.grad_out);
  gather<kHeadSize, Shape::kQueries>({query_tile, grad_tile, out_tile},
                                     {query_rows<Element>(p, sample, head),
                                      output_rows<kHeadSize>(p, grad_out, sample, head),
                                      output_rows<kHeadSize>(p, out, sample, head)},
                                     slot_at);
  cp_async_commit();
  gather_step(0);
  cp_async_wait<1>();
  sync_block();

  LeftRows<kHeadSize> queries[1], grads[1], outs;
  queries[0].load(query_tile, warp_row);
  grads[0].load(grad_tile, warp_row);
  outs.load(out_tile, warp_row);
  float delta[2], lse[2];
  dot_rows<Element>(delta, grads[0], outs);
  const int64_t statistics = statistics_offset(p, sample, head);
  store_delta(delta, p.delta + statistics, slot_at, warp_row);
  load_lse(lse, p.lse + statistics, slot_at, warp_row);

  const Sight<1> sight(p, text, first_query + warp_row);
  const DropoutKey draw = dropout_key(p.seed, sample * p.heads + head);
  float grad_queries[1][kHeadSize / 8][4];
  set_zero(grad_queries);

  for (int step = 0; step < tiles.count; ++step) {
    cp_async_wait<0>();
    sync_block();  // This step's tiles are there, and the last step's may be overwritten.
    if (step + 1 < tiles.count) gather_step(step + 1);
    const bool is_text = tiles.is_text(step);
    const int first_key = tiles.first_key(step);
    if (!sight.any(is_text, first_key)) continue;

    const Shared stage = stages + step % 2 * Shape::kStageBytes;
    float scores[1][kTile / 8][4], grad_scores[1][kTile / 8][4];
    set_zero(scores);
    multiply_rows<Element>(scores, queries, stage);
    if (!sight.all(is_text, first_key)) sight.mask(scores, is_text, first_key);
    probabilities_of_rows<kHeadSize>(scores[0], lse);
    set_zero(grad_scores);
    multiply_rows<Element>(grad_scores, grads, stage + Shape::kTileBytes);
    if constexpr (Variant::kDropout) {
      const float kept_factor = kept_scale(p.dropout);
      visit_dropout<kTile / 8, false>(
          draw, first_query + warp_row, dropout_column(p, is_text, first_key), p.dropout,
          [&](int n, int i, bool kept) { grad_scores[0][n][i] *= kept ? kept_factor : 0.0f; });
    }
#pragma unroll
    for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        grad_scores[0][n][i] = scores[0][n][i] * (grad_scores[0][n][i] - delta[i / 2]);
      }
    }
    multiply_columns<Element, kHeadSize>(grad_queries, grad_scores, stage);
  }

  write_query_gradients<Element, kHeadSize>(p, grad_queries[0], query_tile, warp_row, sample, head,
                                            slot_at);
}

// ---- sums of queries' gradients ----
// Where one pass adds them up: float32 [B, H, N / 16, D / 16, 2, 32, 4]. Four floats are what a lane
// holds of one of its two rows in two neighbouring 16 x 8 tiles of an accumulator, so that a warp adds
// to, or reads, 512 contiguous bytes at once.

// Call visit(sums, n, half) for the floats that stand for d[n] and d[n + 1] of an accumulator whose
// first row is the query at `place` and whose first column is `element`; both multiples of 16.
template <int HeadSize, int N, class Visit>
__device__ __forceinline__ void visit_sums(const Problem& p, int sample, int head, int place,
                                           int element, const Visit& visit) {
  const int64_t row = (static_cast<int64_t>(sample) * p.heads + head) * p.places + place;
  float* first = p.workspace + row * HeadSize + 16 * element + 4 * lane_index();
#pragma unroll
  for (int n = 0; n < N; n += 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) visit(first + 128 * (n + half), n, half);
  }
}

// Before the pass: delta, and sums of zero.
template <class Variant>
__global__ void __launch_bounds__(kThreads)
    interval_backward_begin(const __grid_constant__ Problem p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;

  const int head = blockIdx.y, sample = blockIdx.z;
  const int first_query = blockIdx.x * kTile, warp_row = 16 * warp_index();
  const Shared grad_tile = shared_base();
  const Shared out_tile = grad_tile + QueryShape<kHeadSize>::kTileBytes;
  const PlacesFrom slot_at(p, first_query);
  gather<kHeadSize, kTile>(
      {grad_tile, out_tile},
      {output_rows<kHeadSize>(p, static_cast<const Element*>(p.grad_out), sample, head),
       output_rows<kHeadSize>(p, static_cast<const Element*>(p.out), sample, head)},
      slot_at);
  cp_async_commit();
  visit_sums<kHeadSize, kHeadSize / 8>(
      p, sample, head, first_query + warp_row, 0,
      [](float* sums, int, int) { store_global(reinterpret_cast<float4*>(sums), float4{}); });
  cp_async_wait<0>();
  sync_block();

  LeftRows<kHeadSize> grads, outs;
  grads.load(grad_tile, warp_row);
  outs.load(out_tile, warp_row);
  float delta[2];
  dot_rows<Element>(delta, grads, outs);
  store_delta(delta, p.delta + statistics_offset(p, sample, head), slot_at, warp_row);
}

// After it: the sums become packed gradients.
template <class Variant>
__global__ void __launch_bounds__(kThreads) interval_backward_end(const __grid_constant__ Problem p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;

  const int head = blockIdx.y, sample = blockIdx.z;
  const int first_query = blockIdx.x * kTile, warp_row = 16 * warp_index();
  float grads[kHeadSize / 8][4];
  visit_sums<kHeadSize, kHeadSize / 8>(
      p, sample, head, first_query + warp_row, 0, [&](const float* sums, int n, int half) {
        const float4 four = load_global(reinterpret_cast<const float4*>(sums));
        grads[n][2 * half] = four.x, grads[n][2 * half + 1] = four.y;
        grads[n + 1][2 * half] = four.z, grads[n + 1][2 * half + 1] = four.w;
      });
  write_query_gradients<Element, kHeadSize>(p, grads, shared_base(), warp_row, sample, head,
                                            PlacesFrom(p, first_query));
}

// ---- by keys ----

// Whether the pass by keys also adds gradients of queries, or leaves them to the pass by queries.
enum class Queries { left, added };

template <int HeadSize, Queries Way>
struct KeyShape {
  static constexpr int kQueries = HeadSize == 64 ? 64 : 32;  // Per step; registers allow no more.
  using Left = std::conditional_t<HeadSize == 64, LeftRows<HeadSize>, LeftRowsInTile<HeadSize>>;
  static constexpr int kTileBytes = kTile * HeadSize * 2;
  static constexpr int kQueryBytes = kQueries * HeadSize * 2;
  // A stage: queries, gradients of their outputs, then a QueryFacts of each, field by field.
  static constexpr int kLse = 2 * kQueryBytes;
  static constexpr int kDelta = kLse + 4 * kQueries;
  static constexpr int kRuns = kDelta + 4 * kQueries;
  static constexpr int kStageBytes = kRuns + 8 * kQueries;
  // Where gradients are added: those of a step's scores, a row for each key, 64 elements wide.
  static constexpr int kScores = 2 * kTileBytes + 2 * kStageBytes;
  static constexpr int kSharedBytes = kScores + (Way == Queries::added ? 2 * kTile * kTile : 0);
};

// Tiles of text that the pass visits: gradients of queries need all of them.
template <Queries Way>
__host__ __device__ int text_tiles_of(const Problem& p) {
  return Way == Queries::added || p.grad_text ? tiles_of(p.text_slots) : 0;
}

// Which tile of keys a block owns. Text comes first in the grid; image tiles of one head follow
// each other, so that they find its queries in L2.
struct KeyBlock {
  bool is_text;
  int first_key, head, sample;

  __device__ __forceinline__ KeyBlock(const Problem& p, int text_tiles) {
    const int text_blocks = text_tiles * p.heads * p.batch;
    is_text = static_cast<int>(blockIdx.x) < text_blocks;
    const int block = is_text ? blockIdx.x : blockIdx.x - text_blocks;
    const int tiles = is_text ? text_tiles : p.places / kTile;
    first_key = block % tiles * kTile;
    head = block / tiles % p.heads;
    sample = block / tiles / p.heads;
  }
};

// What the key pass needs of a query besides its rows.
struct QueryFacts {
  float lse = 0.0f, delta = 0.0f;  // lse as a power of two
  int2 run;                        // the places that it sees

  // Padding has rows of zeros: with these numbers its probabilities are 1 and its gradients 0.
  __device__ __forceinline__ void load(const Problem& p, int64_t offset, int place) {
    run = {load_global(p.begin + place), load_global(p.end + place)};
    const int slot = load_global(p.slots + place);
    lse = slot >= 0 ? load_global(p.lse + offset + slot) * kLog2e : 0.0f;
    delta = slot >= 0 ? load_global(p.delta + offset + slot) : 0.0f;
  }

  template <class Shape>
  __device__ __forceinline__ void store(Shared stage, int query) const {
    store_shared(stage + Shape::kLse + 4 * query, lse);
    store_shared(stage + Shape::kDelta + 4 * query, delta);
    store_shared(stage + Shape::kRuns + 8 * query, run);
  }
};

// In what follows, rows of an accumulator are a warp's 16 keys and columns the queries of a step.
// A column's facts lie in shared memory; a lane has columns 8n + 2t and 8n + 2t + 1.
__device__ __forceinline__ int lane_column(int n) { return 8 * n + 2 * (lane_index() % 4); }

// Unsee the scores of what is not visible. A text key is seen by all queries or by none.
template <int N>
__device__ __forceinline__ void mask_keys(float (&scores)[N][4], int first_key, bool is_text,
                                          Run text, Shared runs) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int4 seen = load_shared<int4>(runs + 8 * lane_column(n));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Run image = i % 2 ? Run{seen.z, seen.w} : Run{seen.x, seen.y};
      const int key = first_key + 8 * (i / 2) + lane_index() / 4;
      if (!choose(is_text, text, image).has(key)) scores[n][i] = kMasked;
    }
  }
}

template <int HeadSize, int N>
__device__ __forceinline__ void probabilities_of_columns(float (&scores)[N][4], Shared lse) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 pair = load_shared<float2>(lse + 4 * lane_column(n));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sum = i % 2 ? pair.y : pair.x;
      scores[n][i] = exp2_fast(scores[n][i] * (kScale<HeadSize> * kLog2e) - sum);
    }
  }
}

// Gradients of probabilities become those of scores. A probability that dropout took comes in
// negated and goes out as zero.
template <bool Dropout, int N>
__device__ __forceinline__ void score_gradients(float (&probabilities)[N][4], float (&grads)[N][4],
                                                Shared delta) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const float2 pair = load_shared<float2>(delta + 4 * lane_column(n));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float& probability = probabilities[n][i];
      grads[n][i] = fabsf(probability) * (grads[n][i] - (i % 2 ? pair.y : pair.x));
      if constexpr (Dropout) probability = fmaxf(probability, 0.0f);
    }
  }
}

// Add a step's gradients of queries, of which a warp makes 16 rows of 64 elements. `some`: the keys
// that any of the queries sees.
template <class Element, int HeadSize, int NumQueries>
__device__ __forceinline__ void add_query_gradients(const Problem& p, const KeyBlock& block,
                                                    Run some, int first_query, Shared score_tile,
                                                    Shared key_tile) {
  if (!some.meets(block.first_key, kTile)) return;
  constexpr int kRowTiles = NumQueries / 16;
  const int row = 16 * (warp_index() % kRowTiles), element = 64 * (warp_index() / kRowTiles);
  float grads[1][8][4];
  set_zero(grads);
#pragma unroll
  for (int key = 0; key < kTile; key += 16) {
    if (!some.meets(block.first_key + key, 16)) continue;
    multiply_transposed<Element, kTile, HeadSize>(grads[0], score_tile, row / 8, key_tile,
                                                  element / 8, key);
  }
  visit_sums<HeadSize, 8>(
      p, block.sample, block.head, first_query + row, element, [&](float* sums, int n, int half) {
        add_global(sums, float4{grads[0][n][2 * half], grads[0][n][2 * half + 1],
                                grads[0][n + 1][2 * half], grads[0][n + 1][2 * half + 1]});
      });
}

template <class Variant, Queries Way>
__device__ __forceinline__ void backward_by_keys(const Problem& p) {
  using Element = typename Variant::Element;
  constexpr int kHeadSize = Variant::kHeadSize;
  using Shape = KeyShape<kHeadSize, Way>;
  constexpr int kQueries = Shape::kQueries;
  constexpr int kStepsPerTile = kTile / kQueries;

  const KeyBlock block(p, text_tiles_of<Way>(p));
  const bool wants_keys = Way == Queries::left || !block.is_text || p.grad_text;
  const int warp_row = 16 * warp_index();
  const int first_key = block.first_key + warp_row;
  const int64_t statistics = statistics_offset(p, block.sample, block.head);
  const Shared key_tile = shared_base();
  const Shared value_tile = key_tile + Shape::kTileBytes;
  const Shared stages = value_tile + Shape::kTileBytes;
  const Shared score_tile = shared_base() + Shape::kScores;

  const auto queries = query_rows<Element>(p, block.sample, block.head);
  const auto grads = output_rows<kHeadSize>(p, static_cast<const Element*>(p.grad_out),
                                            block.sample, block.head);
  const bool has_facts = threadIdx.x < kQueries;  // One query's facts pass through each thread.
  const auto stage_of = [&](int step) { return stages + step % 2 * Shape::kStageBytes; };
  const auto gather_step = [&](int step, QueryFacts& facts) {
    const int first = step * kQueries;
    const Shared stage = stage_of(step);
    gather<kHeadSize, kQueries>({stage, stage + Shape::kQueryBytes}, {queries, grads},
                                PlacesFrom(p, first));
    cp_async_commit();
    if (has_facts) facts.load(p, statistics, first + threadIdx.x);
  };
  const auto store_facts = [&](int step, const QueryFacts& facts) {
    if (has_facts) facts.template store<Shape>(stage_of(step), threadIdx.x);
  };

  const int32_t* seen_by = p.seen_by + 2 * (block.first_key / kTile);
  const int first_step = block.is_text ? 0 : load_global(seen_by) * kStepsPerTile;
  const int last_step =
      (block.is_text ? p.places / kTile : load_global(seen_by + 1)) * kStepsPerTile;
  const Run text = real_text(p, block.sample);
  QueryFacts facts;
  KeysAndValues<Element, kHeadSize>(p, text, block.sample, block.head)
      .gather_tile(p, key_tile, value_tile, block.is_text, block.first_key);
  cp_async_commit();
  gather_step(first_step, facts);
  store_facts(first_step, facts);
  cp_async_wait<1>();
  sync_block();

  typename Shape::Left keys[1], values[1];
  keys[0].load(key_tile, warp_row);
  values[0].load(value_tile, warp_row);
  const DropoutKey draw = dropout_key(p.seed, block.sample * p.heads + block.head);
  float grad_keys[1][kHeadSize / 8][4], grad_values[1][kHeadSize / 8][4];
  set_zero(grad_keys);
  set_zero(grad_values);

  for (int step = first_step; step < last_step; ++step) {
    cp_async_wait<0>();
    sync_block();  // This step's rows are there, and the last step's may be overwritten.
    const Shared stage = stage_of(step);
    const bool more = step + 1 < last_step;
    if (more) gather_step(step + 1, facts);

    const int4 bounds = load_global(reinterpret_cast<const int4*>(p.bounds) + step / kStepsPerTile);
    const Run some = choose(block.is_text, text, {bounds.x, bounds.y});
    const Run every = choose(block.is_text, text, {bounds.z, bounds.w});
    if (some.meets(first_key, 16)) {
      float scores[1][kQueries / 8][4], grad_scores[1][kQueries / 8][4];
      set_zero(scores);
      multiply_rows<Element>(scores, keys, stage);
      if (!every.covers(first_key, 16)) {
        mask_keys(scores[0], first_key, block.is_text, text, stage + Shape::kRuns);
      }
      probabilities_of_columns<kHeadSize>(scores[0], stage + Shape::kLse);
      set_zero(grad_scores);
      multiply_rows<Element>(grad_scores, values, stage + Shape::kQueryBytes);
      if constexpr (Variant::kDropout) {
        const float kept_factor = kept_scale(p.dropout);
        visit_dropout<kQueries / 8, true>(
            draw, step * kQueries, dropout_column(p, block.is_text, first_key), p.dropout,
            [&](int n, int i, bool kept) {
              if (!kept) scores[0][n][i] = -scores[0][n][i];
              grad_scores[0][n][i] *= kept ? kept_factor : 0.0f;
            });
      }
      score_gradients<Variant::kDropout>(scores[0], grad_scores[0], stage + Shape::kDelta);
      if constexpr (Way == Queries::added) {
        store_tile<Element, kTile>(score_tile, warp_row, grad_scores[0]);
      }
      if (wants_keys) {
        multiply_columns<Element, kHeadSize>(grad_values, scores, stage + Shape::kQueryBytes);
        multiply_columns<Element, kHeadSize>(grad_keys, grad_scores, stage);
      }
    }
    if constexpr (Way == Queries::added) {
      sync_block();  // All warps' gradients of scores are there.
      add_query_gradients<Element, kHeadSize, kQueries>(p, block, some, step * kQueries,
                                                        score_tile, key_tile);
    }
    if (more) store_facts(step + 1, facts);
  }
  if (!wants_keys) return;

  const float key_scale[2] = {kScale<kHeadSize>, kScale<kHeadSize>};
  const float value_scale[2] = {kept_scale(p.dropout), kept_scale(p.dropout)};
  scale_rows(grad_keys[0], key_scale);
  scale_rows(grad_values[0], value_scale);
  // The loop reads the warp's own rows of these tiles for D = 128, all keys for gradients of queries.
  Way == Queries::added ? sync_block() : sync_warp();
  store_tile<Element, kHeadSize>(key_tile, warp_row, grad_keys[0]);  // Its own rows.
  store_tile<Element, kHeadSize>(value_tile, warp_row, grad_values[0]);
  sync_warp();
  const auto scatter_both = [&](void* to, int slots, int parts, const auto& slot_at) {
    auto* base = static_cast<Element*>(to);
    for (int part = 0; part < 2; ++part) {
      scatter<kHeadSize, 16>(part ? value_tile : key_tile, warp_row,
                             packed_rows<kHeadSize>(p, base, slots, parts, parts - 2 + part,
                                                    block.sample, block.head),
                             slot_at);
    }
  };
  if (block.is_text) {
    scatter_both(p.grad_text, p.text_slots, 2, TextFrom{{0, p.text_slots}, block.first_key});
  } else {
    scatter_both(p.grad_image, p.image_slots, 3, PlacesFrom(p, block.first_key));
  }
}

template <class Variant>
__global__ void __launch_bounds__(kThreads, 2)
    interval_backward_keys(const __grid_constant__ Problem p) {
  backward_by_keys<Variant, Queries::left>(p);
}

template <class Variant>
__global__ void __launch_bounds__(kThreads, 2)
    interval_backward_keys_and_queries(const __grid_constant__ Problem p) {
  backward_by_keys<Variant, Queries::added>(p);
}

// ---- host ----

// A kernel of which a block has 64 queries.
int launch_by_queries(void (*kernel)(Problem), int shared_bytes, const Problem& p, void* stream) {
  return launch(kernel, dim3(p.places / kTile, p.heads, p.batch), kThreads, shared_bytes, stream, p);
}

template <int HeadSize, Queries Way>
int launch_by_keys(void (*kernel)(Problem), const Problem& p, void* stream) {
  const int tiles = p.places / kTile + text_tiles_of<Way>(p);
  return launch(kernel, dim3(tiles * p.heads * p.batch), kThreads,
                KeyShape<HeadSize, Way>::kSharedBytes, stream, p);
}

template <class Variant>
int launch_two_passes(const Problem& p, void* stream) {
  constexpr int kHeadSize = Variant::kHeadSize;
  const int status = launch_by_queries(interval_backward_queries<Variant>,
                                       QueryShape<kHeadSize>::kSharedBytes, p, stream);
  if (status) return status;
  return launch_by_keys<kHeadSize, Queries::left>(interval_backward_keys<Variant>, p, stream);
}

template <class Variant>
int launch_one_pass(const Problem& p, void* stream) {
  constexpr int kHeadSize = Variant::kHeadSize;
  constexpr int kTileBytes = QueryShape<kHeadSize>::kTileBytes;
  int status = launch_by_queries(interval_backward_begin<Variant>, 2 * kTileBytes, p, stream);
  if (status) return status;
  status = launch_by_keys<kHeadSize, Queries::added>(interval_backward_keys_and_queries<Variant>, p,
                                                     stream);
  if (status) return status;
  return launch_by_queries(interval_backward_end<Variant>, kTileBytes, p, stream);
}

}  // namespace
}  // namespace megavideo

extern "C" int64_t megavideo_interval_workspace(const MegavideoIntervalAttention* problem) {
  const auto& p = *problem;
  if (!megavideo::is_supported(p)) return 0;
  return sizeof(float) * static_cast<int64_t>(p.batch) * p.heads * p.places * p.head_size;
}

extern "C" int megavideo_interval_backward(const MegavideoIntervalAttention* problem,
                                           void* stream) {
  using namespace megavideo;
  if (!is_supported(*problem)) return MEGAVIDEO_INVALID;
  return with_variant(*problem, [&](auto variant) {
    using Variant = decltype(variant);
    return problem->workspace ? launch_one_pass<Variant>(*problem, stream)
                              : launch_two_passes<Variant>(*problem, stream);
  });
}
