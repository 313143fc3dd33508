// The library's C interface. One translation unit, compiled for one instruction set.

#include <utility>

#include "attention.h"
#include "conv.h"
#include "guided_step.h"
#include "norm.h"
#include "parallel.h"
#include "vector.h"

using namespace coupfast;

namespace {

// PyTorch's own OpenMP runtime, found by the caller: a second one would fight the first for the cores.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel g_parallel = nullptr;
int (*g_thread)() = nullptr;
int (*g_threads)() = nullptr;

template <typename Body>
void on_threads(int threads, const Body& body) {
  Schedule schedule;
  if (threads <= 1 || !g_parallel) {
    Team alone(0, 1, &schedule);
    body(alone);
    return;
  }
  struct Call {
    const Body& body;
    Schedule& schedule;
  } call{body, schedule};
  g_parallel(
      [](void* data) {
        Call& c = *static_cast<Call*>(data);
        Team team(g_thread(), g_threads(), &c.schedule);
        c.body(team);
      },
      &call, static_cast<unsigned>(threads), 0);
}

// One operation of a program, mirrored in operations.py.
struct Operation {
  int64_t kind;
  const void* parameters;
};
enum Kind : int64_t {
  kConv = 0,
  kGroupNormAffine = 1,
  kGroupNormVjp = 2,
  kSum = 3,
  kMasked = 4,
  kGuidedStep = 5,
  kAttention = 6,
  kAttentionVjp = 7,
};

void run(const Operation& operation, Team& team) {
  switch (operation.kind) {
    case kConv: return run_conv(*static_cast<const Conv*>(operation.parameters), team);
    case kGroupNormAffine: return run_group_norm_affine(*static_cast<const GroupNormAffine*>(operation.parameters), team);
    case kGroupNormVjp: return run_group_norm_vjp(*static_cast<const GroupNormVjp*>(operation.parameters), team);
    case kSum: return run_sum(*static_cast<const Sum*>(operation.parameters), team);
    case kMasked: return run_masked(*static_cast<const Masked*>(operation.parameters), team);
    case kGuidedStep: return run_guided_step(*static_cast<const GuidedStep*>(operation.parameters), team);
    case kAttention: return run_attention(*static_cast<const Attention*>(operation.parameters), team);
    case kAttentionVjp: return run_attention_vjp(*static_cast<const AttentionVjp*>(operation.parameters), team);
  }
}

}  // namespace

extern "C" {

void coupfast_threads(Parallel parallel, int (*thread)(), int (*threads)()) {
  g_parallel = parallel;
  g_thread = thread;
  g_threads = threads;
}

int coupfast_lanes() { return kLanes; }

int64_t coupfast_conv_scratch(const Conv* conv, int threads) { return conv_scratch(*conv, threads); }

int64_t coupfast_attention_scratch(const Attention* p, int threads) {
  const AttentionShape shape(p->size, p->pixels);
  return p->block * shape.pair_floats() + threads * shape.thread_floats();
}

int64_t coupfast_attention_vjp_scratch(const AttentionVjp* p, int threads) {
  const AttentionShape shape(p->size, p->pixels);
  return p->block * shape.pair_floats_vjp() + threads * shape.thread_floats_vjp();
}

int64_t coupfast_packed_floats(const Pack* pack) { return packed_floats(*pack); }

void coupfast_pack(const Pack* pack, int threads) {
  on_threads(threads, [pack](Team& team) {
    if (pack->tile == 4)
      pack_winograd<4>(*pack, team);
    else if (pack->tile == 2)
      pack_winograd<2>(*pack, team);
    else
      pack_direct(*pack, team);
  });
}

// Operations one after another, in one parallel region.
void coupfast_run(const Operation* operations, int64_t count, int threads) {
  on_threads(threads, [operations, count](Team& team) {
    for (int64_t i = 0; i < count; ++i) run(operations[i], team);
  });
}

}  // extern "C"
