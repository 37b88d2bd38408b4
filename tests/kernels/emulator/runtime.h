// A CUDA block on one CPU thread: every GPU thread is a fibre, and what PTX leaves undefined is a
// fault here. A launch stops at the first fault and returns kFault; `emulator_fault()` says which
// thread of which block did what. Faults are
//   - shared memory: out of bounds, misaligned, read before it was written, read or written while a
//     cp.async to it is unfinished, or touched by two threads (one of them writing) with no barrier
//     between them; this is judged from epochs and so does not depend on the schedule;
//   - global memory: outside the regions given by `emulator_region`, misaligned, a write to a
//     read-only region, one location written by two threads, or read after another thread's write;
//     threads may add to one location, but none may also write or read it in that launch;
//   - lanes of a warp at different collectives, or a barrier that some threads never reach.
// A cp.async moves its bytes at the last moment, in the wait that finishes it. The skewed schedule also
// runs the blocks of a grid last to first, so that what depends on their order shows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace megavideo {
using Shared = uint32_t;
}

namespace megavideo::emulator {

constexpr int kWarp = 32;
constexpr int kFault = 1000;

// What a launch did; filled since the last `emulator_reset`. Copies and global traffic in bytes.
struct Counters {
  uint64_t mma;
  uint64_t ldmatrix;
  uint64_t bank_conflicts;  // extra shared-memory passes of ldmatrix
  uint64_t copied;          // by cp.async, without zero fills
  uint64_t loaded;
  uint64_t stored;
  uint64_t added;         // by atomic additions
  uint64_t barriers;      // of the block
  uint64_t shared_bytes;  // of a block, the most
};
extern Counters counters;

struct Index {
  unsigned x, y, z;
};
extern Index thread_index, block_index, grid_size;
extern unsigned block_size;

// Ends the launch; the message gets the thread and the block in front.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

void check_global_read(const void* address, size_t bytes);
void check_global_write(void* address, size_t bytes);
void check_global_add(void* address, size_t bytes);

// Address of the block's shared memory.
Shared shared_begin();
void read_shared(void* to, Shared address, size_t bytes);
void write_shared(Shared address, const void* from, size_t bytes);
// A read by all lanes of the warp, as ldmatrix does.
void read_shared_by_warp(void* to, Shared address, size_t bytes);

void copy_async(Shared destination, const void* source, bool valid);
void commit_copies();
void wait_copies(size_t pending);

void sync_block();
void sync_warp();

// What one lane brings to a collective, and where it takes its result.
struct Lane {
  const void* in;
  void* out;
};

// Wait until all 32 lanes are here, then let one of them `run`. `what` names the instruction: lanes
// that meet must name the same one.
using Run = void (*)(const Lane (&lanes)[kWarp]);
void collective(const char* what, Run run, const void* in, void* out);

int launch(const std::function<void()>& kernel, Index grid, int threads, int shared_bytes);
const char* last_fault();

}  // namespace megavideo::emulator
