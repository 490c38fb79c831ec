// How elements wider than a byte are multiplied: STEP of them stand in a lane.
#pragma once

#include "simd.h"

namespace TREADLE_NS {

struct Floats {
  static constexpr int STEP = 1, BYTES = 4;
  ALWAYS v16f mac(v16f acc, v16u a, v16u b) { return fused(as_float(a), as_float(b), acc); }
  ALWAYS void put(void* p, v16f x) { store(p, x); }
};

struct Halves {
  static constexpr int STEP = 2, BYTES = 2;
  ALWAYS v16f mac(v16f acc, v16u a, v16u b) { return dot_bf16(acc, a, b); }
  ALWAYS void put(void* p, v16f x) { store_bf16((uint16_t*)p, x); }
};

}  // namespace TREADLE_NS
