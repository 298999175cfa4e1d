// Which accesses of memory are ordered: vector clocks per host thread, stream and event, with byte ranges.
//
// An entity is a thread of the host, or a lane: what one thread has queued on one stream. Its work is numbered from 1. A
// clock holds, per entity, the last work that is known to be done before. Two accesses of one byte, one of them a write,
// race unless one is before the other by these clocks. What actually ran first does not matter, so a race is found
// whatever the timing.
//
// A stream orders the work of two threads only if something orders the threads when they queue it: else which is first is
// luck. The same holds for an event that one thread records and another waits for. What orders threads are Python's
// locks, conditions, starts and joins; threads.py tells of them. Without it all threads count as one.
#pragma once
#include <algorithm>
#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace late {

using Time = uint64_t;

struct Clock {
  std::vector<Time> at;
  Time of(size_t entity) const { return entity < at.size() ? at[entity] : 0; }
  void set(size_t entity, Time time) {
    if (at.size() <= entity) at.resize(entity + 1);
    at[entity] = time;
  }
  void join(const Clock& other) {
    if (at.size() < other.at.size()) at.resize(other.at.size());
    for (size_t i = 0; i < other.at.size(); i++) at[i] = std::max(at[i], other.at[i]);
  }
};

inline std::vector<std::string> labels{"nobody"};  // per entity, what messages call it

struct Access {
  uintptr_t begin = 0, end = 0;
  bool writes = false;
};

class History {
 public:
  // Notes an access by work `time` of `entity`, which knows `clock`. Returns what it races with, or "".
  std::string note(const Access& access, size_t entity, Time time, const Clock& clock, const char* name) {
    if (access.begin >= access.end) return "";
    split(access.begin);
    split(access.end);
    std::string race;
    for (auto i = cells.lower_bound(access.begin); i != cells.end() && i->first < access.end; ++i) {
      Cell& cell = i->second;
      if (race.empty() && cell.write.time > clock.of(cell.write.entity)) race = told(access, entity, name, cell.write, "writes");
      if (access.writes)
        for (const Mark& read : cell.reads)
          if (race.empty() && read.time > clock.of(read.entity)) race = told(access, entity, name, read, "reads");
    }
    if (access.writes) {
      cells.erase(cells.lower_bound(access.begin), cells.lower_bound(access.end));
      cells[access.begin] = Cell{access.end, Mark{entity, time, name}, {}};
      return race;
    }
    uintptr_t at = access.begin;  // gaps get cells too: nothing has written there yet
    while (at < access.end) {
      auto i = cells.find(at);
      if (i == cells.end()) {
        auto next = cells.lower_bound(at);
        uintptr_t end = next == cells.end() ? access.end : std::min(access.end, next->first);
        i = cells.emplace(at, Cell{end, Mark{0, 0, ""}, {}}).first;
      }
      auto& reads = i->second.reads;
      auto mine = std::find_if(reads.begin(), reads.end(), [&](const Mark& m) { return m.entity == entity; });
      if (mine == reads.end()) reads.push_back(Mark{entity, time, name});
      else *mine = Mark{entity, time, name};
      at = i->second.end;
    }
    return race;
  }

  void forget(uintptr_t begin, uintptr_t end) {
    split(begin);
    split(end);
    cells.erase(cells.lower_bound(begin), cells.lower_bound(end));
  }

 private:
  struct Mark {
    size_t entity;
    Time time;
    const char* name;  // lives for ever
  };
  struct Cell {
    uintptr_t end;
    Mark write;
    std::vector<Mark> reads;
  };
  std::map<uintptr_t, Cell> cells;

  void split(uintptr_t at) {
    auto i = cells.upper_bound(at);
    if (i == cells.begin()) return;
    --i;
    if (i->first == at || i->second.end <= at) return;
    Cell rest = i->second;
    i->second.end = at;
    cells.emplace(at, std::move(rest));
  }

  static std::string told(const Access& a, size_t entity, const char* name, const Mark& other, const char* does) {
    std::ostringstream out;
    out << "race: " << name << " on " << labels[entity] << (a.writes ? " writes " : " reads ") << a.end - a.begin
        << " bytes at 0x" << std::hex << a.begin << ", which " << other.name << " on " << labels[other.entity] << " " << does
        << ", and nothing orders the two";
    return out.str();
  }
};

}  // namespace late
