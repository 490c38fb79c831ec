// Runs a program: call after call, by one team of threads from the first to the last.
#include <omp.h>

#include "attention.h"
#include "linear.h"
#include "scratch.h"
#include "text_attention.h"

namespace TREADLE_NS {

using namespace treadle;

namespace {
thread_local Scratch shared_scratch, item_scratch;
}

void run(const Run& r) {
  size_t bytes = 0;
  Plan plan{};
  const Item* items = nullptr;
  for (int64_t i = 0; i < r.count; ++i) {
    const Call& call = r.calls[i];
    size_t needed;
    if (call.operation == LINEAR) {
      needed = linear_bytes(call.linear, r.rows);
    } else if (call.operation == TEXT_ATTENTION) {
      needed = 0;
    } else {
      if (!items) {
        plan = plan_of(call.attention, *r.step, r.threads, nullptr);
        Item* memory = (Item*)item_scratch.room((size_t)plan.count * sizeof(Item));
        plan_of(call.attention, *r.step, r.threads, memory);
        items = memory;
      }
      needed = attention_bytes(call.attention, *r.step, plan);
    }
    if (needed > bytes) bytes = needed;
  }
  void* shared = shared_scratch.room(bytes + 64);
#pragma omp parallel num_threads(r.threads)
  for (int64_t i = 0; i < r.count; ++i) {
    const Call& call = r.calls[i];
    if (call.operation == LINEAR)
      linear(call.linear, r.rows, shared);
    else if (call.operation == TEXT_ATTENTION)
      text_attention(call.texts, *r.step);
    else
      attention(call.attention, *r.step, plan, items, shared);
  }
}

}  // namespace TREADLE_NS
