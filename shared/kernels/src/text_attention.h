// Attention inside each text of a step, both ways and without a cache.
#pragma once

#include "kernels.h"

namespace TREADLE_NS {

// To be called by every thread of the team; when it returns, all of the result is there.
void text_attention(const treadle::TextAttentionCall& call, const treadle::Step& step);

}  // namespace TREADLE_NS
