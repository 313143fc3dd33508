// A team of threads inside one parallel region.
//
// Work is handed out item by item, and a phase is over when all its items are done, not when all threads have come: a thread that
// the operating system holds back (another program runs on its core) delays nobody unless it holds an item. Every item writes its
// own output, so who takes which changes no bit.
//
// A thread that waits spins for as long as a short phase takes, then sleeps: where it only yielded, its core would never be idle,
// and the system would leave the thread that it waits for behind the other program, on that one's core, until its turn is over.
#pragma once

#if defined(__linux__) && defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define COUPFAST_FUTEX 1
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>

namespace coupfast {

// The phase that is under way and its next piece, in one word, so that a late thread cannot take a piece of another phase.
struct Schedule {
  alignas(64) std::atomic<uint64_t> next{0};  // phase << 32 | piece
  alignas(64) std::atomic<int64_t> done{0};   // pieces of this phase
  std::atomic<int> sleepers{0};

  // The next phase begins, for those who sleep as well.
  void begin(uint64_t phase) {
    next.store(phase << 32);
#ifdef COUPFAST_FUTEX
    if (sleepers.load() > 0) syscall(SYS_futex, phase_word(), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
#endif
  }

  // Sleep until this phase is over; it may return earlier.
  void sleep(uint64_t phase) {
#ifdef COUPFAST_FUTEX
    // In this order, and `begin` in the opposite one: either it sees the sleeper, or the word has changed and nobody sleeps.
    sleepers.fetch_add(1);
    syscall(SYS_futex, phase_word(), FUTEX_WAIT_PRIVATE, static_cast<uint32_t>(phase), nullptr, nullptr, 0);
    sleepers.fetch_sub(1);
#else
    (void)phase;
    sched_yield();
#endif
  }

 private:
  uint32_t* phase_word() { return reinterpret_cast<uint32_t*>(&next) + 1; }  // the upper half, which pieces do not change
};
static_assert(sizeof(std::atomic<uint64_t>) == 8, "a phase is the upper half of a word");

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
          schedule_->begin(phase + 1);
          return;
        }
      } else if (++spins < 4000) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
      } else {
        schedule_->sleep(phase);
      }
    }
  }

 private:
  const int thread_, threads_;
  Schedule* const schedule_;
  uint64_t phase_ = 0;
};

}  // namespace coupfast
