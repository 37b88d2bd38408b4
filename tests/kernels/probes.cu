// Small kernels, right and wrong on purpose, that test the emulator. One entry point runs them all.
#include "common.cuh"

namespace megavideo {
namespace {

struct Probe {
  const float* in;   // 1024 floats
  float* out;        // 1024 floats
};

constexpr int kThreads = 64;

// ---- right ----

// Each warp reads what the other wrote.
__global__ void exchange(const __grid_constant__ Probe p) {
  store_shared(shared_base() + 4 * threadIdx.x, load_global(p.in + threadIdx.x));
  sync_block();
  store_global(p.out + threadIdx.x, load_shared<float>(shared_base() + 4 * (threadIdx.x ^ 32)));
}

// Two groups of copies: the older must be there after a wait that leaves one pending.
__global__ void copy(const __grid_constant__ Probe p) {
  Shared first = shared_base() + 16 * threadIdx.x, second = first + 16 * kThreads;
  cp_async_16(first, p.in + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async_16(second, p.in + 4 * (threadIdx.x + kThreads), threadIdx.x % 2 == 0);
  cp_async_commit();
  cp_async_wait<1>();
  float x = load_shared<float>(first);
  cp_async_wait<0>();
  sync_block();
  store_global(p.out + threadIdx.x, x + load_shared<float>(second ^ 16));
}

// out[16 r + c] of warp 0 = sum over k of in[16 r + k] in[16 c + k] / 1024, r < 16, c < 8,
// and of warp 1 with b loaded transposed: sum over k of in[16 r + k] in[16 k + c] / 1024.
template <class Element>
__global__ void product(const __grid_constant__ Probe p) {
  Shared tile = shared_base() + warp_index() * 16 * 128;
  int lane = lane_index();
  for (int i = lane; i < 16 * 8; i += 32) {
    int row = i / 8, column = i % 8 * 2;
    float low = load_global(p.in + 16 * row + column), high = load_global(p.in + 16 * row + column + 1);
    store_shared(tile + swizzled<128>(row, column / 8) + column % 8 * 2, pack<Element>(low, high));
  }
  sync_warp();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, tile + swizzled<128>(lane & 15, lane >> 4));
  if (warp_index() == 0) {
    ldmatrix_x4(b, tile + swizzled<128>(lane & 7, lane >> 3 & 1));
  } else {
    ldmatrix_x4_trans(b, tile + swizzled<128>(lane & 15, 0));
  }
  float d[4] = {};
  mma_m16n8k16<Element>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) {
    int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    store_global(p.out + 256 * warp_index() + 16 * row + column, d[i] / 1024);
  }
}

__global__ void shuffles(const __grid_constant__ Probe p) {
  float x = load_global(p.in + threadIdx.x);
  store_global(p.out + threadIdx.x, quad_max(x) + quad_sum(x) + shuffle_xor(x, 16));
}

__global__ void rounding(const __grid_constant__ Probe p) {
  for (int i = threadIdx.x; i < 256; i += kThreads) {
    float low, high, x = load_global(p.in + i);
    unpack<Bfloat16>(pack<Bfloat16>(x, -x), low, high);
    store_global(p.out + i, low);
    store_global(p.out + 256 + i, high);
    unpack<Float16>(pack<Float16>(x, -x), low, high);
    store_global(p.out + 512 + i, low);
    store_global(p.out + 768 + i, high);
  }
}

// dropout_keeps of slots q = thread, k = 0..15, as a sum of powers of two.
__global__ void dropout(const __grid_constant__ Probe p) {
  DropoutKey key = dropout_key(0x123456789abcdefull, 3);
  int q = threadIdx.x, bits = 0;
  for (int k = 0; k < 16; ++k) {
    bits |= dropout_keeps(dropout_word(key, q, k), q >> 3 & 1, k >> 3 & 1, 128) << k;
  }
  store_global(p.out + q, static_cast<float>(bits));
}

// out[4 i + j] gets, from each block and both warps, in[4 i + j].
__global__ void add(const __grid_constant__ Probe p) {
  const int first = 4 * lane_index();
  const float* in = p.in + first;
  add_global(p.out + first, float4{load_global(in), load_global(in + 1), load_global(in + 2),
                                   load_global(in + 3)});
}

// As `add` to out[0], but block 0 adds 2^24, to which what is below 1 adds nothing.
__global__ void add_big_in_block_0(const __grid_constant__ Probe p) {
  if (threadIdx.x > 0) return;
  add_global(p.out, float4{blockIdx.x == 0 ? 16777216.0f : load_global(p.in), 0, 0, 0});
}

// Zeros for `add`.
__global__ void clear(const __grid_constant__ Probe p) {
  if (blockIdx.x == 0) store_global(reinterpret_cast<float4*>(p.out) + threadIdx.x, float4{});
}

// ---- wrong ----

__global__ void no_barrier(const __grid_constant__ Probe p) {
  store_shared(shared_base() + 4 * threadIdx.x, 1.0f);
  store_global(p.out + threadIdx.x, load_shared<float>(shared_base() + 4 * (threadIdx.x ^ 32)));
}

// Written again for the next round while the other warp may still read.
__global__ void no_second_barrier(const __grid_constant__ Probe p) {
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    store_shared(shared_base() + 4 * threadIdx.x, 1.0f);
    sync_block();
    sum += load_shared<float>(shared_base() + 4 * (threadIdx.x ^ 32));
  }
  store_global(p.out + threadIdx.x, sum);
}

__global__ void no_warp_barrier(const __grid_constant__ Probe p) {
  store_shared(shared_base() + 4 * threadIdx.x, 1.0f);
  store_global(p.out + threadIdx.x, load_shared<float>(shared_base() + 4 * (threadIdx.x ^ 1)));
}

__global__ void no_wait(const __grid_constant__ Probe p) {
  cp_async_16(shared_base() + 16 * threadIdx.x, p.in + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<1>();
  store_global(p.out + threadIdx.x, load_shared<float>(shared_base() + 16 * threadIdx.x));
}

__global__ void no_commit(const __grid_constant__ Probe p) {
  cp_async_16(shared_base() + 16 * threadIdx.x, p.in + 4 * threadIdx.x, true);
  cp_async_wait<0>();
  store_global(p.out + threadIdx.x, load_shared<float>(shared_base() + 16 * threadIdx.x));
}

__global__ void wait_without_barrier(const __grid_constant__ Probe p) {
  cp_async_16(shared_base() + 16 * threadIdx.x, p.in + 4 * threadIdx.x, true);
  cp_async_commit();
  cp_async_wait<0>();
  store_global(p.out + threadIdx.x, load_shared<float>(shared_base() + 16 * (threadIdx.x ^ 32)));
}

__global__ void never_written(const __grid_constant__ Probe p) {
  store_global(p.out + threadIdx.x, load_shared<float>(shared_base() + 4 * threadIdx.x));
}

__global__ void past_shared(const __grid_constant__ Probe p) {
  store_shared(shared_base() + 4096 + 4 * threadIdx.x, 1.0f);
}

__global__ void misaligned(const __grid_constant__ Probe p) {
  store_shared(shared_base() + 8, float4{1, 2, 3, 4});
}

__global__ void past_input(const __grid_constant__ Probe p) {
  store_global(p.out + threadIdx.x, load_global(p.in + 1000 + threadIdx.x));
}

__global__ void into_input(const __grid_constant__ Probe p) {
  store_global(const_cast<float*>(p.in) + threadIdx.x, 1.0f);
}

__global__ void two_writers(const __grid_constant__ Probe p) { store_global(p.out, 1.0f); }

__global__ void read_back(const __grid_constant__ Probe p) {
  store_global(p.out + threadIdx.x, 1.0f);
  sync_block();
  store_global(p.out + kThreads + threadIdx.x, load_global(p.out + (threadIdx.x ^ 1)));
}

__global__ void add_and_write(const __grid_constant__ Probe p) {
  if (warp_index() == 0) add_global(p.out + 4 * lane_index(), float4{1, 2, 3, 4});
  if (warp_index() == 1) store_global(p.out + lane_index(), 0.0f);
}

__global__ void read_sum(const __grid_constant__ Probe p) {
  add_global(p.out + 4 * lane_index(), float4{1, 2, 3, 4});
  store_global(p.out + 512 + threadIdx.x, load_global(p.out + threadIdx.x));
}

__global__ void divergent(const __grid_constant__ Probe p) {
  if (lane_index() < 16) {
    sync_warp();
  } else {
    store_global(p.out + threadIdx.x, shuffle_xor(1.0f, 1));
  }
}

__global__ void missed_barrier(const __grid_constant__ Probe p) {
  if (warp_index() == 0) sync_block();
}

__global__ void missed_shuffle(const __grid_constant__ Probe p) {
  if (lane_index() != 7) store_global(p.out + threadIdx.x, shuffle_xor(1.0f, 8));
}

struct Named {
  const char* name;
  void (*kernel)(Probe);
};

const Named kProbes[] = {
    {"exchange", exchange},
    {"copy", copy},
    {"product_bfloat16", product<Bfloat16>},
    {"product_float16", product<Float16>},
    {"shuffles", shuffles},
    {"rounding", rounding},
    {"dropout", dropout},
    {"clear", clear},
    {"add", add},
    {"add_big_in_block_0", add_big_in_block_0},
    {"no_barrier", no_barrier},
    {"no_second_barrier", no_second_barrier},
    {"no_warp_barrier", no_warp_barrier},
    {"no_wait", no_wait},
    {"no_commit", no_commit},
    {"wait_without_barrier", wait_without_barrier},
    {"never_written", never_written},
    {"past_shared", past_shared},
    {"misaligned", misaligned},
    {"past_input", past_input},
    {"into_input", into_input},
    {"two_writers", two_writers},
    {"read_back", read_back},
    {"add_and_write", add_and_write},
    {"read_sum", read_sum},
    {"divergent", divergent},
    {"missed_barrier", missed_barrier},
    {"missed_shuffle", missed_shuffle},
};

}  // namespace
}  // namespace megavideo

// Run the probe called `name` on `blocks` blocks of 64 threads with 4096 bytes of shared memory.
extern "C" int run_probe(const char* name, const float* in, float* out, int blocks) {
  using namespace megavideo;
  for (const Named& probe : kProbes) {
    if (strcmp(probe.name, name) == 0) {
      return launch(probe.kernel, dim3(blocks), kThreads, 4096, nullptr, Probe{in, out});
    }
  }
  return -1;
}
