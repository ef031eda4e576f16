// The loops of instance normalisation on the CPU. "Plane" functions walk over positions that lie
// side by side; "positions" and "tile" functions over positions whose channels do (channels_last).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "macros.h"

namespace fastgan {
namespace {

// Sums are in fp32 within a block and in double across blocks.
constexpr int64_t kBlock = 2048;  // positions of a plane
constexpr int64_t kRows = 64;     // positions of a tile
constexpr int64_t kTile = 128;    // channels of a tile
constexpr int64_t kShare = 8;     // one part in so many of a block gives the sums their centre

// Calls body(r, n) for rows r to r + n of `count`, n four and at the end one: what lies in arrays
// of channels is loaded once for four.
template <typename Body>
FASTGAN_INLINE void for_each_rows(int64_t count, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) body(r, std::integral_constant<int, 4>());
  for (; r < count; ++r) body(r, std::integral_constant<int, 1>());
}

// --- Moments: the mean, less the plane's first pixel, and the sum of squared deviations ----------
// Less a pixel, because a mean large against the deviation would cost digits. A block is read once:
// its sums are about the mean of its first eighth, and the squares about that mean are at most
// eight times those about the block's own, so that taking the difference off costs one digit at
// most.

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

// The same by `count` others whose deviations from `shift + centre` and their squares sum to these.
FASTGAN_INLINE void merge_sums(double& mean, double& m2, double seen, float centre, float sum,
                               float square, double count) {
  const double difference = sum / count;
  const double other_m2 = std::max(square - sum * difference, 0.0);  // in this order it keeps NaN
  merge(mean, m2, seen, centre + difference, other_m2, count);
}

// Four independent sums hide the latency of an addition.
FASTGAN_CLONES void plane_moments(const float* x, int64_t count, Moments* moments) {
  const float shift = x[0];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin), quarter = size / 4;
    const int64_t first = (size + kShare - 1) / kShare;
    const float* x0 = x + begin;
    const float *x1 = x0 + quarter, *x2 = x1 + quarter, *x3 = x2 + quarter;
    float centre = 0;
#pragma omp simd reduction(+ : centre)
    for (int64_t i = 0; i < first; ++i) centre += x0[i] - shift;
    centre /= static_cast<float>(first);

    float s0 = 0, s1 = 0, s2 = 0, s3 = 0, q0 = 0, q1 = 0, q2 = 0, q3 = 0;
    const auto add = [=](float value, float& s, float& q) FASTGAN_LAMBDA {
      const float deviation = value - shift - centre;
      s += deviation;
      q += deviation * deviation;
    };
#pragma omp simd reduction(+ : s0, s1, s2, s3, q0, q1, q2, q3)
    for (int64_t i = 0; i < quarter; ++i) {
      add(x0[i], s0, q0);
      add(x1[i], s1, q1);
      add(x2[i], s2, q2);
      add(x3[i], s3, q3);
    }
    for (int64_t i = 4 * quarter; i < size; ++i) add(x0[i], s0, q0);
    merge_sums(moments->mean, moments->m2, static_cast<double>(begin), centre,
               (s0 + s1) + (s2 + s3), (q0 + q1) + (q2 + q3), static_cast<double>(size));
  }
}

// shift, mean, m2: [channels], at most kTile of them. Moments and sums of tiles and chunks are
// added to what is there.
FASTGAN_CLONES void tile_moments(const float* x, int64_t stride, const float* shift,
                                 int64_t positions, int64_t channels, double* mean, double* m2) {
  for (int64_t begin = 0; begin < positions; begin += kRows) {
    const float* block = x + begin * stride;
    const int64_t rows = std::min(kRows, positions - begin), first = (rows + kShare - 1) / kShare;
    float centre[kTile] = {}, sum[kTile] = {}, square[kTile] = {};
    for (int64_t r = 0; r < first; ++r) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) centre[c] += block[r * stride + c] - shift[c];
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) centre[c] /= static_cast<float>(first);
    for_each_rows(rows, [&](int64_t r, auto n) FASTGAN_LAMBDA {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        for (int i = 0; i < n; ++i) {
          const float deviation = block[(r + i) * stride + c] - shift[c] - centre[c];
          sum[c] += deviation;
          square[c] += deviation * deviation;
        }
      }
    });
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      merge_sums(mean[c], m2[c], static_cast<double>(begin), centre[c], sum[c], square[c],
                 static_cast<double>(rows));
    }
  }
}

// Of the chunks of an image, `chunk` positions each: means, m2s: [chunks, stride]; mean, m2:
// [channels].
FASTGAN_CLONES void merge_chunks(const double* means, const double* m2s, int64_t stride,
                                 int64_t chunk, int64_t positions, int64_t channels, double* mean,
                                 double* m2) {
  for (int64_t begin = 0; begin < positions; begin += chunk, means += stride, m2s += stride) {
    const auto seen = static_cast<double>(begin);
    const auto count = static_cast<double>(std::min(chunk, positions - begin));
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) merge(mean[c], m2[c], seen, means[c], m2s[c], count);
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

  FASTGAN_INLINE Affine operator[](int64_t c) const {
    return {shift[c], centre[c], gain[c], offset[c]};
  }
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
  for_each_rows(positions, [&](int64_t p, auto n) FASTGAN_LAMBDA {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const Affine a = f[c];
      for (int64_t r = p; r < p + n; ++r) {
        float z = (x[r * x_stride + c] - a.shift - a.centre) * a.gain + a.offset;
        if constexpr (with_activation) z = activated(z, slope);
        if constexpr (with_residual) z += residual[r * residual_stride + c];
        y[r * channels + c] = z;
      }
    }
  });
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

  FASTGAN_INLINE Slope operator[](int64_t c) const {
    return {direct[c], mean_g[c], constant[c], linear[c]};
  }
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
    for_each_rows(end - begin, [&](int64_t p, auto n) FASTGAN_LAMBDA {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const Affine a = f[c];
        for (int64_t r = begin + p; r < begin + p + n; ++r) {
          const float centred = x[r * x_stride + c] - a.shift - a.centre;
          const float g = before_activation<with_activation>(grad[r * grad_stride + c], centred,
                                                             a.gain, a.offset, slope);
          g_sum[c] += g;
          gx_sum[c] += g * centred;
        }
      }
    });
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      g_sums[c] += g_sum[c];
      gx_sums[c] += gx_sum[c];
    }
  }
}

// Of all chunks of an image: gs, gxs: [chunks, stride]; g, gx: [channels].
FASTGAN_CLONES void add_chunks(const double* gs, const double* gxs, int64_t stride, int64_t chunks,
                               int64_t channels, double* g, double* gx) {
  for (int64_t j = 0; j < chunks; ++j, gs += stride, gxs += stride) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      g[c] += gs[c];
      gx[c] += gxs[c];
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
  for_each_rows(positions, [&](int64_t p, auto n) FASTGAN_LAMBDA {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const Affine a = f[c];
      const Slope b = s[c];
      for (int64_t r = p; r < p + n; ++r) {
        const float centred = x[r * x_stride + c] - a.shift - a.centre;
        const float g = before_activation<with_activation>(grad[r * grad_stride + c], centred,
                                                           a.gain, a.offset, slope);
        grad_x[r * channels + c] = b.direct * (g - b.mean_g) + (b.constant + b.linear * centred);
      }
    }
  });
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
