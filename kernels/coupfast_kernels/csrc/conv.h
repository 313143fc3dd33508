// Convolutions of channels-last fp32 maps with packed weights: direct (any kernel and stride, and the transposes of strided ones),
// or 3x3 of stride 1 by Winograd F(2x2) and F(4x4).
#pragma once

#include "direct.h"
#include "winograd.h"

namespace coupfast {

inline void run_conv(const Conv& c, Team& team) {
  if (c.tile == 4) return WinogradConv<4>(c).run(team);
  if (c.tile == 2) return WinogradConv<2>(c).run(team);
  run_direct(c, team);
}

inline int64_t conv_scratch(const Conv& c, int threads) {
  return c.tile == 1 ? scratch_direct(c, threads) : WinogradShape(c).scratch_floats(c, threads);
}

// --- weights ---------------------------------------------------------------------------------------------------------------------

// Pack weights [out][in][kh][kw] (element strides given, so that a transposed convolution's are a view) for `run_conv`.
struct Pack {
  int32_t tile, out_channels, channels, kernel_height, kernel_width, flip;
  int32_t pad, spread;  // as `Conv` has them: 1 but for the transpose of a strided convolution, whose parts lie one behind the other
  int64_t out_stride, in_stride;
  const float* weights;
  float* to;  // coupfast_packed_floats(...) floats
};

template <int kTile>
void pack_winograd(const Pack& p, Team& team) {
  constexpr int kSize = Winograd<kTile>::kSize;
  const int64_t depth = columns(p.channels) * kLanes;
  team.each(panels(p.out_channels) * depth, [&](int64_t item) {
    const int64_t panel = item / depth, k = item % depth, width = is_half(p.out_channels, panel) ? kLanes : kPanel;
    float packed[kSize][kSize][kPanel] = {};
    const int lanes = static_cast<int>(std::min<int64_t>(width, p.out_channels - panel * kPanel));
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
        std::memcpy(p.to + ((i * kSize + j) * columns(p.out_channels) + 2 * panel) * kLanes * depth + k * width, packed[i][j],
                    sizeof(float) * static_cast<size_t>(width));
  });
}

// The taps of one part (`Taps`): all of them, where `spread` is one.
inline void pack_taps(const Pack& p, const Taps& rows, const Taps& across, float* to, Team& team) {
  const auto value = [&p](int64_t out, int64_t k, int64_t i, int64_t j) {
    const int64_t tap = p.flip ? (p.kernel_height - 1 - i) * p.kernel_width + p.kernel_width - 1 - j : i * p.kernel_width + j;
    return p.weights[out * p.out_stride + k * p.in_stride + tap];
  };
  const int64_t length = static_cast<int64_t>(across.count) * p.channels;
  const auto term = [&](int64_t out, int64_t i, int64_t k) {
    return value(out, k % p.channels, rows.first + i * p.spread, across.first + k / p.channels * p.spread);
  };
  if (few_outputs(p.out_channels, p.channels)) {
    const int64_t padded = columns(length) * kLanes;
    team.each(p.out_channels, [&](int64_t out) {
      for (int64_t i = 0; i < rows.count; ++i)
        for (int64_t k = 0; k < padded; ++k) to[(out * rows.count + i) * padded + k] = k < length ? term(out, i, k) : 0.0f;
    });
    return;
  }
  team.each(panels(p.out_channels), [&](int64_t panel) {
    const int64_t width = is_half(p.out_channels, panel) ? kLanes : kPanel;
    float* const packed = to + panel * kPanel * rows.count * length;
    for (int64_t i = 0; i < rows.count; ++i)
      for (int64_t k = 0; k < length; ++k)
        for (int64_t lane = 0; lane < width; ++lane) {
          const int64_t out = panel * kPanel + lane;
          packed[(i * length + k) * width + lane] = out < p.out_channels ? term(out, i, k) : 0.0f;
        }
  });
}

inline void pack_direct(const Pack& p, Team& team) {
  float* to = p.to;
  for (int i = 0; i < p.spread; ++i)
    for (int j = 0; j < p.spread; ++j) {
      const Taps rows(p.kernel_height, p.pad, p.spread, i), across(p.kernel_width, p.pad, p.spread, j);
      pack_taps(p, rows, across, to, team);
      to += packed_direct(p.out_channels, p.channels, rows.count, across.count);
    }
}

inline int64_t packed_floats(const Pack& p) {
  if (p.tile != 1) return (p.tile + 2) * (p.tile + 2) * columns(p.channels) * kLanes * columns(p.out_channels) * kLanes;
  int64_t total = 0;
  for (int i = 0; i < p.spread; ++i)
    for (int j = 0; j < p.spread; ++j)
      total += packed_direct(p.out_channels, p.channels, Taps(p.kernel_height, p.pad, p.spread, i).count,
                             Taps(p.kernel_width, p.pad, p.spread, j).count);
  return total;
}

}  // namespace coupfast
