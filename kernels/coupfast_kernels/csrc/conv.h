// Convolutions of channels-last fp32 maps with packed weights: direct (any kernel and stride), or 3x3 stride-1 by Winograd
// F(2x2) and F(4x4). One structure for the three: tiles of m x m outputs are taken through (m + 2)^2 products each of
// which is a matrix product over channels; direct convolution is m = 1 with one product over taps x channels.
//
// Per block of tiles, all threads together: input -> (activation) -> V[xi][tile][channel]; M[xi] = V[xi] U[xi]; M -> y with
// the epilogue. Every output is one sum in one order: neither the number of threads nor the rest of the batch changes a bit.
#pragma once

#include "parallel.h"
#include "vector.h"

namespace coupfast {

// Mirrored in Python (native structures): keep the order.
struct Conv {
  int32_t tile;  // 1: direct, 2: F(2x2), 4: F(4x4)
  int32_t batch, height, width, channels;
  int32_t out_height, out_width, out_channels;
  int32_t kernel_height, kernel_width, stride, pad_top, pad_left;
  int32_t block_rows;  // rows of tiles (of all images, end to end) that are in scratch memory at a time
  int32_t activation;  // applied to (x - subtract) * multiply + add, where these are given
  int32_t z_activation;
  int64_t x_pixel, y_pixel, z_pixel, residual_pixel;  // floats from one pixel to the next, at least the channels
  int64_t affine_image;                      // floats from one image's `subtract`, `multiply`, `add` to the next's (0: shared)
  int64_t image_bias_image;
  float scale;           // of the sum with the residual
  float residual_factor;  // before the sum
  const float* x;
  const float* weights;  // as `coupfast_pack` makes them
  float* y;              // ((x * weights + bias + image_bias) masked + residual) scaled; or null
  float* z;              // activation(y * z_multiply + z_add); or null
  const float* subtract;  // [channels], or null
  const float* multiply;
  const float* add;
  const float* bias;         // [out_channels], or null
  const float* image_bias;   // [batch or 1][out_channels], or null
  const uint8_t* mask;       // of the output, bits, (out_channels + 7) / 8 bytes a pixel; or null
  const float* mask_factor;  // [out_channels]: where the bit is set the value is multiplied by it (null: 1), else zero
  const float* residual;     // map of y's shape, or null
  const float* z_multiply;   // [out_channels], or null
  const float* z_add;
  uint8_t* z_mask;           // where z's ReLU let the value through, as `mask`; or null
  const uint8_t* z_slopes;   // such a mask from before: z's ReLU is this instead (its derivative there); or null
  float* scratch;            // coupfast_conv_scratch(...) floats
};

struct ConvShape {
  int products, tile_rows, tile_columns;  // tile rows per image
  int64_t depth;                          // of every matrix product, padded to whole vectors
  int64_t padded_channels, padded_out;
  int64_t v_stride, m_stride;  // floats from one product's matrix to the next's
  int64_t strip_floats;        // of one thread's activated strip
  bool in_place;               // the products read x itself: a 1x1 convolution of what is already there

  static constexpr int kStripChannels = 64;

  ConvShape(const Conv& c) {
    const int m = c.tile;
    products = m == 1 ? 1 : (m + 2) * (m + 2);
    tile_rows = (c.out_height + m - 1) / m;
    tile_columns = (c.out_width + m - 1) / m;
    padded_channels = (c.channels + kLanes - 1) / kLanes * kLanes;
    padded_out = (static_cast<int64_t>(c.out_channels) + kPanel - 1) / kPanel * kPanel;
    depth = padded_channels * (m == 1 ? c.kernel_height * c.kernel_width : 1);
    in_place = c.kernel_height == 1 && c.kernel_width == 1 && c.stride == 1 && c.pad_top == 0 && c.pad_left == 0 &&
               c.activation == kIdentity && c.multiply == nullptr && c.channels % kLanes == 0;
    const int64_t tiles = static_cast<int64_t>(c.block_rows) * tile_columns;
    v_stride = in_place ? 0 : odd_lines(tiles * depth);
    m_stride = odd_lines(tiles * padded_out);
    strip_floats = odd_lines(static_cast<int64_t>(strip_height(c)) * strip_width(c) * kStripChannels);
  }

  // An odd number of cache lines: powers of two would put all products' rows into the same cache set.
  static int64_t odd_lines(int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

  int strip_height(const Conv& c) const { return c.tile == 1 ? c.kernel_height : c.tile + 2; }
  int strip_width(const Conv& c) const {
    return c.tile == 1 ? (c.out_width - 1) * c.stride + c.kernel_width : tile_columns * c.tile + 2;
  }
  int64_t scratch_floats(int threads) const {
    return products * (v_stride + m_stride) + threads * strip_floats;
  }
};

// --- the strip: activated input pixels with their border, for one row of tiles and some channels -----------------------------

template <int kActivation>
inline Vector activate(Vector v) {
  if (kActivation == kRelu) return relu(v);
  if (kActivation == kSilu) return v * sigmoid(v);
  return v;
}

template <int kActivation, bool kAffine>
void fill_strip(const Conv& c, const ConvShape& s, int image, int tile_row, int channel, int count, float* strip) {
  const int height = s.strip_height(c), width = s.strip_width(c);
  const int padded = (count + kLanes - 1) / kLanes * kLanes;
  const int step = c.tile == 1 ? c.stride : c.tile;
  const int64_t parameters = c.affine_image * image + channel;
  for (int i = 0; i < height; ++i) {
    const int row = tile_row * step - c.pad_top + i;
    float* to = strip + static_cast<int64_t>(i) * width * ConvShape::kStripChannels;
    if (row < 0 || row >= c.height) {
      for (int j = 0; j < width; ++j, to += ConvShape::kStripChannels)
        std::memset(to, 0, sizeof(float) * static_cast<size_t>(padded));
      continue;
    }
    const float* from = c.x + ((static_cast<int64_t>(image) * c.height + row) * c.width - c.pad_left) * c.x_pixel + channel;
    for (int j = 0; j < width; ++j, from += c.x_pixel, to += ConvShape::kStripChannels) {
      if (j < c.pad_left || j >= c.width + c.pad_left) {
        std::memset(to, 0, sizeof(float) * static_cast<size_t>(padded));
        continue;
      }
      int k = 0;
      for (; k + kLanes <= count; k += kLanes) {
        Vector v = load(from + k);
        if (kAffine)
          v = fma(v - load(c.subtract + parameters + k), load(c.multiply + parameters + k), load(c.add + parameters + k));
        store(to + k, activate<kActivation>(v));
      }
      if (k < count) {
        const int rest = count - k;
        Vector v = load_some(from + k, rest);
        if (kAffine)
          v = fma(v - load_some(c.subtract + parameters + k, rest), load_some(c.multiply + parameters + k, rest),
                  load_some(c.add + parameters + k, rest));
        Vector kept = {};
        const Vector activated = activate<kActivation>(v);
        std::memcpy(&kept, &activated, sizeof(float) * static_cast<size_t>(rest));
        store(to + k, kept);
      }
    }
  }
}

using FillStrip = void (*)(const Conv&, const ConvShape&, int, int, int, int, float*);

inline FillStrip choose_fill(const Conv& c) {
  const bool affine = c.multiply != nullptr;
  switch (c.activation) {
    case kRelu: return affine ? fill_strip<kRelu, true> : fill_strip<kRelu, false>;
    case kSilu: return affine ? fill_strip<kSilu, true> : fill_strip<kSilu, false>;
    default: return affine ? fill_strip<kIdentity, true> : fill_strip<kIdentity, false>;
  }
}

// --- Winograd's transforms -----------------------------------------------------------------------------------------------------

// F(4x4, 3x3) at the points 0, +-5/8, +-3/2 and infinity. They halve the error of the usual 0, +-1, +-2 (kernels/README.md),
// and all constants of the transforms are exact in binary.
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
void transform_input(const Conv&, const ConvShape& s, const float* strip, int count, float* v) {
  constexpr int kSize = Winograd<kTile>::kSize;
  const int64_t row = static_cast<int64_t>(s.tile_columns * kTile + 2) * ConvShape::kStripChannels;
  for (int column = 0; column < s.tile_columns; ++column) {
    for (int k = 0; k < count; k += kLanes) {
      const float* from = strip + static_cast<int64_t>(column) * kTile * ConvShape::kStripChannels + k;
      Vector half[kSize][kSize];  // [column][transformed row]
#pragma GCC unroll 8
      for (int j = 0; j < kSize; ++j) {
        Vector d[kSize];
#pragma GCC unroll 8
        for (int i = 0; i < kSize; ++i) d[i] = load(from + i * row + j * ConvShape::kStripChannels);
        Winograd<kTile>::input(d, half[j]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kSize; ++i) {
        Vector d[kSize], out[kSize];
#pragma GCC unroll 8
        for (int j = 0; j < kSize; ++j) d[j] = half[j][i];
        Winograd<kTile>::input(d, out);
#pragma GCC unroll 8
        for (int j = 0; j < kSize; ++j) store(v + (i * kSize + j) * s.v_stride + column * s.depth + k, out[j]);
      }
    }
  }
}

// Direct: the taps of every output pixel side by side.
inline void gather_taps(const Conv& c, const ConvShape& s, const float* strip, int count, float* v) {
  const int width = s.strip_width(c);
  const size_t bytes = sizeof(float) * static_cast<size_t>((count + kLanes - 1) / kLanes * kLanes);
  for (int column = 0; column < c.out_width; ++column) {
    for (int i = 0; i < c.kernel_height; ++i) {
      for (int j = 0; j < c.kernel_width; ++j) {
        const float* from = strip + (static_cast<int64_t>(i) * width + column * c.stride + j) * ConvShape::kStripChannels;
        std::memcpy(v + column * s.depth + (i * c.kernel_width + j) * s.padded_channels, from, bytes);
      }
    }
  }
}

// --- matrix products -----------------------------------------------------------------------------------------------------------

// Sums are taken in runs of this many terms, which are then added: rounding grows with the run and the number of runs, not with
// their product. Most of a Winograd convolution's error is made here (kernels/README.md).
constexpr int64_t kRun = 32;
constexpr int kUnrolled = 4;  // divides kLanes, which divides every depth

template <int kCount>
void multiply_rows(const float* a, int64_t a_stride, const float* b, int64_t depth, float* to, int64_t to_stride) {
  Vector total[kCount][2] = {};
  for (int64_t start = 0; start < depth; start += kRun) {
    Vector sum[kCount][2] = {};
    for (int64_t k = std::min(depth - start, kRun); k > 0; k -= kUnrolled) {
#pragma GCC unroll 8
      for (int u = 0; u < kUnrolled; ++u) {
        const Vector b0 = load(b + u * kPanel), b1 = load(b + u * kPanel + kLanes);
        const float* row = a + u;  // three rows from one pointer: more pointers than registers would be worse than these sums
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
          const Vector value = broadcast(row[i % 3 * a_stride]);
          accumulate(sum[i][0], value, b0);
          accumulate(sum[i][1], value, b1);
          if (i % 3 == 2) row += 3 * a_stride;
        }
      }
      a += kUnrolled;
      b += kUnrolled * kPanel;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      total[i][0] += sum[i][0];
      total[i][1] += sum[i][1];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    store(to + i * to_stride, total[i][0]);
    store(to + i * to_stride + kLanes, total[i][1]);
  }
}

using MultiplyRows = void (*)(const float*, int64_t, const float*, int64_t, float*, int64_t);

template <int... kCounts>
MultiplyRows choose_rows(int count, std::integer_sequence<int, kCounts...>) {
  static constexpr MultiplyRows table[] = {multiply_rows<kCounts + 1>...};
  return table[count - 1];
}

// M[tile][panel's channels] for all tiles of the block and one panel of one product.
inline void multiply_panel(const float* v, int64_t v_row, const float* weights, int64_t depth, int64_t tiles, float* m,
                           int64_t m_row) {
  const int64_t groups = (tiles + kRows - 1) / kRows;
  for (int64_t group = 0; group < groups; ++group) {  // of nearly equal size: a last group of one row would waste most of it
    const int64_t begin = tiles * group / groups, end = tiles * (group + 1) / groups;
    choose_rows(static_cast<int>(end - begin), std::make_integer_sequence<int, kRows>{})(
        v + begin * v_row, v_row, weights, depth, m + begin * m_row, m_row);
  }
}

// --- the epilogue --------------------------------------------------------------------------------------------------------------

// What happens to a vector of output channels, channel by channel and pixel by pixel. What a convolution does not ask for costs
// nothing: the three cases are template arguments, and a missing bias or factor is a vector of its neutral element.
template <bool kMasked, bool kResidual, bool kZ>
class Epilogue {
 public:
  // For `count` channels from `channel` of one image.
  Epilogue(const Conv& c, int64_t image, int channel, int count)
      : c_(c), channel_(channel), count_(count), whole_(count == kLanes), mask_bytes_((c.out_channels + 7) / 8) {
    if (c.bias) bias_ += get(c.bias + channel);
    if (c.image_bias) bias_ += get(c.image_bias + image * c.image_bias_image + channel);
    if (kMasked) factor_ = c.mask_factor ? get(c.mask_factor + channel) : broadcast(1.0f);
    if (kZ) {
      z_multiply_ = c.z_multiply ? get(c.z_multiply + channel) : broadcast(1.0f);
      if (c.z_add) z_add_ = get(c.z_add + channel);
    }
  }

  void operator()(Vector v, int64_t pixel) const {
    v += bias_;
    if (kMasked) v = where(get_bits(c_.mask, pixel), v * factor_);
    if (kResidual) v = fma(broadcast(c_.residual_factor), get(c_.residual + pixel * c_.residual_pixel + channel_), v);
    v *= broadcast(c_.scale);
    if (!kZ || c_.y) put(c_.y + pixel * c_.y_pixel + channel_, v);
    if (!kZ) return;
    v = v * z_multiply_ + z_add_;
    float* const z = c_.z + pixel * c_.z_pixel + channel_;
    if (c_.z_slopes) return put(z, where(get_bits(c_.z_slopes, pixel), v));
    if (c_.z_mask) put_bits(c_.z_mask, pixel, positive(v));
    if (c_.z_activation == kRelu) v = relu(v);
    if (c_.z_activation == kSilu) v *= sigmoid(v);
    put(z, v);
  }

 private:
  Vector get(const float* from) const { return whole_ ? load(from) : load_some(from, count_); }
  void put(float* to, Vector v) const { whole_ ? store(to, v) : store_some(to, v, count_); }
  uint32_t get_bits(const uint8_t* mask, int64_t pixel) const {
    uint32_t bits = 0;
    std::memcpy(&bits, mask + pixel * mask_bytes_ + channel_ / 8, static_cast<size_t>((count_ + 7) / 8));
    return bits;
  }
  void put_bits(uint8_t* mask, int64_t pixel, uint32_t bits) const {
    bits &= static_cast<uint32_t>((uint64_t{1} << count_) - 1);
    std::memcpy(mask + pixel * mask_bytes_ + channel_ / 8, &bits, static_cast<size_t>((count_ + 7) / 8));
  }

  const Conv& c_;
  const int channel_, count_;
  const bool whole_;
  const int64_t mask_bytes_;
  Vector bias_ = {}, factor_ = {}, z_multiply_ = {}, z_add_ = {};
};

template <int kTile, typename Finish>
void transform_tile(const Conv& c, const ConvShape& s, const float* m, int64_t image, int tile_row, int column,
                    const Finish& finish) {
  constexpr int kSize = Winograd<kTile>::kSize;
  Vector half[kSize][kTile];
#pragma GCC unroll 8
  for (int j = 0; j < kSize; ++j) {
    Vector products[kSize];
#pragma GCC unroll 8
    for (int i = 0; i < kSize; ++i) products[i] = load(m + (i * kSize + j) * s.m_stride);
    Winograd<kTile>::output(products, half[j]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kTile; ++i) {
    const int row = tile_row * kTile + i;
    if (row >= c.out_height) break;
    Vector products[kSize], y[kTile];
#pragma GCC unroll 8
    for (int j = 0; j < kSize; ++j) products[j] = half[j][i];
    Winograd<kTile>::output(products, y);
    const int64_t pixel = (image * c.out_height + row) * c.out_width + column * kTile;
#pragma GCC unroll 8
    for (int j = 0; j < kTile; ++j)
      if (column * kTile + j < c.out_width) finish(y[j], pixel + j);
  }
}

// From M to the output: one row of tiles, channels from `channel` to `end`.
template <int kTile, bool kMasked, bool kResidual, bool kZ>
void write_output(const Conv& c, const ConvShape& s, const float* m, int64_t image, int tile_row, int channel, int end) {
  for (int column = 0; column < s.tile_columns; ++column) {
    for (int k = channel; k < end; k += kLanes) {
      const Epilogue<kMasked, kResidual, kZ> finish(c, image, k, std::min(kLanes, end - k));
      const float* const from = m + column * s.padded_out + k;
      if constexpr (kTile == 1)
        finish(load(from), (image * c.out_height + tile_row) * c.out_width + column);
      else
        transform_tile<kTile>(c, s, from, image, tile_row, column, finish);
    }
  }
}

using WriteOutput = void (*)(const Conv&, const ConvShape&, const float*, int64_t, int, int, int);

template <int kTile>
WriteOutput choose_output(const Conv& c) {
  static constexpr WriteOutput table[] = {
      write_output<kTile, false, false, false>, write_output<kTile, false, false, true>, write_output<kTile, false, true, false>,
      write_output<kTile, false, true, true>,   write_output<kTile, true, false, false>, write_output<kTile, true, false, true>,
      write_output<kTile, true, true, false>,   write_output<kTile, true, true, true>};
  return table[4 * (c.mask != nullptr) + 2 * (c.residual != nullptr) + (c.z != nullptr)];
}

// --- all of it ------------------------------------------------------------------------------------------------------------------

inline void run_conv(const Conv& c, Team& team) {
  const ConvShape s(c);
  float* const v = c.scratch;
  float* const m = v + s.products * s.v_stride;
  float* const strip = m + s.products * s.m_stride + team.thread() * s.strip_floats;
  const FillStrip fill = choose_fill(c);
  const WriteOutput write = c.tile == 4 ? choose_output<4>(c) : c.tile == 2 ? choose_output<2>(c) : choose_output<1>(c);
  const int chunks = (c.channels + ConvShape::kStripChannels - 1) / ConvShape::kStripChannels;
  const int out_chunks = (c.out_channels + ConvShape::kStripChannels - 1) / ConvShape::kStripChannels;
  const int panels = static_cast<int>(s.padded_out / kPanel);
  const int64_t rows = static_cast<int64_t>(c.batch) * s.tile_rows;
  for (int64_t first = 0; first < rows; first += c.block_rows) {
    const int64_t last = std::min(rows, first + c.block_rows), tiles = (last - first) * s.tile_columns;

    if (!s.in_place) {
      team.each((last - first) * chunks, [&](int64_t item) {
        const int64_t row = first + item / chunks;
        const int channel = static_cast<int>(item % chunks) * ConvShape::kStripChannels;
        const int count = std::min(ConvShape::kStripChannels, c.channels - channel);
        fill(c, s, static_cast<int>(row / s.tile_rows), static_cast<int>(row % s.tile_rows), channel, count, strip);
        float* const to = v + (row - first) * s.tile_columns * s.depth + channel;
        if (c.tile == 4)
          transform_input<4>(c, s, strip, count, to);
        else if (c.tile == 2)
          transform_input<2>(c, s, strip, count, to);
        else
          gather_taps(c, s, strip, count, to);
      });
    }

    const float* const a = s.in_place ? c.x + first * c.out_width * c.x_pixel : v;
    const int64_t a_row = s.in_place ? c.x_pixel : s.depth;
    team.each(static_cast<int64_t>(s.products) * panels, [&](int64_t item) {
      const int64_t product = item / panels, panel = item % panels;
      multiply_panel(a + product * s.v_stride, a_row, c.weights + item * s.depth * kPanel, s.depth, tiles,
                     m + product * s.m_stride + panel * kPanel, s.padded_out);
    });

    team.each((last - first) * out_chunks, [&](int64_t item) {
      const int64_t row = first + item / out_chunks;
      const int channel = static_cast<int>(item % out_chunks) * ConvShape::kStripChannels;
      const int end = std::min(channel + ConvShape::kStripChannels, c.out_channels);
      write(c, s, m + (row - first) * s.tile_columns * s.padded_out, row / s.tile_rows, static_cast<int>(row % s.tile_rows),
            channel, end);
    });
  }
}

// --- weights ---------------------------------------------------------------------------------------------------------------------

// Pack weights [out][in][kh][kw] (element strides given, so that a transposed convolution's are a view) for `run_conv`.
struct Pack {
  int32_t tile, out_channels, channels, kernel_height, kernel_width, flip;
  int64_t out_stride, in_stride;
  const float* weights;
  float* to;  // products x depth x padded_out floats
};

template <int kTile>
void pack_winograd(const Pack& p, Team& team) {
  constexpr int kSize = Winograd<kTile>::kSize;
  const int64_t depth = (p.channels + kLanes - 1) / kLanes * kLanes;
  const int64_t panels = (p.out_channels + kPanel - 1) / kPanel;
  team.each(panels * depth, [&](int64_t item) {
    const int64_t panel = item / depth, k = item % depth;
    float packed[kSize][kSize][kPanel] = {};
    const int lanes = static_cast<int>(std::min<int64_t>(kPanel, p.out_channels - panel * kPanel));
    for (int lane = 0; lane < lanes && k < p.channels; ++lane) {
      const float* g = p.weights + (panel * kPanel + lane) * p.out_stride + k * p.in_stride;
      double half[3][kSize];  // [column][transformed row]
      for (int j = 0; j < 3; ++j) {
        double column[3];
        for (int i = 0; i < 3; ++i) column[i] = p.flip ? g[(2 - i) * 3 + (2 - j)] : g[i * 3 + j];
        Winograd<kTile>::weights(column, half[j]);
      }
      for (int i = 0; i < kSize; ++i) {
        const double row[3] = {half[0][i], half[1][i], half[2][i]};
        double u[kSize];
        Winograd<kTile>::weights(row, u);
        for (int j = 0; j < kSize; ++j) packed[i][j][lane] = static_cast<float>(u[j]);
      }
    }
    for (int i = 0; i < kSize; ++i)
      for (int j = 0; j < kSize; ++j)
        std::memcpy(p.to + (((i * kSize + j) * panels + panel) * depth + k) * kPanel, packed[i][j], sizeof packed[i][j]);
  });
}

inline void pack_direct(const Pack& p, Team& team) {
  const int64_t padded = (p.channels + kLanes - 1) / kLanes * kLanes, taps = p.kernel_height * p.kernel_width;
  const int64_t panels = (p.out_channels + kPanel - 1) / kPanel;
  team.each(panels, [&](int64_t panel) {
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t k = 0; k < padded; ++k)
        for (int lane = 0; lane < kPanel; ++lane) {
          const int64_t out = panel * kPanel + lane;
          const bool inside = out < p.out_channels && k < p.channels;
          p.to[((panel * taps + tap) * padded + k) * kPanel + lane] =
              inside ? p.weights[out * p.out_stride + k * p.in_stride + (p.flip ? taps - 1 - tap : tap)] : 0.0f;
        }
  });
}

}  // namespace coupfast
