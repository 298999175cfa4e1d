// A device for tests that does nothing before somebody waits for it: torch's PrivateUse1, on the memory of the host.
//
// Memory: two mappings of one file. Tensors have addresses of the first, which the host cannot touch; work goes to the
// second. Freed blocks stay with their stream, as in CUDA's caching allocator, and new blocks hold 0xFF bytes.
// Streams: queues. Copies and computing run when the host waits for something that comes after them, in the waiting
// thread; only the shapes of results are worked out before, on meta tensors. `late_schedule` has other timings.
// Graphs: while a thread captures, what it queues goes into a graph, which can be queued again and again. Memory that is
// allocated meanwhile is the graphs': it is used again for them alone. Waits of the host are refused.
// Races: every access is checked against the vector clocks of races.h when it is queued.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_set>

#include "races.h"

namespace late {
using namespace c10;
namespace {

constexpr int kDevices = 2;
constexpr int kPool = 32;                      // streams per device that torch.Stream takes in turns, as CUDA has
constexpr size_t kReserved = size_t(16) << 30;  // addresses per device; memory is taken when it is written
constexpr size_t kRound = 512;
constexpr size_t kPoisoned = size_t(64) << 20;  // larger blocks are not filled
constexpr DeviceType kType = DeviceType::PrivateUse1;

enum Count { EVENT_WAITS, STREAM_WAITS, BLOCKING_D2H, BLOCKING_H2D, ASYNC_COPIES, SCALARS, AT_ONCE, COUNTS };
std::atomic<long> counts[COUNTS];
// 0: as late as allowed. 1: everything at once. 2: copies at once, computing late.
std::atomic<int> schedule{0};

const char* interned(const std::string& name) {
  static std::mutex m;
  static std::unordered_set<std::string> names;
  std::lock_guard<std::mutex> l(m);
  return names.insert(name).first->c_str();
}

// --- state. `state` guards everything below; it is never held while anything else is called.

struct Item {
  std::function<void()> work;
  size_t on = 0;  // or: wait for item `seq` of this entity
  Time seq = 0;
  std::function<bool()> ready;  // or: wait until this holds, which the host brings about
};
struct Entry {  // what a piece of work, or the record of an event, knows; `at`: the time of the thread that queued it
  Time at = 0;
  Clock clock;
};
struct Thread {  // of the host
  size_t entity = 0;
  Time now = 0;
  Clock clock;
};
struct Lane {  // what one thread has queued on one stream
  size_t thread = 0;  // its entity
  size_t entity = 0;
  Time issued = 0;
  std::deque<Entry> entries;
};
struct Queue {
  int device = 0;
  std::deque<Item> items;
  Time issued = 0, done = 0;
  std::deque<Lane> lanes;
  std::string error;
};
struct Recorded {  // a piece of work of a graph
  const char* name;
  std::vector<Access> accesses;
  std::function<void()> work;
  std::function<bool()> ready;
};
struct Block {
  size_t bytes = 0;
  size_t entity = 0;
  std::set<size_t> users;  // streams of record_stream
};
struct Memory {
  char *seen = nullptr, *real = nullptr;
  size_t limit = size_t(2) << 30, top = 0, allocated = 0, reserved = 0, peak_allocated = 0, peak_reserved = 0;
  std::map<uintptr_t, Block> live;
  std::map<size_t, std::multimap<size_t, uintptr_t>> cached;  // per entity, by size
  std::map<uintptr_t, size_t> spare;                          // given back to the device
};
struct Pinned {
  size_t bytes = 0;
  bool registered = false;
};

std::mutex state;
std::recursive_mutex running;  // held while work runs. Order: running before state, never the other way round
std::vector<Queue*> queues;    // by stream, from 1; behind the streams, one engine per device for loose copies
std::deque<Thread> threads;
std::map<size_t, Clock> locks;  // by number of a lock of Python's: what the threads that released it knew
size_t epoch = 1;               // what was noted in an earlier one is forgotten
bool threads_apart = false;     // else all threads of the host are one
std::atomic<bool> loose{false};  // copies from the host leave the order of their stream
History history;
Memory memories[kDevices];
std::map<uintptr_t, Pinned> pinned;
std::vector<std::string> races;
size_t next_stream[kDevices] = {};
thread_local size_t my_epoch = 0, my_thread = 0;
thread_local int current_device = 0;
thread_local size_t current_stream[kDevices] = {1, 2};

std::map<int, std::vector<Recorded>> graphs;
int next_graph = 1;
thread_local int capturing = 0;  // the graph of the calling thread's capture; 0: there is none

size_t default_stream(int device) { return 1 + device; }
size_t pool_stream(int device, size_t i) { return 1 + kDevices + device * kPool + i % kPool; }
size_t engine(int device) { return 1 + kDevices + kDevices * kPool + device; }
size_t graph_memory(int device) { return engine(kDevices) + device; }  // not a stream: whose blocks are of graphs

void start() {
  for (size_t i = 0; i <= engine(kDevices - 1); i++) queues.push_back(new Queue);
  for (int device = 0; device < kDevices; device++) {
    queues[default_stream(device)]->device = queues[engine(device)]->device = device;
    for (size_t i = 0; i < kPool; i++) queues[pool_stream(device, i)]->device = device;
  }
  for (auto& memory : memories) {
    int file = memfd_create("late", 0);
    TORCH_CHECK(file >= 0 && ftruncate(file, kReserved) == 0, "late: memfd");
    memory.seen = (char*)mmap(nullptr, kReserved, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file, 0);
    memory.real = (char*)mmap(nullptr, kReserved, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    TORCH_CHECK(memory.seen != MAP_FAILED && memory.real != MAP_FAILED, "late: mmap");
    close(file);
  }
}

Memory* memory_of(const void* p) {
  for (auto& memory : memories)
    if ((const char*)p >= memory.seen && (const char*)p < memory.seen + kReserved) return &memory;
  return nullptr;
}

char* real(const void* p) {
  Memory* memory = memory_of(p);
  TORCH_CHECK(memory, "late: not an address of the device");
  return memory->real + ((const char*)p - memory->seen);
}

void check_live(const void* p, size_t bytes) {  // `state` is held
  Memory* memory = memory_of(p);
  TORCH_CHECK(memory, "late: not an address of the device");
  auto i = memory->live.upper_bound((uintptr_t)p);
  TORCH_CHECK(i != memory->live.begin(), "late: memory of the device that was never allocated");
  --i;
  TORCH_CHECK((uintptr_t)p + bytes <= i->first + i->second.bytes, "late: memory of the device that was freed");
}

bool is_pinned(const void* p) {
  std::lock_guard<std::mutex> l(state);
  auto i = pinned.upper_bound((uintptr_t)p);
  if (i == pinned.begin()) return false;
  --i;
  return (uintptr_t)p < i->first + i->second.bytes;
}

// --- what is known to be before. `state` is held

constexpr size_t kEntries = 4096, kRecords = 64;  // older ones are forgotten; what asks for them may see a race too many

size_t new_entity(const std::string& label) {
  labels.push_back(label);
  return labels.size() - 1;
}

Thread& me() {
  if (my_epoch != epoch || (!threads_apart && my_thread != 0)) {
    my_epoch = epoch;
    if (threads_apart || threads.empty()) {
      threads.push_back(Thread{new_entity(threads.empty() ? "the host" : "thread " + std::to_string(threads.size())), 0, {}});
      my_thread = threads.size() - 1;
    } else {
      my_thread = 0;
    }
  }
  return threads[my_thread];
}

Thread& acts() {  // the calling thread, which does something now
  Thread& thread = me();
  thread.clock.set(thread.entity, ++thread.now);
  return thread;
}

// The last entry that `thread` knows of, by an order of the threads; nullptr if there is none.
const Entry* known(const std::deque<Entry>& entries, size_t by, const Thread& thread) {
  auto i = std::upper_bound(entries.begin(), entries.end(), thread.clock.of(by), [](Time t, const Entry& e) { return t < e.at; });
  return i == entries.begin() ? nullptr : &*std::prev(i);
}

// What is done once the work of a stream is done that `thread` knows of.
Clock after_stream(const Queue& q, const Thread& thread) {
  Clock clock = thread.clock;
  for (const Lane& lane : q.lanes)
    if (const Entry* entry = known(lane.entries, lane.thread, thread)) clock.join(entry->clock);
  return clock;
}

Lane& lane_of(size_t stream, const Thread& thread) {
  Queue& q = *queues[stream];
  for (Lane& lane : q.lanes)
    if (lane.thread == thread.entity) return lane;
  std::string label = "stream " + std::to_string(stream);
  if (thread.entity != threads[0].entity) label += " by " + labels[thread.entity];
  q.lanes.push_back(Lane{thread.entity, new_entity(label), 0, {}});
  return q.lanes.back();
}

void forget_order() {
  epoch++;
  threads.clear();
  locks.clear();
  labels.resize(1);
  for (Queue* q : queues) q->lanes.clear();
  history = History();
}

std::string note(const Access& access, size_t entity, Time time, const Clock& clock, const char* name) {
  std::string race = history.note(access, entity, time, clock, name);
  if (!race.empty()) races.push_back(race);
  return race;
}

// --- queues

// `running` is held, and let go of while a stream waits for the host: other threads may then run what comes next.
// patient: whether to wait for the host at all.
void run_until(size_t entity, Time seq, bool patient = true) {
  Queue& queue = *queues[entity];
  for (;;) {
    Item item;
    Time before;
    bool waits;
    {
      std::lock_guard<std::mutex> l(state);
      if (queue.done >= seq || queue.items.empty()) return;
      before = queue.done;
      waits = queue.items.front().on || queue.items.front().ready;
      item = queue.items.front();
      if (!waits) queue.items.pop_front();
    }
    if (waits) {
      if (item.on) {
        run_until(item.on, item.seq, patient);
      } else if (!item.ready()) {
        if (!patient) return;
        running.unlock();
        usleep(50);
        running.lock();
        continue;
      }
      std::lock_guard<std::mutex> l(state);
      if (queue.done != before) continue;  // another thread has been here
      if (item.on && queues[item.on]->done < item.seq) return;  // not patient
      queue.items.pop_front();
      queue.done++;
      continue;
    }
    if (item.work) {
      try {
        item.work();
      } catch (const std::exception& error) {
        std::lock_guard<std::mutex> l(state);
        if (queue.error.empty()) queue.error = error.what();
      }
    }
    std::lock_guard<std::mutex> l(state);
    queue.done++;
  }
}

void raise_error(size_t entity) {
  std::string error;
  {
    std::lock_guard<std::mutex> l(state);
    std::swap(error, queues[entity]->error);
  }
  TORCH_CHECK(error.empty(), "late: work of stream ", entity, " failed: ", error);
}

void refuse_capture(const char* what) { TORCH_CHECK(!capturing, "late: ", what, " cannot be captured"); }

// The host waits for item `seq`, after which what is in `clock` is done.
void host_waits(size_t entity, Time seq, const Clock& clock) {
  refuse_capture("a wait of the host");
  {
    std::lock_guard<std::recursive_mutex> r(running);
    run_until(entity, seq);
  }
  {
    std::lock_guard<std::mutex> l(state);
    me().clock.join(clock);
  }
  raise_error(entity);
}

void host_waits_for_stream(size_t entity) {
  Time seq;
  Clock clock;
  {
    std::lock_guard<std::mutex> l(state);
    seq = queues[entity]->issued;
    clock = after_stream(*queues[entity], acts());
  }
  host_waits(entity, seq, clock);
}

void host_waits_for_device(int device) {
  for (size_t i = 1; i < queues.size(); i++)
    if (queues[i]->device == device) host_waits_for_stream(i);
}

void run_everything() {  // errors stay with their streams
  std::lock_guard<std::recursive_mutex> r(running);
  for (size_t i = 1; i < queues.size(); i++) {
    Time seq;
    {
      std::lock_guard<std::mutex> l(state);
      seq = queues[i]->issued;
    }
    run_until(i, seq);
  }
}

// Queues work and notes its accesses. Gives the first race, or "".
std::string queue(size_t entity, const char* name, const std::vector<Access>& accesses, std::function<void()> work,
                  size_t on = 0, Time seq = 0, const Clock* clock = nullptr, std::function<bool()> ready = nullptr) {
  std::string race;
  {
    std::lock_guard<std::mutex> l(state);
    if (capturing) {
      TORCH_CHECK(!on, "late: a wait for another stream cannot be captured");
      graphs.at(capturing).push_back({name, accesses, std::move(work), std::move(ready)});
      return race;
    }
    Queue& q = *queues[entity];
    const Thread& thread = acts();
    Clock knows = after_stream(q, thread);
    if (clock) knows.join(*clock);
    Lane& lane = lane_of(entity, thread);
    knows.set(lane.entity, ++lane.issued);
    for (const Access& access : accesses) {
      std::string found = note(access, lane.entity, lane.issued, knows, name);
      if (race.empty()) race = found;
    }
    lane.entries.push_back(Entry{thread.now, std::move(knows)});
    if (lane.entries.size() > kEntries) lane.entries.pop_front();
    q.issued++;
    q.items.push_back(Item{std::move(work), on, seq, std::move(ready)});
  }
  return race;
}

void wait_on_stream(size_t entity, size_t on, Time seq, const Clock& clock) {
  queue(entity, "wait", {}, nullptr, on, seq, &clock);
}

void wait_on_all_of(size_t entity, size_t other) {
  Time seq;
  Clock clock;
  {
    std::lock_guard<std::mutex> l(state);
    seq = queues[other]->issued;
    clock = after_stream(*queues[other], acts());
  }
  if (other != entity) wait_on_stream(entity, other, seq, clock);
}

void at_once_if_asked(size_t entity, bool copies) {
  int how = schedule;
  if (capturing || how == 0 || (how == 2 && !copies)) return;
  Time seq;
  {
    std::lock_guard<std::mutex> l(state);
    seq = queues[entity]->issued;
  }
  std::lock_guard<std::recursive_mutex> r(running);
  run_until(entity, seq);
}

void submit(size_t entity, const char* name, const std::vector<Access>& accesses, std::function<void()> work,
            bool copies = false) {
  std::string race = queue(entity, name, accesses, std::move(work));
  at_once_if_asked(entity, copies);
  TORCH_CHECK(race.empty(), race);
}

// --- memory

size_t from_spare(Memory& memory, size_t bytes) {  // `state` is held; 0: none
  for (auto i = memory.spare.begin(); i != memory.spare.end(); ++i) {
    if (i->second < bytes) continue;
    uintptr_t at = i->first;
    size_t rest = i->second - bytes;
    memory.spare.erase(i);
    if (rest) memory.spare[at + bytes] = rest;
    return at;
  }
  return 0;
}

uintptr_t take(int device, size_t bytes, size_t entity) {  // 0: over the limit
  std::lock_guard<std::mutex> l(state);
  Memory& memory = memories[device];
  uintptr_t at = 0;
  auto& mine = memory.cached[entity];
  auto i = mine.lower_bound(bytes);
  if (i != mine.end() && i->first <= std::max(2 * bytes, bytes + 65536)) {
    bytes = i->first;
    at = i->second;
    mine.erase(i);
  } else {
    if (memory.reserved + bytes > memory.limit) return 0;
    at = from_spare(memory, bytes);
    if (!at) {
      TORCH_CHECK(memory.top + bytes <= kReserved, "late: no addresses left");
      at = (uintptr_t)memory.seen + memory.top;
      memory.top += bytes;
    }
    memory.reserved += bytes;
    memory.peak_reserved = std::max(memory.peak_reserved, memory.reserved);
  }
  memory.live[at] = Block{bytes, entity, {}};
  memory.allocated += bytes;
  memory.peak_allocated = std::max(memory.peak_allocated, memory.allocated);
  return at;
}

void give_back_cached(int device) {
  host_waits_for_device(device);
  std::lock_guard<std::mutex> l(state);
  Memory& memory = memories[device];
  for (auto& [entity, blocks] : memory.cached) {
    if (entity >= graph_memory(0) && !graphs.empty()) continue;  // what is free now is used in the next replay
    for (auto& [bytes, at] : blocks) {
      memory.spare[at] = bytes;
      memory.reserved -= bytes;
    }
    blocks.clear();
  }
  for (auto i = memory.spare.begin(); i != memory.spare.end();) {  // neighbors become one
    auto next = std::next(i);
    if (next != memory.spare.end() && i->first + i->second == next->first) {
      i->second += next->second;
      memory.spare.erase(next);
    } else {
      ++i;
    }
  }
}

void release(void* p) {
  if (!p) return;
  Memory& memory = *memory_of(p);
  Block block;
  {
    std::lock_guard<std::mutex> l(state);
    block = memory.live.at((uintptr_t)p);
  }
  bool of_graphs = block.entity >= graph_memory(0);
  if (!of_graphs)
    for (size_t user : block.users) wait_on_all_of(block.entity, user);
  std::lock_guard<std::mutex> l(state);
  if (of_graphs) {  // graphs that use it later are replayed one after the other
    memory.live.erase((uintptr_t)p);
    memory.cached[block.entity].emplace(block.bytes, (uintptr_t)p);
    memory.allocated -= block.bytes;
    return;
  }
  const Thread& thread = acts();
  Clock clock = thread.clock;  // whoever used it on its own stream had a reference to it, so all of that is before
  for (const Lane& lane : queues[block.entity]->lanes)
    if (!lane.entries.empty()) clock.join(lane.entries.back().clock);
  // Its stream may use the memory again from here on, so whatever other streams do with it must be done by then.
  const Lane& lane = lane_of(block.entity, thread);
  note(Access{(uintptr_t)p, (uintptr_t)p + block.bytes, true}, lane.entity, lane.issued, clock, "free");
  history.forget((uintptr_t)p, (uintptr_t)p + block.bytes);
  memory.live.erase((uintptr_t)p);
  memory.cached[block.entity].emplace(block.bytes, (uintptr_t)p);
  memory.allocated -= block.bytes;
}

void set_stat(CachingAllocator::StatArray& stats, size_t now, size_t peak) {
  auto& all = stats[static_cast<size_t>(CachingAllocator::StatType::AGGREGATE)];
  all.current = int64_t(now);
  all.peak = int64_t(peak);
}

struct DeviceMemory final : c10::DeviceAllocator {
  DataPtr allocate(size_t n) override {
    int device = current_device;
    Device where(kType, device);
    if (!n) return {nullptr, nullptr, &release, where};
    size_t bytes = (n + kRound - 1) / kRound * kRound, entity = capturing ? graph_memory(device) : current_stream[device];
    uintptr_t at = take(device, bytes, entity);
    if (!at) {
      refuse_capture("giving back memory");
      give_back_cached(device);
      at = take(device, bytes, entity);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, at, "late: out of memory. ", n, " bytes of device ", device, " were asked for.");
    if (bytes <= kPoisoned) {
      char* to = real((void*)at);
      queue(entity, "allocate", {Access{at, at + bytes, true}}, [to, bytes] { std::memset(to, 0xFF, bytes); });
    }
    return {(void*)at, (void*)at, &release, where};
  }
  DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "late: copy_data"); }
  bool initialized() override { return true; }
  void emptyCache(MempoolId_t) override {
    for (int device = 0; device < kDevices; device++) give_back_cached(device);
  }
  void recordStream(const DataPtr& ptr, Stream stream) override {
    std::lock_guard<std::mutex> l(state);
    Memory* memory = memory_of(ptr.get());
    if (memory) memory->live.at((uintptr_t)ptr.get_context()).users.insert(size_t(stream.id()));
  }
  CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> l(state);
    Memory& memory = memories[device];
    CachingDeviceAllocator::DeviceStats stats;
    set_stat(stats.allocated_bytes, memory.allocated, memory.peak_allocated);
    set_stat(stats.reserved_bytes, memory.reserved, memory.peak_reserved);
    return stats;
  }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex device) override {
    std::lock_guard<std::mutex> l(state);
    Memory& memory = memories[device];
    memory.peak_allocated = memory.allocated;
    memory.peak_reserved = memory.reserved;
  }
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex device) override {
    std::lock_guard<std::mutex> l(state);
    return {memories[device].limit - memories[device].reserved, memories[device].limit};
  }
} device_memory;
REGISTER_ALLOCATOR(kType, &device_memory);

// Says that the host touches pinned memory. Gives the race, or "".
std::string host_touches(uintptr_t at, size_t bytes, bool writes, const char* name) {
  std::lock_guard<std::mutex> l(state);
  const Thread& thread = acts();
  return note(Access{at, at + bytes, writes}, thread.entity, thread.now, thread.clock, name);
}

void unpin(uintptr_t at, const char* name) {
  size_t bytes;
  {
    std::lock_guard<std::mutex> l(state);
    auto i = pinned.find(at);
    if (i == pinned.end()) {
      races.push_back("late: memory is unregistered that was not registered");
      return;
    }
    bytes = i->second.bytes;
  }
  if (!host_touches(at, bytes, true, name).empty())  // the memory may be gone afterwards
    run_everything();
  std::lock_guard<std::mutex> l(state);
  history.forget(at, at + bytes);
  pinned.erase(at);
}

struct PinnedMemory final : c10::Allocator {
  static void unmap(void* p) {  // a caching allocator keeps it until its copies are done; here it stays
    std::lock_guard<std::mutex> l(state);
    pinned.erase((uintptr_t)p);
  }
  DataPtr allocate(size_t n) override {
    if (!n) return {nullptr, nullptr, &unmap, kCPU};
    size_t bytes = (n + 4095) / 4096 * 4096;
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(p != MAP_FAILED, "late: mmap");
    std::lock_guard<std::mutex> l(state);
    pinned[(uintptr_t)p] = Pinned{bytes, false};
    return {p, p, &unmap, kCPU};
  }
  DeleterFnPtr raw_deleter() const override { return &unmap; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
} pinned_memory;

// --- devices, streams, events

struct Event {
  int device = 0;
  size_t entity = 0;
  Time seq = 0, engine_seq = 0;
  size_t epoch = 0;
  std::deque<std::pair<size_t, Entry>> records;  // (entity of the thread that recorded it, what is done then)

  // What is done once the last record is done that the calling thread knows of. `state` is held.
  Clock after() {
    const Thread& thread = acts();
    if (epoch == late::epoch)
      for (auto i = records.rbegin(); i != records.rend(); ++i)
        if (i->second.at <= thread.clock.of(i->first)) return i->second.clock;
    return thread.clock;
  }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(DeviceType) {}
  static int index(Device device) { return device.has_index() && device.index() >= 0 ? device.index() : current_device; }
  Stream stream(size_t entity) const {
    return Stream(Stream::UNSAFE, Device(kType, DeviceIndex(queues[entity]->device)), StreamId(entity));
  }
  DeviceType type() const override { return kType; }
  Device exchangeDevice(Device device) const override {
    Device old = getDevice();
    setDevice(device);
    return old;
  }
  Device getDevice() const override { return Device(kType, DeviceIndex(current_device)); }
  void setDevice(Device device) const override {
    TORCH_CHECK(index(device) < kDevices, "late: there are ", kDevices, " devices");
    current_device = index(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = index(device); }
  Stream getStream(Device device) const override { return stream(current_stream[index(device)]); }
  Stream getDefaultStream(Device device) const override { return stream(default_stream(index(device))); }
  Stream getNewStream(Device device, int) const override {
    std::lock_guard<std::mutex> l(state);
    return stream(pool_stream(index(device), next_stream[index(device)]++));
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream s) const override {
    size_t& current = current_stream[s.device_index()];
    Stream old = stream(current);
    current = size_t(s.id());
    return old;
  }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete (Event*)event; }
  void record(void** event, const Stream& s, const DeviceIndex, const EventFlag) const override {
    if (!*event) *event = new Event{s.device_index()};
    auto* e = (Event*)*event;
    refuse_capture("an event");
    TORCH_CHECK(e->device == s.device_index(), "late: an event of device ", e->device, " is recorded on another device");
    std::lock_guard<std::mutex> l(state);
    const Queue &q = *queues[s.id()], &copies = *queues[engine(e->device)];
    const Thread& thread = acts();
    Clock clock = after_stream(q, thread);
    clock.join(after_stream(copies, thread));
    if (e->epoch != late::epoch) e->records.clear();
    e->epoch = late::epoch;
    e->records.emplace_back(thread.entity, Entry{thread.now, std::move(clock)});
    if (e->records.size() > kRecords) e->records.pop_front();
    e->entity = size_t(s.id());
    e->seq = q.issued;
    e->engine_seq = copies.issued;
  }
  void block(void* event, const Stream& s) const override {
    if (!event) return;
    refuse_capture("an event");
    auto* e = (Event*)event;
    size_t entity = size_t(s.id());
    if (!e->entity || (e->entity == entity && !loose)) return;
    Clock clock;
    {
      std::lock_guard<std::mutex> l(state);
      clock = e->after();
    }
    if (loose) wait_on_stream(entity, engine(e->device), e->engine_seq, clock);
    if (e->entity != entity) wait_on_stream(entity, e->entity, e->seq, clock);
  }
  bool queryEvent(void* event) const override {
    auto* e = (Event*)event;
    return !event || !e->entity || asked(e->entity, e->seq);
  }
  void synchronizeEvent(void* event) const override {
    if (!event) return;
    auto* e = (Event*)event;
    counts[EVENT_WAITS]++;
    if (!e->entity) return;
    Clock clock;
    {
      std::lock_guard<std::mutex> l(state);
      clock = e->after();
    }
    host_waits(engine(e->device), e->engine_seq, clock);
    host_waits(e->entity, e->seq, clock);
  }
  bool queryStream(const Stream& s) const override {
    Time seq;
    {
      std::lock_guard<std::mutex> l(state);
      seq = queues[s.id()]->issued;
    }
    return asked(size_t(s.id()), seq);
  }
  void synchronizeStream(const Stream& s) const override {
    counts[STREAM_WAITS]++;
    host_waits_for_stream(size_t(s.id()));
  }
  void synchronizeDevice(const DeviceIndex device) const override {
    counts[STREAM_WAITS]++;
    host_waits_for_device(device);
  }
  void recordDataPtrOnStream(const DataPtr& ptr, const Stream& s) const override { device_memory.recordStream(ptr, s); }

  // Whether work is done. Each question that is answered with no lets one item run: who asks again and again gets there.
  static bool asked(size_t entity, Time seq) {
    Time done;
    {
      std::lock_guard<std::mutex> l(state);
      done = queues[entity]->done;
    }
    if (done >= seq) return true;
    std::unique_lock<std::recursive_mutex> r(running, std::try_to_lock);
    if (r.owns_lock()) run_until(entity, done + 1, false);
    return false;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex getCurrentDevice() const override { return DeviceIndex(current_device); }
  void setCurrentDevice(DeviceIndex device) const override { Guard().setDevice(Device(kType, device)); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    DeviceIndex old = getCurrentDevice();
    if (device >= 0) setCurrentDevice(device);
    return old;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  Device getDeviceFromPtr(void* p) const override {
    Memory* memory = memory_of(p);
    TORCH_CHECK(memory, "late: not an address of the device");
    return Device(kType, DeviceIndex(memory - memories));
  }
};

// --- tensors

size_t span(const at::Tensor& t) {  // bytes from the first element to behind the last one
  if (!t.numel()) return 0;
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
  return size_t(last + 1) * t.element_size();
}

Access access(const at::Tensor& t, bool writes) {
  auto at = (uintptr_t)t.const_data_ptr();
  return Access{at, at + span(t), writes};
}

// The tensor as work sees it: the same bytes at an address of the host. It keeps nothing alive.
at::Tensor on_host(const at::Tensor& t) {
  if (!t.numel()) return at::empty_strided(t.sizes(), t.strides(), t.options().device(kCPU));
  if (!t.is_privateuseone()) return at::from_blob(const_cast<void*>(t.const_data_ptr()), t.sizes(), t.strides(), t.options());
  {
    std::lock_guard<std::mutex> l(state);
    check_live(t.const_data_ptr(), span(t));
  }
  return at::from_blob(real(t.const_data_ptr()), t.sizes(), t.strides(), t.options().device(kCPU));
}

at::Tensor empty(IntArrayRef sizes, std::optional<ScalarType> dtype, std::optional<Layout>, std::optional<Device> device,
                 std::optional<bool>, std::optional<MemoryFormat> format) {
  const OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(sizes, &device_memory, DispatchKeySet(DispatchKey::PrivateUse1),
                                   dtype_or_default(dtype), format);
}

at::Tensor empty_strided(IntArrayRef sizes, IntArrayRef strides, std::optional<ScalarType> dtype, std::optional<Layout>,
                         std::optional<Device> device, std::optional<bool>) {
  const OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, DispatchKeySet(DispatchKey::PrivateUse1),
                                           dtype_or_default(dtype));
}

// Nothing of the calling thread (modes, autocast, autograd) has a say in what a kernel does.
struct Bare {
  c10::impl::ForceDispatchKeyGuard keys{
      c10::impl::LocalDispatchKeySet([] {
        c10::impl::PODLocalDispatchKeySet pod{};
        pod.set_included(default_included_set);
        pod.set_excluded(default_excluded_set | autograd_dispatch_keyset_with_ADInplaceOrView | autocast_dispatch_keyset);
        return pod;
      }())};
};

uint64_t digest(const at::Tensor& t) {
  uint64_t sum = 1469598103934665603ull;
  auto* bytes = (const unsigned char*)t.const_data_ptr();
  for (size_t i = 0, n = span(t); i < n; i++) sum = (sum ^ bytes[i]) * 1099511628211ull;
  return sum;
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& destination, bool non_blocking) {
  if (!destination.numel()) return destination;
  bool from_host = !source.is_privateuseone(), to_host = !destination.is_privateuseone();
  const at::Tensor& at_host = to_host ? destination : source;
  bool async = !(from_host || to_host) || (non_blocking && is_pinned(at_host.const_data_ptr()));
  int device = from_host ? destination.get_device() : source.get_device();
  size_t entity = current_stream[device];
  size_t other = from_host || to_host ? entity : current_stream[destination.get_device()];
  if (other != entity) wait_on_all_of(entity, other);
  at::Tensor from = on_host(source), to = on_host(destination);
  std::vector<Access> accesses;
  bool tracked = async || !(from_host || to_host);
  if (!from_host || tracked) accesses.push_back(access(source, false));
  if (!to_host || tracked) accesses.push_back(access(destination, true));
  const char* name = from_host ? "copy from the host" : to_host ? "copy to the host" : "copy";
  if (!async) {
    counts[to_host ? BLOCKING_D2H : BLOCKING_H2D]++;
    std::string race = queue(entity, name, accesses, [from, to] {
      Bare bare;
      to.copy_(from);
    });
    host_waits_for_stream(entity);  // also where there is a race: the memory may be gone afterwards
    TORCH_CHECK(race.empty(), race);
    return destination;
  }
  if (from_host || to_host) counts[ASYNC_COPIES]++;
  uint64_t before = from_host ? digest(from) : 0;
  if (to_host && schedule == 0 && to.is_contiguous()) std::memset(to.data_ptr(), 0xFF, span(to));
  size_t where = entity;
  if (from_host && loose) wait_on_all_of(where = engine(device), entity);
  submit(
      where, name, accesses,
      [from, to, from_host, before] {
        Bare bare;
        TORCH_CHECK(!from_host || digest(from) == before, "late: the host has changed the source of a copy that was under way");
        to.copy_(from);
      },
      true);
  if (other != entity) wait_on_all_of(other, entity);
  return destination;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& destination) {
  if (destination.sizes() != source.sizes()) at::native::resize_(destination, source.sizes(), std::nullopt);
  return copy_from(source, destination, false);
}

at::Tensor as_strided(const at::Tensor& t, SymIntArrayRef sizes, SymIntArrayRef strides, std::optional<SymInt> offset) {
  return at::cpu::as_strided_symint(t, sizes, strides, offset);
}
at::Tensor view(const at::Tensor& t, SymIntArrayRef sizes) { return at::native::view(t, C10_AS_INTARRAYREF_SLOW(sizes)); }
at::Tensor reshape_alias(const at::Tensor& t, SymIntArrayRef sizes, SymIntArrayRef strides) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}
const at::Tensor& resize_(const at::Tensor& t, SymIntArrayRef sizes, std::optional<MemoryFormat>) {
  IntArrayRef to = C10_AS_INTARRAYREF_SLOW(sizes);
  if (t.sizes() == to) return t;
  size_t bytes = size_t(c10::multiply_integers(to)) * t.element_size() + size_t(t.storage_offset()) * t.element_size();
  if (bytes > t.storage().nbytes()) {
    TORCH_CHECK(!t.storage_offset(), "late: a view cannot grow");
    const OptionalDeviceGuard guard(t.device());
    auto storage = t.storage();
    storage.set_data_ptr_noswap(device_memory.allocate(bytes));
    storage.set_nbytes(bytes);
  }
  t.unsafeGetTensorImpl()->set_sizes_contiguous(to);
  return t;
}
at::Tensor& set_off(at::Tensor& t, at::Storage s, int64_t offset, IntArrayRef sizes, IntArrayRef strides) {
  return at::cpu::set_(t, s, offset, sizes, strides);
}
at::Tensor& set_storage(at::Tensor& t, at::Storage s) { return at::native::set_(t, s); }
at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& s) { return at::native::set_tensor_(t, s); }

at::Tensor view_as_real(const at::Tensor& t) { return at::native::view_as_real(t); }
at::Tensor view_as_complex(const at::Tensor& t) { return at::native::view_as_complex(t); }

void record_stream(at::Tensor& t, Stream stream) { device_memory.recordStream(t.storage().data_ptr(), stream); }

at::Scalar item(const at::Tensor& t) {
  counts[SCALARS]++;
  size_t entity = current_stream[t.get_device()];
  at::Tensor value = on_host(t);
  submit(entity, "item", {access(t, false)}, nullptr);
  host_waits_for_stream(entity);
  Bare bare;
  return at::native::_local_scalar_dense_cpu(value);
}

// --- computing

using torch::jit::Stack;

// Applies f to every tensor of a value, and gives the value of the results.
IValue mapped(const IValue& value, const std::function<at::Tensor(const at::Tensor&)>& f) {
  if (value.isTensor()) return value.toTensor().defined() ? IValue(f(value.toTensor())) : value;
  if (value.isTensorList()) {
    c10::List<at::Tensor> out;
    for (const at::Tensor& t : value.toTensorList()) out.push_back(t.defined() ? f(t) : t);
    return out;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> out;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorList())
      out.push_back(t.has_value() && t->defined() ? std::optional<at::Tensor>(f(*t)) : t);
    return out;
  }
  return value;
}

struct Plan {  // one call of an operator, divided into what happens now and what happens on the device
  Stack later;
  std::vector<std::pair<at::Tensor, at::Tensor>> inputs;  // (of the caller, on meta)
  std::vector<at::Tensor> results;                        // new ones, as work sees them
  std::vector<Access> accesses;
};

at::Tensor counterpart(const Plan& plan, const at::Tensor& meta) {
  for (const auto& [mine, other] : plan.inputs)
    if (other.is_same(meta)) return mine;
  return {};
}

// Whether all that an operator returns are arguments that it writes and that have their shape already: in-place ones, and
// out= ones, which torch makes of most operators before they get here.
bool returns_what_it_writes(const FunctionSchema& schema, Stack* stack, size_t base, std::vector<IValue>& returned) {
  for (const auto& result : schema.returns()) {
    const auto* alias = result.alias_info();
    if (!alias || !alias->isWrite()) return false;
    bool found = false;
    for (size_t i = 0; i < schema.arguments().size() && !found; i++) {
      const auto* argument = schema.arguments()[i].alias_info();
      if (!argument || !(*argument == *alias)) continue;
      const IValue& value = (*stack)[base + i];
      if (!value.isTensor() || !value.toTensor().is_privateuseone() || !value.toTensor().numel()) return false;
      returned.push_back(value);
      found = true;
    }
    if (!found) return false;
  }
  return !schema.returns().empty();
}

// Works out on meta tensors what an operator gives, and allocates it. False: only its values tell.
bool plan_call(const OperatorHandle& op, Stack* stack, Plan& plan, std::vector<IValue>& returned, std::string& why) {
  const auto& schema = op.schema();
  size_t count = schema.arguments().size(), base = stack->size() - count;
  if (returns_what_it_writes(schema, stack, base, returned)) return true;
  returned.clear();
  Stack now;
  std::optional<Device> device;
  for (size_t i = 0; i < count; i++) {
    const IValue& value = (*stack)[base + i];
    if (value.isDevice()) {
      if (value.toDevice().is_privateuseone()) device = value.toDevice();
      now.push_back(value.toDevice().is_privateuseone() ? IValue(Device(kMeta)) : value);
      continue;
    }
    now.push_back(mapped(value, [&](const at::Tensor& t) {
      if (t.is_privateuseone()) device = t.device();
      if (!t.is_privateuseone() && !t.dim()) return t;  // a number
      at::Tensor known = [&] {
        for (const auto& [mine, other] : plan.inputs)
          if (mine.is_same(t)) return other;
        return at::Tensor();
      }();
      if (known.defined()) return known;
      at::Tensor meta = at::empty_strided(t.sizes(), t.strides(), t.options().device(kMeta).pinned_memory(false));
      plan.inputs.emplace_back(t, meta);
      return meta;
    }));
  }
  try {
    Bare bare;
    op.callBoxed(&now);
  } catch (const std::exception& error) {
    why = error.what();
    return false;
  }
  const OptionalDeviceGuard guard(device.has_value() ? std::optional<Device>(device) : std::nullopt);
  for (const auto& [mine, meta] : plan.inputs)  // out= arguments take the shape of what is written
    if (mine.is_privateuseone() && mine.sizes() != meta.sizes()) {
      resize_(mine, c10::fromIntArrayRefSlow(meta.sizes()), std::nullopt);
      if (mine.strides() != meta.strides()) mine.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides());
    }
  for (const IValue& value : now) {
    bool unclear = false;
    returned.push_back(mapped(value, [&](const at::Tensor& meta) {
      at::Tensor mine = counterpart(plan, meta);
      if (mine.defined()) return mine;
      if (!meta.is_meta()) {
        unclear = true;
        return meta;
      }
      for (const auto& [other, input] : plan.inputs)
        if (other.is_privateuseone() && input.storage().unsafeGetStorageImpl() == meta.storage().unsafeGetStorageImpl())
          return at::cpu::as_strided_symint(other, c10::fromIntArrayRefSlow(meta.sizes()),
                                            c10::fromIntArrayRefSlow(meta.strides()),
                                            SymInt(other.storage_offset() + meta.storage_offset()));
      at::Tensor fresh = empty_strided(meta.sizes(), meta.strides(), meta.scalar_type(), std::nullopt,
                                       device.value_or(Device(kType, DeviceIndex(current_device))), std::nullopt);
      plan.results.push_back(on_host(fresh));
      plan.accesses.push_back(access(fresh, true));
      return fresh;
    }));
    if (unclear) return false;
  }
  return true;
}

void collect(std::vector<at::Tensor>& out, const IValue& value) {
  mapped(value, [&](const at::Tensor& t) {
    out.push_back(t);
    return t;
  });
}

// What the device runs: the CPU's kernel on the device's memory.
void run_later(const OperatorHandle& op, Stack stack, const std::vector<at::Tensor>& results) {
  Bare bare;
  thread_local bool counted = false;  // a thread computes with as many threads as the process was told, or bits differ
  if (!counted) at::init_num_threads();
  counted = true;
  std::vector<at::Tensor> inputs, outputs;
  for (const IValue& value : stack) collect(inputs, value);
  op.callBoxed(&stack);
  for (const IValue& value : stack) collect(outputs, value);
  size_t next = 0;
  for (const at::Tensor& out : outputs) {
    bool is_input = std::any_of(inputs.begin(), inputs.end(), [&](const at::Tensor& t) { return t.is_same(out); });
    if (is_input) continue;
    TORCH_CHECK(next < results.size(), "late: ", op.schema().name(), " gave more than its shapes told");
    TORCH_CHECK(results[next].sizes() == out.sizes(), "late: ", op.schema().name(), " gave another shape");
    const_cast<at::Tensor&>(results[next++]).copy_(out);
  }
}

std::mutex at_once_lock;
std::set<std::string> at_once;

void fallback(const OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  std::string full = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  size_t count = schema.arguments().size(), base = stack->size() - count;
  Plan plan;
  std::vector<IValue> returned;
  std::string why;
  bool deferred = plan_call(op, stack, plan, returned, why);
  if (!deferred) {  // its values are needed now, as on any device: the host waits
    counts[AT_ONCE]++;
    {
      std::lock_guard<std::mutex> l(at_once_lock);
      at_once.insert(full + ": " + why.substr(0, why.find('\n')));
    }
    at::native::cpu_fallback(op, stack);
    return;
  }
  size_t entity = 0;
  for (size_t i = 0; i < count; i++) {
    const IValue& value = (*stack)[base + i];
    const auto* alias = schema.arguments()[i].alias_info();
    bool writes = alias && alias->isWrite();
    if (value.isDevice() && value.toDevice().is_privateuseone()) {
      if (!entity) entity = current_stream[Guard::index(value.toDevice())];
      plan.later.push_back(Device(kCPU));
      continue;
    }
    plan.later.push_back(mapped(value, [&](const at::Tensor& t) {
      if (!t.is_privateuseone()) return t.clone();
      if (!entity) entity = current_stream[t.get_device()];
      plan.accesses.push_back(access(t, writes));
      return on_host(t);
    }));
  }
  if (!entity) entity = current_stream[current_device];
  submit(entity, interned(full), plan.accesses,
         [op, later = std::move(plan.later), results = std::move(plan.results)] { run_later(op, later, results); });
  torch::jit::drop(*stack, count);
  for (IValue& value : returned) stack->push_back(std::move(value));
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("_local_scalar_dense", item);
  m.impl("record_stream", record_stream);
  m.impl("view_as_real", view_as_real);
  m.impl("view_as_complex", view_as_complex);
  m.impl("set_.source_Storage_storage_offset", set_off);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

void copy_text(const std::string& text, char* to, size_t bytes) {
  size_t n = std::min(bytes - 1, text.size());
  std::memcpy(to, text.data(), n);
  to[n] = 0;
}

}  // namespace
}  // namespace late

// --- what Python calls through ctypes, which has released the GIL
using namespace late;
extern "C" {
void late_start() {
  start();
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  c10::register_privateuse1_backend("late");
}
void late_schedule(int how) { schedule = how; }
void late_counts(long* out) {
  for (int i = 0; i < COUNTS; i++) out[i] = counts[i];
}
void late_pin(uintptr_t at, size_t bytes) {
  std::lock_guard<std::mutex> l(state);
  pinned[at] = Pinned{bytes, true};
}
void late_unpin(uintptr_t at) { unpin(at, "unregistering"); }
void late_limit(int device, size_t bytes) {
  std::lock_guard<std::mutex> l(state);
  memories[device].limit = bytes;
}
uintptr_t late_real(uintptr_t at) { return (uintptr_t)real((void*)at); }
int late_host_touches(uintptr_t at, size_t bytes, int writes, const char* name) {
  return !host_touches(at, bytes, writes != 0, interned(name)).empty();
}
// Python's work on the current stream of a device: reads and writes are pairs (address, bytes).
int late_submit(int device, const char* name, void (*work)(), const uintptr_t* reads, int num_reads,
                const uintptr_t* writes, int num_writes) {
  std::vector<Access> accesses;
  for (int i = 0; i < num_reads; i++) accesses.push_back({reads[2 * i], reads[2 * i] + reads[2 * i + 1], false});
  for (int i = 0; i < num_writes; i++) accesses.push_back({writes[2 * i], writes[2 * i] + writes[2 * i + 1], true});
  size_t entity = current_stream[device];
  std::string race = queue(entity, interned(name), accesses, work);
  at_once_if_asked(entity, false);
  return !race.empty();
}
// The current stream of a device waits until `ready` gives 1. The host is not known to have waited for anything.
void late_wait(int device, const char* name, int (*ready)()) {
  size_t entity = current_stream[device];
  queue(entity, interned(name), {}, nullptr, 0, 0, nullptr, [ready] { return ready() != 0; });
  at_once_if_asked(entity, false);
}
// Runs all that was queued, as a device does that waits for nobody.
void late_run() { run_everything(); }
void late_texts(int which, char* to, size_t bytes) {
  std::string text;
  if (which == 0) {
    std::lock_guard<std::mutex> l(state);
    for (auto& race : races) text += race + "\n";
  } else {
    std::lock_guard<std::mutex> l(at_once_lock);
    for (auto& name : at_once) text += name + "\n";
  }
  copy_text(text, to, bytes);
}
// Whether threads of the host are told apart; `late_acquired` and `late_releases` must then be called for every lock.
void late_threads(int apart) {
  std::lock_guard<std::mutex> l(state);
  threads_apart = apart != 0;
  forget_order();
}
void late_loose(int is_loose) { loose = is_loose != 0; }
void late_acquired(size_t lock) {
  std::lock_guard<std::mutex> l(state);
  me().clock.join(locks[lock]);
}
void late_releases(size_t lock) {
  std::lock_guard<std::mutex> l(state);
  locks[lock].join(me().clock);
}
// From here to `late_capture_end` the calling thread queues into a new graph, whose number `late_capture_end` gives.
void late_capture_begin() {
  std::lock_guard<std::mutex> l(state);
  capturing = next_graph++;
  graphs[capturing];
}
int late_capture_end() { return std::exchange(capturing, 0); }
// Queues a graph's work on the current stream of a device, as if it were new.
int late_replay(int device, int graph) {
  std::vector<Recorded> recorded;
  {
    std::lock_guard<std::mutex> l(state);
    recorded = graphs.at(graph);
  }
  size_t entity = current_stream[device];
  bool raced = false;
  for (Recorded& r : recorded)
    raced |= !queue(entity, r.name, r.accesses, r.work, 0, 0, nullptr, r.ready).empty();
  at_once_if_asked(entity, false);
  return raced;
}
void late_drop(int graph) {
  std::lock_guard<std::mutex> l(state);
  graphs.erase(graph);
}
void late_forget() {
  std::lock_guard<std::mutex> l(state);
  forget_order();
  races.clear();
  for (Queue* q : queues) q->error.clear();
}
}
