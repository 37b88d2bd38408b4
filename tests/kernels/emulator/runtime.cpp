// Fibres, schedules and checks of the emulator; runtime.h says what is checked.
#include "runtime.h"

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <ucontext.h>
#include <vector>

namespace megavideo::emulator {

Counters counters;
Index thread_index, block_index, grid_size;
unsigned block_size;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMaxSharedBytes = 163 << 10;  // sm_80; sm_90 has 227 KiB
constexpr Shared kSharedBase = 1024;           // not 0, so that a forgotten base is out of bounds
constexpr int kUnit = 4;                       // bytes of shared memory that are watched as one

enum class Schedule { round_robin, skewed };
enum class State { ready, in_collective, at_barrier, done };

struct Fault {};

struct Copy {
  Shared destination;
  const void* source;
  bool valid;
};

struct Thread {
  State state;
  const char* waits_for;
  bool started;
  ucontext_t context;
  jmp_buf resume;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

struct Warp {
  Lane lanes[kWarp];
  int arrived;
  const char* what;
  uint32_t epoch;  // number of sync_warp passed
};

// Who touched a unit of shared memory last. Readers are a thread, all of one warp, or more.
struct Unit {
  int32_t writer = -1, reader = -1;
  uint32_t write_block, write_warp, read_block, read_warp;  // epochs
  bool in_flight = false;
};
constexpr int32_t kWarpReader = 1 << 16;
constexpr int32_t kManyReaders = 1 << 24;

struct Region {
  std::string name;
  const unsigned char* begin;
  size_t bytes;
  bool writable;
  std::vector<uint32_t> writers;  // per two bytes: 1 + thread's number in the grid, 0 is nobody
};
constexpr uint32_t kAdders = UINT32_MAX;  // as a writer: threads that add, however many

Schedule schedule = Schedule::round_robin;
std::vector<Region> regions;
std::string fault_text;

// The running block.
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<std::unique_ptr<char[]>> stacks;
std::vector<unsigned char> shared;
std::vector<Unit> units;
uint32_t block_epoch;
int at_barrier;
int current = -1;
const std::function<void()>* body;
ucontext_t scheduler_context;
jmp_buf scheduler;

int warp_of(int thread) { return thread / kWarp; }
Warp& current_warp() { return warps[warp_of(current)]; }

// ---- fibres ----
// A fibre starts by swapcontext and is then switched by _setjmp and _longjmp, which unlike
// swapcontext make no system call: a warp collective is 32 switches.

void yield() {
  if (_setjmp(threads[current].resume) == 0) _longjmp(scheduler, 1);
}

void fibre() {
  try {
    (*body)();
  } catch (const Fault&) {
  }
  threads[current].state = State::done;
  _longjmp(scheduler, 1);
}

void start(Thread& thread) {
  getcontext(&thread.context);
  thread.context.uc_stack.ss_sp = stacks[current].get();
  thread.context.uc_stack.ss_size = kStackBytes;
  thread.context.uc_link = nullptr;
  makecontext(&thread.context, fibre, 0);
  thread.started = true;
  swapcontext(&scheduler_context, &thread.context);
}

void run(int index) {
  current = index;
  thread_index = {static_cast<unsigned>(index), 0, 0};
  Thread& thread = threads[index];
  if (_setjmp(scheduler) == 0) {
    if (thread.started) _longjmp(thread.resume, 1);
    start(thread);
  }
  current = -1;
}

// Run each lane that can run until it waits or ends. Returns whether any could.
bool turn(int warp) {
  bool ran = false;
  for (int lane = 0; lane < kWarp && fault_text.empty(); ++lane) {
    int index = warp * kWarp + lane;
    if (threads[index].state != State::ready) continue;
    run(index);
    ran = true;
  }
  return ran;
}

bool all_done() {
  for (const Thread& thread : threads) {
    if (thread.state != State::done) return false;
  }
  return true;
}

const char* place_of(const Thread& thread) {
  return thread.state == State::done ? "exit" : thread.waits_for;
}

// Where the threads are, as runs that are at the same place.
void report_deadlock() {
  fault_text = "deadlock:";
  const char* last = "";
  for (size_t i = 0; i < threads.size(); ++i) {
    const char* place = place_of(threads[i]);
    if (strcmp(place, last) != 0) {
      fault_text += " from thread " + std::to_string(i) + " at " + place + ";";
    }
    last = place;
  }
}

void run_block() {
  while (fault_text.empty() && !all_done()) {
    bool ran = false;
    for (size_t warp = 0; warp < warps.size(); ++warp) {
      bool more = turn(warp);
      ran |= more;
      while (more && schedule == Schedule::skewed) more = turn(warp);
    }
    if (!ran && fault_text.empty()) report_deadlock();
  }
}

void reset_block(int num_threads, int shared_bytes) {
  while (stacks.size() < static_cast<size_t>(num_threads)) {
    stacks.emplace_back(new char[kStackBytes]);
  }
  threads.assign(num_threads, Thread{});
  warps.assign(num_threads / kWarp, Warp{});
  shared.assign(shared_bytes, 0xff);  // NaN in every type
  units.assign(shared_bytes / kUnit, Unit{});
  block_epoch = 0;
  at_barrier = 0;
}

// ---- shared memory ----

unsigned char* shared_bytes_at(Shared address, size_t bytes) {
  if (address % bytes) fault("shared address %u is not a multiple of %zu", address, bytes);
  if (address < kSharedBase || address - kSharedBase + bytes > shared.size()) {
    fault("%zu bytes at shared offset %d are outside the block's %zu bytes", bytes,
          static_cast<int>(address) - static_cast<int>(kSharedBase), shared.size());
  }
  return shared.data() + (address - kSharedBase);
}

// Whether an access of this warp (`thread` < 0) or thread comes after one at these epochs.
bool ordered(int before, uint32_t block, uint32_t warp, int thread) {
  if (before == thread || block < block_epoch) return true;
  bool same_warp = before < kWarpReader ? warp_of(before) == warp_of(current)
                                        : before == kWarpReader + warp_of(current);
  return same_warp && warp < current_warp().epoch;
}

void mark_read(Unit& unit, int thread) {
  if (unit.reader < 0 || unit.read_block < block_epoch) {
    unit.reader = thread < 0 ? kWarpReader + warp_of(current) : thread;
  } else if (unit.reader != thread) {
    bool same_warp = unit.reader < kWarpReader ? warp_of(unit.reader) == warp_of(current)
                                               : unit.reader == kWarpReader + warp_of(current);
    unit.reader = same_warp ? kWarpReader + warp_of(current) : kManyReaders;
  }
  unit.read_block = block_epoch;
  unit.read_warp = current_warp().epoch;
}

void check_read(Shared address, size_t bytes, int thread) {
  size_t first = (address - kSharedBase) / kUnit;
  for (size_t i = first; i < first + bytes / kUnit; ++i) {
    Unit& unit = units[i];
    int offset = static_cast<int>(i * kUnit);
    if (unit.in_flight) fault("read of shared offset %d before its cp.async was waited for", offset);
    if (unit.writer < 0) fault("read of shared offset %d, which was never written", offset);
    if (!ordered(unit.writer, unit.write_block, unit.write_warp, thread)) {
      fault("read of shared offset %d, written by thread %d, with no barrier between", offset,
            unit.writer);
    }
    mark_read(unit, thread);
  }
}

void check_write(Shared address, size_t bytes) {
  size_t first = (address - kSharedBase) / kUnit;
  for (size_t i = first; i < first + bytes / kUnit; ++i) {
    Unit& unit = units[i];
    int offset = static_cast<int>(i * kUnit);
    if (unit.in_flight) fault("write to shared offset %d during a cp.async to it", offset);
    if (unit.writer >= 0 && !ordered(unit.writer, unit.write_block, unit.write_warp, current)) {
      fault("write to shared offset %d, written by thread %d, with no barrier between", offset,
            unit.writer);
    }
    if (unit.reader >= 0 && !ordered(unit.reader, unit.read_block, unit.read_warp, current)) {
      fault("write to shared offset %d, read by other threads, with no barrier between", offset);
    }
  }
}

void mark_written(Shared address, size_t bytes, bool in_flight) {
  size_t first = (address - kSharedBase) / kUnit;
  for (size_t i = first; i < first + bytes / kUnit; ++i) {
    units[i] = Unit{};
    units[i].writer = current;
    units[i].write_block = block_epoch;
    units[i].write_warp = current_warp().epoch;
    units[i].in_flight = in_flight;
  }
}

void finish(const Copy& copy) {
  unsigned char* to = shared_bytes_at(copy.destination, 16);
  if (copy.valid) {
    memcpy(to, copy.source, 16);
  } else {
    memset(to, 0, 16);
  }
  mark_written(copy.destination, 16, false);
}

// ---- global memory ----

Region* region_of(const void* address, size_t bytes) {
  auto* at = static_cast<const unsigned char*>(address);
  if (reinterpret_cast<uintptr_t>(at) % bytes) {
    fault("global address %p is not a multiple of %zu", address, bytes);
  }
  if (regions.empty()) return nullptr;  // the caller chose not to have global memory checked
  const Region* nearest = nullptr;
  for (Region& region : regions) {
    if (at >= region.begin && at + bytes <= region.begin + region.bytes) return &region;
    if (at >= region.begin && (!nearest || region.begin > nearest->begin)) nearest = &region;
  }
  if (!nearest) fault("%zu bytes at %p are before every region", bytes, address);
  fault("%zu bytes at %s + %zu are outside its %zu bytes", bytes, nearest->name.c_str(),
        static_cast<size_t>(at - nearest->begin), nearest->bytes);
}

uint32_t number_in_grid() {
  uint32_t block = (block_index.z * grid_size.y + block_index.y) * grid_size.x + block_index.x;
  return block * block_size + current + 1;
}

size_t first_writer(const Region& region, const void* address) {
  return (static_cast<const unsigned char*>(address) - region.begin) / 2;
}

// Note who writes; all writes to a place in a launch must be by one thread, or be additions.
void claim(void* address, size_t bytes, uint32_t writer) {
  Region* region = region_of(address, bytes);
  if (!region) return;
  if (!region->writable) fault("write to %s, which is read-only", region->name.c_str());
  size_t first = first_writer(*region, address);
  for (size_t i = first; i < first + bytes / 2; ++i) {
    if (region->writers[i] && region->writers[i] != writer) {
      fault("second write to %s + %zu", region->name.c_str(), 2 * i);
    }
    region->writers[i] = writer;
  }
}

}  // namespace

void fault(const char* format, ...) {
  char message[256], text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  snprintf(text, sizeof(text), "block (%u, %u, %u), thread %d: %s", block_index.x, block_index.y,
           block_index.z, current, message);
  fault_text = text;
  throw Fault{};
}

void check_global_read(const void* address, size_t bytes) {
  Region* region = region_of(address, bytes);
  if (!region || !region->writable) return;
  size_t first = first_writer(*region, address);
  for (size_t i = first; i < first + bytes / 2; ++i) {
    if (region->writers[i] && region->writers[i] != number_in_grid()) {
      fault("read of %s + %zu, written by another thread", region->name.c_str(), 2 * i);
    }
  }
}

void check_global_write(void* address, size_t bytes) { claim(address, bytes, number_in_grid()); }

void check_global_add(void* address, size_t bytes) { claim(address, bytes, kAdders); }

Shared shared_begin() { return kSharedBase; }

void read_shared(void* to, Shared address, size_t bytes) {
  const unsigned char* from = shared_bytes_at(address, bytes);
  check_read(address, bytes, current);
  memcpy(to, from, bytes);
}

void read_shared_by_warp(void* to, Shared address, size_t bytes) {
  const unsigned char* from = shared_bytes_at(address, bytes);
  check_read(address, bytes, -1);
  memcpy(to, from, bytes);
}

void write_shared(Shared address, const void* from, size_t bytes) {
  unsigned char* to = shared_bytes_at(address, bytes);
  check_write(address, bytes);
  mark_written(address, bytes, false);
  memcpy(to, from, bytes);
}

void copy_async(Shared destination, const void* source, bool valid) {
  unsigned char* to = shared_bytes_at(destination, 16);
  if (valid) check_global_read(source, 16);
  check_write(destination, 16);
  mark_written(destination, 16, true);
  memset(to, 0xff, 16);
  counters.copied += valid ? 16 : 0;
  threads[current].open.push_back({destination, source, valid});
}

void commit_copies() {
  Thread& thread = threads[current];
  thread.committed.push_back(std::move(thread.open));
  thread.open.clear();
}

void wait_copies(size_t pending) {
  auto& committed = threads[current].committed;
  while (committed.size() > pending) {
    for (const Copy& copy : committed.front()) finish(copy);
    committed.pop_front();
  }
}

void sync_block() {
  Thread& thread = threads[current];
  if (++at_barrier < static_cast<int>(threads.size())) {
    thread.state = State::at_barrier;
    thread.waits_for = "sync_block";
    yield();
    return;
  }
  for (Thread& other : threads) other.state = State::ready;
  at_barrier = 0;
  ++block_epoch;
  ++counters.barriers;
}

void collective(const char* what, Run run, const void* in, void* out) {
  Warp& warp = current_warp();
  if (warp.arrived && strcmp(warp.what, what) != 0) {
    fault("%s while other lanes of the warp are at %s", what, warp.what);
  }
  warp.what = what;
  warp.lanes[current % kWarp] = {in, out};
  if (++warp.arrived < kWarp) {
    threads[current].state = State::in_collective;
    threads[current].waits_for = what;
    yield();
    return;
  }
  warp.arrived = 0;
  run(warp.lanes);
  for (int lane = 0; lane < kWarp; ++lane) {
    threads[warp_of(current) * kWarp + lane].state = State::ready;
  }
}

void sync_warp() {
  collective("sync_warp", [](const Lane (&)[kWarp]) { ++current_warp().epoch; }, nullptr, nullptr);
}

int launch(const std::function<void()>& kernel, Index grid, int num_threads, int shared_bytes) {
  fault_text.clear();
  if (num_threads < kWarp || num_threads > 1024 || num_threads % kWarp) {
    fault_text = "a block of " + std::to_string(num_threads) + " threads";
  } else if (shared_bytes < 0 || static_cast<size_t>(shared_bytes) > kMaxSharedBytes) {
    fault_text = "a block with " + std::to_string(shared_bytes) + " bytes of shared memory";
  }
  for (Region& region : regions) region.writers.assign(region.writable ? region.bytes / 2 : 0, 0);
  counters.shared_bytes = std::max(counters.shared_bytes, static_cast<uint64_t>(shared_bytes));
  body = &kernel;
  grid_size = grid;
  block_size = num_threads;
  unsigned blocks = grid.x * grid.y * grid.z;
  for (unsigned i = 0; i < blocks && fault_text.empty(); ++i) {
    unsigned block = schedule == Schedule::skewed ? blocks - 1 - i : i;
    block_index = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
    reset_block(num_threads, shared_bytes);
    run_block();
  }
  return fault_text.empty() ? 0 : kFault;
}

const char* last_fault() { return fault_text.c_str(); }

// ---- half precision ----

namespace {

struct HalfTable {
  float value[1 << 16];
  HalfTable() {
    for (int bits = 0; bits < 1 << 16; ++bits) {
      int exponent = bits >> 10 & 31, fraction = bits & 1023;
      float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                   : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                   : std::ldexp(1024.0f + fraction, exponent - 25);
      value[bits] = bits >> 15 ? -size : size;
    }
  }
};

}  // namespace

float float_of_half(uint16_t bits) {
  static const HalfTable table;
  return table.value[bits];
}

uint16_t half_of_float(float value) {
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  float size = std::fabs(value);
  if (std::isnan(size)) return 0x7fff;
  if (size == 0) return sign;  // frexp would call its exponent 0
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(size, &exponent);            // size < 2^exponent
  exponent = std::max(exponent, -13);     // below 2^-14 steps stay 2^-24
  float steps = std::nearbyint(std::ldexp(size, 11 - exponent));  // half to even
  // Carries from the fraction into the exponent by themselves.
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + static_cast<int>(steps));
}

}  // namespace megavideo::emulator

// ---- what Python calls ----

using namespace megavideo::emulator;

// The message of the last launch's fault, or an empty string.
extern "C" const char* emulator_fault() { return last_fault(); }

// Forget regions and counters; `skewed`: each warp runs until it waits for another, blocks last to
// first, else all in turns.
extern "C" void emulator_reset(int skewed) {
  schedule = skewed ? Schedule::skewed : Schedule::round_robin;
  regions.clear();
  counters = Counters{};
}

// Let kernels touch `bytes` at `begin`. Without any region, global memory is not checked.
extern "C" void emulator_region(const char* name, const void* begin, size_t bytes, int writable) {
  regions.push_back({name, static_cast<const unsigned char*>(begin), bytes, writable != 0, {}});
}

extern "C" void emulator_counters(Counters* to) { *to = counters; }
