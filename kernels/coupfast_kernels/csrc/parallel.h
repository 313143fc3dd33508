// A team of threads inside one parallel region.
//
// Work is handed out item by item, and a phase is over when all its items are done, not when all threads have come: a thread that
// the operating system holds back (another program runs on its core) delays nobody unless it holds an item. Every item writes its
// own output, so who takes which changes no bit.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace coupfast {

// The phase that is under way and its next piece, in one word, so that a late thread cannot take a piece of another phase.
struct Schedule {
  alignas(64) std::atomic<uint64_t> next{0};  // phase << 32 | piece
  alignas(64) std::atomic<int64_t> done{0};   // pieces of this phase
};

class Team {
 public:
  Team(int thread, int threads, Schedule* schedule) : thread_(thread), threads_(threads), schedule_(schedule) {}

  int thread() const { return thread_; }

  // body(item) for every item in [0, count); returns when all are done. Every thread calls it, with the same count.
  template <typename Body>
  void each(int64_t count, const Body& body) {
    if (threads_ == 1) {
      for (int64_t item = 0; item < count; ++item) body(item);
      return;
    }
    const int64_t grain = std::max<int64_t>(1, count / (8 * threads_)), pieces = (count + grain - 1) / grain;
    if (pieces == 0) return;
    const uint64_t phase = phase_++;
    for (int spins = 0;;) {
      uint64_t next = schedule_->next.load(std::memory_order_acquire);
      if (next >> 32 != phase) return;  // over
      const int64_t piece = static_cast<int64_t>(next & 0xffffffffu);
      if (piece < pieces) {
        if (!schedule_->next.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
        for (int64_t item = piece * grain; item < std::min(count, (piece + 1) * grain); ++item) body(item);
        if (schedule_->done.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) {
          schedule_->done.store(0, std::memory_order_relaxed);
          schedule_->next.store((phase + 1) << 32, std::memory_order_release);
          return;
        }
      } else if (++spins < 4000) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  const int thread_, threads_;
  Schedule* const schedule_;
  uint64_t phase_ = 0;
};

}  // namespace coupfast
