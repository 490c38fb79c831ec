// The C interface, and the choice of the instruction set.
#include <cstring>

#include "kernels.h"
#include "pack.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

#define DECLARE(NAME)              \
  namespace NAME {                 \
  void run(const treadle::Run&);   \
  }
DECLARE(generic)
#ifdef TREADLE_X86
DECLARE(avx2)
DECLARE(avx512)
#endif

namespace treadle {
namespace {

const Level LEVELS[] = {
#ifdef TREADLE_X86
    {"avx512", avx512::run},
    {"avx2", avx2::run},
#endif
    {"generic", generic::run},
};
constexpr int COUNT = sizeof(LEVELS) / sizeof(Level);

bool runs_here(const Level& level) {
#ifdef TREADLE_X86
  __builtin_cpu_init();
  if (!std::strcmp(level.name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("fma");
  if (!std::strcmp(level.name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return true;
}

const Level* best() {
  for (const Level& level : LEVELS)
    if (runs_here(level)) return &level;
  return &LEVELS[COUNT - 1];
}

const Level* chosen = best();

}  // namespace
}  // namespace treadle

using namespace treadle;

// The name of the i-th instruction set, the best first, or null; whether this CPU has it.
EXPORT const char* treadle_level(int32_t i) { return i >= 0 && i < COUNT ? LEVELS[i].name : nullptr; }
EXPORT int32_t treadle_level_runs(int32_t i) { return i >= 0 && i < COUNT && runs_here(LEVELS[i]); }

EXPORT const char* treadle_chosen_level() { return chosen->name; }

// 0, or -1 for a name that is none here.
EXPORT int32_t treadle_choose_level(const char* name) {
  for (const Level& level : LEVELS)
    if (!std::strcmp(level.name, name) && runs_here(level)) {
      chosen = &level;
      return 0;
    }
  return -1;
}

EXPORT Weight* treadle_pack(const void* source, int32_t source_kind, int64_t out, int64_t in, const float* bias,
                            int32_t kind, int64_t group, int32_t threads) {
  return pack(source, (Kind)source_kind, out, in, bias, (Kind)kind, group, threads);
}

EXPORT Weight* treadle_pack_quantized(const void* q, const void* scale, const void* least, int64_t out, int64_t in,
                                      const float* bias, int32_t kind, int64_t group, int32_t threads) {
  return pack_quantized({q, scale, least}, out, in, bias, (Kind)kind, group, threads);
}

EXPORT void treadle_unpack(const Weight* weight, float* out) { unpack(*weight, out); }

EXPORT int64_t treadle_weight_bytes(const Weight* weight) { return weight->bytes; }

EXPORT void treadle_release(Weight* weight) { release(weight); }

// Runs the calls one after another over `rows` rows; `step` is for those that attend.
EXPORT void treadle_run(const Call* calls, int64_t count, int64_t rows, const Step* step, int32_t threads) {
  if (rows > 0) chosen->run({calls, count, rows, step, threads});
}
