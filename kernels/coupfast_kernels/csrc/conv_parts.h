// What convolutions of channels-last fp32 maps have in common: their description, what comes before the sums (border and
// activation) and what comes behind them.
#pragma once

#include <type_traits>

#include "product.h"
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
  int32_t spread;  // direct, of stride 1: x is taken with spread - 1 zeros between its pixels (a strided one's transpose); or 1
  int32_t alone;   // whether a thread takes a block by itself, or all take one together: changes no bit
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

constexpr int kStripChannels = 64;  // of one thread's strip, in Winograd's algorithms

// An odd number of cache lines: powers of two would put all products' rows into the same cache set.
inline int64_t odd_lines(int64_t floats) { return ((floats + 15) / 16 | 1) * 16; }

// --- activated input pixels with their border ----------------------------------------------------------------------------------

template <int kActivation>
inline Vector activate(Vector v) {
  if (kActivation == kRelu) return relu(v);
  if (kActivation == kSilu) return v * sigmoid(v);
  return v;
}

// `width` pixels of input row `row` from column -pad_left on, channels [channel, channel + count), a pixel every `to_pixel`
// floats; where kPadded, zeros fill the last vector of a pixel.
template <int kActivation, bool kAffine, bool kPadded>
void fill_row(const Conv& c, int image, int row, int channel, int count, int width, float* to, int64_t to_pixel) {
  const size_t bytes = sizeof(float) * static_cast<size_t>(kPadded ? (count + kLanes - 1) / kLanes * kLanes : count);
  const bool inside = row >= 0 && row < c.height;
  const int begin = inside ? std::min(width, std::max(0, c.pad_left)) : width;
  const int end = inside ? std::max(begin, std::min(width, c.width + c.pad_left)) : width;
  for (int j = 0; j < begin; ++j) std::memset(to + j * to_pixel, 0, bytes);
  for (int j = end; j < width; ++j) std::memset(to + j * to_pixel, 0, bytes);
  if (begin == end) return;
  const float* from = c.x + ((static_cast<int64_t>(image) * c.height + row) * c.width + begin - c.pad_left) * c.x_pixel + channel;
  to += begin * to_pixel;
  if (kActivation == kIdentity && !kAffine && c.x_pixel == count && to_pixel == count) {
    std::memcpy(to, from, bytes * static_cast<size_t>(end - begin));
    return;
  }
  const int64_t parameters = c.affine_image * image + channel;
  const float* const subtract = kAffine ? c.subtract + parameters : nullptr;
  const float* const multiply = kAffine ? c.multiply + parameters : nullptr;
  const float* const add = kAffine ? c.add + parameters : nullptr;
  for (int j = begin; j < end; ++j, from += c.x_pixel, to += to_pixel) {
    int k = 0;
    for (; k + kLanes <= count; k += kLanes) {
      Vector v = load(from + k);
      if (kAffine) v = fma(v - load(subtract + k), load(multiply + k), load(add + k));
      store(to + k, activate<kActivation>(v));
    }
    if (k < count) {
      const int rest = count - k;
      Vector v = load_some(from + k, rest);
      if (kAffine) v = fma(v - load_some(subtract + k, rest), load_some(multiply + k, rest), load_some(add + k, rest));
      v = activate<kActivation>(v);
      if (kPadded)
        store(to + k, keep_some(v, rest));
      else
        store_some(to + k, v, rest);
    }
  }
}

using FillRow = void (*)(const Conv&, int, int, int, int, int, float*, int64_t);

template <bool kPadded>
FillRow choose_fill(const Conv& c) {
  const bool affine = c.multiply != nullptr;
  switch (c.activation) {
    case kRelu: return affine ? fill_row<kRelu, true, kPadded> : fill_row<kRelu, false, kPadded>;
    case kSilu: return affine ? fill_row<kSilu, true, kPadded> : fill_row<kSilu, false, kPadded>;
    default: return affine ? fill_row<kIdentity, true, kPadded> : fill_row<kIdentity, false, kPadded>;
  }
}

// --- the epilogue --------------------------------------------------------------------------------------------------------------

// What happens to a vector of output channels, channel by channel and pixel by pixel. What a convolution does not ask for costs
// nothing: the three cases are template arguments, and a missing bias or factor is a vector of its neutral element. Everything
// that it reads of `Conv` is copied: for all the compiler knows, a result is stored there.
template <bool kMasked, bool kResidual, bool kZ>
class Epilogue {
 public:
  // For `count` channels from `channel` of one image. Where `streams` says so, whole vectors of y go past the caches.
  Epilogue(const Conv& c, int64_t image, int channel, int count, bool streams = false)
      : count_(count),
        whole_(count == kLanes),
        streams_(streams && whole_),
        mask_bytes_((c.out_channels + 7) / 8),
        y_pixel_(c.y_pixel),
        y_(c.y ? c.y + channel : nullptr),
        scale_(broadcast(c.scale)) {
    if (c.bias) bias_ += get(c.bias + channel);
    if (c.image_bias) bias_ += get(c.image_bias + image * c.image_bias_image + channel);
    if (kMasked) {
      mask_ = c.mask + channel / 8;
      factor_ = c.mask_factor ? get(c.mask_factor + channel) : broadcast(1.0f);
    }
    if (kResidual) {
      residual_ = c.residual + channel;
      residual_pixel_ = c.residual_pixel;
      residual_factor_ = broadcast(c.residual_factor);
    }
    if (kZ) {
      z_ = c.z + channel;
      z_pixel_ = c.z_pixel;
      z_activation_ = c.z_activation;
      z_mask_ = c.z_mask ? c.z_mask + channel / 8 : nullptr;
      z_slopes_ = c.z_slopes ? c.z_slopes + channel / 8 : nullptr;
      z_multiply_ = c.z_multiply ? get(c.z_multiply + channel) : broadcast(1.0f);
      if (c.z_add) z_add_ = get(c.z_add + channel);
    }
  }

  void operator()(Vector v, int64_t pixel) const {
    v += bias_;
    if (kMasked) v = where(get_bits(mask_, pixel), v * factor_);
    if (kResidual) v = fma(residual_factor_, get(residual_ + pixel * residual_pixel_), v);
    v *= scale_;
    if (!kZ || y_) {
      if (streams_)
        stream(y_ + pixel * y_pixel_, v);
      else
        put(y_ + pixel * y_pixel_, v);
    }
    if (!kZ) return;
    v = v * z_multiply_ + z_add_;
    float* const z = z_ + pixel * z_pixel_;
    if (z_slopes_) return put(z, where(get_bits(z_slopes_, pixel), v));
    if (z_mask_) put_bits(z_mask_, pixel, positive(v));
    if (z_activation_ == kRelu) v = relu(v);
    if (z_activation_ == kSilu) v *= sigmoid(v);
    put(z, v);
  }

 private:
  Vector get(const float* from) const { return whole_ ? load(from) : load_some(from, count_); }
  void put(float* to, Vector v) const { whole_ ? store(to, v) : store_some(to, v, count_); }
  uint32_t get_bits(const uint8_t* mask, int64_t pixel) const {
    uint32_t bits = 0;
    if (whole_)
      std::memcpy(&bits, mask + pixel * mask_bytes_, kLanes / 8);
    else
      std::memcpy(&bits, mask + pixel * mask_bytes_, static_cast<size_t>((count_ + 7) / 8));
    return bits;
  }
  void put_bits(uint8_t* mask, int64_t pixel, uint32_t bits) const {
    if (whole_) {
      std::memcpy(mask + pixel * mask_bytes_, &bits, kLanes / 8);
      return;
    }
    bits &= static_cast<uint32_t>((uint64_t{1} << count_) - 1);
    std::memcpy(mask + pixel * mask_bytes_, &bits, static_cast<size_t>((count_ + 7) / 8));
  }

  const int count_;
  const bool whole_, streams_;
  const int64_t mask_bytes_, y_pixel_;
  float* const y_;
  const Vector scale_;
  const uint8_t* mask_ = nullptr;
  const float* residual_ = nullptr;
  int64_t residual_pixel_ = 0, z_pixel_ = 0;
  float* z_ = nullptr;
  int32_t z_activation_ = kIdentity;
  uint8_t* z_mask_ = nullptr;
  const uint8_t* z_slopes_ = nullptr;
  Vector bias_ = {}, factor_ = {}, residual_factor_ = {}, z_multiply_ = {}, z_add_ = {};
};

// kind(masked, residual, z) for what `c` asks for.
template <typename Kind>
auto choose_epilogue(const Conv& c, const Kind& kind) {
  using No = std::false_type;
  using Yes = std::true_type;
  const auto with = [&](auto masked, auto residual) { return c.z ? kind(masked, residual, Yes{}) : kind(masked, residual, No{}); };
  const auto and_residual = [&](auto masked) { return c.residual ? with(masked, Yes{}) : with(masked, No{}); };
  return c.mask ? and_residual(Yes{}) : and_residual(No{});
}

}  // namespace coupfast
