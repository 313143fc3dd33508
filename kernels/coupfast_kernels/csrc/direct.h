// Direct convolutions. Rows of output pixels, of all images end to end, are taken in blocks. A block's input, activated and with
// its border, is laid out pixel by pixel without gaps; then the terms of an output pixel are kernel_height runs of
// kernel_width x channels floats, and the matrix product reads them there. A 1x1 convolution of what is already there
// reads x itself.
//
// The order of a sum is that of its terms, in runs (product.h), whatever the block, the panel or the thread.
#pragma once

#include "conv_parts.h"
#include "parallel.h"

namespace coupfast {

// --- few output channels: vectors of terms --------------------------------------------------------------------------------------

// A vector of output channels would be mostly padding. Each sum is taken in kLanes parts instead, which are added at the end.
constexpr int kFewChannels = 4;
constexpr int kFewPixels = kLanes == 16 ? 4 : 3;  // kFewPixels x kFewChannels accumulators fit beside what they read

inline bool few_outputs(int64_t out_channels, int64_t channels) { return out_channels <= kFewChannels && channels >= kLanes; }

// Packed weights of one convolution: of `few_outputs` [out][kernel_height][kernel_width x channels, to whole vectors].
inline int64_t packed_direct(int64_t out_channels, int64_t channels, int64_t kernel_height, int64_t kernel_width) {
  if (!few_outputs(out_channels, channels)) return kernel_height * kernel_width * channels * columns(out_channels) * kLanes;
  return out_channels * kernel_height * columns(kernel_width * channels) * kLanes;
}

// The terms at `k`, in vectors of which the first `lanes` count.
template <int kPixels, int kOut, bool kWhole>
COUPFAST_INLINE void add_few(Vector (&sum)[kPixels][kOut], const float* a, int64_t pixel, const float* weights, int64_t of_output,
                             int lanes) {
  Vector x[kPixels];
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) x[i] = kWhole ? load(a + i * pixel) : load_some(a + i * pixel, lanes);
#pragma GCC unroll 4
  for (int o = 0; o < kOut; ++o) {
    const Vector w = load(weights + o * of_output);
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) sum[i][o] = accumulate(sum[i][o], x[i], w);
  }
}

template <int kPixels, int kOut>
void multiply_few(const float* a, int64_t pixel, const Terms& terms, const float* weights, float* to) {
  const int64_t length = terms.length, whole = length / kLanes * kLanes;
  const int64_t padded = columns(length) * kLanes, of_output = terms.segments * padded;
  Vector total[kPixels][kOut] = {};
  for (int64_t segment = 0; segment < terms.segments; ++segment, a += terms.next, weights += padded) {
    Vector sum[kPixels][kOut] = {};
    for (int64_t k = 0; k < whole; k += kLanes) add_few<kPixels, kOut, true>(sum, a + k, pixel, weights + k, of_output, kLanes);
    if (whole < length)
      add_few<kPixels, kOut, false>(sum, a + whole, pixel, weights + whole, of_output, static_cast<int>(length - whole));
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 4
      for (int o = 0; o < kOut; ++o) total[i][o] += sum[i][o];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kPixels; ++i) {
    float sums[kLanes] = {};
#pragma GCC unroll 4
    for (int o = 0; o < kOut; ++o) sums[o] = sum_lanes(total[i][o]);
    store(to + i * kPanel, load(sums));
  }
}

using MultiplyFew = void (*)(const float*, int64_t, const Terms&, const float*, float*);

template <int kPixels>
MultiplyFew choose_few(int out_channels) {
  static constexpr MultiplyFew table[] = {multiply_few<kPixels, 1>, multiply_few<kPixels, 2>, multiply_few<kPixels, 3>,
                                          multiply_few<kPixels, 4>};
  return table[out_channels - 1];
}

// --- geometry -------------------------------------------------------------------------------------------------------------------

// Where the results lie in y: all of them, or of a transpose those whose rows and columns leave one remainder.
struct Target {
  int64_t height, width;
  int64_t step = 1, row = 0, column = 0;
  int64_t pixel(int64_t image, int64_t i, int64_t j) const { return (image * height + i * step + row) * width + j * step + column; }
};

struct DirectShape {
  // About as many output pixels are multiplied by one panel before their results leave the cache.
  static constexpr int64_t kPixels = 48;
  // A group reads its pixels side by side; where those are so many floats apart, the hardware does not foresee it. What is to be
  // multiplied so many pixels later is fetched beforehand.
  static constexpr int64_t kStrided = 64, kAhead = 24;
  // A larger result does not stay in the caches until it is read, and costs as much to be read before it is overwritten as a 1x1
  // product costs to be computed. A smaller one is fetched beforehand.
  static constexpr int64_t kCachedBytes = 1 << 22;
  // Packed weights that stay in a core's cache while all panels are taken for some pixels.
  static constexpr int64_t kResidentFloats = 1 << 16;

  Target target;
  bool in_place;  // the products read x itself
  bool few;
  int64_t lines;        // rows of outputs of all images
  int64_t strip_width;  // pixels
  int64_t image_rows;   // of input, that an image's outputs read
  int64_t pixel, row;   // floats from one output pixel's terms to its right and lower neighbour's, in what is read
  Terms terms;
  int64_t panel_count;
  bool streams;   // y goes past the caches
  bool flat;      // all pixels lie evenly, in what is read and in y
  bool finishes;  // the product itself writes y: nothing but a bias and a scale follows it

  DirectShape(const Conv& c, const Target& to) : target(to) {
    in_place = c.kernel_height == 1 && c.kernel_width == 1 && c.pad_top == 0 && c.pad_left == 0 && c.activation == kIdentity &&
               c.multiply == nullptr && (c.out_height - 1) * c.stride < c.height && (c.out_width - 1) * c.stride < c.width;
    few = few_outputs(c.out_channels, c.channels);
    flat = in_place && c.stride == 1 && target.step == 1 && c.out_height == c.height && c.out_width == c.width;
    lines = static_cast<int64_t>(c.batch) * c.out_height;
    strip_width = static_cast<int64_t>(c.out_width - 1) * c.stride + c.kernel_width;
    image_rows = static_cast<int64_t>(c.out_height - 1) * c.stride + c.kernel_height;
    const int64_t input_row = in_place ? c.width * c.x_pixel : strip_width * c.channels;
    pixel = c.stride * (in_place ? c.x_pixel : c.channels);
    row = c.stride * input_row;
    terms = {c.kernel_width == 0 ? 0 : c.kernel_height, static_cast<int64_t>(c.kernel_width) * c.channels, input_row, kDirectRun};
    panel_count = few ? 1 : panels(c.out_channels);
    const int64_t y_bytes = sizeof(float) * target.height * target.width * c.batch * c.out_channels;
    streams = kStreams && c.y != nullptr && y_bytes > kCachedBytes && c.y_pixel % kLanes == 0 &&
              reinterpret_cast<uintptr_t>(c.y) % sizeof(Vector) == 0;
    finishes = !few && terms.depth() > 0 && c.out_channels % kLanes == 0 && c.y != nullptr && c.z == nullptr && c.mask == nullptr &&
               c.residual == nullptr && c.image_bias == nullptr;
  }

  bool fills() const { return !in_place && terms.segments > 0; }
  // At most, of a block: each image that it touches adds the rows by which the kernel overhangs.
  int64_t strip_floats(const Conv& c) const {
    if (!fills()) return 0;
    const int64_t most = std::min<int64_t>(c.block_rows, lines), images = (most + c.out_height - 2) / c.out_height + 1;
    return odd_lines((most * c.stride + images * std::max(0, c.kernel_height - c.stride)) * terms.next);
  }
  int64_t product_floats() const { return odd_lines((kPixels + kMostRows<1>) * kPanel); }
  int64_t scratch_floats(const Conv& c, int threads) const {
    return c.alone ? threads * (strip_floats(c) + product_floats()) : strip_floats(c) + threads * product_floats();
  }
};

// Lines [first, last) of outputs and the rows of input that they read, one piece an image.
class DirectBlock {
 public:
  DirectBlock(const Conv& c, const DirectShape& s, int64_t first, int64_t last, const float* strips)
      : c_(c), s_(s), first_(first), first_image_(first / c.out_height), first_row_(first % c.out_height), strips_(strips) {
    const int64_t rows = std::min(last, (first_image_ + 1) * c.out_height) - first;
    first_rows_ = (rows - 1) * c.stride + c.kernel_height;
    pixels = (last - first) * c.out_width;
    const int64_t last_image = (last - 1) / c.out_height;
    strip_rows = last_image == first_image_ ? first_rows_ : strip_row(last - 1) + c.kernel_height;
  }

  int64_t pixels, strip_rows;

  void fill(int64_t strip_row, FillRow fill_row, float* strips) const {
    int64_t image = first_image_, row = first_row_ * c_.stride + strip_row;
    if (strip_row >= first_rows_) {
      image += 1 + (strip_row - first_rows_) / s_.image_rows;
      row = (strip_row - first_rows_) % s_.image_rows;
    }
    fill_row(c_, static_cast<int>(image), static_cast<int>(row) - c_.pad_top, 0, c_.channels, static_cast<int>(s_.strip_width),
             strips + strip_row * s_.terms.next, c_.channels);
  }

  // Products of pixels [begin, end) with one panel: m[pixel - begin][kPanel], or finished, in y.
  void multiply(int64_t begin, int64_t end, int64_t panel, float* m) const {
    const float* const weights = c_.weights + panel * s_.terms.depth() * kPanel;
    const int64_t width = c_.out_width;
    const int64_t y_stride = s_.target.step * c_.y_pixel;
    int64_t line = begin / width, column = begin % width;
    if (s_.flat && !s_.few) {
      const bool foresee = panel == 0 && s_.pixel >= DirectShape::kStrided;
      const float* const first = start(line, column);
      float* const to = result(line, column, panel);
      const auto even = [&](int64_t p) {
        const float* const found = first + p * s_.pixel;
        if (foresee)
          for (int64_t k = 0; k < kTogether * s_.pixel; k += 16) __builtin_prefetch(found + DirectShape::kAhead * s_.pixel + k);
        return found;
      };
      const int64_t count = end - begin, unit = count % kTogether == 0 ? kTogether : 1;
      multiply_some(even, count, unit, panel, weights, m, [&](int64_t p) { return to + p * y_stride; });
      return;
    }
    if (s_.few || width % kTogether != 0) {
      // Pixels of a line lie evenly.
      while (begin < end) {
        const int64_t count = std::min(end - begin, width - column);
        const float* const first = start(line, column);
        if (s_.few)
          multiply_line(first, count, m);
        else
          multiply_some([&](int64_t p) { return first + p * s_.pixel; }, count, 1, panel, weights, m,
                        [&, to = result(line, column, panel)](int64_t p) { return to + p * y_stride; });
        m += count * kPanel;
        begin += count;
        ++line;
        column = 0;
      }
      return;
    }
    // Those of several lines do in small units, where the width is made of such.
    const float* next = start(line, column);
    float* to = result(line, column, panel);
    int64_t result_line = line, result_column = column;
    const auto following_result = [&](int64_t) {
      float* const found = to;
      result_column += kTogether;
      to += kTogether * y_stride;
      if (result_column == width) {
        result_column = 0;
        if (++result_line * width < pixels) to = result(result_line, 0, panel);
      }
      return found;
    };
    const bool foresee = s_.in_place && panel == 0 && s_.pixel >= DirectShape::kStrided;
    const int64_t floats = kTogether * s_.pixel;
    const auto following = [&](int64_t) {
      const float* const found = next;
      if (foresee)
        for (int64_t k = 0; k < floats; k += 16) __builtin_prefetch(found + DirectShape::kAhead * s_.pixel + k);
      column += kTogether;
      next += kTogether * s_.pixel;
      if (column == width) {
        column = 0;
        if (++line * width < pixels) next = start(line, 0);
      }
      return found;
    };
    multiply_some(following, end - begin, kTogether, panel, weights, m, following_result);
  }

  // The epilogue of what `multiply` left.
  template <bool kMasked, bool kResidual, bool kZ>
  void finish(int64_t begin, int64_t end, int64_t panel, const float* m) const {
    const int channel = static_cast<int>(panel) * kPanel, last_channel = std::min(channel + kPanel, c_.out_channels);
    while (begin < end) {
      const int64_t line = first_ + begin / c_.out_width, column = begin % c_.out_width;
      const int64_t count = std::min(end - begin, c_.out_width - column);
      const int64_t image = line / c_.out_height, pixel = s_.target.pixel(image, line % c_.out_height, column);
      for (int k = channel; k < last_channel; k += kLanes) {
        const Epilogue<kMasked, kResidual, kZ> finish(c_, image, k, std::min(kLanes, last_channel - k), s_.streams);
        const float* from = m + k - channel;
        const int64_t step = s_.target.step;
        for (int64_t j = 0; j < count; ++j) finish(load(from + j * kPanel), pixel + j * step);
      }
      m += count * kPanel;
      begin += count;
    }
    if (s_.streams) end_streams();
  }

 private:
  // Where the input of a line of outputs begins.
  int64_t strip_row(int64_t line) const {
    const uint32_t height = static_cast<uint32_t>(c_.out_height);
    const int64_t image = static_cast<uint32_t>(line) / height, row = static_cast<uint32_t>(line) % height;
    if (image == first_image_) return (row - first_row_) * c_.stride;
    return first_rows_ + (image - first_image_ - 1) * s_.image_rows + row * c_.stride;
  }

  // The first term of an output pixel; lines count from the block's first.
  const float* start(int64_t line, int64_t column) const {
    if (!s_.in_place) return strips_ + strip_row(first_ + line) * s_.terms.next + column * s_.pixel;
    const uint32_t height = static_cast<uint32_t>(c_.out_height), all = static_cast<uint32_t>(first_ + line);
    const int64_t image = all / height, row = all % height;
    return c_.x + (image * c_.height + row * c_.stride) * c_.width * c_.x_pixel + column * s_.pixel;
  }

  // Where a result of the product belongs, null where the product does not write it; lines count as in `start`.
  float* result(int64_t line, int64_t column, int64_t panel) const {
    if (!s_.finishes) return nullptr;
    const uint32_t height = static_cast<uint32_t>(c_.out_height), all = static_cast<uint32_t>(first_ + line);
    const int64_t image = all / height, row = all % height;
    return c_.y + s_.target.pixel(image, row, column) * c_.y_pixel + panel * kPanel;
  }

  template <typename Start, typename Result>
  void multiply_some(Start&& start, int64_t count, int64_t unit, int64_t panel, const float* weights, float* m,
                     Result&& target) const {
    const Finish finish{s_.target.step * c_.y_pixel, c_.bias ? c_.bias + panel * kPanel : nullptr, c_.scale, s_.streams};
    const Finish* const then = s_.finishes ? &finish : nullptr;
    if (is_half(c_.out_channels, panel))
      multiply_panel<1>(start, count, unit, s_.pixel, s_.terms, weights, m, kPanel, then, target);
    else
      multiply_panel<2>(start, count, unit, s_.pixel, s_.terms, weights, m, kPanel, then, target);
    if (then && s_.streams) end_streams();
  }

  void multiply_line(const float* from, int64_t count, float* m) const {
    for (; count >= kFewPixels; count -= kFewPixels, from += kFewPixels * s_.pixel, m += kFewPixels * kPanel)
      choose_few<kFewPixels>(c_.out_channels)(from, s_.pixel, s_.terms, c_.weights, m);
    for (; count > 0; --count, from += s_.pixel, m += kPanel)
      choose_few<1>(c_.out_channels)(from, s_.pixel, s_.terms, c_.weights, m);
  }

  const Conv& c_;
  const DirectShape& s_;
  const int64_t first_, first_image_, first_row_;
  int64_t first_rows_;
  const float* const strips_;
};

using FinishDirect = void (DirectBlock::*)(int64_t, int64_t, int64_t, const float*) const;

// --- all of it ------------------------------------------------------------------------------------------------------------------

inline void run_direct(const Conv& c, const Target& target, Team& team) {
  const DirectShape s(c, target);
  if (s.lines == 0 || c.out_width <= 0) return;
  const FillRow fill_row = choose_fill<false>(c);
  const FinishDirect finish = choose_epilogue(c, [](auto masked, auto residual, auto z) -> FinishDirect {
    return &DirectBlock::finish<decltype(masked)::value, decltype(residual)::value, decltype(z)::value>;
  });
  const int64_t blocks = (s.lines + c.block_rows - 1) / c.block_rows;
  const auto block = [&](int64_t index, const float* strips) {
    return DirectBlock(c, s, index * c.block_rows, std::min(s.lines, (index + 1) * c.block_rows), strips);
  };
  // Nearly equal parts of a block's pixels, cut between units that lie evenly.
  const auto parts = [](const DirectBlock& b) { return (b.pixels + DirectShape::kPixels - 1) / DirectShape::kPixels; };
  const auto cut = [&parts](const DirectBlock& b, int64_t part) {
    const int64_t count = parts(b);
    return part == count ? b.pixels : b.pixels * part / count / kTogether * kTogether;
  };
  const auto compute = [&](const DirectBlock& b, int64_t part, int64_t panel, float* m) {
    const int64_t begin = cut(b, part), end = cut(b, part + 1);
    b.multiply(begin, end, panel, m);
    if (!s.finishes) (b.*finish)(begin, end, panel, m);
  };
  const int64_t strip_floats = s.strip_floats(c), product_floats = s.product_floats();

  // What is read again soonest should be what the cache holds: the pixels, or a panel that all together would push out.
  const bool panel_by_panel = s.terms.depth() * c.out_channels > DirectShape::kResidentFloats;
  const auto compute_item = [&](const DirectBlock& b, int64_t item, float* m) {
    const int64_t count = parts(b);
    if (panel_by_panel)
      compute(b, item % count, item / count, m);
    else
      compute(b, item / s.panel_count, item % s.panel_count, m);
  };

  if (c.alone) {
    float* const strips = c.scratch + team.thread() * (strip_floats + product_floats);
    team.each(blocks, [&](int64_t index) {
      const DirectBlock b = block(index, strips);
      if (s.fills())
        for (int64_t row = 0; row < b.strip_rows; ++row) b.fill(row, fill_row, strips);
      for (int64_t item = 0; item < parts(b) * s.panel_count; ++item) compute_item(b, item, strips + strip_floats);
    });
    return;
  }
  float* const strips = c.scratch;
  float* const m = c.scratch + strip_floats + team.thread() * product_floats;
  for (int64_t index = 0; index < blocks; ++index) {
    const DirectBlock b = block(index, strips);
    if (s.fills()) team.each(b.strip_rows, [&](int64_t row) { b.fill(row, fill_row, strips); });
    team.each(parts(b) * s.panel_count, [&](int64_t item) { compute_item(b, item, m); });
  }
}

// The taps of a transpose's outputs whose index leaves `remainder` when divided by `spread`: `count` of them from `first` on,
// `spread` apart; the first reads the input at -`pad` of the first such output.
struct Taps {
  int first, count, pad;

  Taps(int kernel, int pad_before, int spread, int remainder) {
    first = ((pad_before - remainder) % spread + spread) % spread;
    count = first < kernel ? (kernel - first + spread - 1) / spread : 0;
    pad = (pad_before - remainder - first) / spread;
  }
};

// The convolutions that a transpose of a strided one consists of: body(part, target, floats of packed weights before its own).
template <typename Body>
void each_remainder(const Conv& c, const Body& body) {
  int64_t offset = 0;
  for (int i = 0; i < c.spread; ++i)
    for (int j = 0; j < c.spread; ++j) {
      const Taps rows(c.kernel_height, c.pad_top, c.spread, i), across(c.kernel_width, c.pad_left, c.spread, j);
      Conv part = c;
      part.kernel_height = rows.count;
      part.kernel_width = across.count;
      part.pad_top = rows.pad;
      part.pad_left = across.pad;
      part.out_height = (c.out_height - i + c.spread - 1) / c.spread;
      part.out_width = (c.out_width - j + c.spread - 1) / c.spread;
      part.block_rows = std::max(1, c.block_rows / c.spread);
      if (part.out_height > 0 && part.out_width > 0) {
        const Target target{c.out_height, c.out_width, c.spread, i, j};
        body(part, target, offset);
      }
      offset += packed_direct(c.out_channels, c.channels, rows.count, across.count);
    }
}

inline void run_direct(const Conv& c, Team& team) {
  if (c.spread <= 1) return run_direct(c, Target{c.out_height, c.out_width}, team);
  each_remainder(c, [&](Conv& part, const Target& target, int64_t offset) {
    part.weights += offset;
    run_direct(part, target, team);
  });
}

inline int64_t scratch_direct(const Conv& c, int threads) {
  if (c.spread <= 1) return DirectShape(c, Target{c.out_height, c.out_width}).scratch_floats(c, threads);
  int64_t most = 0;
  each_remainder(c, [&](const Conv& part, const Target& target, int64_t) {
    most = std::max(most, DirectShape(part, target).scratch_floats(part, threads));
  });
  return most;
}

}  // namespace coupfast
