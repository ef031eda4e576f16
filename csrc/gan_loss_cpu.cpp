#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "gan_loss.h"

namespace fastgan {
namespace {

// Sums run over blocks in the vector registers' own precision and over blocks in double. Chunks
// are the unit of parallel work; their partial sums add up in order, whatever the thread count.
constexpr int64_t kBlock = 1024;
constexpr int64_t kChunk = 16 * kBlock;
constexpr int64_t kSerial = 64 * 1024;  // up to this many logits, threads cost more than they save

struct Chunk {
  const Segment* segment;
  int64_t begin, size;
};

std::vector<Chunk> split(const std::vector<Segment>& segments) {
  std::vector<Chunk> chunks;
  for (const Segment& segment : segments) {
    for (int64_t begin = 0; begin < segment.numel; begin += kChunk) {
      chunks.push_back({&segment, begin, std::min(kChunk, segment.numel - begin)});
    }
  }
  return chunks;
}

// Calls body(i) for every chunk.
template <typename Body>
void for_each(const std::vector<Chunk>& chunks, Body body) {
  int64_t numel = 0;
  for (const Chunk& chunk : chunks) numel += chunk.size;
  const auto count = static_cast<int64_t>(chunks.size());
  at::parallel_for(0, count, numel > kSerial ? 1 : count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

struct Sums {
  double loss = 0, logits = 0, correct = 0;
};

template <Mode mode, bool real, typename scalar_t>
FASTGAN_CLONES void sum_chunk(const scalar_t* x, int64_t size, double label_smoothing, Sums* sums) {
  using T = at::opmath_type<scalar_t>;
  const T smoothing = static_cast<T>(label_smoothing);
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    T loss = 0, logits = 0, correct = 0;
#pragma omp simd reduction(+ : loss, logits, correct)
    for (int64_t i = begin; i < end; ++i) {
      const T logit = static_cast<T>(x[i]);
      loss += loss_of<mode, real>(logit, smoothing);
      logits += logit;
      correct += judged_correctly<mode, real>(logit) ? T(1) : T(0);
    }
    sums->loss += loss;
    sums->logits += logits;
    sums->correct += correct;
  }
}

template <Mode mode, bool real, typename scalar_t>
FASTGAN_CLONES void slopes_of_chunk(const scalar_t* x, scalar_t* grad, int64_t size,
                                    double label_smoothing, double factor) {
  using T = at::opmath_type<scalar_t>;
  const T smoothing = static_cast<T>(label_smoothing);
  const T scale = static_cast<T>(factor);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    grad[i] = static_cast<scalar_t>(scale * slope_of<mode, real>(static_cast<T>(x[i]), smoothing));
  }
}

}  // namespace

LossAndStats gan_loss_forward_cpu(c10::ScalarType dtype, const std::vector<Segment>& segments,
                                  LossSettings settings) {
  const std::vector<Chunk> chunks = split(segments);
  std::vector<Sums> sums(chunks.size());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "gan_loss", [&] {
    with_mode(settings.mode, [&](auto mode) {
      for_each(chunks, [&](int64_t i) {
        const auto [segment, begin, size] = chunks[i];
        const auto* x = static_cast<const scalar_t*>(segment->logits) + begin;
        const auto kernel =
            segment->real ? sum_chunk<mode(), true, scalar_t> : sum_chunk<mode(), false, scalar_t>;
        kernel(x, size, settings.label_smoothing, &sums[i]);
      });
    });
  });

  LossAndStats result;
  double real_count = 0, fake_count = 0;  // one of them stays 0 for a generator
  for (size_t i = 0; i < chunks.size(); ++i) {
    const Segment& segment = *chunks[i].segment;
    result.loss += segment.weight * sums[i].loss / static_cast<double>(segment.numel);
    (segment.real ? result.real_mean : result.fake_mean) += sums[i].logits;
    (segment.real ? result.real_accuracy : result.fake_accuracy) += sums[i].correct;
    (segment.real ? real_count : fake_count) += static_cast<double>(chunks[i].size);
  }
  result.real_mean /= std::max(real_count, 1.0);
  result.real_accuracy /= std::max(real_count, 1.0);
  result.fake_mean /= std::max(fake_count, 1.0);
  result.fake_accuracy /= std::max(fake_count, 1.0);
  return result;
}

void gan_loss_backward_cpu(c10::ScalarType dtype, const std::vector<Segment>& segments,
                           LossSettings settings, double upstream) {
  const std::vector<Chunk> chunks = split(segments);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "gan_loss_backward", [&] {
    with_mode(settings.mode, [&](auto mode) {
      for_each(chunks, [&](int64_t i) {
        const auto [segment, begin, size] = chunks[i];
        const auto* x = static_cast<const scalar_t*>(segment->logits) + begin;
        auto* grad = static_cast<scalar_t*>(segment->grad) + begin;
        const double factor = upstream * segment->weight / static_cast<double>(segment->numel);
        const auto kernel = segment->real ? slopes_of_chunk<mode(), true, scalar_t>
                                          : slopes_of_chunk<mode(), false, scalar_t>;
        kernel(x, grad, size, settings.label_smoothing, factor);
      });
    });
  });
}

}  // namespace fastgan
