// The loops of instance normalisation on the CPU. "Plane" functions walk over positions that lie
// side by side; "positions" and "tile" functions over positions whose channels do (channels_last).
#pragma once

#include <algorithm>
#include <cstdint>

#include "macros.h"

namespace fastgan {
namespace {

// Sums run over blocks in fp32 and over blocks in double.
constexpr int64_t kBlock = 4096;  // positions of a plane: 16 KB, which the L1 cache gives twice
constexpr int64_t kRows = 64;     // positions of a tile
constexpr int64_t kTile = 64;     // channels of a tile

// --- Moments: the mean, less the plane's first pixel, and the sum of squared deviations ----------
// Less a pixel, because a mean large against the deviation would cost digits.

struct Moments {
  double mean = 0, m2 = 0;
};

// Chan's update of the moments of `seen` positions by those of `count` others.
FASTGAN_INLINE void merge(double& mean, double& m2, double seen, double other_mean, double other_m2,
                          double count) {
  const double difference = other_mean - mean;
  const double share = count / (seen + count);
  mean += difference * share;
  m2 += other_m2 + difference * difference * seen * share;
}

// Each block twice, in four independent sums.
FASTGAN_CLONES void plane_moments(const float* x, int64_t count, Moments* moments) {
  const float shift = x[0];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin), quarter = size / 4;
    const float* x0 = x + begin;
    const float *x1 = x0 + quarter, *x2 = x1 + quarter, *x3 = x2 + quarter;
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < quarter; ++i) {
      s0 += x0[i] - shift;
      s1 += x1[i] - shift;
      s2 += x2[i] - shift;
      s3 += x3[i] - shift;
    }
    for (int64_t i = 4 * quarter; i < size; ++i) s0 += x0[i] - shift;
    const float mean = ((s0 + s1) + (s2 + s3)) / static_cast<float>(size);

    const auto square = [=](float value) __attribute__((always_inline)) {
      const float deviation = value - shift - mean;
      return deviation * deviation;
    };
    s0 = s1 = s2 = s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < quarter; ++i) {
      s0 += square(x0[i]);
      s1 += square(x1[i]);
      s2 += square(x2[i]);
      s3 += square(x3[i]);
    }
    for (int64_t i = 4 * quarter; i < size; ++i) s0 += square(x0[i]);
    merge(moments->mean, moments->m2, static_cast<double>(begin), mean, (s0 + s1) + (s2 + s3),
          static_cast<double>(size));
  }
}

// shift, mean, m2: [channels], at most kTile of them.
FASTGAN_CLONES void tile_moments(const float* x, int64_t stride, const float* shift,
                                 int64_t positions, int64_t channels, double* mean, double* m2) {
  for (int64_t begin = 0; begin < positions; begin += kRows) {
    const float* block = x + begin * stride;
    const int64_t rows = std::min(kRows, positions - begin);
    float sum[kTile] = {}, square[kTile] = {};
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) sum[c] += block[r * stride + c] - shift[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) sum[c] /= static_cast<float>(rows);
    for (int64_t r = 0; r < rows; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float deviation = block[r * stride + c] - shift[c] - sum[c];
        square[c] += deviation * deviation;
      }
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      merge(mean[c], m2[c], static_cast<double>(begin), sum[c], square[c],
            static_cast<double>(rows));
    }
  }
}

// --- Normalisation -------------------------------------------------------------------------------
// y = act((x - shift - centre) gain + offset) + residual

// Of one plane: shift its first pixel, centre the mean less that.
struct Affine {
  float shift, centre, gain, offset;
};

// The same of the channels of an image: [channels] each.
struct Affines {
  const float *shift, *centre, *gain, *offset;
};

FASTGAN_INLINE float activated(float z, float slope) { return z > 0 ? z : z * slope; }

template <bool with_activation, bool with_residual>
FASTGAN_CLONES void normalise_plane(const float* x, const float* residual, float* y, int64_t count,
                                    Affine f, float slope) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    float z = (x[i] - f.shift - f.centre) * f.gain + f.offset;
    if constexpr (with_activation) z = activated(z, slope);
    if constexpr (with_residual) z += residual[i];
    y[i] = z;
  }
}

template <bool with_activation, bool with_residual>
FASTGAN_CLONES void normalise_positions(const float* x, int64_t x_stride, const float* residual,
                                        int64_t residual_stride, float* y, int64_t positions,
                                        int64_t channels, Affines f, float slope) {
  for (int64_t p = 0; p < positions; ++p) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      float z = (x[c] - f.shift[c] - f.centre[c]) * f.gain[c] + f.offset[c];
      if constexpr (with_activation) z = activated(z, slope);
      if constexpr (with_residual) z += residual[c];
      y[c] = z;
    }
    x += x_stride;
    y += channels;
    if constexpr (with_residual) residual += residual_stride;
  }
}

// --- Gradients ----------------------------------------------------------------------------------
// g is the gradient before the activation, whose branch is found again from x.

struct GradSums {
  double g = 0, gx = 0;  // of g and of g (x - mean)
};

// grad_x = direct (g - mean_g) + constant + linear (x - mean), of one plane
struct Slope {
  float direct, mean_g, constant, linear;
};

// and of the channels of an image.
struct Slopes {
  const float *direct, *mean_g, *constant, *linear;
};

template <bool with_activation>
FASTGAN_INLINE float before_activation(float g, float centred, float gain, float offset,
                                       float slope) {
  return !with_activation || centred * gain + offset > 0 ? g : g * slope;
}

template <bool with_activation>
FASTGAN_CLONES void sum_plane(const float* x, const float* grad, int64_t count, Affine f,
                              float slope, GradSums* sums) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, count);
    float g_sum = 0, gx_sum = 0;
#pragma omp simd reduction(+ : g_sum, gx_sum)
    for (int64_t i = begin; i < end; ++i) {
      const float centred = x[i] - f.shift - f.centre;
      const float g = before_activation<with_activation>(grad[i], centred, f.gain, f.offset, slope);
      g_sum += g;
      gx_sum += g * centred;
    }
    sums->g += g_sum;
    sums->gx += gx_sum;
  }
}

// g_sums, gx_sums: [channels], at most kTile of them.
template <bool with_activation>
FASTGAN_CLONES void sum_tile(const float* x, int64_t x_stride, const float* grad,
                             int64_t grad_stride, int64_t positions, int64_t channels, Affines f,
                             float slope, double* g_sums, double* gx_sums) {
  for (int64_t begin = 0; begin < positions; begin += kRows) {
    const int64_t end = std::min(begin + kRows, positions);
    float g_sum[kTile] = {}, gx_sum[kTile] = {};
    for (int64_t p = begin; p < end; ++p) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const float centred = x[p * x_stride + c] - f.shift[c] - f.centre[c];
        const float g = before_activation<with_activation>(grad[p * grad_stride + c], centred,
                                                           f.gain[c], f.offset[c], slope);
        g_sum[c] += g;
        gx_sum[c] += g * centred;
      }
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      g_sums[c] += g_sum[c];
      gx_sums[c] += gx_sum[c];
    }
  }
}

template <bool with_activation>
FASTGAN_CLONES void differentiate_plane(const float* x, const float* grad, float* grad_x,
                                        int64_t count, Affine f, float slope, Slope s) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const float centred = x[i] - f.shift - f.centre;
    const float g = before_activation<with_activation>(grad[i], centred, f.gain, f.offset, slope);
    grad_x[i] = s.direct * (g - s.mean_g) + (s.constant + s.linear * centred);
  }
}

template <bool with_activation>
FASTGAN_CLONES void differentiate_positions(const float* x, int64_t x_stride, const float* grad,
                                            int64_t grad_stride, float* grad_x, int64_t positions,
                                            int64_t channels, Affines f, float slope, Slopes s) {
  for (int64_t p = 0; p < positions; ++p) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float centred = x[c] - f.shift[c] - f.centre[c];
      const float g =
          before_activation<with_activation>(grad[c], centred, f.gain[c], f.offset[c], slope);
      grad_x[c] = s.direct[c] * (g - s.mean_g[c]) + (s.constant[c] + s.linear[c] * centred);
    }
    x += x_stride;
    grad += grad_stride;
    grad_x += channels;
  }
}

// --- Reflection padding -------------------------------------------------------------------------

// The rows of an image of one plane, or of all planes of a channels_last image, and of that image
// padded by reflection.
struct Rows {
  int64_t H, W, run;  // run: floats per position
  int64_t left, right, top, bottom;

  bool padded() const { return left + right + top + bottom > 0; }
  int64_t size() const { return W * run; }
  int64_t padded_size() const { return (left + W + right) * run; }
  int64_t padded_begin(int64_t i) const { return i * padded_size(); }
  // Of row h inside the padded image.
  int64_t inner_begin(int64_t h) const { return padded_begin(h + top) + left * run; }

  // Calls body(i) for the rows i of the padded image, beside h + top, that show row h.
  template <typename Body>
  void for_each_mirror(int64_t h, const Body& body) const {
    if (h >= 1 && h <= top) body(top - h);
    if (h <= H - 2 && h >= H - 1 - bottom) body(top + 2 * (H - 1) - h);
  }
};

// Copies row h of a padded image, whose inner part is written, to wherever it shows.
inline void mirror_row(float* padded, int64_t h, const Rows& rows) {
  const int64_t run = rows.run, last = rows.W - 1;
  float *row = padded + rows.padded_begin(h + rows.top), *inner = padded + rows.inner_begin(h);
  for (int64_t k = 1; k <= rows.left; ++k) std::copy_n(inner + k * run, run, inner - k * run);
  for (int64_t k = 1; k <= rows.right; ++k) {
    std::copy_n(inner + (last - k) * run, run, inner + (last + k) * run);
  }
  rows.for_each_mirror(
      h, [&](int64_t i) { std::copy_n(row, rows.padded_size(), padded + rows.padded_begin(i)); });
}

FASTGAN_CLONES void add(float* out, const float* in, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] += in[i];
}

// The other way: row h of an image becomes the sum of all that shows it in the padded image.
inline void fold_row(const float* padded, float* image, int64_t h, const Rows& rows) {
  const int64_t run = rows.run, last = rows.W - 1;
  float* out = image + h * rows.size();
  const auto add_row = [&](int64_t i) {
    const float* inner = padded + rows.padded_begin(i) + rows.left * run;
    add(out, inner, rows.size());
    for (int64_t k = 1; k <= rows.left; ++k) add(out + k * run, inner - k * run, run);
    for (int64_t k = 1; k <= rows.right; ++k) {
      add(out + (last - k) * run, inner + (last + k) * run, run);
    }
  };
  std::fill_n(out, rows.size(), 0.0f);
  add_row(h + rows.top);
  rows.for_each_mirror(h, add_row);
}

}  // namespace
}  // namespace fastgan
