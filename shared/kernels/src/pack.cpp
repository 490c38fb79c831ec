// Weights [out, in] into panels; see kernels.h for the order. Done once, at load.
#include "pack.h"

#include <omp.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "bfloat16.h"

namespace treadle {

namespace {

constexpr int64_t PAGE = 4096, HUGE_PAGE = 2 << 20;

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Zeros, in pages of their own: a heap would keep what lies between them. Large ones for large weights.
uint8_t* pages(int64_t bytes) {
  const int64_t extra = bytes >= HUGE_PAGE ? HUGE_PAGE : 0;
  void* memory = mmap(nullptr, bytes + extra, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
  uint8_t* begin = (uint8_t*)memory;
  if (!extra) return begin;
  uint8_t* data = (uint8_t*)up((int64_t)(uintptr_t)begin, HUGE_PAGE);
  if (data > begin) munmap(begin, data - begin);
  if (data < begin + extra) munmap(data + bytes, begin + extra - data);
#ifdef MADV_HUGEPAGE
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

int64_t step_of(Kind kind, int64_t group) {
  return kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 2 : group;
}

int64_t panel_bytes(Kind kind, int64_t padded_in, int64_t group) {
  if (kind == FLOAT32) return padded_in * PANEL * 4;
  if (kind == BFLOAT16) return padded_in * PANEL * 2;
  if (kind == INT8) return padded_in / group * (group * PANEL + PANEL * 4);
  return padded_in / group * (group / 2 * PANEL + PANEL * 4);
}

int64_t panels_of(const Weight& w) { return up(w.out, PANEL) / PANEL; }

float read(const void* data, Kind source, int64_t index) {
  if (source == FLOAT32) return ((const float*)data)[index];
  return from_bfloat16(((const uint16_t*)data)[index]);
}

void pack_int8(Weight& w, const float* row, int64_t out, uint8_t* panel) {
  const int64_t column = out % PANEL, group_bytes = w.group * PANEL + PANEL * 4;
  for (int64_t g = 0; g * w.group < w.in; ++g) {
    const float* x = row + g * w.group;
    const int64_t count = w.in - g * w.group < w.group ? w.in - g * w.group : w.group;
    uint8_t* at = panel + g * group_bytes;
    float top = 0;
    for (int64_t i = 0; i < count; ++i) top = std::fmax(top, std::fabs(x[i]));
    const float inverse = top > 0 ? 127.0f / top : 0.0f, scale = top / 127.0f;
    for (int64_t i = 0; i < count; ++i)
      at[(i / 4 * PANEL + column) * 4 + i % 4] = (uint8_t)(__builtin_lrintf(x[i] * inverse) + 128);
    std::memcpy(at + w.group * PANEL + column * 4, &scale, 4);
  }
}

struct Fit {
  float scale, least;  // as they are stored
  float error;
};

// The code, 0 to 15, that is nearest to x.
inline int code_of(float x, float least, float inverse) {
  const float place = (x - least) * inverse + 0.5f;
  return (int)(place < 0.0f ? 0.0f : place > 15.5f ? 15.5f : place);
}

Fit fit_of(const float* x, int64_t count, float low, float high) {
  Fit fit{};
  fit.scale = from_bfloat16(to_bfloat16((high - low) / 15.0f));
  fit.least = from_bfloat16(to_bfloat16(low));
  const float inverse = fit.scale > 0 ? 1.0f / fit.scale : 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float off = fit.scale * (float)code_of(x[i], fit.least, inverse) + fit.least - x[i];
    fit.error += off * off;
  }
  return fit;
}

// Scale and minimum of a group: of the ranges tried, that of the least squared error. The whole range is the
// first; narrower ones cut the group's outliers off.
Fit best_fit(const float* x, int64_t count) {
  float low = x[0], high = x[0];
  for (int64_t i = 1; i < count; ++i) {
    low = std::fmin(low, x[i]);
    high = std::fmax(high, x[i]);
  }
  Fit best = fit_of(x, count, low, high);
  for (const float cut : {0.03f, 0.06f, 0.1f}) {
    const float by = (high - low) * cut;
    for (const Fit& fit : {fit_of(x, count, low + by, high), fit_of(x, count, low, high - by),
                           fit_of(x, count, low + by, high - by)})
      if (fit.error < best.error) best = fit;
  }
  return best;
}

inline void put_int4(uint8_t* group, int64_t column, int64_t i, int q) {
  uint8_t& byte = group[(i / 8 * PANEL + column) * 4 + i % 4];
  byte = (uint8_t)(byte | (i % 8 < 4 ? q : q << 4));
}

inline void put_pair(const Weight& w, uint8_t* group, int64_t column, uint16_t scale, uint16_t least) {
  const uint32_t pair = (uint32_t)scale | (uint32_t)least << 16;
  std::memcpy(group + w.group / 2 * PANEL + column * 4, &pair, 4);
}

void pack_int4(Weight& w, const float* row, int64_t out, uint8_t* panel) {
  const int64_t column = out % PANEL, group_bytes = w.group / 2 * PANEL + PANEL * 4;
  for (int64_t g = 0; g * w.group < w.in; ++g) {
    const float* x = row + g * w.group;
    const int64_t count = w.in - g * w.group < w.group ? w.in - g * w.group : w.group;
    uint8_t* at = panel + g * group_bytes;
    const Fit fit = best_fit(x, count);
    const float inverse = fit.scale > 0 ? 1.0f / fit.scale : 0.0f;
    for (int64_t i = 0; i < count; ++i) put_int4(at, column, i, code_of(x[i], fit.least, inverse));
    put_pair(w, at, column, to_bfloat16(fit.scale), to_bfloat16(fit.least));
  }
}

// A row that is quantised already: the same panel as if it were packed from what it was quantised from.
void pack_int8(Weight& w, const Quantized& from, int64_t out, uint8_t* panel) {
  const int64_t column = out % PANEL, groups = w.padded_in / w.group;
  const int8_t* q = (const int8_t*)from.q + out * w.in;
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* at = panel + g * (w.group * PANEL + PANEL * 4);
    const int64_t count = w.in - g * w.group < w.group ? w.in - g * w.group : w.group;
    for (int64_t i = 0; i < count; ++i)
      at[(i / 4 * PANEL + column) * 4 + i % 4] = (uint8_t)(q[g * w.group + i] + 128);
    std::memcpy(at + w.group * PANEL + column * 4, (const float*)from.scale + out * groups + g, 4);
  }
}

void pack_int4(Weight& w, const Quantized& from, int64_t out, uint8_t* panel) {
  const int64_t column = out % PANEL, groups = w.padded_in / w.group;
  const uint32_t* words = (const uint32_t*)from.q + out * ((w.in + 7) / 8);
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t* at = panel + g * (w.group / 2 * PANEL + PANEL * 4);
    const int64_t count = w.in - g * w.group < w.group ? w.in - g * w.group : w.group;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t input = g * w.group + i;
      put_int4(at, column, i, (int)(words[input / 8] >> input % 8 * 4 & 15));
    }
    const int64_t place = out * groups + g;
    put_pair(w, at, column, ((const uint16_t*)from.scale)[place], ((const uint16_t*)from.least)[place]);
  }
}

// With no weights in it yet; null without memory.
Weight* room_for(int64_t out, int64_t in, const float* bias, Kind kind, int64_t group) {
  Weight* w = new Weight{};
  w->kind = kind;
  w->out = out;
  w->in = in;
  w->group = kind == INT4 || kind == INT8 ? group : 0;
  w->padded_in = up(in, step_of(kind, group));
  w->panel_bytes = panel_bytes(kind, w->padded_in, group);
  const int64_t panels = panels_of(*w);
  const int64_t scales = up(out, PANEL) * 4;
  w->bytes = up(panels * w->panel_bytes, 64) + (bias ? scales : 0);
  w->bytes = up(w->bytes, PAGE);
  w->data = pages(w->bytes);
  if (!w->data) {
    delete w;
    return nullptr;
  }
  uint8_t* rest = w->data + up(panels * w->panel_bytes, 64);
  if (bias) {
    w->bias = (float*)rest;
    std::memcpy(w->bias, bias, out * 4);
  }
  return w;
}

}  // namespace

Weight* pack(const void* source, Kind source_kind, int64_t out, int64_t in, const float* bias, Kind kind,
             int64_t group, int threads) {
  Weight* w = room_for(out, in, bias, kind, group);
  if (!w) return nullptr;
  const int64_t panels = panels_of(*w);
#pragma omp parallel num_threads(threads)
  {
    float* row = (float*)std::malloc(in * 4);
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t o = p * PANEL; o < out && o < (p + 1) * PANEL; ++o) {
        for (int64_t i = 0; i < in; ++i) row[i] = read(source, source_kind, o * in + i);
        uint8_t* panel = w->data + p * w->panel_bytes;
        const int64_t column = o % PANEL;
        if (kind == FLOAT32)
          for (int64_t i = 0; i < in; ++i) ((float*)panel)[i * PANEL + column] = row[i];
        else if (kind == BFLOAT16)
          for (int64_t i = 0; i < in; ++i)
            ((uint16_t*)panel)[(i / 2 * PANEL + column) * 2 + i % 2] = to_bfloat16(row[i]);
        else if (kind == INT8)
          pack_int8(*w, row, o, panel);
        else
          pack_int4(*w, row, o, panel);
      }
    std::free(row);
  }
  return w;
}

Weight* pack_quantized(const Quantized& from, int64_t out, int64_t in, const float* bias, Kind kind,
                       int64_t group, int threads) {
  Weight* w = room_for(out, in, bias, kind, group);
  if (!w) return nullptr;
  const int64_t panels = panels_of(*w);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t o = p * PANEL; o < out && o < (p + 1) * PANEL; ++o) {
      uint8_t* panel = w->data + p * w->panel_bytes;
      if (kind == INT8)
        pack_int8(*w, from, o, panel);
      else
        pack_int4(*w, from, o, panel);
    }
  return w;
}

void unpack(const Weight& w, float* out) {
  for (int64_t o = 0; o < w.out; ++o) {
    const uint8_t* panel = w.data + o / PANEL * w.panel_bytes;
    const int64_t column = o % PANEL, group_bytes = w.group * PANEL / (w.kind == INT4 ? 2 : 1) + PANEL * 4;
    for (int64_t i = 0; i < w.in; ++i) {
      float& value = out[o * w.in + i];
      if (w.kind == FLOAT32)
        value = ((const float*)panel)[i * PANEL + column];
      else if (w.kind == BFLOAT16)
        value = from_bfloat16(((const uint16_t*)panel)[(i / 2 * PANEL + column) * 2 + i % 2]);
      else if (w.kind == INT8) {
        const uint8_t* at = panel + i / w.group * group_bytes;
        const int64_t j = i % w.group;
        float scale;
        std::memcpy(&scale, at + w.group * PANEL + column * 4, 4);
        value = scale * (float)((int)at[(j / 4 * PANEL + column) * 4 + j % 4] - 128);
      } else {
        const uint8_t* at = panel + i / w.group * group_bytes;
        const int64_t j = i % w.group;
        const uint8_t byte = at[(j / 8 * PANEL + column) * 4 + j % 4];
        uint32_t pair;
        std::memcpy(&pair, at + w.group / 2 * PANEL + column * 4, 4);
        const int q = j % 8 < 4 ? byte & 15 : byte >> 4;
        value = from_bfloat16((uint16_t)pair) * q + from_bfloat16((uint16_t)(pair >> 16));
      }
    }
  }
}

void release(Weight* w) {
  munmap(w->data, w->bytes);
  delete w;
}

}  // namespace treadle
