// A team of threads inside one parallel region: static shares of work, and a barrier.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace coupfast {

class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(threads)) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    // A thread may share its core with another of the team: spinning for ever would keep that one from arriving.
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase;) {
      if (++spins < 4000) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};
};

struct Team {
  int thread;
  int threads;
  Barrier* barrier;

  void wait() const { barrier->wait(threads); }

  // This thread's part of `count` items: contiguous, and a function of the counts alone.
  struct Range {
    int64_t begin, end;
  };
  Range share(int64_t count) const { return {count * thread / threads, count * (thread + 1) / threads}; }
};

}  // namespace coupfast
