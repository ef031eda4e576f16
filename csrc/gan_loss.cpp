// fastgan::gan_loss and its gradients, to second order, over the kernels of gan_loss.h.
#include "gan_loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#ifdef FASTGAN_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#endif

namespace fastgan {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// What both ops take besides tensors: the loss is scale * (mean over each tensor, summed).
struct Arguments {
  std::string_view mode;
  double label_smoothing;
  double scale;
};

Mode parse_mode(std::string_view mode) {
  if (mode == "bce") return Mode::bce;
  if (mode == "lsgan") return Mode::lsgan;
  if (mode == "hinge") return Mode::hinge;
  TORCH_CHECK_VALUE(mode == "wgan",
                    "gan_loss: mode must be one of 'bce', 'lsgan', 'hinge', 'wgan', got '", mode,
                    "'");
  return Mode::wgan;
}

// One of the lists may be empty; the dispatcher found the op by a tensor, so not both are.
const Tensor& first_of(TensorList real, TensorList fake) {
  return real.empty() ? fake.front() : real.front();
}

void check(TensorList real, TensorList fake) {
  const Tensor& first = first_of(real, fake);
  const auto check_list = [&](const char* name, TensorList tensors) {
    for (size_t i = 0; i < tensors.size(); ++i) {
      const Tensor& x = tensors[i];
      TORCH_CHECK_TYPE(x.scalar_type() == first.scalar_type(), "gan_loss: ", name, "[", i,
                       "] must be ", first.scalar_type(), " like the other logits, got ",
                       x.scalar_type());
      TORCH_CHECK_VALUE(x.device() == first.device(), "gan_loss: ", name, "[", i, "] must be on ",
                        first.device(), " like the other logits, got ", x.device());
      TORCH_CHECK_VALUE(x.numel() > 0, "gan_loss: ", name, "[", i, "] must have elements, got ",
                        x.sizes());
    }
  };
  check_list("real_logits", real);
  check_list("fake_logits", fake);
}

// Elements are read in the order of memory, whatever the strides, if they lie without gaps.
Tensor dense(const Tensor& x) { return x.is_non_overlapping_and_dense() ? x : x.contiguous(); }

Tensor grad_like(const Tensor& x) {
  return x.is_non_overlapping_and_dense() ? at::empty_like(x)
                                          : at::empty_like(x, at::MemoryFormat::Contiguous);
}

c10::ScalarType loss_dtype(const Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Segments point into tensors that their owner keeps alive.
struct Segments {
  std::vector<Tensor> logits, grads;
  std::vector<Segment> segments;

  Segments(TensorList real, TensorList fake, double weight, bool with_grads) {
    logits.reserve(real.size() + fake.size());
    add(real, true, weight, with_grads);
    add(fake, false, weight, with_grads);
  }

 private:
  void add(TensorList tensors, bool real, double weight, bool with_grads) {
    for (const Tensor& x : tensors) {
      logits.push_back(dense(x));
      void* grad = nullptr;
      if (with_grads) {
        grads.push_back(grad_like(x));
        grad = grads.back().data_ptr();
      }
      segments.push_back({logits.back().const_data_ptr(), grad, x.numel(), weight, real});
    }
  }
};

// --- Kernels' side of the dispatcher ------------------------------------------------------------

std::tuple<Tensor, Tensor> gan_loss(TensorList real, TensorList fake, std::string_view mode,
                                    double label_smoothing, double scale) {
  check(real, fake);
  const Tensor& first = first_of(real, fake);
  const LossSettings settings{parse_mode(mode), label_smoothing};
  const Segments all(real, fake, scale, /*with_grads=*/false);
  const Tensor loss = at::empty({}, first.options().dtype(loss_dtype(first)));
  const Tensor stats = at::empty({4}, first.options().dtype(at::kFloat));
#ifdef FASTGAN_WITH_CUDA
  if (first.is_cuda()) {
    const c10::cuda::CUDAGuard guard(first.device());
    Tensor scratch;
    if (const int64_t size = gan_loss_scratch_cuda(all.segments))
      scratch = at::empty({size}, stats.options());
    gan_loss_forward_cuda(first.scalar_type(), all.segments, settings,
                          scratch.defined() ? scratch.mutable_data_ptr<float>() : nullptr,
                          loss.mutable_data_ptr<float>(), stats.mutable_data_ptr<float>());
    return {loss, stats};
  }
#endif
  const LossAndStats result = gan_loss_forward_cpu(first.scalar_type(), all.segments, settings);
  loss.fill_(result.loss);
  auto* out = stats.mutable_data_ptr<float>();
  out[0] = static_cast<float>(result.real_mean);
  out[1] = static_cast<float>(result.fake_mean);
  out[2] = static_cast<float>(result.real_accuracy);
  out[3] = static_cast<float>(result.fake_accuracy);
  return {loss, stats};
}

std::vector<Tensor> gan_loss_backward(const Tensor& grad, TensorList real, TensorList fake,
                                      std::string_view mode, double label_smoothing, double scale) {
  check(real, fake);
  const Tensor& first = first_of(real, fake);
  TORCH_CHECK_VALUE(grad.numel() == 1 && grad.scalar_type() == loss_dtype(first) &&
                        grad.device() == first.device(),
                    "gan_loss_backward: grad must be one ", loss_dtype(first), " on ",
                    first.device(), ", got ", grad.scalar_type(), " ", grad.sizes(), " on ",
                    grad.device());
  const LossSettings settings{parse_mode(mode), label_smoothing};
  Segments all(real, fake, scale, /*with_grads=*/true);
#ifdef FASTGAN_WITH_CUDA
  if (first.is_cuda()) {
    const c10::cuda::CUDAGuard guard(first.device());
    gan_loss_backward_cuda(first.scalar_type(), all.segments, settings,
                           grad.const_data_ptr<float>());
    return std::move(all.grads);
  }
#endif
  gan_loss_backward_cpu(first.scalar_type(), all.segments, settings, grad.item<double>());
  return std::move(all.grads);
}

std::tuple<Tensor, Tensor> gan_loss_meta(TensorList real, TensorList fake, std::string_view mode,
                                         double label_smoothing, double scale) {
  const Tensor& first = first_of(real, fake);
  return {at::empty({}, first.options().dtype(loss_dtype(first))),
          at::empty({4}, first.options().dtype(at::kFloat))};
}

std::vector<Tensor> gan_loss_backward_meta(const Tensor& grad, TensorList real, TensorList fake,
                                           std::string_view mode, double label_smoothing,
                                           double scale) {
  std::vector<Tensor> grads;
  for (const Tensor& x : real) grads.push_back(grad_like(x));
  for (const Tensor& x : fake) grads.push_back(grad_like(x));
  return grads;
}

// --- Autograd -----------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> call_gan_loss(TensorList real, TensorList fake, const Arguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastgan::gan_loss", "")
                             .typed<decltype(gan_loss)>();
  return op.call(real, fake, a.mode, a.label_smoothing, a.scale);
}

std::vector<Tensor> call_gan_loss_backward(const Tensor& grad, TensorList real, TensorList fake,
                                           const Arguments& a) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("fastgan::gan_loss_backward", "")
                             .typed<decltype(gan_loss_backward)>();
  return op.call(grad, real, fake, a.mode, a.label_smoothing, a.scale);
}

// Keeps the settings of an op for its backward; the logits are saved beside them.
void save(AutogradContext* ctx, const Arguments& a, size_t real_count) {
  ctx->saved_data["mode"] = std::string(a.mode);
  ctx->saved_data["label_smoothing"] = a.label_smoothing;
  ctx->saved_data["scale"] = a.scale;
  ctx->saved_data["real_count"] = static_cast<int64_t>(real_count);
}

Arguments restore(AutogradContext* ctx) {
  return {ctx->saved_data["mode"].toStringView(), ctx->saved_data["label_smoothing"].toDouble(),
          ctx->saved_data["scale"].toDouble()};
}

variable_list concatenate(TensorList real, TensorList fake) {
  variable_list all(real.begin(), real.end());
  all.insert(all.end(), fake.begin(), fake.end());
  return all;
}

// The first and second derivative of the loss of one logit, in differentiable operations: the
// reference for gradients of the second and higher orders.
Tensor slope(const Tensor& x, bool real, Mode mode, double label_smoothing) {
  switch (mode) {
    case Mode::bce:
      return real ? label_smoothing - at::sigmoid(-x) : at::sigmoid(x);
    case Mode::lsgan:
      return real ? 2 * (x - 1) : 2 * x;
    case Mode::hinge:
      return real ? -(x < 1).to(x.dtype()) : (x > -1).to(x.dtype());
    case Mode::wgan:
      return at::full_like(x, real ? -1.0 : 1.0);
  }
  TORCH_INTERNAL_ASSERT(false);
}

// Zero for the piecewise linear losses, as in the reference path.
Tensor curvature(const Tensor& x, Mode mode) {
  switch (mode) {
    case Mode::bce:
      return at::sigmoid(x) * at::sigmoid(-x);
    case Mode::lsgan:
      return at::full_like(x, 2.0);
    case Mode::hinge:
    case Mode::wgan:
      return at::zeros_like(x);
  }
  TORCH_INTERNAL_ASSERT(false);
}

class GanLossBackward : public torch::autograd::Function<GanLossBackward> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& grad, TensorList real,
                               TensorList fake, const Arguments& a) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list to_save = concatenate(real, fake);
    to_save.push_back(grad);
    ctx->save_for_backward(std::move(to_save));
    save(ctx, a, real.size());
    return call_gan_loss_backward(grad, real, fake, a);
  }

  // The forward is grad_i = grad * scale / N_i * slope(x_i).
  static variable_list backward(AutogradContext* ctx, const variable_list& grad_grads) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    variable_list logits = ctx->get_saved_variables();
    const Tensor grad = logits.back();
    logits.pop_back();
    const Arguments a = restore(ctx);
    const Mode mode = parse_mode(a.mode);
    const auto real_count = static_cast<size_t>(ctx->saved_data["real_count"].toInt());

    Tensor grad_of_grad = at::zeros_like(grad);
    variable_list grad_of_logits;
    for (size_t i = 0; i < logits.size(); ++i) {
      const Tensor x = logits[i].to(grad.dtype());
      const at::Scalar numel{c10::SymFloat(x.sym_numel())};  // a symbol under torch.compile
      const Tensor direction = grad_grads[i].to(grad.dtype()) * a.scale / numel;
      grad_of_grad =
          grad_of_grad + (direction * slope(x, i < real_count, mode, a.label_smoothing)).sum();
      grad_of_logits.push_back((grad * direction * curvature(x, mode)).to(logits[i].dtype()));
    }
    variable_list grads{grad_of_grad};
    grads.insert(grads.end(), grad_of_logits.begin(), grad_of_logits.end());
    grads.emplace_back();  // the arguments
    return grads;
  }
};

class GanLoss : public torch::autograd::Function<GanLoss> {
 public:
  static variable_list forward(AutogradContext* ctx, TensorList real, TensorList fake,
                               const Arguments& a) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, stats] = call_gan_loss(real, fake, a);
    ctx->save_for_backward(concatenate(real, fake));
    save(ctx, a, real.size());
    ctx->mark_non_differentiable({stats});
    return {loss, stats};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads_of_outputs) {
    const variable_list logits = ctx->get_saved_variables();
    const auto real_count = static_cast<size_t>(ctx->saved_data["real_count"].toInt());
    const TensorList all(logits);
    variable_list grads = call_gan_loss_backward(grads_of_outputs[0], all.slice(0, real_count),
                                                 all.slice(real_count), restore(ctx));
    grads.emplace_back();  // the arguments
    return grads;
  }
};

bool recorded(TensorList tensors) {
  const auto requires_grad = [](const Tensor& x) { return x.requires_grad(); };
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), requires_grad);
}

std::tuple<Tensor, Tensor> gan_loss_autograd(TensorList real, TensorList fake,
                                             std::string_view mode, double label_smoothing,
                                             double scale) {
  const Arguments a{mode, label_smoothing, scale};
  if (recorded(real) || recorded(fake)) {
    const variable_list outputs = GanLoss::apply(real, fake, a);
    return {outputs[0], outputs[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_gan_loss(real, fake, a);
}

std::vector<Tensor> gan_loss_backward_autograd(const Tensor& grad, TensorList real, TensorList fake,
                                               std::string_view mode, double label_smoothing,
                                               double scale) {
  const Arguments a{mode, label_smoothing, scale};
  if (recorded(grad) || recorded(real) || recorded(fake)) {
    return GanLossBackward::apply(grad, real, fake, a);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return call_gan_loss_backward(grad, real, fake, a);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastgan, m) {
  m.def(
      "gan_loss(Tensor[] real_logits, Tensor[] fake_logits, str mode, float label_smoothing,"
      " float scale) -> (Tensor loss, Tensor stats)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "gan_loss_backward(Tensor grad, Tensor[] real_logits, Tensor[] fake_logits, str mode,"
      " float label_smoothing, float scale) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("gan_loss", gan_loss);
  m.impl("gan_loss_backward", gan_loss_backward);
}

#ifdef FASTGAN_WITH_CUDA
TORCH_LIBRARY_IMPL(fastgan, CUDA, m) {
  m.impl("gan_loss", gan_loss);
  m.impl("gan_loss_backward", gan_loss_backward);
}
#endif

TORCH_LIBRARY_IMPL(fastgan, Meta, m) {
  m.impl("gan_loss", gan_loss_meta);
  m.impl("gan_loss_backward", gan_loss_backward_meta);
}

TORCH_LIBRARY_IMPL(fastgan, Autograd, m) {
  m.impl("gan_loss", gan_loss_autograd);
  m.impl("gan_loss_backward", gan_loss_backward_autograd);
}

}  // namespace fastgan
