// What attention's sums are made of: tiles and partitions, and what a query has seen of its keys so far.
#pragma once

#include "attention.h"
#include "elements.h"

namespace TREADLE_NS {

using namespace treadle;

namespace {

constexpr int64_t TILE = 64;          // keys that are weighed together
constexpr int64_t PARTITION = 512;    // keys that are summed before they are merged; a multiple of TILE
constexpr int ROWS = TILE_ROWS;       // queries, of tokens and heads, that share the reading of a tile
constexpr float NOTHING = -__builtin_inff();

// A query's state: what it has seen so far of its keys.
struct Part {
  float top[ROWS], sum[ROWS];
  float* mix;  // [ROWS][D]
};

ALWAYS void merge(Part& into, const Part& from, int rows, int64_t dim) {
  for (int r = 0; r < rows; ++r) {
    const float top = most(into.top[r], from.top[r]);
    if (from.top[r] == NOTHING) continue;
    if (into.top[r] == NOTHING) {
      into.top[r] = from.top[r];
      into.sum[r] = from.sum[r];
      std::memcpy(into.mix + r * dim, from.mix + r * dim, dim * 4);
      continue;
    }
    const v16f factors = exp_of(v16f{into.top[r] - top, from.top[r] - top});
    const float a = factors[0], b = factors[1];
    into.top[r] = top;
    into.sum[r] = into.sum[r] * a + from.sum[r] * b;
    for (int64_t d = 0; d < dim; d += LANES) {
      float* x = into.mix + r * dim + d;
      store(x, fused(load<v16f>(from.mix + r * dim + d), splat(b), load<v16f>(x) * a));
    }
  }
}

}  // namespace

}  // namespace TREADLE_NS
