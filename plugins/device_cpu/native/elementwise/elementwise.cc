// Norms and activations as C functions: rows are shared out to the pool where there are enough of them.

#include "elementwise/elementwise.h"

#include <algorithm>

#include "pool.h"

namespace opsin {
namespace {

constexpr int64_t kSmall = 1 << 15;  // elements up to which other threads are not worth waking
constexpr int64_t kTask = 1 << 13;   // elements of a task

bool valid(int64_t type, int64_t rows, int64_t columns) {
  return (type == 0 || type == 1) && rows >= 0 && columns > 0;
}

bool valid(int64_t activation) { return activation >= 0 && activation <= 3; }

// body(first, count) over all rows.
template <class Body>
void rows_at_once(int64_t rows, int64_t columns, const Body& body) {
  if (rows * columns <= kSmall) {
    body(0, rows);
    return;
  }
  int64_t some = std::max<int64_t>(1, kTask / columns);
  parallel_for((rows + some - 1) / some,
               [&](int64_t task, int) { body(task * some, std::min(some, rows - task * some)); });
}

}  // namespace
}  // namespace opsin

using namespace opsin;

OPSIN_EXPORT int opsin_rms_norm(int64_t type, int64_t rows, int64_t columns, const void* x, int64_t x_stride,
                                void* residual, int64_t residual_stride, const void* weight, float eps, void* to,
                                int64_t to_stride) {
  if (!valid(type, rows, columns)) return 1;
  const ElementwiseTable* table = OPSIN_PICK(elementwise_table);
  rows_at_once(rows, columns, [&](int64_t first, int64_t count) {
    table->rms_norm(static_cast<int>(type), first, count, columns, x, x_stride, residual, residual_stride, weight, eps,
                    to, to_stride);
  });
  return 0;
}

OPSIN_EXPORT int opsin_layer_norm(int64_t type, int64_t rows, int64_t columns, const void* x, int64_t x_stride,
                                  const void* weight, const void* bias, float eps, void* to, int64_t to_stride) {
  if (!valid(type, rows, columns)) return 1;
  const ElementwiseTable* table = OPSIN_PICK(elementwise_table);
  rows_at_once(rows, columns, [&](int64_t first, int64_t count) {
    table->layer_norm(static_cast<int>(type), first, count, columns, x, x_stride, weight, bias, eps, to, to_stride);
  });
  return 0;
}

OPSIN_EXPORT int opsin_gated(int64_t type, int64_t activation, int64_t rows, int64_t columns, const void* x,
                             int64_t x_stride, void* to, int64_t to_stride) {
  if (!valid(type, rows, columns) || !valid(activation)) return 1;
  const ElementwiseTable* table = OPSIN_PICK(elementwise_table);
  rows_at_once(rows, columns, [&](int64_t first, int64_t count) {
    table->gated(static_cast<int>(type), static_cast<Activation>(activation), first, count, columns, x, x_stride, to,
                 to_stride);
  });
  return 0;
}

OPSIN_EXPORT int opsin_activate(int64_t type, int64_t activation, int64_t elements, void* x) {
  if (!valid(type, elements, 1) || !valid(activation)) return 1;
  const ElementwiseTable* table = OPSIN_PICK(elementwise_table);
  rows_at_once(elements, 1, [&](int64_t first, int64_t count) {
    table->activate(static_cast<int>(type), static_cast<Activation>(activation), first, count, x);
  });
  return 0;
}
