// Matrix products of a few rows with a panel of packed weights, in registers: what all convolutions spend their time in.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace coupfast {

// Packed weights of one product: panels of two vectors of output channels, [depth][kPanel] each; where the channels fill an odd
// number of vectors, the last panel is one vector wide, [depth][kLanes].
inline int64_t columns(int64_t channels) { return (channels + kLanes - 1) / kLanes; }
inline int64_t panels(int64_t channels) { return (columns(channels) + 1) / 2; }
inline bool is_half(int64_t channels, int64_t panel) { return 2 * panel + 1 == columns(channels); }

// The terms of a row's sum in memory: `segments` pieces of `length` floats, `next` floats from the start of one to the next's.
// Sums are taken in runs of at most `run` terms, which are then added: rounding grows with the run and the number of runs, not
// with their product.
struct Terms {
  int64_t segments, length, next, run;
  int64_t depth() const { return segments * length; }
  // Pieces so short that several make one run.
  bool are_short() const { return segments > 1 && length > 0 && length <= kShortest; }

  static constexpr int64_t kShortest = 16;
};

// Most of a Winograd convolution's error is made in its sums (docs/how/kernels-cpu.md); a direct one's rounds less as it is.
constexpr int64_t kWinogradRun = 32, kDirectRun = 128;
constexpr int kUnrolled = 4;

// Rows that lie evenly and have one pointer: a pointer for each would be more than there are registers.
constexpr int kTogether = kLanes == 16 ? 4 : 2;
// As many rows as accumulators fit beside a column of weights and a broadcast; half a panel leaves room for twice as many.
template <int kColumns>
constexpr int kMostRows = kColumns == 2 ? kRows : 2 * kRows;
constexpr int kMostPointers = 2 * kRows / kTogether;

#define COUPFAST_INLINE inline __attribute__((always_inline))

// The simplest of what can follow a product, (sum + bias) * scale, straight from the registers to where the result belongs: short
// sums take hardly longer than to be stored and read once more. Of results as of rows kTogether lie evenly, `stride` floats apart,
// and share a pointer.
struct Finish {
  int64_t stride;
  const float* bias;  // [columns of the panel], or null
  float scale;
  bool streams;  // past the caches
};

template <int kCount, int kColumns>
COUPFAST_INLINE void finish_rows(const Vector (&sum)[kCount][kColumns], const Finish& finish, float* const* y, const float* total,
                                 int64_t total_stride) {
  const Vector scale = broadcast(finish.scale);
#pragma GCC unroll 2
  for (int j = 0; j < kColumns; ++j) {
    Vector bias = {};
    if (finish.bias) bias += load(finish.bias + j * kLanes);
#pragma GCC unroll 24
    for (int i = 0; i < kCount; ++i) {
      const Vector v = total ? load(total + i * total_stride + j * kLanes) + sum[i][j] : sum[i][j];
      float* const to = y[i / kTogether] + i % kTogether * finish.stride + j * kLanes;
      if (finish.streams)
        stream(to, (v + bias) * scale);
      else
        store(to, (v + bias) * scale);
    }
  }
}

// One term of kCount rows, `u` floats on: sum += a b.
template <int kCount, int kColumns, int kPointers>
COUPFAST_INLINE void add_term(Vector (&sum)[kCount][kColumns], const float* const (&a)[kPointers], int64_t row_stride,
                              const float* b, int u) {
  Vector column[kColumns];
#pragma GCC unroll 2
  for (int j = 0; j < kColumns; ++j) column[j] = load(b + (u * kColumns + j) * kLanes);
#pragma GCC unroll 24
  for (int i = 0; i < kCount; ++i) {
    const Vector value = broadcast((a[i / kTogether] + u)[i % kTogether * row_stride]);
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) sum[i][j] = accumulate(sum[i][j], value, column[j]);
  }
}

template <int kPointers>
COUPFAST_INLINE void advance(const float* (&a)[kPointers], int64_t count) {
#pragma GCC unroll 8
  for (int j = 0; j < kPointers; ++j) a[j] += count;
}

// Where kShort, segments are so short that several make one run. With `finish` results go to `y`, and `to` is for totals between
// runs.
template <int kCount, int kColumns, bool kShort>
void multiply_rows(const float* const* rows, int64_t row_stride, const Terms& terms, const float* b, float* to, int64_t to_stride,
                   const Finish* finish, float* const* y) {
  constexpr int kPointers = (kCount + kTogether - 1) / kTogether;
  if (finish && !finish->streams) {
    // What is overwritten has come when the sums are done.
#pragma GCC unroll 24
    for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) __builtin_prefetch(y[i / kTogether] + i % kTogether * finish->stride + j * kLanes, 1);
  }
  const float* a[kPointers];
#pragma GCC unroll 8
  for (int j = 0; j < kPointers; ++j) a[j] = rows[j];
  const int64_t length = terms.length, jump = terms.next - length;
  const int64_t run = kShort ? terms.run / length * length : terms.run;
  const int64_t segments = kShort ? 1 : terms.segments, depth = kShort ? terms.depth() : length;
  bool first = true;
  for (int64_t segment = 0; segment < segments; ++segment) {
    for (int64_t begin = 0; begin < depth; begin += run) {
      Vector sum[kCount][kColumns] = {};
      int64_t left = std::min(depth - begin, run);
      if constexpr (kShort) {
        for (int64_t k = 0; left > 0; --left) {
          add_term(sum, a, row_stride, b, 0);
          k = k + 1 == length ? 0 : k + 1;
          advance(a, k == 0 ? 1 + jump : 1);
          b += kColumns * kLanes;
        }
      } else {
        for (; left >= kUnrolled; left -= kUnrolled) {
#pragma GCC unroll 8
          for (int u = 0; u < kUnrolled; ++u) add_term(sum, a, row_stride, b, u);
          advance(a, kUnrolled);
          b += kUnrolled * kColumns * kLanes;
        }
        for (; left > 0; --left) {
          add_term(sum, a, row_stride, b, 0);
          advance(a, 1);
          b += kColumns * kLanes;
        }
      }
      if (finish && segment + 1 == segments && begin + run >= depth)
        return finish_rows(sum, *finish, y, first ? nullptr : to, to_stride);
      // Totals are kept in memory: there are registers for the sums alone.
#pragma GCC unroll 24
      for (int i = 0; i < kCount; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kColumns; ++j) {
          float* const total = to + i * to_stride + j * kLanes;
          store(total, first ? sum[i][j] : load(total) + sum[i][j]);
        }
      first = false;
    }
    if (!kShort) advance(a, jump);
  }
  if (first)  // no terms
    for (int i = 0; i < kCount; ++i)
      for (int j = 0; j < kColumns; ++j) store(to + i * to_stride + j * kLanes, Vector{});
}

using MultiplyRows = void (*)(const float* const*, int64_t, const Terms&, const float*, float*, int64_t, const Finish*,
                              float* const*);

template <int kColumns, int... kCounts>
MultiplyRows choose_rows(int64_t count, const Terms& terms, std::integer_sequence<int, kCounts...>) {
  static constexpr MultiplyRows longer[] = {multiply_rows<kCounts + 1, kColumns, false>...};
  static constexpr MultiplyRows shorter[] = {multiply_rows<kCounts + 1, kColumns, true>...};
  return (terms.are_short() ? shorter : longer)[count - 1];
}

// Products of `count` rows with one panel: to[row][kPanel]. Groups have whole units of `unit` rows, which is kTogether or one;
// start(r) is where row r lies, and `row_stride` floats on, the kTogether - 1 behind it. It is asked in rising order, of
// multiples of kTogether in units of as many. With `finish`, target(r) is likewise where a row's result belongs.
template <int kColumns, typename Start, typename Result>
void multiply_panel(Start&& start, int64_t count, int64_t unit, int64_t row_stride, const Terms& terms, const float* weights,
                    float* to, int64_t to_stride, const Finish* finish, Result&& target) {
  if (count <= 0) return;
  // Groups of nearly equal size: a last one of a single row would waste most of it.
  const uint32_t units = static_cast<uint32_t>(count / unit), most = static_cast<uint32_t>(kMostRows<kColumns> / unit);
  const uint32_t groups = (units + most - 1) / most, least = units / groups, larger = units % groups;
  int64_t first = 0, last;
  for (uint32_t group = 0; group < groups; ++group, first = last) {
    last = first + (least + (group < larger)) * unit;
    const float* rows[kMostPointers];
    float* y[kMostPointers];
    for (int64_t j = 0; first + j * kTogether < last; ++j) {
      rows[j] = start(first + j * kTogether);
      if (finish) y[j] = target(first + j * kTogether);
    }
    choose_rows<kColumns>(last - first, terms, std::make_integer_sequence<int, kMostRows<kColumns>>{})(
        rows, row_stride, terms, weights, to + first * to_stride, to_stride, finish, y);
  }
}

template <int kColumns, typename Start>
void multiply_panel(Start&& start, int64_t count, int64_t unit, int64_t row_stride, const Terms& terms, const float* weights,
                    float* to, int64_t to_stride) {
  multiply_panel<kColumns>(start, count, unit, row_stride, terms, weights, to, to_stride, nullptr,
                           [](int64_t) -> float* { return nullptr; });
}

}  // namespace coupfast
