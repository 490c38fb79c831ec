// Attention of one encoder layer: every token sees the whole of its text.
//
// A text's keys are put in panels as weights are, and its values side by side. Then some queries at a time
// are multiplied with all keys, weighed, and multiplied with all values; a text is short, so that a row of
// scores is there whole. A row's bits depend on its own text alone.
#include "text_attention.h"

#include <omp.h>

#include "scratch.h"
#include "simd.h"

namespace TREADLE_NS {

using namespace treadle;

namespace {

thread_local Scratch own_scratch;

constexpr int ROWS = TILE_ROWS;          // queries that share the reading of keys and values
constexpr int64_t SHARE = 8 * ROWS;      // queries of an item where there are few texts
constexpr float NOTHING = -__builtin_inff();

// One head of one text.
struct Text {
  int64_t tokens, padded, dim, stride;
  const float* q;       // [tokens][stride]
  const float* keys;    // [padded / 32][dim][32]
  const float* values;  // [tokens][dim]
  float* scores;        // [ROWS][padded]
  float* y;             // [tokens][out]
  int64_t out;
  float scale;
};

// Scores of R queries and all keys.
template <int R>
ALWAYS void multiply_keys(const Text& t, int64_t first) {
  const float* q = t.q + first * t.stride;
  const float* k = t.keys;
  for (int64_t panel = 0; panel < t.padded; panel += PANEL) {
    v16f sum[R][2] = {};
    for (int64_t d = 0; d < t.dim; ++d, k += PANEL) {
      const v16f k0 = load<v16f>(k), k1 = load<v16f>(k + LANES);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const v16f x = splat(q[r * t.stride + d]);
        sum[r][0] = fused(x, k0, sum[r][0]);
        sum[r][1] = fused(x, k1, sum[r][1]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      store(t.scores + r * t.padded + panel, sum[r][0]);
      store(t.scores + r * t.padded + panel + LANES, sum[r][1]);
    }
  }
}

// A row's weights, not yet divided by their sum; gives what they are to be multiplied with.
ALWAYS float weigh(const Text& t, float* row) {
  for (int64_t i = t.tokens; i < t.padded; ++i) row[i] = NOTHING;
  v16f top = splat(NOTHING), sum{};
  for (int64_t i = 0; i < t.padded; i += LANES) top = larger(top, load<v16f>(row + i));
  const v16f highest = splat(largest_of(top));
  for (int64_t i = 0; i < t.padded; i += LANES) {
    const v16f weight = exp_of((load<v16f>(row + i) - highest) * t.scale);
    store(row + i, weight);
    sum = sum + weight;
  }
  return 1.0f / sum_of(sum);
}

// Sixteen times W columns of the result of R queries.
template <int R, int W>
ALWAYS void multiply_values(const Text& t, int64_t first, int64_t column, const float (&inverse)[ROWS]) {
  v16f sum[R][W] = {};
  const float* v = t.values + column;
  for (int64_t k = 0; k < t.tokens; ++k, v += t.dim) {
    v16f value[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) value[w] = load<v16f>(v + w * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const v16f x = splat(t.scores[r * t.padded + k]);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) sum[r][w] = fused(x, value[w], sum[r][w]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) store(t.y + (first + r) * t.out + column + w * LANES, sum[r][w] * inverse[r]);
}

template <int R>
void attend(const Text& t, int64_t first) {
  multiply_keys<R>(t, first);
  float inverse[ROWS];
  for (int r = 0; r < R; ++r) inverse[r] = weigh(t, t.scores + r * t.padded);
  int64_t column = 0;
  for (; column + 2 * LANES <= t.dim; column += 2 * LANES) multiply_values<R, 2>(t, first, column, inverse);
  if (column < t.dim) multiply_values<R, 1>(t, first, column, inverse);
}

using Rows = void (*)(const Text&, int64_t first);

template <int R>
struct Fill {
  static void into(Rows* rows) {
    rows[R] = attend<R>;
    Fill<R - 1>::into(rows);
  }
};
template <>
struct Fill<0> {
  static void into(Rows*) {}
};

struct Table {
  Rows rows[ROWS + 1] = {};
  Table() { Fill<ROWS>::into(rows); }
};

// Queries `from` to `to` of a head of a text that begins in row `row`.
void attend_text(const TextAttentionCall& c, int64_t row, int64_t tokens, int64_t head, int64_t from, int64_t to) {
  static const Table table;
  const int64_t D = c.head_dim, width = c.heads * D;
  Text t{};
  t.tokens = tokens;
  t.padded = (tokens + PANEL - 1) / PANEL * PANEL;
  t.dim = D;
  t.stride = 3 * width;
  t.out = width;
  t.scale = c.scale;
  t.q = c.qkv + row * t.stride + head * D;
  t.y = c.y + row * width + head * D;
  float* keys = (float*)own_scratch.room((size_t)((2 * D + ROWS) * t.padded) * 4);
  float* values = keys + t.padded * D;
  for (int64_t panel = 0; panel < t.padded; panel += PANEL) {
    const int64_t there = least<int64_t>(PANEL, tokens - panel);
    float* into = keys + panel * D;
    for (int64_t i = 0; i < PANEL; ++i) {
      const float* key = t.q + (panel + i) * t.stride + width;
      for (int64_t d = 0; d < D; ++d) into[d * PANEL + i] = i < there ? key[d] : 0.0f;
    }
  }
  for (int64_t i = 0; i < tokens; ++i)
    std::memcpy(values + i * D, t.q + i * t.stride + 2 * width, (size_t)D * 4);
  t.keys = keys;
  t.values = values;
  t.scores = values + t.padded * D;
  const int64_t count = to - from, tiles = (count + ROWS - 1) / ROWS;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = count * tile / tiles, last = count * (tile + 1) / tiles;
    table.rows[last - first](t, from + first);
  }
}

}  // namespace

void text_attention(const TextAttentionCall& c, const Step& s) {
  int64_t longest = 0;
  for (int64_t i = 0; i < s.sequences; ++i) longest = most<int64_t>(longest, s.row_of[i + 1] - s.row_of[i]);
  // Each item puts the keys in order for itself, so texts are divided only where threads would be idle.
  const bool divide = s.sequences * c.heads < 4 * omp_get_num_threads();
  const int64_t share = divide ? SHARE : longest, parts = (longest + share - 1) / share;
  const int64_t count = s.sequences * c.heads * parts;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; ++i) {
    const int64_t text = i / parts / c.heads, head = i / parts % c.heads, from = i % parts * share;
    const int64_t row = s.row_of[text], tokens = s.row_of[text + 1] - row;
    if (from < tokens) attend_text(c, row, tokens, head, from, least(tokens, from + share));
  }
}

}  // namespace TREADLE_NS
