// Sixteen lanes at a time, on every instruction set.
//
// The types are the compiler's vector extensions, which it splits where registers are narrower. Only what
// it has no words for is written with intrinsics: dot products of half and byte types, and conversions.
// Every file that includes this is compiled once for each instruction set, with TREADLE_NS naming it; all is
// static, so that no code for a newer CPU is ever linked into the path of an older one.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define TREADLE_AVX512 1
#elif defined(__AVX2__)
#define TREADLE_AVX2 1
#endif

namespace TREADLE_NS {

constexpr int LANES = 16;

typedef float v16f __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint32_t v16u __attribute__((vector_size(64)));

#define ALWAYS static inline __attribute__((always_inline))

// Rows of a product that are computed together: as many as registers (of sixteen floats) hold, with two vectors of
// columns.
#if defined(TREADLE_AVX512)
constexpr int TILE_ROWS = 12, REGISTERS = 32;
#elif defined(TREADLE_AVX2)
constexpr int TILE_ROWS = 3, REGISTERS = 8;
#else
constexpr int TILE_ROWS = 2, REGISTERS = 4;
#endif

template <typename T>
ALWAYS T least(T a, T b) { return a < b ? a : b; }
template <typename T>
ALWAYS T most(T a, T b) { return a > b ? a : b; }

template <typename V>
ALWAYS V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename V>
ALWAYS void store(void* p, V v) { std::memcpy(p, &v, sizeof(V)); }

// Not `v16f{} + x`: that is computed, as nobody may drop 0 + -0.
ALWAYS v16f splat(float x) {
#if defined(TREADLE_AVX512)
  return (v16f)_mm512_set1_ps(x);
#else
  return v16f{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}
ALWAYS v16u splat_u(uint32_t x) { return v16u{} + x; }
ALWAYS v16i splat_i(int32_t x) { return v16i{} + x; }

// The first n of sixteen floats, the others zero.
ALWAYS v16f load_some(const float* p, int64_t n) {
  if (n >= LANES) return load<v16f>(p);
  v16f v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

ALWAYS void store_some(float* p, v16f v, int64_t n) {
  if (n >= LANES) {
    store(p, v);
    return;
  }
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

ALWAYS v16f as_float(v16u bits) { return (v16f)bits; }
ALWAYS v16u as_bits(v16f x) { return (v16u)x; }
ALWAYS v16f to_float(v16i x) { return __builtin_convertvector(x, v16f); }
ALWAYS v16f choose(v16i mask, v16f yes, v16f no) {
  return as_float(((v16u)mask & as_bits(yes)) | (~(v16u)mask & as_bits(no)));
}

// a * b + c, rounded once where the CPU can. The compiler is told to contract nothing by itself: it might
// do so for one number of rows and not for another.
ALWAYS v16f fused(v16f a, v16f b, v16f c) {
#if defined(TREADLE_AVX512)
  return (v16f)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TREADLE_AVX2)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  std::memcpy(z, &c, 64);
  for (int half = 0; half < 2; ++half) z[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
  std::memcpy(&c, z, 64);
  return c;
#else
  return a * b + c;
#endif
}

ALWAYS v16f larger(v16f a, v16f b) {
#if defined(TREADLE_AVX512)
  return (v16f)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return choose(a > b, a, b);
#endif
}

// Halves of sums and maxima, in one order always.
ALWAYS float sum_of(v16f v) {
#if defined(TREADLE_AVX512)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float s[LANES];
  store(s, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) s[i] += s[i + width];
  return s[0];
#endif
}

ALWAYS int32_t sum_of(v16i v) {
#if defined(TREADLE_AVX512)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
#endif
}

ALWAYS bool any_of(v16i mask) { return sum_of(mask) != 0; }

ALWAYS float largest_of(v16f v) {
#if defined(TREADLE_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float s[LANES];
  store(s, v);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) s[i] = most(s[i], s[i + width]);
  return s[0];
#endif
}

ALWAYS v16f magnitude(v16f x) { return as_float(as_bits(x) & splat_u(0x7fffffffu)); }

// To the nearest integer, ties to even, for |x| < 2^22.
ALWAYS v16i nearest(v16f x) {
#if defined(TREADLE_AVX512)
  return (v16i)_mm512_cvtps_epi32((__m512)x);
#else
  const v16f magic = splat(12582912.0f);  // 1.5 * 2^23
  volatile v16f shifted = x + magic;      // or the compiler cancels the two
  return (v16i)as_bits(shifted) - (v16i)as_bits(magic);
#endif
}

// exp, to 2 ulp; exactly 0 below -87. After Cephes' expf: 2^n times a polynomial in the rest.
ALWAYS v16f exp_of(v16f x) {
  const v16i tiny = x < splat(-87.0f);
  v16f y = choose(x > splat(88.0f), splat(88.0f), x);
  y = choose(tiny, splat(0.0f), y);
  const v16i n = nearest(y * 1.44269504088896341f);
  const v16f f = to_float(n);
  const v16f r = fused(f, splat(2.12194440e-4f), fused(f, splat(-0.693359375f), y));
  v16f p = splat(1.9875691500e-4f);
  p = fused(p, r, splat(1.3981999507e-3f));
  p = fused(p, r, splat(8.3334519073e-3f));
  p = fused(p, r, splat(4.1665795894e-2f));
  p = fused(p, r, splat(1.6666665459e-1f));
  p = fused(p, r, splat(5.0000001201e-1f));
  p = fused(p, r * r, r + 1.0f);
  const v16f scale = as_float((v16u)((n + 127) << 23));
  return choose(tiny, splat(0.0f), p * scale);
}

// Sixteen bfloat16 values to memory, rounded to nearest, ties to even.
ALWAYS void store_bf16(uint16_t* p, v16f x) {
#if defined(TREADLE_AVX512)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &half, 32);
#else
  for (int i = 0; i < LANES; ++i) p[i] = treadle::to_bfloat16(x[i]);
#endif
}

// acc + a.low * b.low + a.high * b.high, of pairs of bfloat16 in each lane.
ALWAYS v16f dot_bf16(v16f acc, v16u a, v16u b) {
#if defined(TREADLE_AVX512)
  return (v16f)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc = fused(as_float(a << 16), as_float(b << 16), acc);
  return fused(as_float(a & splat_u(0xffff0000u)), as_float(b & splat_u(0xffff0000u)), acc);
#endif
}

#if defined(TREADLE_AVX2)
ALWAYS __m256i dot_bytes_avx2(__m256i acc, __m256i unsigned4, __m256i signed4) {
  const __m256i low = _mm256_set1_epi16(0x00ff);
  const __m256i even = _mm256_madd_epi16(
      _mm256_and_si256(unsigned4, low), _mm256_srai_epi16(_mm256_slli_epi16(signed4, 8), 8));
  const __m256i odd =
      _mm256_madd_epi16(_mm256_srli_epi16(unsigned4, 8), _mm256_srai_epi16(signed4, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
#endif

// acc + the four products of unsigned bytes with signed bytes in each lane; exact.
ALWAYS v16i dot_bytes(v16i acc, v16u unsigned4, v16u signed4) {
#if defined(TREADLE_AVX512)
  return (v16i)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)unsigned4, (__m512i)signed4);
#elif defined(TREADLE_AVX2)
  __m256i sums[2], left[2], right[2];
  std::memcpy(sums, &acc, 64);
  std::memcpy(left, &unsigned4, 64);
  std::memcpy(right, &signed4, 64);
  for (int half = 0; half < 2; ++half) sums[half] = dot_bytes_avx2(sums[half], left[half], right[half]);
  std::memcpy(&acc, sums, 64);
  return acc;
#else
  const v16i mask = splat_i(0xff);
  const v16i u = (v16i)unsigned4, s = (v16i)signed4;
  acc += (u & mask) * ((s << 24) >> 24);
  acc += ((u >> 8) & mask) * ((s << 16) >> 24);
  acc += ((u >> 16) & mask) * ((s << 8) >> 24);
  return acc + ((u >> 24) & mask) * (s >> 24);
#endif
}

// Sixteen integers in -128..127 to bytes.
ALWAYS void store_bytes(int8_t* p, v16i x) {
#if defined(TREADLE_AVX512)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)x);
  std::memcpy(p, &bytes, 16);
#else
  for (int i = 0; i < LANES; ++i) p[i] = (int8_t)x[i];
#endif
}

ALWAYS uint32_t word_at(const void* p) {
  uint32_t w;
  std::memcpy(&w, p, 4);
  return w;
}

}  // namespace TREADLE_NS
