// Some queries of one sequence and key head over the cache: the arithmetic of attention, by tile of keys.
//
// A query's result has the same bits however the step is put together. Tiles and partitions of keys stand at
// fixed positions, a query's sums go through them in order, and a key that it does not see adds an exact
// zero. Rows are only computed side by side, partitions only at the same time.
#pragma once

#include "attention_parts.h"

namespace TREADLE_NS {

using namespace treadle;

namespace {

template <typename E>
struct Attention {
  const AttentionCall& c;
  const Step& s;
  const int64_t D, G, KH, B, width;
  uint8_t* queries;  // [key head][rows][group][D]

  Attention(const AttentionCall& call, const Step& step, void* memory)
      : c(call), s(step), D(call.head_dim), G(call.heads / call.key_heads), KH(call.key_heads), B(call.cache.block),
        width((call.heads + 2 * call.key_heads) * call.head_dim), queries((uint8_t*)memory) {}

  ALWAYS int64_t stored_bytes(const AttentionCall& c) { return c.cache.kind == INT8 ? 1 : E::BYTES; }

  uint8_t* keys_at(int64_t block, int64_t head) const {
    return (uint8_t*)c.cache.keys + (block * KH + head) * B * D * stored_bytes(c);
  }
  uint8_t* values_at(int64_t block, int64_t head) const {
    return (uint8_t*)c.cache.values + (block * KH + head) * B * D * stored_bytes(c);
  }

  // Norms (if there is a weight) and turns one head, into floats.
  void turn(const float* x, const float* norm_weight, int64_t position, float* out) const {
    const int64_t half = D / 2;
    v16f norm = splat(1.0f);
    if (norm_weight) {
      v16f squares{};
      for (int64_t d = 0; d < D; d += LANES) {
        const v16f v = load<v16f>(x + d);
        squares = fused(v, v, squares);
      }
      norm = splat(1.0f / __builtin_sqrtf(sum_of(squares) / (float)D + c.epsilon));
    }
    const float *cos = c.cos + position * half, *sin = c.sin + position * half;
    for (int64_t d = 0; d < half; d += LANES) {
      const int64_t left = half - d;
      v16f a = load_some(x + d, left) * norm, b = load_some(x + half + d, left) * norm;
      if (norm_weight) {
        a = a * load_some(norm_weight + d, left);
        b = b * load_some(norm_weight + half + d, left);
      }
      const v16f co = load_some(cos + d, left), si = load_some(sin + d, left);
      store_some(out + d, fused(a, co, -(b * si)), left);
      store_some(out + half + d, fused(b, co, a * si), left);
    }
  }

  void write_key(const float* key, int64_t block, int64_t head, int64_t offset) const {
    uint8_t* panel = keys_at(block, head) + offset / LANES * (LANES * D * stored_bytes(c));
    const int64_t lane = offset % LANES;
    if (c.cache.kind == INT8) {
      const float scale = quantised_scale(key);
      const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
      c.cache.key_scales[(block * KH + head) * B + offset] = scale;
      for (int64_t d = 0; d < D; d += LANES) {
        int8_t q[LANES];
        store_bytes(q, nearest(load<v16f>(key + d) * inverse));
        for (int i = 0; i < LANES; ++i)
          panel[((d + i) / 2 * LANES + lane) * 2 + (d + i) % 2] = (uint8_t)q[i];
      }
      return;
    }
    alignas(64) uint8_t row[LANES * 4];
    for (int64_t d = 0; d < D; d += LANES) {
      E::put(row, load<v16f>(key + d));
      for (int i = 0; i < LANES; i += E::STEP)
        std::memcpy(panel + ((d + i) / E::STEP * LANES + lane) * 4, row + i * E::BYTES, 4);
    }
  }

  // `last`: no later token of this step follows in the sequence. Its pair's other half, which is not there
  // yet, is multiplied by zero: it must not be what a failed request left, which may be NaN.
  void write_value(const float* value, int64_t block, int64_t head, int64_t offset, bool last) const {
    uint8_t* values = values_at(block, head);
    if (c.cache.kind == INT8) {
      const float scale = quantised_scale(value);
      const float inverse = scale > 0 ? 1.0f / scale : 0.0f;
      c.cache.value_scales[(block * KH + head) * B + offset] = scale;
      uint8_t* out = values + offset / 2 * D * 2 + offset % 2;
      for (int64_t d = 0; d < D; d += LANES) {
        int8_t q[LANES];
        store_bytes(q, nearest(load<v16f>(value + d) * inverse));
        for (int i = 0; i < LANES; ++i) out[(d + i) * 2] = (uint8_t)q[i];
      }
      return;
    }
    alignas(64) uint8_t row[LANES * 4];
    uint8_t* out = values + offset / E::STEP * D * 4;
    const int64_t place = offset % E::STEP;
    for (int64_t d = 0; d < D; d += LANES) {
      E::put(row, load<v16f>(value + d));
      for (int i = 0; i < LANES; ++i) {
        uint8_t* at = out + (d + i) * 4;
        std::memcpy(at + place * E::BYTES, row + i * E::BYTES, E::BYTES);
        if (E::STEP == 2 && last && place == 0) std::memset(at + 2, 0, 2);
      }
    }
  }

  float quantised_scale(const float* x) const {
    v16f top{};
    for (int64_t d = 0; d < D; d += LANES) top = larger(top, magnitude(load<v16f>(x + d)));
    return largest_of(top) / 127.0f;
  }

  // The row's queries to scratch, its keys and values to the cache.
  void take_in(int64_t row, int64_t sequence, float* wide) const {
    const int64_t position = s.positions[row];
    const int32_t* table = s.tables + s.table_of[sequence];
    const int64_t block = table[position / B], offset = position % B;
    const float* x = c.qkv + row * width;
    for (int64_t head = 0; head < c.heads; ++head, x += D) {
      turn(x, c.q_norm, position, wide);
      uint8_t* out = queries + (((head / G) * s.rows + row) * G + head % G) * D * E::BYTES;
      for (int64_t d = 0; d < D; d += LANES) E::put(out + d * E::BYTES, load<v16f>(wide + d));
    }
    for (int64_t head = 0; head < KH; ++head, x += D) {
      turn(x, c.k_norm, position, wide);
      write_key(wide, block, head, offset);
    }
    const bool last = row + 1 == s.row_of[sequence + 1];
    for (int64_t head = 0; head < KH; ++head, x += D) write_value(x, block, head, offset, last);
  }

  // INT8: sixteen keys, or pairs of values, to bfloat16; small integers are exact there.
  ALWAYS void widen(const uint8_t* from, uint8_t* to, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
      v16f x;
#if defined(TREADLE_AVX512)
      __m128i bytes;
      std::memcpy(&bytes, from + i, 16);
      x = (v16f)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
      for (int lane = 0; lane < LANES; ++lane) x[lane] = (float)(int8_t)from[i + lane];
#endif
      E::put(to + i * E::BYTES, x);
    }
  }

  // Of W times sixteen keys.
  template <int R, int W>
  ALWAYS void scores(const uint8_t* q, const uint8_t* const* keys, int64_t steps, int64_t stride, float* out) {
    v16f acc[R][W];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i) acc[r][i] = v16f{};
    for (int64_t step = 0; step < steps; ++step, q += 4) {
      v16u b[W];
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i) b[i] = load<v16u>(keys[i] + 64 * step);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const v16u x = splat_u(word_at(q + r * stride));
#pragma GCC unroll 4
        for (int i = 0; i < W; ++i) acc[r][i] = E::mac(acc[r][i], x, b[i]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i) store(out + r * TILE + i * LANES, acc[r][i]);
  }

  // mix += weights * values, for W vectors of dimensions from d on, or for as many as there are.
  template <int R, int W>
  ALWAYS void mixed(const uint8_t* weights, const uint8_t* const* values, int64_t steps, int64_t D, int64_t d,
                    float* mix) {
    constexpr int PER = 16 / E::STEP;  // steps of a row of sixteen keys
    int64_t at[W];
    for (int i = 0; i < W; ++i) at[i] = d + i * LANES < D ? d + i * LANES : d;
    v16f acc[R][W];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i) acc[r][i] = load<v16f>(mix + r * D + at[i]);
    for (int64_t step = 0; step < steps; ++step) {
      const uint8_t* v = values[step / PER] + step % PER * D * 4;
      v16u b[W];
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i) b[i] = load<v16u>(v + at[i] * 4);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const v16u x = splat_u(word_at(weights + r * TILE * E::BYTES + step * 4));
#pragma GCC unroll 4
        for (int i = 0; i < W; ++i) acc[r][i] = E::mac(acc[r][i], x, b[i]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < W; ++i) store(mix + r * D + at[i], acc[r][i]);
  }

  // One tile of keys, from `from` on, for R rows. Keys and values are read line after line, which a CPU foresees as
  // well as it can be told.
  template <int R>
  void tile(const Item& item, int64_t from, int64_t seen_to, Part& part, uint8_t* wide) const {
    constexpr int W = R * 4 + 5 <= REGISTERS ? 4 : 2;  // vectors side by side: few rows wait for their own sums else
    const int32_t* table = s.tables + s.table_of[item.sequence];
    const int64_t first_row = s.row_of[item.sequence], start = s.start_of[item.sequence];
    const uint8_t* q = queries + ((item.head * s.rows + first_row) * G + item.first) * D * E::BYTES;
    const int64_t spans = (seen_to - from + LANES - 1) / LANES;  // of sixteen keys, at most four
    const uint8_t *keys[4], *values[4];
    const float *key_scales[4], *value_scales[4];
    const int64_t span_bytes = LANES * D * stored_bytes(c);
    for (int64_t i = 0; i < spans; ++i) {
      const int64_t key = from + i * LANES, block = table[key / B], offset = key % B;
      keys[i] = keys_at(block, item.head) + offset / LANES * span_bytes;
      values[i] = values_at(block, item.head) + offset / LANES * span_bytes;
      if (c.cache.kind == INT8) {
        const int64_t at = (block * KH + item.head) * B + offset;
        key_scales[i] = c.cache.key_scales + at;
        value_scales[i] = c.cache.value_scales + at;
        uint8_t *k = wide + 2 * i * LANES * D * E::BYTES, *v = k + LANES * D * E::BYTES;
        widen(keys[i], k, LANES * D);
        widen(values[i], v, LANES * D);
        keys[i] = k;
        values[i] = v;
      }
    }
    for (int64_t i = spans; i < 4; ++i) keys[i] = keys[spans - 1];  // weighed, and not looked at
    alignas(64) float score[R * TILE];
    alignas(64) uint8_t weight[R * TILE * E::BYTES];
    for (int64_t i = 0; i < spans; i += W)
      scores<R, W>(q, keys + i, D / E::STEP, D * E::BYTES, score + i * LANES);

    const v16i lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int r = 0; r < R; ++r) {
      const int64_t position = start + (item.first + r) / G;
      const int64_t least_key = c.window ? most<int64_t>(0, position - c.window + 1) : 0;
      v16f x[4], high = splat(NOTHING);
      for (int64_t i = 0; i < 4; ++i) {
        if (i >= spans) {
          x[i] = splat(NOTHING);
          continue;
        }
        x[i] = load<v16f>(score + r * TILE + i * LANES) * c.scale;
        if (c.cache.kind == INT8) x[i] = x[i] * load<v16f>(key_scales[i]);
        const int64_t key = from + i * LANES;
        if (key + LANES - 1 > position || key < least_key) {
          const v16i at = lanes + (int32_t)key;
          x[i] = choose((at <= splat_i((int32_t)position)) & (at >= splat_i((int32_t)least_key)), x[i],
                        splat(NOTHING));
        }
        high = larger(high, x[i]);
      }
      const float tile_top = largest_of(high), top = most(part.top[r], tile_top);
      // A score that is NaN makes no maximum: it must come out, not be lost.
      const bool blind = top == NOTHING;
      const v16f shift = splat(blind ? 0.0f : top);
      v16f sum{};
      for (int64_t i = 0; i < 4; ++i) {
        v16f p = exp_of(x[i] - shift);
        p = choose(x[i] == x[i], p, x[i]);
        uint8_t* out = weight + (r * TILE + i * LANES) * E::BYTES;
        if (c.cache.kind == INT8) {
          // The values' scales go into the weights; what is not there has none.
          sum = sum + p;
          if (i < spans) p = choose(p > splat(0.0f), p * load<v16f>(value_scales[i]), p);
          E::put(out, p);
        } else {
          E::put(out, p);
          sum = sum + rounded(out, p);
        }
      }
      const float fade = blind || part.top[r] == NOTHING ? 0.0f : exp_of(splat(part.top[r] - top))[0];
      part.sum[r] = part.sum[r] * fade + sum_of(sum);
      part.top[r] = top;
      float* mix = part.mix + r * D;
      for (int64_t d = 0; d < D; d += LANES) store(mix + d, load<v16f>(mix + d) * fade);
    }
    const int64_t steps = (seen_to - from + E::STEP - 1) / E::STEP;
    for (int64_t d = 0; d < D; d += W * LANES) mixed<R, W>(weight, values, steps, D, d, part.mix);
  }

  // What the stored weights are, so that they add up to one.
  ALWAYS v16f rounded(const uint8_t* stored, v16f p) {
    if (E::STEP == 1) return p;
    v16f x;
#if defined(TREADLE_AVX512)
    __m256i half;
    std::memcpy(&half, stored, 32);
    x = (v16f)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
    for (int i = 0; i < LANES; ++i) {
      uint16_t half;
      std::memcpy(&half, stored + 2 * i, 2);
      x[i] = from_bfloat16(half);
    }
#endif
    return x;
  }

  template <int R>
  void rows_of(const Item& item, Part& total, float* memory) const {
    const int64_t start = s.start_of[item.sequence];
    const int64_t last = start + (item.first + R - 1) / G;  // the last key that any row sees
    int64_t from = item.keys_from;
    const int64_t to = least(item.keys_to, last + 1);
    if (c.window) from = most(from, most<int64_t>(0, start + item.first / G - c.window + 1) / TILE * TILE);
    Part part{};
    part.mix = memory;
    uint8_t* wide = (uint8_t*)(memory + ROWS * D);
    for (int r = 0; r < R; ++r) total.top[r] = NOTHING, total.sum[r] = 0;
    std::memset(total.mix, 0, R * D * 4);
    while (from < to) {
      const int64_t end = least(to, (from / PARTITION + 1) * PARTITION);
      for (int r = 0; r < R; ++r) part.top[r] = NOTHING, part.sum[r] = 0;
      std::memset(part.mix, 0, R * D * 4);
      for (int64_t key = from; key < end; key += TILE) tile<R>(item, key, least(end, key + TILE), part, wide);
      merge(total, part, R, D);
      from = end;
    }
  }

  static size_t own_bytes(int64_t D) { return (2 * ROWS * D + 4 * TILE * D + 64 + D) * 4; }

  void write_out(const Item& item, const Part& part) const {
    for (int r = 0; r < item.rows; ++r) {
      const int64_t row = s.row_of[item.sequence] + (item.first + r) / G;
      const int64_t head = item.head * G + (item.first + r) % G;
      float* y = c.y + (row * c.heads + head) * D;
      const v16f inverse = splat(1.0f / part.sum[r]);
      for (int64_t d = 0; d < D; d += LANES) store(y + d, load<v16f>(part.mix + r * D + d) * inverse);
    }
  }
};

template <typename E, int R>
struct ByRows {
  static void run(const Attention<E>& a, const Item& item, Part& part, float* memory) {
    if (item.rows == R)
      a.template rows_of<R>(item, part, memory);
    else
      ByRows<E, R - 1>::run(a, item, part, memory);
  }
};
template <typename E>
struct ByRows<E, 0> {
  static void run(const Attention<E>&, const Item&, Part&, float*) {}
};

}  // namespace

}  // namespace TREADLE_NS
