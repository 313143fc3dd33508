// One guided step with its noise: y = a x + b eps_hat + c guidance + d z [+ e x_in + f z' + p x_before + q eps_before], in the bits
// of the definitions in guided_step/ and noise/. Nothing here may call fma: the definitions round every product and every sum.
#pragma once

#include "parallel.h"
#include "vector.h"

namespace coupfast {

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

// Which of kLanes blocks a lane works on: unpacking stays within 128 bits, and so puts these in order.
constexpr int block_of(int lane) { return lane % 4 * (kLanes / 4) + lane / 4; }

// High and low words of the 64-bit products.
inline Words multiply(Words v, uint32_t factor, Words* high) {
#if defined(__AVX512F__)
  const __m512i f = _mm512_set1_epi32(static_cast<int32_t>(factor));
  const __m512i even = _mm512_mul_epu32((__m512i)v, f), odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)v, 32), f);
  *high = (Words)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
  return (Words)_mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
#elif defined(__AVX2__)
  const __m256i f = _mm256_set1_epi32(static_cast<int32_t>(factor));
  const __m256i even = _mm256_mul_epu32((__m256i)v, f), odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)v, 32), f);
  *high = (Words)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  return (Words)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
#else
  Words low;
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(v[i]) * factor;
    (*high)[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
  return low;
#endif
}

// Philox 4x32-10 of `counter`, in place.
inline void philox(Words (&counter)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    Words high_a, high_b;
    const Words low_a = multiply(counter[0], 0xD2511F53u, &high_a), low_b = multiply(counter[2], 0xCD9E8D57u, &high_b);
    counter[0] = high_b ^ counter[1] ^ key0;
    counter[1] = low_b;
    counter[2] = high_a ^ counter[3] ^ key1;
    counter[3] = low_a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The IEEE root. The definition's, rounded to float64 and then to float32, is the same number: noise/definition.py.
inline Vector square_root(Vector v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_sqrt_ps((__m512)v);
#elif defined(__AVX2__)
  return (Vector)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

inline Vector to_float(Integers v) { return __builtin_convertvector(v, Vector); }

// The two normals of a pair of words.
inline void box_muller(Words w0, Words w1, Vector* z0, Vector* z1) {
  constexpr float kLog[] = {0.3333333134651184f,  -0.250008225440979f,  0.20001226663589478f, -0.16623356938362122f,
                            0.14201761782169342f, -0.131601944565773f, 0.12761549651622772f, -0.07634429633617401f};
  constexpr float kSin[] = {0.7853981852531433f, -0.08074543625116348f, 0.002490007085725665f, -3.595450834836811e-05f};
  constexpr float kCos[] = {-0.3084251284599304f, 0.015854327008128166f, -0.00032594200456514955f, 3.5313344142196e-06f};
  constexpr int32_t kSqrtHalf = 0x3F3504F3;

  const Integers shifted = (Integers)to_float((Integers)((w0 >> 9) * 2 + 1)) - kSqrtHalf;
  const Vector exponent = to_float(shifted >> 23) - 24.0f;
  const Vector f = (Vector)((shifted & 0x7FFFFF) + kSqrtHalf) - 1.0f;
  Vector p = f * kLog[7] + kLog[6];
  for (int i = 5; i >= 0; --i) p = p * f + kLog[i];
  const Vector f2 = f * f;
  const Vector tail = (f2 * f) * p - 0.5f * f2;
  const Vector radius = square_root(-2.0f * (exponent * 0.6931471824645996f + (f + tail)));

  const Integers n = (Integers)((w1 >> 9) * 2 + 1);
  const Integers quadrant = (n + 0x200000) >> 22;
  const Vector y = to_float(n - (quadrant << 22)) * 0x1p-21f;
  const Vector y2 = y * y;
  const Vector s = (((y2 * kSin[3] + kSin[2]) * y2 + kSin[1]) * y2 + kSin[0]) * y;
  const Vector c = (((y2 * kCos[3] + kCos[2]) * y2 + kCos[1]) * y2 + kCos[0]) * y2 + 1.0f;
  const Integers swap = (quadrant & 1) != 0;
  const Vector cosine = swap ? s : c, sine = swap ? c : s;
  *z0 = radius * (Vector)((Words)cosine ^ ((Words)(quadrant + 1) & 2) << 30);  // bit 1 to the sign's place
  *z1 = radius * (Vector)((Words)sine ^ ((Words)quadrant & 2) << 30);
}

// to[4 block_of(l) + i] = z[i][l]
inline void store_blocks(float* to, const Vector (&z)[4]) {
#if defined(__AVX512F__)
  const __m512 a = _mm512_unpacklo_ps((__m512)z[0], (__m512)z[1]), b = _mm512_unpackhi_ps((__m512)z[0], (__m512)z[1]);
  const __m512 c = _mm512_unpacklo_ps((__m512)z[2], (__m512)z[3]), d = _mm512_unpackhi_ps((__m512)z[2], (__m512)z[3]);
  store(to, (Vector)_mm512_unpacklo_pd((__m512d)a, (__m512d)c));
  store(to + kLanes, (Vector)_mm512_unpackhi_pd((__m512d)a, (__m512d)c));
  store(to + 2 * kLanes, (Vector)_mm512_unpacklo_pd((__m512d)b, (__m512d)d));
  store(to + 3 * kLanes, (Vector)_mm512_unpackhi_pd((__m512d)b, (__m512d)d));
#elif defined(__AVX2__)
  const __m256 a = _mm256_unpacklo_ps((__m256)z[0], (__m256)z[1]), b = _mm256_unpackhi_ps((__m256)z[0], (__m256)z[1]);
  const __m256 c = _mm256_unpacklo_ps((__m256)z[2], (__m256)z[3]), d = _mm256_unpackhi_ps((__m256)z[2], (__m256)z[3]);
  store(to, (Vector)_mm256_unpacklo_pd((__m256d)a, (__m256d)c));
  store(to + kLanes, (Vector)_mm256_unpackhi_pd((__m256d)a, (__m256d)c));
  store(to + 2 * kLanes, (Vector)_mm256_unpacklo_pd((__m256d)b, (__m256d)d));
  store(to + 3 * kLanes, (Vector)_mm256_unpackhi_pd((__m256d)b, (__m256d)d));
#else
  for (int l = 0; l < kLanes; ++l)
    for (int i = 0; i < 4; ++i) to[4 * block_of(l) + i] = z[i][l];
#endif
}

struct GuidedStep {
  int64_t batch, channels, pixels;
  // Floats from a pixel to the next: `channels` if channels-last, else 1. As y's where there is no tensor.
  int64_t x_pixel, eps_pixel, guidance_pixel, x_in_pixel, x_before_pixel, eps_before_pixel, y_pixel;
  uint64_t seed;
  int64_t step;           // of the noise, in [0, 2^32)
  int64_t second_noise;   // whether there is a second noise, of step 2^31 + step
  float a, b, c, d, e, f, p, q;
  const float* x;         // or null: y = z
  const float* eps_hat;   // or null, as the next four
  const float* guidance;
  const float* x_in;
  const float* x_before;
  const float* eps_before;
  const int64_t* ids;     // [batch], in [0, 2^32); or null: no noise
  const int64_t* draw;    // [batch], in [0, 2^32)
  float* y;               // may be one of those read
};

constexpr int64_t kTile = 256;  // pixels at a time: whole groups of blocks, and few enough that y stays in L1 for its noise
constexpr int64_t kGroup = 4 * kLanes;

// Noise of elements `element` … `element` + count - 1 of an image, count at most kTile: from the returned address in `normals` on.
inline const float* tile_normals(
    const GuidedStep& p, int64_t image, int64_t element, int64_t count, int64_t noise_step, float (&normals)[kTile + kGroup]) {
  Words block;
  for (int l = 0; l < kLanes; ++l) block[l] = static_cast<uint32_t>(block_of(l));
  const Words step = Words{} + static_cast<uint32_t>(noise_step), draw = Words{} + static_cast<uint32_t>(p.draw[image]),
              id = Words{} + static_cast<uint32_t>(p.ids[image]);
  const int64_t skipped = element % 4;
  block += static_cast<uint32_t>(element / 4);
  for (int64_t i = 0; i < skipped + count; i += kGroup) {
    Words w[4] = {block, step, draw, id};
    philox(w, static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
    Vector z[4];
    box_muller(w[0], w[1], &z[0], &z[1]);
    box_muller(w[2], w[3], &z[2], &z[3]);
    store_blocks(normals + i, z);
    block += static_cast<uint32_t>(kLanes);
  }
  return normals + skipped;
}

// sum += coefficient * term, for `count` elements that lie `pixel` floats apart in `term`.
inline void add_term(float* sum, float coefficient, const float* term, int64_t pixel, int64_t count) {
  if (pixel == 1)
    for (int64_t i = 0; i < count; ++i) sum[i] = sum[i] + coefficient * term[i];
  else
    for (int64_t i = 0; i < count; ++i) sum[i] = sum[i] + coefficient * term[i * pixel];
}

inline void run_guided_step(const GuidedStep& p, Team& team) {
  const bool last_columns = p.x_in || p.second_noise || p.x_before || p.eps_before;

  // Where all lie alike, an image is one row of floats to all but the noise, which counts (channel, row, column).
  const bool alike = p.x_pixel == p.y_pixel && p.eps_pixel == p.y_pixel && p.guidance_pixel == p.y_pixel &&
                     p.x_in_pixel == p.y_pixel && p.x_before_pixel == p.y_pixel && p.eps_before_pixel == p.y_pixel;
  const bool flat = alike && (p.y_pixel == 1 || !p.ids);
  const int64_t channels = flat ? 1 : p.channels, pixels = flat ? p.channels * p.pixels : p.pixels;
  const int64_t tiles = (pixels + kTile - 1) / kTile;

  team.each(p.batch * tiles, [&](int64_t item) {
    const int64_t image = item / tiles, first = item % tiles * kTile, count = std::min(kTile, pixels - first);
    const int64_t start = image * channels * pixels;
    const auto offset = [=](int64_t channel, int64_t pixel) {
      return start + (pixel == 1 || flat ? channel * pixels + first : first * pixel + channel);
    };

    if (last_columns) {
      // Sums stay beside y until they are whole: y may be what is read last.
      const auto stride = [=](int64_t pixel) { return flat ? 1 : pixel; };
      for (int64_t channel = 0; channel < channels; ++channel) {
        float sum[kTile], normals[kTile + kGroup];
        const auto add = [&](float coefficient, const float* tensor, int64_t pixel) {
          if (tensor) add_term(sum, coefficient, tensor + offset(channel, pixel), stride(pixel), count);
        };
        const auto add_noise = [&](float coefficient, int64_t step) {
          const int64_t element = channel * pixels + first;
          add_term(sum, coefficient, tile_normals(p, image, element, count, step, normals), 1, count);
        };
        const float* const x = p.x + offset(channel, p.x_pixel);
        for (int64_t i = 0; i < count; ++i) sum[i] = p.a * x[i * stride(p.x_pixel)];
        add(p.b, p.eps_hat, p.eps_pixel);
        add(p.c, p.guidance, p.guidance_pixel);
        if (p.ids) add_noise(p.d, p.step);
        add(p.e, p.x_in, p.x_in_pixel);
        if (p.second_noise) add_noise(p.f, (int64_t{1} << 31) + p.step);
        add(p.p, p.x_before, p.x_before_pixel);
        add(p.q, p.eps_before, p.eps_before_pixel);
        float* const y = p.y + offset(channel, p.y_pixel);
        for (int64_t i = 0; i < count; ++i) y[i * stride(p.y_pixel)] = sum[i];
      }
      return;
    }

    if (p.x && alike) {
      const int64_t from = start + first * channels, floats = count * channels;
      for (int64_t i = 0; i < floats; i += kLanes) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLanes, floats - i));
        const auto get = [=](const float* tensor) {
          return lanes == kLanes ? load(tensor + from + i) : load_some(tensor + from + i, lanes);
        };
        Vector y = p.a * get(p.x);
        if (p.eps_hat) y = y + p.b * get(p.eps_hat);
        if (p.guidance) y = y + p.c * get(p.guidance);
        if (lanes == kLanes)
          store(p.y + from + i, y);
        else
          store_some(p.y + from + i, y, lanes);
      }
    } else if (p.x) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        const int64_t x = offset(channel, p.x_pixel), eps = offset(channel, p.eps_pixel);
        const int64_t guidance = offset(channel, p.guidance_pixel), to = offset(channel, p.y_pixel);
        for (int64_t i = 0; i < count; ++i) {
          float y = p.a * p.x[x + i * p.x_pixel];
          if (p.eps_hat) y = y + p.b * p.eps_hat[eps + i * p.eps_pixel];
          if (p.guidance) y = y + p.c * p.guidance[guidance + i * p.guidance_pixel];
          p.y[to + i * p.y_pixel] = y;
        }
      }
    }

    for (int64_t channel = 0; p.ids && channel < channels; ++channel) {
      float normals[kTile + kGroup];
      const float* const z = tile_normals(p, image, channel * pixels + first, count, p.step, normals);
      float* const y = p.y + offset(channel, p.y_pixel);
      if (!p.x)
        for (int64_t i = 0; i < count; ++i) y[i * p.y_pixel] = z[i];
      else if (p.y_pixel == 1)
        for (int64_t i = 0; i < count; ++i) y[i] = y[i] + p.d * z[i];
      else
        for (int64_t i = 0; i < count; ++i) y[i * p.y_pixel] = y[i * p.y_pixel] + p.d * z[i];
    }
  });
}

}  // namespace coupfast
