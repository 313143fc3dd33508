// GroupNorm on channels-last maps: its affine form for a convolution's input, its transpose through an activation; and the
// elementwise operations that no convolution took in.
#pragma once

#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace coupfast {

// Channels that one thread takes together: whole groups, and a few cache lines of every pixel.
struct GroupShare {
  int per_item, items, group;

  GroupShare(int channels, int groups) {
    group = channels / groups;
    per_item = std::max(1, 64 / group);
    items = (groups + per_item - 1) / per_item;
  }
};

// multiply = gamma / std, subtract = mean, add = beta for every image and channel: GroupNorm(x) = (x - subtract) * multiply + add.
struct GroupNormAffine {
  int32_t batch, channels, groups, pad;
  int64_t pixels, x_pixel;
  double eps;
  const float* x;
  const float* gamma;  // [channels]
  const float* beta;
  float* subtract;  // [batch][channels], as the rest
  float* multiply;
  float* add;
  float* inverse;  // 1 / std
};

inline void run_group_norm_affine(const GroupNormAffine& p, Team& team) {
  constexpr int64_t kBlock = 32;  // pixels summed in float32 before double precision takes over
  const GroupShare share(p.channels, p.groups);
  std::vector<double> sums(2 * static_cast<size_t>(share.per_item) * share.group + 2 * kLanes);
  team.each(static_cast<int64_t>(p.batch) * share.items, [&](int64_t item) {
    const int64_t image = item / share.items;
    const int first_group = static_cast<int>(item % share.items) * share.per_item;
    const int groups = std::min(share.per_item, p.groups - first_group);
    const int first = first_group * share.group, count = groups * share.group;
    const float* x = p.x + image * p.pixels * p.x_pixel + first;
    std::fill(sums.begin(), sums.end(), 0.0);
    double* const squares = sums.data() + count + kLanes;
    for (int64_t start = 0; start < p.pixels; start += kBlock) {
      const int64_t end = std::min(p.pixels, start + kBlock);
      for (int k = 0; k < count; k += kLanes) {
        const int lanes = std::min(kLanes, count - k);
        // Relative to the first pixel: a variance is a small difference where a channel's mean is large.
        const Vector origin = load_some(x + k, lanes);
        Vector sum = {}, square = {};
        for (int64_t pixel = start; pixel < end; ++pixel) {
          const float* from = x + pixel * p.x_pixel + k;
          const Vector d = (lanes == kLanes ? load(from) : load_some(from, lanes)) - origin;
          sum += d;
          square = fma(d, d, square);
        }
        for (int lane = 0; lane < lanes; ++lane) {
          sums[static_cast<size_t>(k + lane)] += sum[lane];
          squares[k + lane] += square[lane];
        }
      }
    }
    const double pixels = static_cast<double>(p.pixels), size = pixels * share.group;
    for (int g = 0; g < groups; ++g) {
      double mean = 0.0, variance = 0.0;
      for (int c = g * share.group; c < (g + 1) * share.group; ++c) mean += x[c] + sums[static_cast<size_t>(c)] / pixels;
      mean /= share.group;
      for (int c = g * share.group; c < (g + 1) * share.group; ++c) {
        const double shift = x[c] - mean;
        variance += squares[c] + 2.0 * shift * sums[static_cast<size_t>(c)] + shift * shift * pixels;
      }
      const double inverse = 1.0 / std::sqrt(variance / size + p.eps);
      for (int c = first + g * share.group; c < first + (g + 1) * share.group; ++c) {
        const int64_t at = image * p.channels + c;
        p.subtract[at] = static_cast<float>(mean);
        p.multiply[at] = static_cast<float>(inverse * p.gamma[c]);
        p.add[at] = p.beta[c];
        p.inverse[at] = static_cast<float>(inverse);
      }
    }
  });
}

// The transpose of activation(GroupNorm(x)) applied to `dh`, plus residual_factor * residual.
struct GroupNormVjp {
  int32_t batch, channels, groups, activation;
  int64_t pixels, x_pixel, dh_pixel, dx_pixel, residual_pixel;
  float residual_factor, pad;
  const float* x;
  const float* gamma;
  const float* subtract;  // [batch][channels], as GroupNormAffine left them
  const float* multiply;
  const float* add;
  const float* inverse;
  const float* dh;
  const float* residual;  // or null
  float* dx;              // may be dh; not residual
};

inline void put(float* to, Vector v, int lanes) { lanes == kLanes ? store(to, v) : store_some(to, v, lanes); }

inline void run_group_norm_vjp(const GroupNormVjp& p, Team& team) {
  constexpr int64_t kBlock = 32;
  const GroupShare share(p.channels, p.groups);
  const size_t most = static_cast<size_t>(share.per_item) * share.group + kLanes;
  std::vector<double> sums(2 * most);
  std::vector<float> means(2 * most);
  team.each(static_cast<int64_t>(p.batch) * share.items, [&](int64_t item) {
    const int64_t image = item / share.items;
    const int first_group = static_cast<int>(item % share.items) * share.per_item;
    const int groups = std::min(share.per_item, p.groups - first_group);
    const int first = first_group * share.group, count = groups * share.group;
    const int64_t parameters = image * p.channels + first;
    std::fill(sums.begin(), sums.end(), 0.0);
    double* const products = sums.data() + most;
    // gamma * d activation(n) at one vector of one pixel, and the normalised x.
    const auto gradient = [&](int64_t pixel, int k, int lanes, Vector* normalised) {
      const bool whole = lanes == kLanes;
      const auto get = [whole, lanes](const float* from) { return whole ? load(from) : load_some(from, lanes); };
      const Vector centred = get(p.x + pixel * p.x_pixel + first + k) - get(p.subtract + parameters + k);
      Vector d = get(p.dh + pixel * p.dh_pixel + first + k);
      if (p.activation == kSilu) {
        const Vector n = fma(centred, get(p.multiply + parameters + k), get(p.add + parameters + k));
        const Vector s = sigmoid(n);
        d *= s * fma(n, broadcast(1.0f) - s, broadcast(1.0f));
      }
      *normalised = centred * get(p.inverse + parameters + k);
      return d * get(p.gamma + first + k);
    };
    for (int64_t start = 0; start < p.pixels; start += kBlock) {
      const int64_t end = std::min(p.pixels, start + kBlock);
      for (int k = 0; k < count; k += kLanes) {
        const int lanes = std::min(kLanes, count - k);
        Vector sum = {}, product = {}, normalised;
        for (int64_t pixel = start; pixel < end; ++pixel) {
          const Vector d = gradient(image * p.pixels + pixel, k, lanes, &normalised);
          put(p.dx + (image * p.pixels + pixel) * p.dx_pixel + first + k, d, lanes);  // for the second pass
          sum += d;
          product = fma(d, normalised, product);
        }
        for (int lane = 0; lane < lanes; ++lane) {
          sums[static_cast<size_t>(k + lane)] += sum[lane];
          products[k + lane] += product[lane];
        }
      }
    }
    const double size = static_cast<double>(p.pixels) * share.group;
    for (int g = 0; g < groups; ++g) {
      double sum = 0.0, product = 0.0;
      for (int c = g * share.group; c < (g + 1) * share.group; ++c) {
        sum += sums[static_cast<size_t>(c)];
        product += products[c];
      }
      for (int c = g * share.group; c < (g + 1) * share.group; ++c) {
        means[static_cast<size_t>(c)] = static_cast<float>(sum / size);
        means[most + static_cast<size_t>(c)] = static_cast<float>(product / size);
      }
    }
    for (int64_t at = 0; at < p.pixels; ++at) {
      const int64_t pixel = image * p.pixels + at;
      for (int k = 0; k < count; k += kLanes) {
        const int lanes = std::min(kLanes, count - k);
        const bool whole = lanes == kLanes;
        const auto get = [whole, lanes](const float* from) { return whole ? load(from) : load_some(from, lanes); };
        const Vector d = get(p.dx + pixel * p.dx_pixel + first + k);
        const Vector normalised =
            (get(p.x + pixel * p.x_pixel + first + k) - get(p.subtract + parameters + k)) * get(p.inverse + parameters + k);
        const Vector inner = d - get(means.data() + k) - normalised * get(means.data() + most + k);
        Vector dx = inner * get(p.inverse + parameters + k);
        if (p.residual)
          dx = fma(broadcast(p.residual_factor), get(p.residual + pixel * p.residual_pixel + first + k), dx);
        put(p.dx + pixel * p.dx_pixel + first + k, dx, lanes);
      }
    }
  });
}

// y = factor_a * a + factor_b * b.
struct Sum {
  int64_t pixels, channels, a_pixel, b_pixel, y_pixel;
  float factor_a, factor_b;
  const float* a;
  const float* b;  // or null
  float* y;        // may be a or b
};

inline void run_sum(const Sum& p, Team& team) {
  team.each(p.pixels, [&](int64_t pixel) {
    for (int64_t k = 0; k < p.channels; k += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, p.channels - k));
      Vector v = broadcast(p.factor_a) * load_some(p.a + pixel * p.a_pixel + k, lanes);
      if (p.b) v = fma(broadcast(p.factor_b), load_some(p.b + pixel * p.b_pixel + k, lanes), v);
      store_some(p.y + pixel * p.y_pixel + k, v, lanes);
    }
  });
}

// y = multiply * d where the mask's bit is set, else zero; plus residual_factor * residual.
struct Masked {
  int64_t pixels, channels, d_pixel, y_pixel, residual_pixel;
  float residual_factor, pad;
  const float* d;
  const uint8_t* mask;
  const float* multiply;  // [channels], or null
  const float* residual;  // or null
  float* y;
};

inline void run_masked(const Masked& p, Team& team) {
  team.each(p.pixels, [&](int64_t pixel) {
    for (int64_t k = 0; k < p.channels; k += kLanes) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, p.channels - k));
      uint32_t bits = 0;
      std::memcpy(&bits, p.mask + pixel * ((p.channels + 7) / 8) + k / 8, static_cast<size_t>((lanes + 7) / 8));
      Vector v = load_some(p.d + pixel * p.d_pixel + k, lanes);
      if (p.multiply) v *= load_some(p.multiply + k, lanes);
      v = where(bits, v);
      if (p.residual) v = fma(broadcast(p.residual_factor), load_some(p.residual + pixel * p.residual_pixel + k, lanes), v);
      store_some(p.y + pixel * p.y_pixel + k, v, lanes);
    }
  });
}

}  // namespace coupfast
