// y = prologue(x) W^T + bias + residual, for packed weights.
//
// A row's bits do not depend on the other rows: an output is summed over the inputs in one order, in one
// accumulator, whatever number of rows is computed together. Sums of bytes are exact.
#include "linear.h"

#include <omp.h>

#include "elements.h"
#include "scratch.h"

namespace TREADLE_NS {

using namespace treadle;

namespace {

constexpr float QUANTISED = 127.0f;  // activations are rounded to -127..127
constexpr int64_t FEW = 2;           // rows that every thread prepares for itself, rather than wait

// The rows of x as the kernels read them. Those of bytes come in groups of w.group inputs, each with a scale.
struct Rows {
  uint8_t* data;  // [rows][stride bytes]
  int64_t stride, groups;
  int64_t count;
  float* scale;   // [groups][rows]
  int32_t* sum;   // [groups][rows] of INT8: minus what the weights' offset of 128 adds
  float* extent;  // [groups][rows] of INT4: what the weights' minimum is multiplied with
};

int64_t stride_of(const Weight& w) {
  const int64_t element = w.kind == FLOAT32 ? 4 : w.kind == BFLOAT16 ? 2 : 1;
  return (w.padded_in * element + 63) / 64 * 64;
}

int64_t groups_of(const Weight& w) { return w.group ? w.padded_in / w.group : 0; }

size_t rows_bytes(const Weight& w, int64_t rows) {
  return (size_t)(rows * (stride_of(w) + 12 * groups_of(w)) + 256);
}

Rows rows_in(const Weight& w, int64_t rows, void* memory) {
  Rows r{};
  r.data = (uint8_t*)memory;
  r.stride = stride_of(w);
  r.groups = groups_of(w);
  r.count = rows;
  r.scale = (float*)(r.data + rows * r.stride);
  r.sum = (int32_t*)(r.scale + rows * r.groups);
  r.extent = (float*)(r.sum + rows * r.groups);
  return r;
}

ALWAYS v16f silu_of(v16f x) { return x / (exp_of(-x) + 1.0f); }

// Sixteen prologued inputs from i on; zeros behind the last one.
ALWAYS v16f prologued(const LinearCall& c, const float* x, float norm, int64_t i) {
  const int64_t in = c.weight->in, left = in - i;
  if (c.prologue == SILU_GATE) return silu_of(load_some(x + i, left)) * load_some(x + in + i, left);
  const v16f v = load_some(x + i, left);
  return c.prologue == PLAIN ? v : v * norm * load_some(c.norm_weight + i, left);
}

float norm_of(const LinearCall& c, const float* x) {
  if (c.prologue != RMS_NORM) return 1.0f;
  const int64_t in = c.weight->in;
  v16f squares{};
  for (int64_t i = 0; i < in; i += LANES) {
    const v16f v = load_some(x + i, in - i);
    squares = fused(v, v, squares);
  }
  return 1.0f / __builtin_sqrtf(sum_of(squares) / (float)in + c.epsilon);
}

void quantise(const LinearCall& c, const float* x, float norm, const Rows& rows, int64_t row, float* wide) {
  const Weight& w = *c.weight;
  v16i odd{};
  for (int64_t i = 0; i < w.padded_in; i += LANES) {
    const v16f v = i < w.in ? prologued(c, x, norm, i) : v16f{};
    store(wide + i, v);
    odd |= ~(magnitude(v) < splat(1e30f));
  }
  // Neither NaN nor infinity is hidden: the scales carry it into the result.
  const bool sound = !any_of(odd);
  int8_t* out = (int8_t*)rows.data + row * rows.stride;
  for (int64_t g = 0; g < rows.groups; ++g) {
    const int64_t begin = g * w.group, end = begin + w.group, place = g * rows.count + row;
    v16f top{};
    for (int64_t i = begin; i < end; i += LANES) top = larger(top, magnitude(load<v16f>(wide + i)));
    const float highest = sound ? largest_of(top) : 0.0f;
    const v16f inverse = splat(highest > 1e-30f ? QUANTISED / highest : 0.0f);
    v16i total{};
    for (int64_t i = begin; i < end; i += LANES) {
      const v16i q = sound ? nearest(load<v16f>(wide + i) * inverse) : v16i{};
      store_bytes(out + i, q);
      total += q;
    }
    const int32_t sum = sum_of(total);
    rows.scale[place] = sound ? highest * (1.0f / QUANTISED) : __builtin_nanf("");
    rows.sum[place] = -128 * sum;
    rows.extent[place] = rows.scale[place] * (float)sum;
  }
}

void prepare(const LinearCall& c, const Rows& rows, int64_t row, float* wide) {
  const Weight& w = *c.weight;
  const float* x = c.x + row * w.in * (c.prologue == SILU_GATE ? 2 : 1);
  const float norm = norm_of(c, x);
  if (w.kind == INT8 || w.kind == INT4) return quantise(c, x, norm, rows, row, wide);
  uint8_t* out = rows.data + row * rows.stride;
  for (int64_t i = 0; i < w.padded_in; i += LANES) {
    const v16f v = i < w.in ? prologued(c, x, norm, i) : v16f{};
    if (w.kind == FLOAT32)
      store_some((float*)out + i, v, w.padded_in - i);
    else
      store_bf16((uint16_t*)out + i, v);  // the stride has room for all sixteen
  }
}

void finish(const LinearCall& c, int64_t row, int64_t column, v16f sum) {
  const Weight& w = *c.weight;
  const int64_t left = w.out - column;
  if (left <= 0) return;
  if (w.bias) sum = sum + load_some(w.bias + column, left);
  if (c.residual) sum = sum + load_some(c.residual + row * w.out + column, left);
  store_some(c.y + row * w.out + column, sum, left);
}

template <int R>
ALWAYS void finish(const LinearCall& c, int64_t row, int64_t panel, const v16f (&sum)[R][2]) {
  const Weight& w = *c.weight;
  const int64_t column = panel * PANEL;
  if (column + PANEL > w.out) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      finish(c, row + r, column, sum[r][0]);
      finish(c, row + r, column + LANES, sum[r][1]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const int64_t at = (row + r) * w.out + column;
    v16f y0 = sum[r][0], y1 = sum[r][1];
    if (w.bias) {
      y0 = y0 + load<v16f>(w.bias + column);
      y1 = y1 + load<v16f>(w.bias + column + LANES);
    }
    if (c.residual) {
      y0 = y0 + load<v16f>(c.residual + at);
      y1 = y1 + load<v16f>(c.residual + at + LANES);
    }
    store(c.y + at, y0);
    store(c.y + at + LANES, y1);
  }
}

// Zeros; and asks for where the tile's sums will go, as another thread may have the lines.
template <int R>
ALWAYS void begin(const LinearCall& c, int64_t row, int64_t panel, v16f (&sum)[R][2]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = v16f{};
  const int64_t out = c.weight->out;
  const float* y = c.y + row * out + panel * PANEL;
  for (int r = 0; r < R; ++r, y += out) {
    __builtin_prefetch(y, 1);
    __builtin_prefetch(y + LANES, 1);
  }
}

// Weights that are wanted soon: a share of the next panel, asked for bit by bit while this one is multiplied.
struct Ahead {
  const uint8_t* at;
  int64_t lines;  // at a time
  ALWAYS void fetch(Ahead& ahead) {
    for (int64_t i = 0; i < ahead.lines; ++i) __builtin_prefetch(ahead.at + 64 * i);
    ahead.at += 64 * ahead.lines;
  }
};

constexpr int64_t STRETCH = 32;  // steps between two of these times, where there are no groups

template <typename E>
struct Wide {
  template <int R>
  ALWAYS void tile(const LinearCall& c, const Rows& rows, int64_t row, int64_t panel, Ahead ahead) {
    const Weight& w = *c.weight;
    const uint8_t* b = w.data + panel * w.panel_bytes;
    const uint8_t* a = rows.data + row * rows.stride;
    v16f sum[R][2];
    begin<R>(c, row, panel, sum);
    for (int64_t k = 0; k < w.padded_in / E::STEP; ++k, b += 128) {
      if (k % STRETCH == 0) Ahead::fetch(ahead);
      const v16u b0 = load<v16u>(b), b1 = load<v16u>(b + 64);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const v16u x = splat_u(word_at(a + r * rows.stride + 4 * k));
        sum[r][0] = E::mac(sum[r][0], x, b0);
        sum[r][1] = E::mac(sum[r][1], x, b1);
      }
    }
    finish<R>(c, row, panel, sum);
  }
};

struct Int8 {
  template <int R>
  ALWAYS void tile(const LinearCall& c, const Rows& rows, int64_t row, int64_t panel, Ahead ahead) {
    const Weight& w = *c.weight;
    const uint8_t* b = w.data + panel * w.panel_bytes;
    const uint8_t* a = rows.data + row * rows.stride;
    v16f sum[R][2];
    begin<R>(c, row, panel, sum);
    for (int64_t g = 0; g < rows.groups; ++g) {
      Ahead::fetch(ahead);
      v16i acc[R][2];
      const int64_t place = g * rows.count + row;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = splat_i(rows.sum[place + r]);
      for (int64_t k = 0; k < w.group / 4; ++k, b += 128, a += 4) {
        const v16u b0 = load<v16u>(b), b1 = load<v16u>(b + 64);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const v16u x = splat_u(word_at(a + r * rows.stride));
          acc[r][0] = dot_bytes(acc[r][0], b0, x);
          acc[r][1] = dot_bytes(acc[r][1], b1, x);
        }
      }
      const v16f scale0 = load<v16f>(b), scale1 = load<v16f>(b + 64);
      b += 128;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const v16f scale = splat(rows.scale[place + r]);
        sum[r][0] = fused(to_float(acc[r][0]) * scale, scale0, sum[r][0]);
        sum[r][1] = fused(to_float(acc[r][1]) * scale, scale1, sum[r][1]);
      }
    }
    finish<R>(c, row, panel, sum);
  }
};

struct Int4 {
  template <int R>
  ALWAYS void tile(const LinearCall& c, const Rows& rows, int64_t row, int64_t panel, Ahead ahead) {
    const Weight& w = *c.weight;
    const uint8_t* b = w.data + panel * w.panel_bytes;
    const uint8_t* a = rows.data + row * rows.stride;
    const v16u low = splat_u(0x0f0f0f0fu);
    v16f sum[R][2];
    begin<R>(c, row, panel, sum);
    for (int64_t g = 0; g < rows.groups; ++g) {
      Ahead::fetch(ahead);
      const int64_t place = g * rows.count + row;
      v16i acc[R][2];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = v16i{};
      for (int64_t k = 0; k < w.group / 8; ++k, b += 128, a += 8) {
        const v16u b0 = load<v16u>(b), b1 = load<v16u>(b + 64);
        const v16u low0 = b0 & low, low1 = b1 & low, high0 = (b0 >> 4) & low, high1 = (b1 >> 4) & low;
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const v16u x = splat_u(word_at(a + r * rows.stride));
          const v16u y = splat_u(word_at(a + r * rows.stride + 4));
          acc[r][0] = dot_bytes(acc[r][0], low0, x);
          acc[r][1] = dot_bytes(acc[r][1], low1, x);
          acc[r][0] = dot_bytes(acc[r][0], high0, y);
          acc[r][1] = dot_bytes(acc[r][1], high1, y);
        }
      }
      const v16u pair0 = load<v16u>(b), pair1 = load<v16u>(b + 64), top = splat_u(0xffff0000u);
      b += 128;
      const v16f scale0 = as_float(pair0 << 16), scale1 = as_float(pair1 << 16);
      const v16f least0 = as_float(pair0 & top), least1 = as_float(pair1 & top);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const v16f scale = splat(rows.scale[place + r]), extent = splat(rows.extent[place + r]);
        sum[r][0] = fused(least0, extent, fused(to_float(acc[r][0]) * scale, scale0, sum[r][0]));
        sum[r][1] = fused(least1, extent, fused(to_float(acc[r][1]) * scale, scale1, sum[r][1]));
      }
    }
    finish<R>(c, row, panel, sum);
  }
};

using Tile = void (*)(const LinearCall&, const Rows&, int64_t row, int64_t panel, Ahead ahead);

template <typename K, int R>
void tile_of(const LinearCall& c, const Rows& rows, int64_t row, int64_t panel, Ahead ahead) {
  K::template tile<R>(c, rows, row, panel, ahead);
}

template <typename K, int R>
struct Tiles {
  static void fill(Tile* tiles) {
    tiles[R] = tile_of<K, R>;
    Tiles<K, R - 1>::fill(tiles);
  }
};
template <typename K>
struct Tiles<K, 0> {
  static void fill(Tile*) {}
};

// Bytes have two sets of sums: of their group, and of all groups.
constexpr int BYTE_ROWS = TILE_ROWS > 3 ? TILE_ROWS / 2 : TILE_ROWS;

struct Table {
  Tile tiles[4][TILE_ROWS + 1] = {};
  Table() {
    Tiles<Wide<Floats>, TILE_ROWS>::fill(tiles[FLOAT32]);
    Tiles<Wide<Halves>, TILE_ROWS>::fill(tiles[BFLOAT16]);
    Tiles<Int8, BYTE_ROWS>::fill(tiles[INT8]);
    Tiles<Int4, BYTE_ROWS>::fill(tiles[INT4]);
  }
};

thread_local Scratch own_scratch;

// A share of the work of all panels and rows: panel by panel, tile after tile.
void multiply(const LinearCall& c, const Rows& rows, int64_t count, int thread, int threads) {
  static const Table table;
  const Weight& w = *c.weight;
  const Tile* tiles = table.tiles[w.kind];
  const int64_t highest = w.group ? BYTE_ROWS : TILE_ROWS;
  const int64_t panels = (w.out + PANEL - 1) / PANEL;
  const int64_t row_tiles = (count + highest - 1) / highest;
  const int64_t units = panels * row_tiles;
  const int64_t end = units * (thread + 1) / threads;
  // One tile a panel reads weights as fast as they come, and a CPU sees that it goes straight on.
  const int64_t times = w.group ? rows.groups : (w.panel_bytes / 128 + STRETCH - 1) / STRETCH;
  const int64_t lines = row_tiles > 1 ? (w.panel_bytes / 64 + times * row_tiles - 1) / (times * row_tiles) : 0;
  for (int64_t unit = units * thread / threads; unit < end; ++unit) {
    const int64_t panel = unit / row_tiles, tile = unit % row_tiles;
    const int64_t first = count * tile / row_tiles, last = count * (tile + 1) / row_tiles;
    const bool more = panel + 1 < panels && (panel + 1) * row_tiles < end;
    const Ahead ahead{w.data + (panel + 1) * w.panel_bytes + tile * lines * times * 64, more ? lines : 0};
    tiles[last - first](c, rows, first, panel, ahead);
  }
}

}  // namespace

size_t linear_bytes(const LinearCall& c, int64_t rows) { return rows > FEW ? rows_bytes(*c.weight, rows) : 0; }

void linear(const LinearCall& c, int64_t count, void* shared) {
  const Weight& w = *c.weight;
  const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
  const size_t wide_bytes = (size_t)(w.padded_in + LANES) * 4 + 64;
  if (count <= FEW) {
    const size_t bytes = (rows_bytes(w, count) + 63) / 64 * 64;
    uint8_t* memory = (uint8_t*)own_scratch.room(bytes + wide_bytes);
    const Rows rows = rows_in(w, count, memory);
    for (int64_t row = 0; row < count; ++row) prepare(c, rows, row, (float*)(memory + bytes));
    multiply(c, rows, count, thread, threads);
  } else {
    const Rows rows = rows_in(w, count, shared);
    float* wide = (float*)own_scratch.room(wide_bytes);
    for (int64_t row = count * thread / threads; row < count * (thread + 1) / threads; ++row)
      prepare(c, rows, row, wide);
#pragma omp barrier
    multiply(c, rows, count, thread, threads);
  }
#pragma omp barrier
}

}  // namespace TREADLE_NS
