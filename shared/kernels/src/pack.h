// Makes, reads back and frees packed weights.
#pragma once

#include "kernels.h"

namespace treadle {

// From rows of float32 or bfloat16 (`source_kind`). `group`, a multiple of 16, is INT8's and INT4's. Null without memory.
Weight* pack(const void* source, Kind source_kind, int64_t out, int64_t in, const float* bias, Kind kind,
             int64_t group, int threads);

// The weights as the kernels see them: [out, in] floats.
void unpack(const Weight& weight, float* out);

void release(Weight* weight);

}  // namespace treadle
