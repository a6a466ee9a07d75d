// Norms and activations over rows of a matrix: what the code for one instruction set provides.
#pragma once

#include <stdint.h>

#include "dispatch.h"

namespace opsin {

enum class Activation : int32_t { silu, gelu, gelu_tanh, quick_gelu };

// A kernel's rows (first, count); strides count elements, from row to row. Every kernel sums in float32.
struct ElementwiseTable {
  // to = h / rms(h) * weight, with h = x, or h = residual += x. `to` may be x.
  void (*rms_norm)(int type, int64_t first, int64_t count, int64_t columns, const void* x, int64_t x_stride,
                   void* residual, int64_t residual_stride, const void* weight, float eps, void* to,
                   int64_t to_stride);
  // to = (x - mean) / sqrt(variance + eps) * weight + bias; bias may be null, `to` may be x
  void (*layer_norm)(int type, int64_t first, int64_t count, int64_t columns, const void* x, int64_t x_stride,
                     const void* weight, const void* bias, float eps, void* to, int64_t to_stride);
  // to = act(x[:, :columns]) * x[:, columns:]
  void (*gated)(int type, Activation activation, int64_t first, int64_t count, int64_t columns, const void* x,
                int64_t x_stride, void* to, int64_t to_stride);
  // x = act(x), for elements (first, count)
  void (*activate)(int type, Activation activation, int64_t first, int64_t count, void* x);
};

OPSIN_TABLES(ElementwiseTable, elementwise_table)

}  // namespace opsin
