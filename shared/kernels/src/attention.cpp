// Attention of one layer over the paged cache, for one step of many sequences.
//
// First every token's query and key are normed (where the model does) and turned, and keys and values go
// into the cache. Then each query reads the keys that it sees, tile by tile, with a running maximum (Milakov
// and Gimelshein, 2018; Dao et al., 2022).
#include "attention.h"

#include <omp.h>

#include "attention_rows.h"
#include "scratch.h"
#include "simd.h"

namespace TREADLE_NS {

namespace {

thread_local Scratch own_scratch;

constexpr double LITTLE = 2e6;  // multiplications and additions

size_t slots_offset(const AttentionCall& c, const Step& s) {
  const int64_t element = c.cache.kind == FLOAT32 ? 4 : 2;
  return (size_t)(s.rows * c.heads * c.head_dim * element + 63) / 64 * 64;
}

template <typename E>
void attend(const AttentionCall& c, const Step& s, const Plan& plan, const Item* items, uint8_t* shared) {
  const int64_t D = c.head_dim;
  const Attention<E> attention(c, s, shared);
  Part* parts = (Part*)(shared + slots_offset(c, s));
  float* mixes = (float*)(parts + plan.slots);
  float* memory = (float*)own_scratch.room(Attention<E>::own_bytes(D));
  const int thread = plan.alone ? 0 : omp_get_thread_num(), threads = plan.alone ? 1 : omp_get_num_threads();

  int64_t sequence = 0;
  for (int64_t row = s.rows * thread / threads; row < s.rows * (thread + 1) / threads; ++row) {
    while (s.row_of[sequence + 1] <= row) ++sequence;
    attention.take_in(row, sequence, memory);
  }
  const auto compute = [&](int64_t i) {
    const Item& item = items[i];
    Part own{};
    own.mix = memory + ROWS * D + TILE * D * 2;
    Part& part = item.slot < 0 ? own : parts[item.slot];
    if (item.slot >= 0) part.mix = mixes + item.slot * ROWS * D;
    ByRows<E, ROWS>::run(attention, item, part, memory);
    if (item.slot < 0) attention.write_out(item, part);
  };
  if (plan.alone) {
    for (int64_t i = 0; i < plan.count; ++i) compute(i);
    return;
  }
#pragma omp barrier
#pragma omp for schedule(dynamic, 4)
  for (int64_t i = 0; i < plan.count; ++i) compute(i);
  // The shares, in the order of their keys.
  if (plan.slots) {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < plan.count; ++i) {
      const Item& item = items[i];
      if (item.slot < 0 || item.keys_from != 0) continue;
      Part& total = parts[item.slot];
      for (int64_t next = i + 1; next < plan.count && items[next].keys_from > 0; ++next)
        merge(total, parts[items[next].slot], item.rows, D);
      attention.write_out(item, total);
    }
  }
}

}  // namespace

// Items for every sequence and key head; keys are shared out where there are too few items for the threads.
Plan plan_of(const AttentionCall& c, const Step& s, int threads, Item* items) {
  const int64_t G = c.heads / c.key_heads;
  Plan plan{};
  int64_t units = 0;
  double work = 0;
  for (int64_t i = 0; i < s.sequences; ++i) {
    const int64_t tokens = s.row_of[i + 1] - s.row_of[i];
    units += (tokens * G + ROWS - 1) / ROWS * c.key_heads;
    work += 4.0 * (double)(tokens * c.heads * c.head_dim) * (double)(s.start_of[i] + tokens);
  }
  plan.alone = threads == 1 || work < LITTLE;
  const bool share = !plan.alone && units < 4 * threads;
  for (int64_t i = 0; i < s.sequences; ++i) {
    const int64_t rows = (s.row_of[i + 1] - s.row_of[i]) * G;
    const int64_t tiles = (rows + ROWS - 1) / ROWS;
    for (int64_t tile = tiles - 1; tile >= 0; --tile)  // the longest first
      for (int64_t head = 0; head < c.key_heads; ++head) {
        Item item{};
        item.sequence = (int32_t)i;
        item.head = (int32_t)head;
        item.first = (int32_t)(rows * tile / tiles);
        item.rows = (int32_t)(rows * (tile + 1) / tiles) - item.first;
        const int64_t keys = s.start_of[i] + (item.first + item.rows - 1) / G + 1;
        const int64_t parts = share ? (keys + PARTITION - 1) / PARTITION : 1;
        for (int64_t part = 0; part < parts; ++part) {
          item.keys_from = part * PARTITION;
          item.keys_to = part + 1 < parts ? (part + 1) * PARTITION : keys;
          item.slot = parts > 1 ? (int32_t)plan.slots++ : -1;
          if (items) items[plan.count] = item;
          ++plan.count;
        }
      }
  }
  return plan;
}

size_t attention_bytes(const AttentionCall& c, const Step& s, const Plan& plan) {
  return slots_offset(c, s) + (size_t)plan.slots * (sizeof(Part) + ROWS * c.head_dim * 4) + 64;
}

void attention(const AttentionCall& c, const Step& s, const Plan& plan, const Item* items, void* shared) {
  if (!plan.alone || omp_get_thread_num() == 0) {
    if (c.cache.kind == FLOAT32)
      attend<Floats>(c, s, plan, items, (uint8_t*)shared);
    else
      attend<Halves>(c, s, plan, items, (uint8_t*)shared);
  }
  if (plan.alone) {
#pragma omp barrier
  }
}

}  // namespace TREADLE_NS
