// Statistics of image planes and what is normalised by them, on the CPU, in fp32. These functions
// fill tensors that exist, of at least one element; a plane is one channel of one image.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>

namespace fastgan {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Padding = std::array<int64_t, 4>;  // left, right, top, bottom

// x: [B, C, ...] -> mean, std: [B, C].
void instance_stats_fwd(const Tensor& x, Tensor mean, Tensor std, double eps, int64_t correction);

// grad_mean, grad_std: [B, C] -> grad_x: like x.
void instance_stats_bwd(const Tensor& x, Tensor grad_x, const OptionalTensor& grad_mean,
                        const OptionalTensor& grad_std, const Tensor& mean, const Tensor& std,
                        int64_t correction);

// x, residual: [B, C, H, W] -> y: [B, C, H + 2 pad, W + 2 pad], centre, rstd: [B, C].
//   y = pad(act(alpha ((x - mean) rstd weight + bias) + (1 - alpha) x) + residual)
// weight, bias: [C], [1, C] or [B, C]. alphas, [B], stand in for alpha. slope: of the activation
// below zero, 1 for none. centre is the mean less the plane's first pixel.
void instance_norm_fwd(const Tensor& x, Tensor y, Tensor centre, Tensor rstd,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual, const OptionalTensor& alphas, double alpha,
                       double slope, int64_t pad, double eps, int64_t correction);

// grad: like y -> grad_x: like x; sums: [2, B, C], the gradients of bias and weight.
void instance_norm_bwd(const Tensor& grad, const Tensor& x, Tensor grad_x, Tensor sums,
                       const Tensor& centre, const Tensor& rstd, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& alphas, double alpha,
                       double slope, int64_t pad, int64_t correction);

// x: [B, C, H, W] -> y, larger by the padding.
void reflection_pad2d_fwd(const Tensor& x, Tensor y, Padding padding);

// grad: like y -> grad_x: like x, the sum over what shows each pixel.
void reflection_pad2d_bwd(const Tensor& grad, Tensor grad_x, Padding padding);

}  // namespace fastgan
