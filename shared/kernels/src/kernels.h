// What the instruction sets implement, and the C interface hands on.
#pragma once

#include <cstdint>

namespace treadle {

constexpr int PANEL = 32;  // output columns that are packed side by side

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

// A weight [out, in], packed in panels of PANEL outputs. In memory, a panel after the other:
//   FLOAT32   [in][32] floats
//   BFLOAT16  [in / 2][32] pairs of consecutive inputs
//   INT8      [in / group] times ([group / 4][32] four consecutive inputs, each q + 128, then [32] floats:
//             scale)
//   INT4      [in / group] times ([group / 8][32] words, then [32] words of two bfloat16: scale, minimum).
//             A word holds inputs 0 to 3 in its bytes' low halves, 4 to 7 in the high ones;
//             the weight is scale * q + minimum
struct Weight {
  Kind kind;
  int64_t out, in;
  int64_t padded_in;  // to a multiple of the kind's step
  int64_t group;      // of INT4 and INT8: inputs whose rows share a scale; else 0
  int64_t panel_bytes;
  uint8_t* data;
  float* bias;   // or null
  int64_t bytes;
};

enum Prologue : int32_t { PLAIN = 0, RMS_NORM = 1, SILU_GATE = 2 };

struct LinearCall {
  const Weight* weight;
  const float* x;            // [rows, in]; [rows, 2 in] for SILU_GATE: gates, then values
  const float* norm_weight;  // [in] for RMS_NORM
  const float* residual;     // [rows, out], or null; may be y
  float* y;                  // [rows, out]
  Prologue prologue;
  float epsilon;
};

// One step's tokens. Rows are sequence after sequence.
struct Step {
  int64_t rows, sequences;
  const int32_t* row_of;    // [sequences + 1]: its first row
  const int32_t* start_of;  // [sequences]: the position of its first row
  const int64_t* table_of;  // [sequences]: where its block table begins
  const int32_t* tables;
  const int32_t* positions;  // [rows]
};

// Paged keys and values of one layer: blocks of `block` tokens, for each key head
//   keys    [block / 16][D / s][16][s]   s: 2 for BFLOAT16, 1 else
//   values  [block / s][D][s]
// INT8 has a float a token for each of the two, [blocks][heads][block].
struct Cache {
  Kind kind;
  int64_t block;
  void *keys, *values;
  float *key_scales, *value_scales;
};

struct AttentionCall {
  Cache cache;
  int64_t heads, key_heads, head_dim;
  const float* qkv;              // [rows, (heads + 2 key_heads) * head_dim]
  const float *q_norm, *k_norm;  // [head_dim], or null
  const float *cos, *sin;        // [positions, head_dim / 2]
  float* y;                      // [rows, heads * head_dim]
  int64_t window;                // a token sees so many, itself included; 0: all
  float epsilon, scale;
};

// Every token sees its whole text. Of the step, `rows`, `sequences` (the texts, none empty) and `row_of` are read.
struct TextAttentionCall {
  int64_t heads, head_dim;  // the latter a multiple of 16
  const float* qkv;         // [rows, 3 * heads * head_dim]: queries, keys, values
  float* y;                 // [rows, heads * head_dim]
  float scale;
};

enum Operation : int32_t { LINEAR = 0, ATTENTION = 1, TEXT_ATTENTION = 2 };

// A program is an array of these. What is called with `rows` alone has no step.
struct Call {
  Operation operation;
  LinearCall linear;
  AttentionCall attention;
  TextAttentionCall texts;
};

struct Run {
  const Call* calls;
  int64_t count, rows;
  const Step* step;
  int threads;
};

struct Level {
  const char* name;
  void (*run)(const Run&);
};

}  // namespace treadle
