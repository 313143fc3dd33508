// Vectors of kLanes floats: GCC/Clang vector extensions, with the few operations they lack.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace coupfast {

// Never fewer than eight lanes, so that a vector's mask is whole bytes; narrower machines take several registers for one.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRows = 12;  // kRows x 2 accumulators, 2 columns of B and a broadcast: 27 of 32 registers
#else
constexpr int kLanes = 8;
constexpr int kRows = 6;  // 15 of 16 registers (AVX2)
#endif
constexpr int kPanel = 2 * kLanes;  // output channels of one panel of packed weights

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// What a masked access may not touch AddressSanitizer does not look at; of a copy it looks at every byte.
#if defined(__SANITIZE_ADDRESS__)
#define COUPFAST_MASKED 0
#else
#define COUPFAST_MASKED 1
#endif

#if defined(__AVX512F__)
inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }
#elif defined(__AVX2__)
inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// The first `count` lanes; the others are zero.
inline Vector load_some(const float* from, int count) {
#if defined(__AVX512F__) && COUPFAST_MASKED
  return (Vector)_mm512_maskz_loadu_ps(first_lanes(count), from);
#elif defined(__AVX2__) && COUPFAST_MASKED
  return (Vector)_mm256_maskload_ps(from, first_lanes(count));
#else
  Vector v = {};
  std::memcpy(&v, from, sizeof(float) * static_cast<size_t>(count));
  return v;
#endif
}

inline void store_some(float* to, Vector v, int count) {
#if defined(__AVX512F__) && COUPFAST_MASKED
  _mm512_mask_storeu_ps(to, first_lanes(count), (__m512)v);
#elif defined(__AVX2__) && COUPFAST_MASKED
  _mm256_maskstore_ps(to, first_lanes(count), (__m256)v);
#else
  std::memcpy(to, &v, sizeof(float) * static_cast<size_t>(count));
#endif
}

// A store that leaves the caches alone: what it overwrites need not be read first. `to` is aligned to the vector, whose lines are
// whole with AVX-512 alone. Others see it after `end_streams`.
#if defined(__AVX512F__)
constexpr bool kStreams = true;
inline void stream(float* to, Vector v) { _mm512_stream_ps(to, (__m512)v); }
inline void end_streams() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
inline void stream(float* to, Vector v) { store(to, v); }
inline void end_streams() {}
#endif

// v without all lanes but the first `count`, which become zero.
inline Vector keep_some(Vector v, int count) {
  Vector kept = {};
  std::memcpy(&kept, &v, sizeof(float) * static_cast<size_t>(count));
  return kept;
}

// The sum of all lanes, halves first.
inline float sum_lanes(Vector v) {
#if defined(__AVX512F__)
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof v);
  const __m256 half = _mm256_add_ps(halves[0], halves[1]);
#elif defined(__AVX2__)
  const __m256 half = (__m256)v;
#endif
#if defined(__AVX2__)
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_shuffle_ps(sum, sum, 1)));
#else
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
#endif
}

inline Vector broadcast(float value) {
#if defined(__AVX512F__)
  return (Vector)_mm512_set1_ps(value);
#elif defined(__AVX2__)
  return (Vector)_mm256_set1_ps(value);
#else
  return value - Vector{};
#endif
}

// low = a0 b0 a1 b1 ... and high, of the lanes from the middle on.
inline void interleave(Vector a, Vector b, Vector* low, Vector* high) {
#if defined(__clang__) && defined(__AVX512F__)
  *low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  *high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__clang__)
  *low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  *high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  Integers lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i / 2 + (i % 2) * kLanes;
  *low = __builtin_shuffle(a, b, lane);
  *high = __builtin_shuffle(a, b, lane + kLanes / 2);
#endif
}

// a * b + c, rounded once where the machine can (the portable build rounds twice).
inline Vector fma(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  Vector r;
  const float32x4_t* pa = reinterpret_cast<const float32x4_t*>(&a);
  const float32x4_t* pb = reinterpret_cast<const float32x4_t*>(&b);
  const float32x4_t* pc = reinterpret_cast<const float32x4_t*>(&c);
  float32x4_t* pr = reinterpret_cast<float32x4_t*>(&r);
  for (int i = 0; i < kLanes / 4; ++i) pr[i] = vfmaq_f32(pc[i], pa[i], pb[i]);
  return r;
#else
  return a * b + c;
#endif
}

// sum + a * b, into the register of `sum`: left to choose, GCC takes other registers and spills those it runs out of. Of a sum
// that is taken by reference it would keep a copy in memory.
inline Vector accumulate(Vector sum, Vector a, Vector b) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#elif defined(__FMA__)
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
#else
  return fma(a, b, sum);
#endif
}

// One bit per lane: set where v > 0.
inline uint32_t positive(Vector v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_setzero_ps(), _CMP_GT_OQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GT_OQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(v[i] > 0.0f) << i;
  return bits;
#endif
}

// v where the lane's bit is set, zero elsewhere.
inline Vector where(uint32_t bits, Vector v) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
#else
  Integers lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = 1 << i;
  const Integers chosen = (lane & static_cast<int32_t>(bits)) != 0;
  return (Vector)((Integers)v & chosen);
#endif
}

// NaN stays NaN, as in PyTorch's ReLU.
inline Vector relu(Vector v) { return v < Vector{} ? Vector{} : v; }

// exp(v) to about one unit in the last place for |v| <= 87; v is clamped there, NaN stays NaN.
inline Vector exp(Vector v) {
  const Vector high = broadcast(87.0f), low = broadcast(-87.0f);
  v = v > high ? high : v;
  v = v < low ? low : v;
  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits of the sum.
  const Vector shift = broadcast(12582912.0f);
  const Vector shifted = fma(v, broadcast(1.44269504088896341f), shift);
  const Vector n = shifted - shift;
  Vector r = fma(n, broadcast(-0.693145751953125f), v);  // ln 2 in two parts, the first with 15 bits
  r = fma(n, broadcast(-1.42860682030941723e-6f), r);
  // Taylor's series to r^7 / 5040: |r| <= ln(2) / 2 leaves an error below 6e-9.
  Vector p = broadcast(1.98412698e-4f);
  p = fma(p, r, broadcast(1.38888889e-3f));
  p = fma(p, r, broadcast(8.33333333e-3f));
  p = fma(p, r, broadcast(4.16666667e-2f));
  p = fma(p, r, broadcast(1.66666667e-1f));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  const Integers exponent = (Integers)shifted << 23;  // n * 2^23, whatever stands above
  return (Vector)((Integers)p + exponent);
}

// Zero below -87, where `exp` stops: v * sigmoid(v) must vanish there however large -v is.
inline Vector sigmoid(Vector v) {
  const Vector s = broadcast(1.0f) / (broadcast(1.0f) + exp(-v));
  return v < broadcast(-87.0f) ? Vector{} : s;
}

enum Activation : int32_t { kIdentity = 0, kRelu = 1, kSilu = 2 };

}  // namespace coupfast
