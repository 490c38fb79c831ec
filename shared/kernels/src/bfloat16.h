// One value to bfloat16 and back. Static: every file has its own, for its own instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace treadle {

// Rounded to nearest, ties to even; NaN stays one.
static inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 64);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float from_bfloat16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

}  // namespace treadle
