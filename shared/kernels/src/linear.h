// A product, computed by all threads of a team together.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace TREADLE_NS {

// What `linear` needs of memory that the team shares.
size_t linear_bytes(const treadle::LinearCall& call, int64_t rows);

// To be called by every thread of the team; when it returns, all of the result is there.
void linear(const treadle::LinearCall& call, int64_t rows, void* shared);

}  // namespace TREADLE_NS
