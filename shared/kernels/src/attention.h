// Attention of a layer, computed by all threads of a team together.
#pragma once

#include <cstddef>

#include "kernels.h"

namespace TREADLE_NS {

// Some queries of a sequence that share the reading of keys, and which keys.
struct Item {
  int32_t sequence, head, first, rows;  // rows of the head's [token][query head of the group]
  int64_t keys_from, keys_to;
  int32_t slot;  // where a share of the partitions is left to be merged; -1: nowhere
};

// How a step's attention is shared out; the same for every layer.
struct Plan {
  int64_t count, slots;
  bool alone;  // so little that one thread does it sooner than two agree
};

// Fills `items` in, where there are any: once to count, once to fill.
Plan plan_of(const treadle::AttentionCall& call, const treadle::Step& step, int threads, Item* items);

// What `attention` needs of memory that the team shares.
size_t attention_bytes(const treadle::AttentionCall& call, const treadle::Step& step, const Plan& plan);

// To be called by every thread of the team; when it returns, all of the result is there.
void attention(const treadle::AttentionCall& call, const treadle::Step& step, const Plan& plan, const Item* items,
               void* shared);

}  // namespace TREADLE_NS
