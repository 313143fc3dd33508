// 3x3 convolutions of stride 1 by Winograd's algorithm: tiles of m x m outputs are taken through (m + 2)^2 products, each of
// which is a matrix product over channels.
//
// Per block of tiles: input -> (activation) -> V[xi][tile][channel]; M[xi] = V[xi] U[xi]; M -> y with the epilogue. Either all
// threads do that together, three phases a block, or each takes blocks by itself and the channels of M panel by panel, so that
// a small layer stays in its own cache. Every output is one sum in one order: neither changes a bit.
#pragma once

#include "conv_parts.h"
#include "parallel.h"

namespace coupfast {

struct WinogradShape {
  int tile, size, tile_rows, tile_columns;  // tile rows per image
  int64_t depth;                            // of every matrix product, padded to whole vectors
  int64_t out_floats;                       // of a tile's results of one product
  int64_t v_stride, m_stride;               // floats from one product's matrix to the next's
  int64_t strip_width, strip_floats;        // pixels; of one thread's activated strip

  explicit WinogradShape(const Conv& c) : tile(c.tile), size(c.tile + 2) {
    tile_rows = (c.out_height + tile - 1) / tile;
    tile_columns = (c.out_width + tile - 1) / tile;
    depth = columns(c.channels) * kLanes;
    out_floats = c.alone ? kPanel : columns(c.out_channels) * kLanes;
    const int64_t tiles = std::min<int64_t>(c.block_rows, rows(c)) * tile_columns;
    v_stride = odd_lines(tiles * depth);
    m_stride = odd_lines(tiles * out_floats);
    strip_width = static_cast<int64_t>(tile_columns) * tile + 2;
    strip_floats = odd_lines(size * strip_width * kStripChannels);
  }

  int64_t rows(const Conv& c) const { return static_cast<int64_t>(c.batch) * tile_rows; }
  int products() const { return size * size; }
  int64_t block_floats() const { return products() * (v_stride + m_stride); }
  int64_t scratch_floats(const Conv& c, int threads) const {
    return (c.alone ? threads : 1) * block_floats() + threads * strip_floats;
  }
};

// --- Winograd's transforms -----------------------------------------------------------------------------------------------------

// F(4x4, 3x3) at the points 0, +-5/8, +-3/2 and infinity. They halve the error of the usual 0, +-1, +-2
// (docs/how/kernels-cpu.md), and all constants of the transforms are exact in binary.
constexpr float kA = 0.625f, kB = 1.5f;
constexpr float kA2 = kA * kA, kB2 = kB * kB, kA3 = kA2 * kA, kB3 = kB2 * kB;

template <int kTile>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kSize = 4;
  static void input(const Vector* d, Vector* v) {  // B^T d
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  static void output(const Vector* m, Vector* y) {  // A^T m
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = (m[1] - m[2]) + m[3];
  }
  static void weights(const double* g, double* u) {  // G g
    u[0] = g[0];
    u[1] = (g[0] + g[1] + g[2]) / 2;
    u[2] = (g[0] - g[1] + g[2]) / 2;
    u[3] = g[2];
  }
};

template <>
struct Winograd<4> {
  static constexpr int kSize = 6;
  static void input(const Vector* d, Vector* v) {
    const Vector a = broadcast(kA), b = broadcast(kB), a2 = broadcast(-kA2), b2 = broadcast(-kB2);
    const Vector product = broadcast(kA2 * kB2), sum = broadcast(-(kA2 + kB2));
    const Vector even_a = fma(b2, d[2], d[4]), odd_a = fma(b2, d[1], d[3]);
    const Vector even_b = fma(a2, d[2], d[4]), odd_b = fma(a2, d[1], d[3]);
    v[0] = fma(product, d[0], fma(sum, d[2], d[4]));
    v[1] = fma(a, odd_a, even_a);
    v[2] = fma(-a, odd_a, even_a);
    v[3] = fma(b, odd_b, even_b);
    v[4] = fma(-b, odd_b, even_b);
    v[5] = fma(product, d[1], fma(sum, d[3], d[5]));
  }
  static void output(const Vector* m, Vector* y) {
    const Vector sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const Vector sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + (sum_a + sum_b);
    y[1] = fma(broadcast(kA), difference_a, broadcast(kB) * difference_b);
    y[2] = fma(broadcast(kA2), sum_a, broadcast(kB2) * sum_b);
    y[3] = fma(broadcast(kA3), difference_a, fma(broadcast(kB3), difference_b, m[5]));
  }
  static void weights(const double* g, double* u) {
    const double a = kA, b = kB;
    // Row j of G is (1, p, p^2) / prod_{l != j} (p_j - p_l) over the finite points.
    const double zero = 1.0 / (a * a * b * b), at_a = 1.0 / (2 * a * a * (a * a - b * b)), at_b = 1.0 / (2 * b * b * (b * b - a * a));
    u[0] = zero * g[0];
    u[1] = at_a * (g[0] + a * g[1] + a * a * g[2]);
    u[2] = at_a * (g[0] - a * g[1] + a * a * g[2]);
    u[3] = at_b * (g[0] + b * g[1] + b * b * g[2]);
    u[4] = at_b * (g[0] - b * g[1] + b * b * g[2]);
    u[5] = g[2];
  }
};

template <int kTile>
void transform_input(const WinogradShape& s, const float* strip, int count, float* v) {
  constexpr int kSize = Winograd<kTile>::kSize;
  const int64_t row = s.strip_width * kStripChannels, v_stride = s.v_stride, depth = s.depth;
  const int tile_columns = s.tile_columns;
  for (int column = 0; column < tile_columns; ++column) {
    for (int k = 0; k < count; k += kLanes) {
      const float* from = strip + static_cast<int64_t>(column) * kTile * kStripChannels + k;
      Vector half[kSize][kSize];  // [column][transformed row]
#pragma GCC unroll 8
      for (int j = 0; j < kSize; ++j) {
        Vector d[kSize];
#pragma GCC unroll 8
        for (int i = 0; i < kSize; ++i) d[i] = load(from + i * row + j * kStripChannels);
        Winograd<kTile>::input(d, half[j]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kSize; ++i) {
        Vector d[kSize], out[kSize];
#pragma GCC unroll 8
        for (int j = 0; j < kSize; ++j) d[j] = half[j][i];
        Winograd<kTile>::input(d, out);
#pragma GCC unroll 8
        for (int j = 0; j < kSize; ++j) store(v + (i * kSize + j) * v_stride + column * depth + k, out[j]);
      }
    }
  }
}

template <int kTile, typename Finish>
void transform_tile(const Conv& c, const WinogradShape& s, const float* m, int64_t image, int tile_row, int column,
                    const Finish& finish) {
  const int64_t m_stride = s.m_stride;
  const int out_height = c.out_height, out_width = c.out_width;
  constexpr int kSize = Winograd<kTile>::kSize;
  Vector half[kSize][kTile];
#pragma GCC unroll 8
  for (int j = 0; j < kSize; ++j) {
    Vector products[kSize];
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) products[i] = load(m + (i * kSize + j) * m_stride);
    Winograd<kTile>::output(products, half[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    const int row = tile_row * kTile + i;
    if (row >= out_height) break;
    Vector products[kSize], y[kTile];
#pragma GCC unroll 8
    for (int j = 0; j < kSize; ++j) products[j] = half[j][i];
    Winograd<kTile>::output(products, y);
    const int64_t pixel = (image * out_height + row) * out_width + column * kTile;
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
      if (column * kTile + j < out_width) finish(y[j], pixel + j);
  }
}

// From M to the output: one row of tiles, channels [channel, end); `m` is at the first of them.
template <int kTile, bool kMasked, bool kResidual, bool kZ>
void transform_output(const Conv& c, const WinogradShape& s, const float* m, int64_t image, int tile_row, int channel, int end) {
  for (int k = channel; k < end; k += kLanes) {
    const Epilogue<kMasked, kResidual, kZ> finish(c, image, k, std::min(kLanes, end - k));
    for (int column = 0; column < s.tile_columns; ++column)
      transform_tile<kTile>(c, s, m + column * s.out_floats + k - channel, image, tile_row, column, finish);
  }
}

using TransformOutput = void (*)(const Conv&, const WinogradShape&, const float*, int64_t, int, int, int);

// --- all of it ------------------------------------------------------------------------------------------------------------------

template <int kTile>
class WinogradConv {
 public:
  explicit WinogradConv(const Conv& c) : c_(c), s_(c), fill_row_(choose_fill<true>(c)) {
    transform_ = choose_epilogue(c, [](auto masked, auto residual, auto z) -> TransformOutput {
      return transform_output<kTile, decltype(masked)::value, decltype(residual)::value, decltype(z)::value>;
    });
  }

  void run(Team& team) const {
    const int64_t rows = s_.rows(c_);
    if (c_.alone) {
      float* const v = c_.scratch + team.thread() * (s_.block_floats() + s_.strip_floats);
      team.each((rows + c_.block_rows - 1) / c_.block_rows, [&](int64_t block) {
        const int64_t first = block * c_.block_rows;
        alone(first, std::min(rows, first + c_.block_rows), v);
      });
      return;
    }
    float* const strip = c_.scratch + s_.block_floats() + team.thread() * s_.strip_floats;
    for (int64_t first = 0; first < rows; first += c_.block_rows)
      together(first, std::min(rows, first + c_.block_rows), c_.scratch, strip, team);
  }

 private:
  static int chunks(int channels) { return (channels + kStripChannels - 1) / kStripChannels; }

  void together(int64_t first, int64_t last, float* v, float* strip, Team& team) const {
    float* const m = v + s_.products() * s_.v_stride;
    const int in_chunks = chunks(c_.channels), out_chunks = chunks(c_.out_channels);
    team.each((last - first) * in_chunks, [&](int64_t item) {
      input(first + item / in_chunks, first, static_cast<int>(item % in_chunks), 0, strip, v);
    });
    const int64_t count = panels(c_.out_channels);
    team.each(s_.products() * count, [&](int64_t item) {
      product(item / count, item % count, (last - first) * s_.tile_columns, v, m + item % count * kPanel);
    });
    team.each((last - first) * out_chunks, [&](int64_t item) {
      const int channel = static_cast<int>(item % out_chunks) * kStripChannels;
      output(first + item / out_chunks, first, channel, std::min(channel + kStripChannels, c_.out_channels), m + channel);
    });
  }

  void alone(int64_t first, int64_t last, float* v) const {
    float* const m = v + s_.products() * s_.v_stride;
    float* const strip = m + s_.products() * s_.m_stride;
    for (int chunk = 0; chunk < chunks(c_.channels); ++chunk)
      for (int64_t row = first; row < last; ++row) {
        // The rows that a tile shares with the one below are activated once.
        const int64_t shared = row > first && row % s_.tile_rows != 0 ? 2 : 0, floats = s_.strip_width * kStripChannels;
        if (shared) std::memcpy(strip, strip + kTile * floats, sizeof(float) * static_cast<size_t>(shared * floats));
        input(row, first, chunk, static_cast<int>(shared), strip, v);
      }
    for (int64_t panel = 0; panel < panels(c_.out_channels); ++panel) {
      for (int64_t xi = 0; xi < s_.products(); ++xi) product(xi, panel, (last - first) * s_.tile_columns, v, m);
      const int channel = static_cast<int>(panel) * kPanel;
      for (int64_t row = first; row < last; ++row)
        output(row, first, channel, std::min(channel + kPanel, c_.out_channels), m);
    }
  }

  // V of one row of tiles and one chunk of channels; the first `filled` rows of the strip are there already.
  void input(int64_t row, int64_t first, int chunk, int filled, float* strip, float* v) const {
    const int channel = chunk * kStripChannels, count = std::min(kStripChannels, c_.channels - channel);
    const int image = static_cast<int>(row / s_.tile_rows), top = static_cast<int>(row % s_.tile_rows) * kTile - c_.pad_top;
    for (int i = filled; i < s_.size; ++i)
      fill_row_(c_, image, top + i, channel, count, static_cast<int>(s_.strip_width), strip + i * s_.strip_width * kStripChannels,
                kStripChannels);
    transform_input<kTile>(s_, strip, count, v + (row - first) * s_.tile_columns * s_.depth + channel);
  }

  // One product of all tiles of the block with one panel, whose results begin at `m`.
  void product(int64_t xi, int64_t panel, int64_t tiles, const float* v, float* m) const {
    const Terms terms{1, s_.depth, s_.depth, kWinogradRun};
    const float* const weights = c_.weights + (xi * columns(c_.out_channels) + 2 * panel) * kLanes * s_.depth;
    const float* const a = v + xi * s_.v_stride;
    const auto start = [&](int64_t tile) { return a + tile * s_.depth; };
    if (is_half(c_.out_channels, panel))
      multiply_panel<1>(start, tiles, 1, s_.depth, terms, weights, m + xi * s_.m_stride, s_.out_floats);
    else
      multiply_panel<2>(start, tiles, 1, s_.depth, terms, weights, m + xi * s_.m_stride, s_.out_floats);
  }

  void output(int64_t row, int64_t first, int channel, int end, const float* m) const {
    transform_(c_, s_, m + (row - first) * s_.tile_columns * s_.out_floats, row / s_.tile_rows,
               static_cast<int>(row % s_.tile_rows), channel, end);
  }

  const Conv& c_;
  const WinogradShape s_;
  const FillRow fill_row_;
  TransformOutput transform_;
};

}  // namespace coupfast
