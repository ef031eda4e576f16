#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "instance_norm.h"
#include "instance_norm_kernels.h"

namespace fastgan {
namespace {

// All splitting is by size, never by the number of threads: the same input gives the same bits.
constexpr int64_t kTask = 32 * 1024;     // elements worth a thread
constexpr int64_t kGroup = 1024 * 1024;  // elements of images that share the cache

// Calls body(i) for i < count, in parallel if there is enough to do.
template <typename Body>
void for_each(int64_t count, int64_t elements_each, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kTask / std::max<int64_t>(1, elements_each));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// --- Memory -------------------------------------------------------------------------------------

// A feature map [B, C, ...] of which one run walks over a plane, or, if channels_last, over all
// planes of an image, position by position.
struct Map {
  Tensor tensor;
  bool channels_last;
  int64_t B, C, HW;
  int64_t batch, channel, position;  // strides
  float* data;

  int64_t planes() const { return B * C; }
  float* plane(int64_t i) const { return data + i / C * batch + i % C * channel; }
  float* image(int64_t b) const { return data + b * batch; }
  float* at(int64_t b, int64_t p) const { return image(b) + p * position; }
};

std::optional<Map> map_of(const Tensor& x, bool channels_last) {
  const int64_t C = x.size(1);
  int64_t HW = 1, position = channels_last ? C : 1;
  for (int64_t i = x.dim() - 1; i >= 2; --i) {
    if (x.size(i) == 1) continue;
    if (HW == 1) position = x.stride(i);
    if (x.stride(i) != HW * position) return {};
    HW *= x.size(i);
  }
  const int64_t channel = C > 1 ? x.stride(1) : (channels_last ? 1 : HW);
  if ((channels_last ? channel : position) != 1) return {};
  auto* data = const_cast<float*>(x.const_data_ptr<float>());  // written only if writable() said so
  return Map{x, channels_last, x.size(0), C, HW, x.stride(0), channel, position, data};
}

Map buffer_for(const Tensor& x, bool channels_last) {
  const auto format = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  return *map_of(at::empty(x.sizes(), x.options().memory_format(format)), channels_last);
}

// The tensor itself if it lies that way, else a copy that does.
Map readable(const Tensor& x, bool channels_last) {
  if (const auto map = map_of(x, channels_last)) return *map;
  Map copy = buffer_for(x, channels_last);
  copy.tensor.copy_(x);
  return copy;
}

Map readable(const Tensor& x) { return readable(x, !map_of(x, false) && map_of(x, true)); }

// The same, and without gaps.
Map dense(const Tensor& x, bool channels_last) {
  const auto map = map_of(x, channels_last);
  if (map && x.is_non_overlapping_and_dense()) return *map;
  Map copy = buffer_for(x, channels_last);
  copy.tensor.copy_(x);
  return copy;
}

// The tensor itself if it lies that way without gaps, else a buffer, for store() to copy.
Map writable(const Tensor& y, bool channels_last) {
  const auto map = map_of(y, channels_last);
  return map && y.is_non_overlapping_and_dense() ? *map : buffer_for(y, channels_last);
}

void store(const Map& written, const Tensor& y) {
  if (!written.tensor.is_same(y)) y.copy_(written.tensor);
}

// --- Reflection padding -------------------------------------------------------------------------

Rows rows_of(const Map& x, const Padding& padding) {
  const auto [left, right, top, bottom] = padding;
  const int64_t run = x.channels_last ? x.C : 1;
  return {x.tensor.size(2), x.tensor.size(3), run, left, right, top, bottom};
}

// Calls body(x, padded, h) for every row h of every image of a map, with the image's and the padded
// image's memory; both maps are without gaps.
template <typename Body>
void for_each_row(const Map& x, const Map& padded, const Rows& rows, const Body& body) {
  const int64_t images = x.channels_last ? x.B : x.planes();
  const int64_t padded_rows = rows.top + rows.H + rows.bottom;
  for_each(images * rows.H, rows.size(), [&](int64_t i) {
    const int64_t image = i / rows.H;
    body(x.data + image * rows.H * rows.size(),
         padded.data + image * rows.padded_begin(padded_rows), i % rows.H);
  });
}

void pad(const Map& x, const Map& y, const Rows& rows) {
  for_each_row(x, y, rows, [&](const float* image, float* padded, int64_t h) {
    std::copy_n(image + h * rows.size(), rows.size(), padded + rows.inner_begin(h));
    mirror_row(padded, h, rows);
  });
}

// The gradient of an image from that of the padded image.
void fold(const Map& grad, const Map& grad_x, const Rows& rows) {
  for_each_row(grad_x, grad, rows, [&](float* image, const float* padded, int64_t h) {
    fold_row(padded, image, h, rows);
  });
}

// --- Channels_last: chunks of positions of a group of images -------------------------------------

// Images that go through the cache together: what is read to reduce them is there to write them.
struct Group {
  const Map& x;
  int64_t first, images;
  int64_t chunk, chunks;  // positions in a chunk, chunks in an image

  // Calls body(b, begin, end, i) for the positions [begin, end) of image b; i counts the calls.
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    for_each(images * chunks, chunk * x.C, [&](int64_t i) {
      const int64_t begin = i % chunks * chunk;
      body(first + i / chunks, begin, std::min(begin + chunk, x.HW), i);
    });
  }

  // Calls body(image, begin, end) for tiles of channels [begin, end), images counting from `first`.
  template <typename Body>
  void for_each_tile(const Body& body) const {
    const int64_t tiles = (x.C + kTile - 1) / kTile;
    const int64_t work = kTile * (4 * chunks + 64);  // in elements: to merge, and to finish, each
    for_each(images * tiles, work, [&](int64_t i) {
      const int64_t begin = i % tiles * kTile;
      body(i / tiles, begin, std::min(begin + kTile, x.C));
    });
  }

  // Calls body(plane, i) for its planes, i counting them.
  template <typename Body>
  void for_each_plane(const Body& body) const {
    for_each(images * x.C, 8, [&](int64_t i) { body(first * x.C + i, i); });
  }
};

// Chunks are multiples of `unit` positions.
template <typename Body>
void for_each_group(const Map& x, int64_t unit, const Body& body) {
  const int64_t images = std::max<int64_t>(1, kGroup / (x.HW * x.C));
  const int64_t units = (std::max(kRows, kTask / x.C) + unit - 1) / unit;
  const int64_t chunk = std::min(units * unit, x.HW);
  for (int64_t first = 0; first < x.B; first += images) {
    body(Group{x, first, std::min(images, x.B - first), chunk, (x.HW + chunk - 1) / chunk});
  }
}

// Two numbers of every plane of a group: `sum` adds up a tile of channels [c, c + channels) of a
// chunk, `combine` the chunks of an image, both into zeros. Calls body(plane, u, v, i), i counting
// the planes.
template <typename Sum, typename Combine, typename Body>
void reduce(const Group& group, const Sum& sum, const Combine& combine, const Body& body) {
  const int64_t C = group.x.C;
  std::vector<double> us(group.images * group.chunks * C), vs(us.size());  // [chunks, C]
  group.for_each_chunk([&](int64_t b, int64_t begin, int64_t end, int64_t i) {
    for (int64_t c = 0; c < C; c += kTile) {
      sum(b, begin, end, c, std::min(kTile, C - c), &us[i * C + c], &vs[i * C + c]);
    }
  });
  group.for_each_tile([&](int64_t image, int64_t begin, int64_t end) {
    double u[kTile] = {}, v[kTile] = {};
    const int64_t chunks = image * group.chunks * C + begin;
    combine(&us[chunks], &vs[chunks], end - begin, u, v);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t i = image * C + c;
      body(group.first * C + i, u[c - begin], v[c - begin], i);
    }
  });
}

// Calls body(plane, moments, i) for every plane of a group, i counting them.
template <typename Body>
void for_each_moments(const Group& group, const Body& body) {
  const Map& x = group.x;
  reduce(
      group,
      [&](int64_t b, int64_t begin, int64_t end, int64_t c, int64_t channels, double* mean,
          double* m2) {
        tile_moments(x.at(b, begin) + c, x.position, x.image(b) + c, end - begin, channels, mean,
                     m2);
      },
      [&](const double* means, const double* m2s, int64_t channels, double* mean, double* m2) {
        merge_chunks(means, m2s, x.C, group.chunk, x.HW, channels, mean, m2);
      },
      [&](int64_t plane, double mean, double m2, int64_t i) { body(plane, Moments{mean, m2}, i); });
}

// Affine of each plane of a group, as arrays.
struct AffineTable {
  std::vector<float> shift, centre, gain, offset;

  explicit AffineTable(const Group& group)
      : shift(group.images * group.x.C), centre(shift), gain(shift), offset(shift) {}
  void set(int64_t i, const Affine& f) {
    shift[i] = f.shift;
    centre[i] = f.centre;
    gain[i] = f.gain;
    offset[i] = f.offset;
  }
  Affines from(int64_t i) const { return {&shift[i], &centre[i], &gain[i], &offset[i]}; }
};

// Slope of each plane of a group, as arrays.
struct SlopeTable {
  std::vector<float> direct, mean_g, constant, linear;

  explicit SlopeTable(const Group& group)
      : direct(group.images * group.x.C), mean_g(direct), constant(direct), linear(direct) {}
  void set(int64_t i, const Slope& s) {
    direct[i] = s.direct;
    mean_g[i] = s.mean_g;
    constant[i] = s.constant;
    linear[i] = s.linear;
  }
  Slopes from(int64_t i) const { return {&direct[i], &mean_g[i], &constant[i], &linear[i]}; }
};

// --- Weight, bias, alpha ------------------------------------------------------------------------

// [C], [1, C] or [B, C]; where there is none, one number for all planes.
class PerPlane {
 public:
  PerPlane(const OptionalTensor& values, double otherwise, int64_t C)
      : otherwise_(static_cast<float>(otherwise)), C_(C) {
    if (!values) return;
    tensor_ = values->to(at::kFloat).contiguous();
    values_ = tensor_.const_data_ptr<float>();
    shared_ = tensor_.numel() == C;
  }
  float operator[](int64_t plane) const {
    return values_ ? values_[shared_ ? plane % C_ : plane] : otherwise_;
  }

 private:
  Tensor tensor_;
  const float* values_ = nullptr;
  bool shared_ = false;
  float otherwise_;
  int64_t C_;
};

struct Parameters {
  PerPlane weight, bias, alpha;

  Parameters(const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& alphas,
             double alpha, const Map& x)
      : weight(weight, 1, x.C), bias(bias, 0, x.C), alpha(of_planes(alphas, x), alpha, x.C) {}

  Affine affine_of(int64_t plane, float shift, float centre, float rstd) const {
    const float a = alpha[plane];
    return {shift, centre, a * weight[plane] * rstd + (1 - a),
            a * bias[plane] + (1 - a) * (shift + centre)};
  }

 private:
  static OptionalTensor of_planes(const OptionalTensor& alphas, const Map& x) {  // [B] -> [B, C]
    if (!alphas) return {};
    return alphas->unsqueeze(1).expand({x.B, x.C});
  }
};

}  // namespace

// --- Statistics ---------------------------------------------------------------------------------

void instance_stats_fwd(const Tensor& x_, Tensor mean_, Tensor std_, double eps,
                        int64_t correction) {
  const Map x = readable(x_);
  auto *mean = mean_.mutable_data_ptr<float>(), *std = std_.mutable_data_ptr<float>();
  const auto dof = static_cast<double>(x.HW - correction);
  const auto finish = [&](int64_t plane, const Moments& moments) {
    mean[plane] = static_cast<float>(*x.plane(plane) + moments.mean);
    std[plane] = static_cast<float>(std::sqrt(moments.m2 / dof + eps));
  };
  if (x.channels_last) {
    for_each_group(x, 1, [&](const Group& group) {
      for_each_moments(
          group, [&](int64_t plane, const Moments& moments, int64_t) { finish(plane, moments); });
    });
  } else {
    for_each(x.planes(), x.HW, [&](int64_t plane) {
      Moments moments;
      plane_moments(x.plane(plane), x.HW, &moments);
      finish(plane, moments);
    });
  }
}

void instance_stats_bwd(const Tensor& x_, Tensor grad_x_, const OptionalTensor& grad_mean_,
                        const OptionalTensor& grad_std_, const Tensor& mean_, const Tensor& std_,
                        int64_t correction) {
  const Map x = readable(x_), grad_x = writable(grad_x_, x.channels_last);
  const PerPlane grad_mean(grad_mean_, 0, x.C), grad_std(grad_std_, 0, x.C);
  const auto *mean = mean_.const_data_ptr<float>(), *std = std_.const_data_ptr<float>();
  const auto count = static_cast<float>(x.HW), dof = static_cast<float>(x.HW - correction);
  // grad_x is affine in x.
  const auto affine_of = [&](int64_t plane) -> Affine {
    return {mean[plane], 0, grad_std[plane] / (std[plane] * dof), grad_mean[plane] / count};
  };
  if (x.channels_last) {
    for_each_group(x, 1, [&](const Group& group) {
      AffineTable affine(group);
      group.for_each_plane([&](int64_t plane, int64_t i) { affine.set(i, affine_of(plane)); });
      group.for_each_chunk([&](int64_t b, int64_t begin, int64_t end, int64_t) {
        normalise_positions<false, false>(x.at(b, begin), x.position, nullptr, 0,
                                          grad_x.at(b, begin), end - begin, x.C,
                                          affine.from((b - group.first) * x.C), 1);
      });
    });
  } else {
    for_each(x.planes(), x.HW, [&](int64_t plane) {
      normalise_plane<false, false>(x.plane(plane), nullptr, grad_x.plane(plane), x.HW,
                                    affine_of(plane), 1);
    });
  }
  store(grad_x, grad_x_);
}

// --- Normalisation ------------------------------------------------------------------------------

void instance_norm_fwd(const Tensor& x_, Tensor y_, Tensor centre_, Tensor rstd_,
                       const OptionalTensor& weight, const OptionalTensor& bias,
                       const OptionalTensor& residual_, const OptionalTensor& alphas, double alpha,
                       double slope_, int64_t pad, double eps, int64_t correction) {
  const Map x = readable(x_), y = writable(y_, x.channels_last);
  const Map residual = residual_ ? readable(*residual_, x.channels_last) : x;
  const Parameters parameters(weight, bias, alphas, alpha, x);
  const Rows rows = rows_of(x, {pad, pad, pad, pad});
  const auto slope = static_cast<float>(slope_);
  const auto dof = static_cast<double>(x.HW - correction);
  auto *centre = centre_.mutable_data_ptr<float>(), *rstd = rstd_.mutable_data_ptr<float>();
  const auto affine_of = [&](int64_t plane, const Moments& moments) {
    centre[plane] = static_cast<float>(moments.mean);
    rstd[plane] = static_cast<float>(1 / std::sqrt(moments.m2 / dof + eps));
    return parameters.affine_of(plane, *x.plane(plane), centre[plane], rstd[plane]);
  };

  const bool plain = slope == 1;
  if (x.channels_last) {
    const auto normalise =
        residual_ ? plain ? normalise_positions<false, true> : normalise_positions<true, true>
        : plain   ? normalise_positions<false, false>
                  : normalise_positions<true, false>;
    for_each_group(x, pad ? rows.W : 1, [&](const Group& group) {
      AffineTable affine(group);
      for_each_moments(group, [&](int64_t plane, const Moments& moments, int64_t i) {
        affine.set(i, affine_of(plane, moments));
      });
      group.for_each_chunk([&](int64_t b, int64_t begin, int64_t end, int64_t) {
        const Affines f = affine.from((b - group.first) * x.C);
        const int64_t step = pad ? rows.W : end - begin;
        for (int64_t p = begin; p < end; p += step) {
          const int64_t h = p / rows.W;
          float* out = pad ? y.image(b) + rows.inner_begin(h) : y.at(b, p);
          normalise(x.at(b, p), x.position, residual.at(b, p), residual.position, out, step, x.C, f,
                    slope);
          if (pad) mirror_row(y.image(b), h, rows);
        }
      });
    });
  } else {
    const auto normalise = residual_
                               ? plain ? normalise_plane<false, true> : normalise_plane<true, true>
                           : plain ? normalise_plane<false, false>
                                   : normalise_plane<true, false>;
    for_each(x.planes(), x.HW, [&](int64_t plane) {
      Moments moments;
      plane_moments(x.plane(plane), x.HW, &moments);
      const Affine f = affine_of(plane, moments);
      const int64_t step = pad ? rows.W : x.HW;
      for (int64_t p = 0; p < x.HW; p += step) {
        const int64_t h = p / rows.W;
        float* out = y.plane(plane) + (pad ? rows.inner_begin(h) : p);
        normalise(x.plane(plane) + p, residual.plane(plane) + p, out, step, f, slope);
        if (pad) mirror_row(y.plane(plane), h, rows);
      }
    });
  }
  store(y, y_);
}

void instance_norm_bwd(const Tensor& grad_, const Tensor& x_, Tensor grad_x_, Tensor sums_,
                       const Tensor& centre_, const Tensor& rstd_, const OptionalTensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& alphas, double alpha,
                       double slope_, int64_t pad, int64_t correction) {
  const Map x = readable(x_), grad_x = writable(grad_x_, x.channels_last);
  Map grad = pad ? buffer_for(x_, x.channels_last) : readable(grad_, x.channels_last);
  if (pad) fold(dense(grad_, x.channels_last), grad, rows_of(x, {pad, pad, pad, pad}));
  const Parameters parameters(weight, bias, alphas, alpha, x);
  const auto slope = static_cast<float>(slope_);
  const auto *centre = centre_.const_data_ptr<float>(), *rstd = rstd_.const_data_ptr<float>();
  auto *g_sum = sums_.mutable_data_ptr<float>(), *gx_sum = g_sum + x.planes();
  const auto affine_of = [&](int64_t plane) {
    return parameters.affine_of(plane, *x.plane(plane), centre[plane], rstd[plane]);
  };
  const auto slope_of = [&](int64_t plane, const Affine& f, const GradSums& sums) -> Slope {
    const double a = parameters.alpha[plane], r = rstd[plane];
    const double mean_g = sums.g / static_cast<double>(x.HW);
    const double mean_gx = sums.gx / static_cast<double>(x.HW - correction);
    g_sum[plane] = static_cast<float>(a * sums.g);
    gx_sum[plane] = static_cast<float>(a * r * sums.gx);
    return {f.gain, static_cast<float>(mean_g), static_cast<float>((1 - a) * mean_g),
            static_cast<float>(-a * parameters.weight[plane] * r * r * r * mean_gx)};
  };

  const bool plain = slope == 1;
  if (x.channels_last) {
    const auto sum = plain ? sum_tile<false> : sum_tile<true>;
    const auto differentiate =
        plain ? differentiate_positions<false> : differentiate_positions<true>;
    for_each_group(x, 1, [&](const Group& group) {
      AffineTable affine(group);
      SlopeTable slopes(group);
      group.for_each_plane([&](int64_t plane, int64_t i) { affine.set(i, affine_of(plane)); });
      reduce(
          group,
          [&](int64_t b, int64_t begin, int64_t end, int64_t c, int64_t channels, double* g,
              double* gx) {
            sum(x.at(b, begin) + c, x.position, grad.at(b, begin) + c, grad.position, end - begin,
                channels, affine.from((b - group.first) * x.C + c), slope, g, gx);
          },
          [&](const double* gs, const double* gxs, int64_t channels, double* g, double* gx) {
            add_chunks(gs, gxs, x.C, group.chunks, channels, g, gx);
          },
          [&](int64_t plane, double g, double gx, int64_t i) {
            slopes.set(i, slope_of(plane, affine_of(plane), {g, gx}));
          });
      group.for_each_chunk([&](int64_t b, int64_t begin, int64_t end, int64_t) {
        const int64_t first = (b - group.first) * x.C;
        differentiate(x.at(b, begin), x.position, grad.at(b, begin), grad.position,
                      grad_x.at(b, begin), end - begin, x.C, affine.from(first), slope,
                      slopes.from(first));
      });
    });
  } else {
    const auto sum = plain ? sum_plane<false> : sum_plane<true>;
    const auto differentiate = plain ? differentiate_plane<false> : differentiate_plane<true>;
    for_each(x.planes(), x.HW, [&](int64_t plane) {
      const Affine f = affine_of(plane);
      GradSums sums;
      sum(x.plane(plane), grad.plane(plane), x.HW, f, slope, &sums);
      differentiate(x.plane(plane), grad.plane(plane), grad_x.plane(plane), x.HW, f, slope,
                    slope_of(plane, f, sums));
    });
  }
  store(grad_x, grad_x_);
}

// --- Reflection padding -------------------------------------------------------------------------

void reflection_pad2d_fwd(const Tensor& x_, Tensor y_, Padding padding) {
  const bool channels_last = readable(y_).channels_last;
  const Map x = dense(x_, channels_last), y = writable(y_, channels_last);
  pad(x, y, rows_of(x, padding));
  store(y, y_);
}

void reflection_pad2d_bwd(const Tensor& grad_, Tensor grad_x_, Padding padding) {
  const bool channels_last = readable(grad_x_).channels_last;
  const Map grad_x = writable(grad_x_, channels_last);
  fold(dense(grad_, channels_last), grad_x, rows_of(grad_x, padding));
  store(grad_x, grad_x_);
}

}  // namespace fastgan
