// Self-attention over the pixels of channels-last maps, softmax(scale q kᵀ) v for every image and head, and its transpose.
//
// Every product is one of product.h's: rows of one matrix, lying as they are read, by packed panels of the other. Keys and values
// are packed once an image and head. Then a block of queries at a time: scores, softmax with whole rows in the cache, product
// with the values. The transpose finds the softmax again from the largest score and the inverse sum of each query, and takes
// queries by kQueries, so that its scratch memory grows with the pixels and not with their square. Every output is one sum in
// one order: neither the number of threads nor the rest of the batch changes a bit.
#pragma once

#include "conv_parts.h"
#include "norm.h"
#include "parallel.h"
#include "product.h"
#include "vector.h"

namespace coupfast {


struct Attention {
  int32_t batch, heads, size, pixels;  // size: channels of a head
  int32_t block;                       // pairs of an image and a head that are in scratch memory at a time
  float scale;
  int64_t q_pixel, k_pixel, v_pixel, y_pixel, q_head, k_head, v_head, y_head;
  const float* q;
  const float* k;
  const float* v;
  float* y;
  float* largest;  // [batch][heads][pixels], as the next
  float* inverse;  // 1 / sum of exp(score - largest)
  float* scratch;  // coupfast_attention_scratch(...) floats
};

// dq, dk, dv of `Attention` for the cotangent dy_factor * dy.
struct AttentionVjp {
  int32_t batch, heads, size, pixels;
  int32_t block;
  float scale, dy_factor, pad;
  int64_t q_pixel, k_pixel, v_pixel, dy_pixel, dq_pixel, dk_pixel, dv_pixel;
  int64_t q_head, k_head, v_head, dy_head, dq_head, dk_head, dv_head;
  const float* q;
  const float* k;
  const float* v;
  const float* dy;
  const float* largest;  // as `Attention` left them
  const float* inverse;
  float* dq;
  float* dk;
  float* dv;
  float* scratch;  // coupfast_attention_vjp_scratch(...) floats
};

struct AttentionShape {
  static constexpr int kBlockRows = 24;  // queries (or keys) that one thread takes together: whole groups of kRows
  static constexpr int kQueries = 256;   // queries whose weights the transpose holds at a time

  int64_t size, pixels;                    // as given
  int64_t size_depth, pixels_depth;        // of sums over a head's channels and over pixels: whole vectors
  int64_t size_panels, pixel_panels;       // of matrices whose columns they are
  int64_t size_row, pixel_row, query_row;  // floats from one row of a thread's block, or of the transposed weights, to the next
  int64_t queries;                         // at most so many at a time, backwards

  AttentionShape(int64_t size_, int64_t pixels_) : size(size_), pixels(pixels_) {
    size_depth = vectors(size);
    pixels_depth = vectors(pixels);
    size_panels = (size + kPanel - 1) / kPanel;
    pixel_panels = (pixels + kPanel - 1) / kPanel;
    size_row = odd_lines(size_panels * kPanel);
    pixel_row = odd_lines(pixel_panels * kPanel);
    queries = std::min<int64_t>(pixels, kQueries);
    query_row = odd_lines(vectors(queries));
  }

  static int64_t vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }
  static int64_t blocks(int64_t rows) { return (rows + kBlockRows - 1) / kBlockRows; }
  static int64_t rows(int64_t begin, int64_t end) { return std::min<int64_t>(kBlockRows, end - begin); }

  int64_t by_size() const { return pixel_panels * kPanel * size_depth; }    // packed: sums over channels, a column a pixel
  int64_t by_pixel() const { return size_panels * kPanel * pixels_depth; }  // packed: sums over pixels, a column a channel
  int64_t by_query() const { return size_panels * kPanel * vectors(queries); }

  int64_t pair_floats() const { return by_size() + by_pixel(); }
  int64_t thread_floats() const { return kBlockRows * (2 * size_row + pixel_row); }
  int64_t pair_floats_vjp() const { return 2 * by_size() + by_pixel() + 2 * by_query() + 2 * pixels * query_row; }
  int64_t thread_floats_vjp() const { return kBlockRows * (2 * size_row + 2 * pixel_row); }
};

// to[r][c] = factor * from[r][c], zeros from `columns` to the end of the last vector.
inline void copy_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float factor, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row)
    for (int64_t c = 0; c < columns; c += kLanes) store(to + c, broadcast(factor) * get(from + c, columns - c));
}

// A panel whose columns are channels and whose rows are pixels: factor * from[pixel][channel].
inline void pack_pixels(const float* from, int64_t pixel, int64_t pixels, int64_t channels, float factor, float* to) {
  const int64_t depth = AttentionShape::vectors(pixels);
  for (int64_t k = 0; k < pixels; ++k, from += pixel, to += kPanel) {
    store(to, broadcast(factor) * get(from, channels));
    store(to + kLanes, channels > kLanes ? broadcast(factor) * get(from + kLanes, channels - kLanes) : Vector{});
  }
  std::memset(to, 0, sizeof(float) * static_cast<size_t>((depth - pixels) * kPanel));
}

// to[c][r] = from[r][c] for kLanes rows and columns at most; rows of `to` are zero behind the last row of `from`, to `padded`.
inline void transpose_tile(const float* from, int64_t from_row, int64_t rows, int64_t columns, int64_t padded, float* to,
                           int64_t to_row) {
  Vector v[kLanes];
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) v[r] = r < rows ? get(from + r * from_row, columns) : Vector{};
  // Interleaved log2(kLanes) times, row r with row r + kLanes / 2.
#pragma GCC unroll 4
  for (int stage = 1; stage < kLanes; stage *= 2) {
    Vector next[kLanes];
#pragma GCC unroll 8
    for (int r = 0; r < kLanes / 2; ++r) interleave(v[r], v[r + kLanes / 2], &next[2 * r], &next[2 * r + 1]);
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) v[r] = next[r];
  }
  if (columns >= kLanes && padded >= kLanes) {
#pragma GCC unroll 16
    for (int c = 0; c < kLanes; ++c) store(to + c * to_row, v[c]);
  } else {
    for (int c = 0; c < std::min<int64_t>(kLanes, columns); ++c) put(to + c * to_row, v[c], padded);
  }
}

inline void transpose(const float* from, int64_t from_row, int64_t rows, int64_t columns, int64_t padded, float* to,
                      int64_t to_row) {
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < padded; r += kLanes)
      transpose_tile(from + r * from_row + c, from_row, rows - r, columns - c, padded - r, to + c * to_row + r, to_row);
}

// A panel whose columns are pixels and whose rows are channels.
inline void pack_channels(const float* from, int64_t pixel, int64_t pixels, int64_t channels, float* to) {
  transpose(from, pixel, std::min<int64_t>(kPanel, pixels), channels, kPanel, to, kPanel);
  const int64_t depth = AttentionShape::vectors(channels);
  std::memset(to + channels * kPanel, 0, sizeof(float) * static_cast<size_t>((depth - channels) * kPanel));
}

// All panels of a product, for some rows.
inline void multiply(const float* a, int64_t a_row, const float* packed, int64_t depth, int64_t count, int64_t rows, float* to,
                     int64_t to_row) {
  const Terms terms{1, depth, depth, kWinogradRun};
  const auto start = [&](int64_t row) { return a + row * a_row; };
  for (int64_t panel = 0; panel < count; ++panel)
    multiply_panel<2>(start, rows, 1, a_row, terms, packed + panel * depth * kPanel, to + panel * kPanel, to_row);
}

// to[r][c] = factor * from[r][c], or added to what is there.
inline void write_rows(const float* from, int64_t from_row, int64_t rows, int64_t columns, float factor, bool add, float* to,
                       int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
    for (int64_t c = 0; c < columns; c += kLanes) {
      Vector v = broadcast(factor) * load(from + c);
      if (add) v += get(to + c, columns - c);
      put(to + c, v, columns - c);
    }
  }
}

inline float total(Vector v) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

// The lanes of v that stand for one of `left` elements, zero elsewhere.
inline Vector inside(Vector v, int64_t left) { return left >= kLanes ? v : where((1u << left) - 1u, v); }

// One head of one image of a map.
template <typename Float>
Float* head_of(Float* map, int64_t pair, int heads, int64_t pixels, int64_t pixel, int64_t head) {
  return map + pair / heads * pixels * pixel + pair % heads * head;
}

// exp(score - largest) in place of a row of scores, zero behind the last; their largest and the inverse of the sum.
inline void softmax_row(float* row, int64_t pixels, float* largest, float* inverse) {
  Vector most = broadcast(row[0]);
  int64_t k = 0;
  for (; k + kLanes <= pixels; k += kLanes) {
    const Vector v = load(row + k);
    most = v > most ? v : most;
  }
  float top = most[0];
  for (int lane = 1; lane < kLanes; ++lane) top = std::max(top, most[lane]);
  for (; k < pixels; ++k) top = std::max(top, row[k]);
  Vector sum = {};
  for (k = 0; k < pixels; k += kLanes) {
    const Vector weight = inside(exp(load(row + k) - broadcast(top)), pixels - k);
    store(row + k, weight);
    sum += weight;
  }
  *largest = top;
  *inverse = 1.0f / total(sum);
}

inline void run_attention(const Attention& p, Team& team) {
  const AttentionShape s(p.size, p.pixels);
  const int64_t pairs = static_cast<int64_t>(p.batch) * p.heads, blocks = s.blocks(s.pixels);
  float* const mine = p.scratch + p.block * s.pair_floats() + team.thread() * s.thread_floats();
  float* const queries = mine;
  float* const result = queries + AttentionShape::kBlockRows * s.size_row;
  float* const scores = result + AttentionShape::kBlockRows * s.size_row;
  for (int64_t first = 0; first < pairs; first += p.block) {
    const int64_t count = std::min<int64_t>(p.block, pairs - first), panels = s.pixel_panels + s.size_panels;
    team.each(count * panels, [&](int64_t item) {
      const int64_t pair = item / panels, panel = item % panels;
      float* const packed = p.scratch + pair * s.pair_floats();
      if (panel < s.pixel_panels) {
        const int64_t at = panel * kPanel;
        const float* from = head_of(p.k, first + pair, p.heads, s.pixels, p.k_pixel, p.k_head) + at * p.k_pixel;
        pack_channels(from, p.k_pixel, s.pixels - at, s.size, packed + at * s.size_depth);
      } else {
        const int64_t at = (panel - s.pixel_panels) * kPanel;
        const float* from = head_of(p.v, first + pair, p.heads, s.pixels, p.v_pixel, p.v_head) + at;
        pack_pixels(from, p.v_pixel, s.pixels, s.size - at, 1.0f, packed + s.by_size() + at * s.pixels_depth);
      }
    });
    team.each(count * blocks, [&](int64_t item) {
      const int64_t pair = first + item / blocks, block = item % blocks;
      const int64_t begin = block * AttentionShape::kBlockRows, rows = s.rows(begin, s.pixels);
      const float* const keys = p.scratch + (pair - first) * s.pair_floats();
      const float* const values = keys + s.by_size();
      float* const largest = p.largest + pair * s.pixels + begin;
      float* const inverse = p.inverse + pair * s.pixels + begin;
      const float* const q = head_of(p.q, pair, p.heads, s.pixels, p.q_pixel, p.q_head) + begin * p.q_pixel;
      copy_rows(q, p.q_pixel, rows, s.size, p.scale, queries, s.size_row);
      multiply(queries, s.size_row, keys, s.size_depth, s.pixel_panels, rows, scores, s.pixel_row);
      for (int64_t r = 0; r < rows; ++r) softmax_row(scores + r * s.pixel_row, s.pixels, largest + r, inverse + r);
      multiply(scores, s.pixel_row, values, s.pixels_depth, s.size_panels, rows, result, s.size_row);
      float* const y = head_of(p.y, pair, p.heads, s.pixels, p.y_pixel, p.y_head) + begin * p.y_pixel;
      for (int64_t r = 0; r < rows; ++r)
        write_rows(result + r * s.size_row, 0, 1, s.size, inverse[r], false, y + r * p.y_pixel, 0);
    });
  }
}

// Weights in place of a row of scores, and their slopes in place of a row of the weights' cotangents.
inline void softmax_row_vjp(float* scores, float* slopes, int64_t pixels, float largest, float inverse) {
  Vector sum = {};
  for (int64_t k = 0; k < pixels; k += kLanes) {
    const Vector weight = inside(exp(load(scores + k) - broadcast(largest)) * broadcast(inverse), pixels - k);
    store(scores + k, weight);
    sum = fma(weight, load(slopes + k), sum);
  }
  const Vector mean = broadcast(total(sum));
  for (int64_t k = 0; k < pixels; k += kLanes) store(slopes + k, load(scores + k) * (load(slopes + k) - mean));
}

inline void run_attention_vjp(const AttentionVjp& p, Team& team) {
  const AttentionShape s(p.size, p.pixels);
  const int64_t pairs = static_cast<int64_t>(p.batch) * p.heads;
  float* const mine = p.scratch + p.block * s.pair_floats_vjp() + team.thread() * s.thread_floats_vjp();
  float* const rows_a = mine;
  float* const rows_b = rows_a + AttentionShape::kBlockRows * s.size_row;
  float* const scores = rows_b + AttentionShape::kBlockRows * s.size_row;
  float* const slopes = scores + AttentionShape::kBlockRows * s.pixel_row;
  const auto parts = [&](int64_t pair) {
    struct {
      float *keys, *values, *keys_by_pixel, *dy, *queries, *weights, *slopes;
    } at;
    at.keys = p.scratch + pair * s.pair_floats_vjp();
    at.values = at.keys + s.by_size();
    at.keys_by_pixel = at.values + s.by_size();
    at.dy = at.keys_by_pixel + s.by_pixel();
    at.queries = at.dy + s.by_query();
    at.weights = at.queries + s.by_query();  // [pixels of keys][query_row], as the next
    at.slopes = at.weights + s.pixels * s.query_row;
    return at;
  };
  for (int64_t first = 0; first < pairs; first += p.block) {
    const int64_t count = std::min<int64_t>(p.block, pairs - first), panels = 2 * s.pixel_panels + s.size_panels;
    team.each(count * panels, [&](int64_t item) {
      const int64_t pair = item / panels, panel = item % panels;
      const auto packed = parts(pair);
      const float* const k = head_of(p.k, first + pair, p.heads, s.pixels, p.k_pixel, p.k_head);
      const float* const v = head_of(p.v, first + pair, p.heads, s.pixels, p.v_pixel, p.v_head);
      if (panel < s.pixel_panels) {
        const int64_t at = panel * kPanel;
        pack_channels(k + at * p.k_pixel, p.k_pixel, s.pixels - at, s.size, packed.keys + at * s.size_depth);
      } else if (panel < 2 * s.pixel_panels) {
        const int64_t at = (panel - s.pixel_panels) * kPanel;
        pack_channels(v + at * p.v_pixel, p.v_pixel, s.pixels - at, s.size, packed.values + at * s.size_depth);
      } else {
        const int64_t at = (panel - 2 * s.pixel_panels) * kPanel;
        pack_pixels(k + at, p.k_pixel, s.pixels, s.size - at, 1.0f, packed.keys_by_pixel + at * s.pixels_depth);
      }
    });
    for (int64_t start = 0; start < s.pixels; start += s.queries) {
      const int64_t queries = std::min(s.queries, s.pixels - start), depth = AttentionShape::vectors(queries);
      const int64_t blocks = s.blocks(queries), work = blocks + 2 * s.size_panels;
      team.each(count * work, [&](int64_t item) {
        const int64_t pair = first + item / work, block = item % work;
        const auto packed = parts(item / work);
        const float* const q = head_of(p.q, pair, p.heads, s.pixels, p.q_pixel, p.q_head) + start * p.q_pixel;
        const float* const dy = head_of(p.dy, pair, p.heads, s.pixels, p.dy_pixel, p.dy_head) + start * p.dy_pixel;
        if (block >= blocks) {
          const int64_t at = (block - blocks) % s.size_panels * kPanel;
          if (block < blocks + s.size_panels)
            pack_pixels(q + at, p.q_pixel, queries, s.size - at, p.scale, packed.queries + at * depth);
          else
            pack_pixels(dy + at, p.dy_pixel, queries, s.size - at, p.dy_factor, packed.dy + at * depth);
          return;
        }
        const int64_t begin = block * AttentionShape::kBlockRows, rows = s.rows(begin, queries);
        copy_rows(q + begin * p.q_pixel, p.q_pixel, rows, s.size, p.scale, rows_a, s.size_row);
        multiply(rows_a, s.size_row, packed.keys, s.size_depth, s.pixel_panels, rows, scores, s.pixel_row);
        copy_rows(dy + begin * p.dy_pixel, p.dy_pixel, rows, s.size, p.dy_factor, rows_a, s.size_row);
        multiply(rows_a, s.size_row, packed.values, s.size_depth, s.pixel_panels, rows, slopes, s.pixel_row);
        const int64_t at = pair * s.pixels + start + begin;
        for (int64_t r = 0; r < rows; ++r)
          softmax_row_vjp(scores + r * s.pixel_row, slopes + r * s.pixel_row, s.pixels, p.largest[at + r], p.inverse[at + r]);
        multiply(slopes, s.pixel_row, packed.keys_by_pixel, s.pixels_depth, s.size_panels, rows, rows_b, s.size_row);
        float* const dq = head_of(p.dq, pair, p.heads, s.pixels, p.dq_pixel, p.dq_head) + (start + begin) * p.dq_pixel;
        write_rows(rows_b, s.size_row, rows, s.size, p.scale, false, dq, p.dq_pixel);
        const int64_t padded = begin + rows == queries ? depth - begin : rows;  // the last block fills the rows' last vector
        transpose(scores, s.pixel_row, rows, s.pixels, padded, packed.weights + begin, s.query_row);
        transpose(slopes, s.pixel_row, rows, s.pixels, padded, packed.slopes + begin, s.query_row);
      });
      const int64_t key_blocks = s.blocks(s.pixels);
      team.each(2 * count * key_blocks, [&](int64_t item) {
        const int64_t pair = first + item / (2 * key_blocks), block = item / 2 % key_blocks;
        const auto packed = parts(pair - first);
        const int64_t begin = block * AttentionShape::kBlockRows, rows = s.rows(begin, s.pixels);
        const bool of_keys = item % 2;
        const float* const left = (of_keys ? packed.slopes : packed.weights) + begin * s.query_row;
        multiply(left, s.query_row, of_keys ? packed.queries : packed.dy, depth, s.size_panels, rows, rows_b, s.size_row);
        const int64_t pixel = of_keys ? p.dk_pixel : p.dv_pixel;
        float* const to = of_keys ? head_of(p.dk, pair, p.heads, s.pixels, p.dk_pixel, p.dk_head)
                                  : head_of(p.dv, pair, p.heads, s.pixels, p.dv_pixel, p.dv_head);
        write_rows(rows_b, s.size_row, rows, s.size, 1.0f, start > 0, to + begin * pixel, pixel);
      });
    }
  }
}

}  // namespace coupfast
