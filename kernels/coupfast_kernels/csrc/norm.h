// GroupNorm on channels-last maps: its affine form for a convolution's input, its transpose through an activation; and the
// elementwise operations that no convolution took in.
#pragma once

#include <cmath>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace coupfast {

// Channels that one thread takes together: whole groups and, where few enough groups make them, whole vectors; a cache line or
// more of every pixel, and of most maps no more than stays in the cache until it is read again.
struct GroupShare {
  int per_item, items, group;

  GroupShare(int channels, int groups) {
    group = channels / groups;
    per_item = std::max(1, 32 / group);
    int whole = 1;
    while (whole * group % kLanes) ++whole;
    if (whole * group <= 128) per_item = (per_item + whole - 1) / whole * whole;
    per_item = std::min(per_item, groups);
    items = (groups + per_item - 1) / per_item;
  }
};

// Pixels summed in float32 before double precision takes over.
constexpr int64_t kSummed = 32;

typedef double Doubles __attribute__((vector_size(8 * kLanes)));

inline void add_to(double* sums, Vector v) {
  Doubles d;
  std::memcpy(&d, sums, sizeof d);
  d += __builtin_convertvector(v, Doubles);
  std::memcpy(sums, &d, sizeof d);
}

// The first of `left` elements; lanes behind the last are zero.
inline Vector get(const float* from, int64_t left) {
  return left >= kLanes ? load(from) : load_some(from, static_cast<int>(left));
}

inline void put(float* to, Vector v, int64_t left) {
  if (left >= kLanes)
    store(to, v);
  else
    store_some(to, v, static_cast<int>(left));
}

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

// Sums of kVectors vectors of channels over some pixels, and of their squares, relative to `origin`, the first pixel: a variance
// is a small difference where a channel's mean is large.
template <int kVectors, bool kWhole>
void add_moments(const float* x, int64_t x_pixel, int64_t pixels, const float* origin, int64_t left, double* sums,
                 double* squares) {
  const int64_t lanes = kWhole ? kLanes : left;
  Vector first[kVectors], sum[kVectors] = {}, square[kVectors] = {};
#pragma GCC unroll 4
  for (int k = 0; k < kVectors; ++k) first[k] = get(origin + k * kLanes, lanes);
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += x_pixel) {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const Vector d = get(x + k * kLanes, lanes) - first[k];
      sum[k] += d;
      square[k] = fma(d, d, square[k]);
    }
  }
  for (int k = 0; k < kVectors; ++k) {
    add_to(sums + k * kLanes, sum[k]);
    add_to(squares + k * kLanes, square[k]);
  }
}

inline void run_group_norm_affine(const GroupNormAffine& p, Team& team) {
  const GroupShare share(p.channels, p.groups);
  const size_t most = static_cast<size_t>(share.per_item) * share.group + kLanes;
  std::vector<double> sums(2 * most);
  team.each(static_cast<int64_t>(p.batch) * share.items, [&](int64_t item) {
    const int64_t image = item / share.items;
    const int first_group = static_cast<int>(item % share.items) * share.per_item;
    const int groups = std::min(share.per_item, p.groups - first_group);
    const int first = first_group * share.group, count = groups * share.group;
    const float* x = p.x + image * p.pixels * p.x_pixel + first;
    std::fill(sums.begin(), sums.end(), 0.0);
    double* const squares = sums.data() + most;
    for (int64_t start = 0; start < p.pixels; start += kSummed) {
      const int64_t pixels = std::min(p.pixels - start, kSummed);
      const float* const from = x + start * p.x_pixel;
      int k = 0;
      for (; k + 4 * kLanes <= count; k += 4 * kLanes)
        add_moments<4, true>(from + k, p.x_pixel, pixels, x + k, kLanes, sums.data() + k, squares + k);
      for (; k + kLanes <= count; k += kLanes)
        add_moments<1, true>(from + k, p.x_pixel, pixels, x + k, kLanes, sums.data() + k, squares + k);
      if (k < count) add_moments<1, false>(from + k, p.x_pixel, pixels, x + k, count - k, sums.data() + k, squares + k);
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

// d = dh * activation'(n) of one vector of channels at some pixels, left in dx; its sum and that of d * (x - mean).
template <bool kActivated, bool kWhole>
void slopes_of_pixels(const GroupNormVjp& p, int64_t pixel, int64_t pixels, int channel, int64_t parameters, int64_t left,
                      double* sums, double* products) {
  const int64_t lanes = kWhole ? kLanes : left;
  const Vector mean = get(p.subtract + parameters, lanes), multiply = get(p.multiply + parameters, lanes);
  const Vector add = get(p.add + parameters, lanes), one = broadcast(1.0f);
  const float* x = p.x + pixel * p.x_pixel + channel;
  const float* dh = p.dh + pixel * p.dh_pixel + channel;
  float* dx = p.dx + pixel * p.dx_pixel + channel;
  Vector sum = {}, product = {};
  for (int64_t i = 0; i < pixels; ++i, x += p.x_pixel, dh += p.dh_pixel, dx += p.dx_pixel) {
    const Vector centred = get(x, lanes) - mean;
    Vector d = get(dh, lanes);
    if (kActivated) {
      const Vector n = fma(centred, multiply, add), s = sigmoid(n);
      d *= s * fma(n, one - s, one);
    }
    put(dx, d, lanes);  // for the second pass
    sum += d;
    product = fma(d, centred, product);
  }
  add_to(sums, sum);
  add_to(products, product);
}

// dx = along * d + across * (x - mean) + shift, and the residual, of one vector of channels at some pixels.
template <bool kResidual, bool kWhole>
void finish_pixels(const GroupNormVjp& p, int64_t pixel, int64_t pixels, int channel, int64_t parameters, int64_t left,
                   const float* along_, const float* across_, const float* shift_) {
  const int64_t lanes = kWhole ? kLanes : left;
  const Vector mean = get(p.subtract + parameters, lanes), along = load(along_), across = load(across_), shift = load(shift_);
  const Vector factor = broadcast(p.residual_factor);
  const float* x = p.x + pixel * p.x_pixel + channel;
  const float* residual = kResidual ? p.residual + pixel * p.residual_pixel + channel : nullptr;
  float* dx = p.dx + pixel * p.dx_pixel + channel;
  for (int64_t i = 0; i < pixels; ++i, x += p.x_pixel, dx += p.dx_pixel) {
    Vector v = fma(across, get(x, lanes) - mean, fma(along, get(dx, lanes), shift));
    if (kResidual) {
      v = fma(factor, get(residual, lanes), v);
      residual += p.residual_pixel;
    }
    put(dx, v, lanes);
  }
}

inline void run_group_norm_vjp(const GroupNormVjp& p, Team& team) {
  const GroupShare share(p.channels, p.groups);
  const size_t most = static_cast<size_t>(share.per_item) * share.group + kLanes;
  std::vector<double> sums(2 * most);
  std::vector<float> factors(3 * most);
  const bool silu = p.activation == kSilu;
  const auto whole_slopes = silu ? slopes_of_pixels<true, true> : slopes_of_pixels<false, true>;
  const auto some_slopes = silu ? slopes_of_pixels<true, false> : slopes_of_pixels<false, false>;
  const auto whole_finish = p.residual ? finish_pixels<true, true> : finish_pixels<false, true>;
  const auto some_finish = p.residual ? finish_pixels<true, false> : finish_pixels<false, false>;
  team.each(static_cast<int64_t>(p.batch) * share.items, [&](int64_t item) {
    const int64_t image = item / share.items;
    const int first_group = static_cast<int>(item % share.items) * share.per_item;
    const int groups = std::min(share.per_item, p.groups - first_group);
    const int first = first_group * share.group, count = groups * share.group;
    const int64_t parameters = image * p.channels + first, begin = image * p.pixels;
    std::fill(sums.begin(), sums.end(), 0.0);
    double* const products = sums.data() + most;
    for (int64_t start = 0; start < p.pixels; start += kSummed) {
      const int64_t pixels = std::min(p.pixels - start, kSummed);
      for (int k = 0; k < count; k += kLanes)
        (count - k >= kLanes ? whole_slopes : some_slopes)(p, begin + start, pixels, first + k, parameters + k, count - k,
                                                           sums.data() + k, products + k);
    }
    // With a = gamma d and n = (x - mean) / std: dx = (a - mean(a) - n mean(a n)) / std.
    float* const along = factors.data();
    float* const across = along + most;
    float* const shift = across + most;
    const double size = static_cast<double>(p.pixels) * share.group;
    for (int g = 0; g < groups; ++g) {
      double sum = 0.0, product = 0.0;
      for (int c = g * share.group; c < (g + 1) * share.group; ++c) {
        sum += p.gamma[first + c] * sums[static_cast<size_t>(c)];
        product += p.gamma[first + c] * products[c];
      }
      for (int c = g * share.group; c < (g + 1) * share.group; ++c) {
        const double inverse = p.inverse[parameters + c];
        along[c] = static_cast<float>(inverse * p.gamma[first + c]);
        across[c] = static_cast<float>(-inverse * inverse * inverse * (product / size));
        shift[c] = static_cast<float>(-inverse * (sum / size));
      }
    }
    for (int64_t start = 0; start < p.pixels; start += kSummed) {
      const int64_t pixels = std::min(p.pixels - start, kSummed);
      for (int k = 0; k < count; k += kLanes)
        (count - k >= kLanes ? whole_finish : some_finish)(p, begin + start, pixels, first + k, parameters + k, count - k,
                                                           along + k, across + k, shift + k);
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
      const int64_t left = p.channels - k;
      Vector v = broadcast(p.factor_a) * get(p.a + pixel * p.a_pixel + k, left);
      if (p.b) v = fma(broadcast(p.factor_b), get(p.b + pixel * p.b_pixel + k, left), v);
      put(p.y + pixel * p.y_pixel + k, v, left);
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
      Vector v = get(p.d + pixel * p.d_pixel + k, lanes);
      if (p.multiply) v *= get(p.multiply + k, lanes);
      v = where(bits, v);
      if (p.residual) v = fma(broadcast(p.residual_factor), get(p.residual + pixel * p.residual_pixel + k, lanes), v);
      put(p.y + pixel * p.y_pixel + k, v, lanes);
    }
  });
}

}  // namespace coupfast
