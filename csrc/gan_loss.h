// GAN losses, element by element: one code for CPU and GPU but for an exponential and a quotient,
// so that the tests of the CPU kernels exercise the mathematics that runs on the GPU. And the
// interface of the kernels around it.
#pragma once

#include <c10/core/ScalarType.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "macros.h"

namespace fastgan {

enum class Mode { bce, lsgan, hinge, wgan };

// exp(-a) for a >= 0; 0 below 2^-126, NaN for NaN. On a GPU one instruction after a product, within
// 5e-6 of the value; elsewhere branch-free, so that compilers vectorise it.
FASTGAN_INLINE float exp_negative(float a) {
#ifdef __CUDA_ARCH__
  float power_of_2;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power_of_2) : "f"(a * -1.44269504f));
  return power_of_2;
#else
  a = a > 88.03f ? 88.03f : a;
  // 1.5 * 2^23 rounds a small float to an integer and leaves that integer in the low bits.
  constexpr float kRound = 12582912.0f;
  const float shifted = kRound - a * 1.44269504f;
  const float n = shifted - kRound;
  // ln 2 in two parts, the first with few enough bits for n times it to be exact.
  const float f = (-a - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p =
      0.49999993f + f * (0.16666515f + f * (0.04166846f + f * (0.0083694188f + f * 0.0013813145f)));
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return (1.0f + f + f * f * p) * power;
#endif
}

FASTGAN_INLINE double exp_negative(double a) { return exp(-a); }

FASTGAN_INLINE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);  // within 2 ulp for the b used here, 1 to 3
#else
  return a / b;
#endif
}

FASTGAN_INLINE double divide(double a, double b) { return a / b; }

// log(1 + u) for 0 <= u <= 1, as 2 atanh(u / (2 + u)).
FASTGAN_INLINE float log1p_unit(float u) {
  const float s = divide(u, 2.0f + u);
  const float z = s * s;
  return 2.0f * s + s * z * (0.66666413f + z * (0.40021699f + z * (0.27999141f + z * 0.28024459f)));
}

FASTGAN_INLINE double log1p_unit(double u) { return log1p(u); }

template <typename T>
FASTGAN_INLINE T positive_part(T x) {  // keeps NaN
  return x < T(0) ? T(0) : x;
}

template <typename T>
FASTGAN_INLINE T softplus(T x) {
  return positive_part(x) + log1p_unit(exp_negative(x < T(0) ? -x : x));
}

template <typename T>
FASTGAN_INLINE T sigmoid(T x) {
  const T e = exp_negative(x < T(0) ? -x : x);
  return divide(x < T(0) ? e : T(1), T(1) + e);
}

// The loss of one logit that should be judged real, or fake. A generator wants its fakes judged
// real, so its losses are these too.
template <Mode mode, bool real, typename T>
FASTGAN_INLINE T loss_of(T x, T label_smoothing) {
  if constexpr (mode == Mode::bce) {
    return real ? softplus(-x) + label_smoothing * x : softplus(x);
  } else if constexpr (mode == Mode::lsgan) {
    const T difference = real ? x - T(1) : x;
    return difference * difference;
  } else if constexpr (mode == Mode::hinge) {
    return positive_part(real ? T(1) - x : T(1) + x);
  } else {
    return real ? -x : x;
  }
}

// Its derivative.
template <Mode mode, bool real, typename T>
FASTGAN_INLINE T slope_of(T x, T label_smoothing) {
  if constexpr (mode == Mode::bce) {
    return real ? label_smoothing - sigmoid(-x) : sigmoid(x);
  } else if constexpr (mode == Mode::lsgan) {
    return T(2) * (real ? x - T(1) : x);
  } else if constexpr (mode == Mode::hinge) {
    return real ? (x < T(1) ? T(-1) : T(0)) : (x > T(-1) ? T(1) : T(0));
  } else {
    return real ? T(-1) : T(1);
  }
}

// A logit on the right side of the decision point counts as judged correctly.
template <Mode mode, bool real, typename T>
FASTGAN_INLINE bool judged_correctly(T x) {
  constexpr T threshold = mode == Mode::lsgan ? T(0.5) : T(0);
  return real ? x > threshold : x < threshold;
}

// --- Kernels: they read and fill memory that exists ---------------------------------------------

// One tensor of logits, its elements in any order.
struct Segment {
  const void* logits;
  void* grad;  // as large as logits; backward only
  int64_t numel;
  double weight;  // of the mean loss over this tensor
  bool real;
};

struct LossSettings {
  Mode mode;
  double label_smoothing;
};

// What the forward computes. The statistics run over all real, or all fake, segments together.
struct LossAndStats {
  double loss = 0, real_mean = 0, fake_mean = 0, real_accuracy = 0, fake_accuracy = 0;
};

LossAndStats gan_loss_forward_cpu(c10::ScalarType dtype, const std::vector<Segment>& segments,
                                  LossSettings settings);
void gan_loss_backward_cpu(c10::ScalarType dtype, const std::vector<Segment>& segments,
                           LossSettings settings, double upstream);

// Floats of scratch memory that the forward needs; 0 if one block does it all.
int64_t gan_loss_scratch_cuda(const std::vector<Segment>& segments);
void gan_loss_forward_cuda(c10::ScalarType dtype, const std::vector<Segment>& segments,
                           LossSettings settings, float* scratch, float* loss,
                           float* stats);  // stats: [4]
void gan_loss_backward_cuda(c10::ScalarType dtype, const std::vector<Segment>& segments,
                            LossSettings settings, const float* upstream);

// Calls body(std::integral_constant<Mode, mode>()), so that the mode is a constant in kernels.
template <typename Body>
void with_mode(Mode mode, Body body) {
  switch (mode) {
    case Mode::bce:
      return body(std::integral_constant<Mode, Mode::bce>());
    case Mode::lsgan:
      return body(std::integral_constant<Mode, Mode::lsgan>());
    case Mode::hinge:
      return body(std::integral_constant<Mode, Mode::hinge>());
    case Mode::wgan:
      return body(std::integral_constant<Mode, Mode::wgan>());
  }
}

}  // namespace fastgan
