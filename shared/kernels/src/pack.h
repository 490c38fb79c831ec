// Makes, reads back and frees packed weights.
#pragma once

#include "kernels.h"

namespace treadle {

// From rows of float32 or bfloat16 (`source_kind`). `group`, a multiple of 16, is INT8's and INT4's. Null without memory.
Weight* pack(const void* source, Kind source_kind, int64_t out, int64_t in, const float* bias, Kind kind,
             int64_t group, int threads);

// Rows that were quantised before, INT8 or INT4. Groups of inputs stand side by side, the last one may be short.
struct Quantized {
  const void* q;      // INT8: [out][in] bytes, signed; INT4: [out][in / 8, rounded up] words, the first input lowest
  const void* scale;  // [out][groups]: floats of INT8, bfloat16 of INT4
  const void* least;  // of INT4 the minimum, bfloat16
};
Weight* pack_quantized(const Quantized& from, int64_t out, int64_t in, const float* bias, Kind kind, int64_t group,
                       int threads);

// The weights as the kernels see them: [out, in] floats.
void unpack(const Weight& weight, float* out);

void release(Weight* weight);

}  // namespace treadle
