// Norms and activations, one pass over memory each, compiled once for each instruction set.

#include "elementwise/elementwise.h"
#include "vec.h"

namespace opsin::OPSIN_ISA {
namespace {

// body(p(take), p(give)) over all columns: whole vectors, then the rest with lanes that are not stored.
template <class Body>
OPSIN_ALWAYS_INLINE void over(int64_t columns, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= columns; i += kLanes)
    body(i, [](auto* p) { return load(p); }, [](auto* p, Vec x) { store(p, x); });
  if (int rest = static_cast<int>(columns - i))
    body(i, [rest](auto* p) { return load_part(p, rest); }, [rest](auto* p, Vec x) { store_part(p, x, rest); });
}

// As it will be read again: rounded to the element type.
OPSIN_ALWAYS_INLINE Vec rounded(const float*, Vec x) { return x; }
OPSIN_ALWAYS_INLINE Vec rounded(const bfloat16*, Vec x) {
  bfloat16 lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}

template <class T>
void rms_norm_of(int64_t first, int64_t count, int64_t columns, const void* x, int64_t x_stride, void* residual,
                 int64_t residual_stride, const void* weight, float eps, void* to, int64_t to_stride) {
  const T* w = static_cast<const T*>(weight);
  for (int64_t row = first; row < first + count; row++) {
    const T* in = static_cast<const T*>(x) + row * x_stride;
    T* out = static_cast<T*>(to) + row * to_stride;
    Vec squares = zero();
    if (residual != nullptr) {
      T* stream = static_cast<T*>(residual) + row * residual_stride;
      over(columns, [&](int64_t i, auto take, auto give) {
        Vec h = rounded(stream, take(in + i) + take(stream + i));
        give(stream + i, h);
        squares = fma(h, h, squares);
      });
      in = stream;
    } else {
      over(columns, [&](int64_t i, auto take, auto) {
        Vec h = take(in + i);
        squares = fma(h, h, squares);
      });
    }
    Vec factor = splat(1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(columns) + eps));
    over(columns, [&](int64_t i, auto take, auto give) { give(out + i, take(in + i) * factor * take(w + i)); });
  }
}

template <class T>
void layer_norm_of(int64_t first, int64_t count, int64_t columns, const void* x, int64_t x_stride, const void* weight,
                   const void* bias, float eps, void* to, int64_t to_stride) {
  const T *w = static_cast<const T*>(weight), *b = static_cast<const T*>(bias);
  const float share = 1.0f / static_cast<float>(columns);
  for (int64_t row = first; row < first + count; row++) {
    const T* in = static_cast<const T*>(x) + row * x_stride;
    T* out = static_cast<T*>(to) + row * to_stride;
    Vec total = zero(), squares = zero();
    over(columns, [&](int64_t i, auto take, auto) { total = total + take(in + i); });
    const Vec mean = splat(sum(total) * share);
    int64_t whole = columns / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
      Vec d = load(in + i) - mean;
      squares = fma(d, d, squares);
    }
    if (int rest = static_cast<int>(columns - whole)) {
      Vec d = OPSIN_ISA::first(load_part(in + whole, rest) - mean, rest, 0.0f);
      squares = fma(d, d, squares);
    }
    const Vec factor = splat(1.0f / __builtin_sqrtf(sum(squares) * share + eps));
    if (b != nullptr) {
      over(columns, [&](int64_t i, auto take, auto give) {
        give(out + i, fma((take(in + i) - mean) * factor, take(w + i), take(b + i)));
      });
    } else {
      over(columns,
           [&](int64_t i, auto take, auto give) { give(out + i, (take(in + i) - mean) * factor * take(w + i)); });
    }
  }
}

OPSIN_ALWAYS_INLINE Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + exp(zero() - x)); }

// erfc(z) / 2 for z >= 0: Abramowitz & Stegun 1964, formula 7.1.26, absolute error below 1e-7.
OPSIN_ALWAYS_INLINE Vec half_erfc(Vec z) {
  Vec t = splat(1.0f) / fma(splat(0.3275911f), z, splat(1.0f));
  Vec p = splat(0.5f * 1.061405429f);
  p = fma(p, t, splat(0.5f * -1.453152027f));
  p = fma(p, t, splat(0.5f * 1.421413741f));
  p = fma(p, t, splat(0.5f * -0.284496736f));
  p = fma(p, t, splat(0.5f * 0.254829592f));
  return p * t * exp(zero() - z * z);
}

template <Activation A>
OPSIN_ALWAYS_INLINE Vec activated(Vec x) {
  if constexpr (A == Activation::silu) return x * sigmoid(x);
  if constexpr (A == Activation::quick_gelu) return x * sigmoid(splat(1.702f) * x);
  if constexpr (A == Activation::gelu_tanh) {  // (1 + tanh u) / 2 = sigmoid(2 u)
    Vec cube = x * x * x;
    return x * sigmoid(splat(1.5957691216f) * fma(splat(0.044715f), cube, x));
  }
  if constexpr (A == Activation::gelu) {
    Vec below = half_erfc(abs(x) * splat(0.70710678118f));  // the normal distribution beyond |x|
    return max(x, zero()) - abs(x) * below;
  }
}

template <class T, Activation A>
void gated_of(int64_t first, int64_t count, int64_t columns, const void* x, int64_t x_stride, void* to,
              int64_t to_stride) {
  for (int64_t row = first; row < first + count; row++) {
    const T* in = static_cast<const T*>(x) + row * x_stride;
    T* out = static_cast<T*>(to) + row * to_stride;
    over(columns, [&](int64_t i, auto take, auto give) {
      give(out + i, activated<A>(take(in + i)) * take(in + columns + i));
    });
  }
}

template <class T, Activation A>
void activate_of(int64_t first, int64_t count, void* x) {
  T* at = static_cast<T*>(x) + first;
  over(count, [&](int64_t i, auto take, auto give) { give(at + i, activated<A>(take(at + i))); });
}

// run(element, activation) with both as types.
template <class Run>
void by_activation(Activation activation, Run run) {
  switch (activation) {
    case Activation::silu: return run.template operator()<Activation::silu>();
    case Activation::gelu: return run.template operator()<Activation::gelu>();
    case Activation::gelu_tanh: return run.template operator()<Activation::gelu_tanh>();
    case Activation::quick_gelu: return run.template operator()<Activation::quick_gelu>();
  }
}

void rms_norm(int type, int64_t first, int64_t count, int64_t columns, const void* x, int64_t x_stride, void* residual,
              int64_t residual_stride, const void* weight, float eps, void* to, int64_t to_stride) {
  auto run = type == 0 ? rms_norm_of<float> : rms_norm_of<bfloat16>;
  run(first, count, columns, x, x_stride, residual, residual_stride, weight, eps, to, to_stride);
}

void layer_norm(int type, int64_t first, int64_t count, int64_t columns, const void* x, int64_t x_stride,
                const void* weight, const void* bias, float eps, void* to, int64_t to_stride) {
  auto run = type == 0 ? layer_norm_of<float> : layer_norm_of<bfloat16>;
  run(first, count, columns, x, x_stride, weight, bias, eps, to, to_stride);
}

void gated(int type, Activation activation, int64_t first, int64_t count, int64_t columns, const void* x,
           int64_t x_stride, void* to, int64_t to_stride) {
  by_activation(activation, [&]<Activation A>() {
    auto run = type == 0 ? gated_of<float, A> : gated_of<bfloat16, A>;
    run(first, count, columns, x, x_stride, to, to_stride);
  });
}

void activate(int type, Activation activation, int64_t first, int64_t count, void* x) {
  by_activation(activation, [&]<Activation A>() {
    auto run = type == 0 ? activate_of<float, A> : activate_of<bfloat16, A>;
    run(first, count, x);
  });
}

}  // namespace

const ElementwiseTable elementwise_table = {rms_norm, layer_norm, gated, activate};

}  // namespace opsin::OPSIN_ISA
