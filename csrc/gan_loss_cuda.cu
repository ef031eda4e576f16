#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>

#include "gan_loss.h"

namespace fastgan {
namespace {

constexpr int64_t kOneBlock = 64 * 1024;  // up to this many logits, one block computes the loss
constexpr int64_t kChunk = 8 * 1024;      // above, each block takes a chunk of one tensor
constexpr int kThreads = 256;
constexpr int kThreadsOneBlock = 512;
constexpr int kWarp = 32;
constexpr int kMaxSegments = 64;  // per launch: what fits into 4 KB of kernel parameters

struct DeviceSegment {
  const void* logits;
  void* grad;
  int64_t numel;
  float factor;  // weight / numel
  bool real;
  int64_t first_chunk;  // of this launch
};

struct Table {
  DeviceSegment segments[kMaxSegments];
  int count;
};

// The partial sums of a block, or of a thread.
struct Sums {
  float loss, real, fake, real_correct, fake_correct;
};
constexpr int kSums = sizeof(Sums) / sizeof(float);

__device__ __forceinline__ Sums operator+(const Sums& a, const Sums& b) {
  return {a.loss + b.loss, a.real + b.real, a.fake + b.fake, a.real_correct + b.real_correct,
          a.fake_correct + b.fake_correct};
}

__device__ __forceinline__ Sums shuffle_down(const Sums& a, int lanes) {
  constexpr unsigned kAll = 0xffffffffu;
  return {__shfl_down_sync(kAll, a.loss, lanes), __shfl_down_sync(kAll, a.real, lanes),
          __shfl_down_sync(kAll, a.fake, lanes), __shfl_down_sync(kAll, a.real_correct, lanes),
          __shfl_down_sync(kAll, a.fake_correct, lanes)};
}

// The sums of all threads, in thread 0. Fixed order: the same input gives the same bits.
template <int threads>
__device__ __forceinline__ Sums block_sum(Sums sums) {
  __shared__ Sums of_warp[threads / kWarp];
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sums = sums + shuffle_down(sums, lanes);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    sums = threadIdx.x < threads / kWarp ? of_warp[threadIdx.x] : Sums{};
    for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) sums = sums + shuffle_down(sums, lanes);
  }
  return sums;
}

template <typename scalar_t>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(scalar_t);
  scalar_t values[size];
};

// Reads 16 bytes at a time where x is aligned; thread is this one's number for x.
template <typename scalar_t, Mode mode, bool real, int threads>
__device__ __forceinline__ Sums sum_elements(const scalar_t* __restrict__ x, int64_t size,
                                             int thread, float factor, float label_smoothing) {
  float loss = 0, logits = 0, correct = 0;
  const auto add = [&](scalar_t value) {
    const float logit = static_cast<float>(value);
    loss += loss_of<mode, real>(logit, label_smoothing);
    logits += logit;
    correct += judged_correctly<mode, real>(logit) ? 1.0f : 0.0f;
  };
  using V = Vector<scalar_t>;
  const int64_t vectors = reinterpret_cast<uintptr_t>(x) % sizeof(V) == 0 ? size / V::size : 0;
#pragma unroll 4
  for (int64_t i = thread; i < vectors; i += threads) {
    const V v = reinterpret_cast<const V*>(x)[i];
#pragma unroll
    for (int j = 0; j < V::size; ++j) add(v.values[j]);
  }
#pragma unroll 1
  for (int64_t i = vectors * V::size + thread; i < size; i += threads) add(x[i]);
  return real ? Sums{factor * loss, logits, 0, correct, 0}
              : Sums{factor * loss, 0, logits, 0, correct};
}

template <typename scalar_t, Mode mode, int threads>
__device__ __forceinline__ Sums sum_segment(const DeviceSegment& segment, int64_t begin,
                                            int64_t size, int thread, float label_smoothing) {
  const auto* x = static_cast<const scalar_t*>(segment.logits) + begin;
  return segment.real ? sum_elements<scalar_t, mode, true, threads>(x, size, thread, segment.factor,
                                                                    label_smoothing)
                      : sum_elements<scalar_t, mode, false, threads>(
                            x, size, thread, segment.factor, label_smoothing);
}

struct Output {
  float* loss;
  float* stats;  // [4]
  float real_count, fake_count;
};

__device__ __forceinline__ void store(const Output& out, const Sums& sums) {
  *out.loss = sums.loss;
  out.stats[0] = sums.real / out.real_count;
  out.stats[1] = sums.fake / out.fake_count;
  out.stats[2] = sums.real_correct / out.real_count;
  out.stats[3] = sums.fake_correct / out.fake_count;
}

template <typename scalar_t, Mode mode>
__global__ void __launch_bounds__(kThreadsOneBlock, 1)
    gan_loss_fwd_one_block_kernel(const __grid_constant__ Table table, float label_smoothing,
                                  Output out) {
  Sums sums{};
  // Where one segment leaves off the next goes on, so that all threads share small segments.
  unsigned first = 0;
  for (int i = 0; i < table.count; ++i) {
    const DeviceSegment& segment = table.segments[i];
    const int thread = (threadIdx.x - first) % kThreadsOneBlock;
    sums = sums + sum_segment<scalar_t, mode, kThreadsOneBlock>(segment, 0, segment.numel, thread,
                                                                label_smoothing);
    first += segment.numel / Vector<scalar_t>::size;
  }
  sums = block_sum<kThreadsOneBlock>(sums);
  if (threadIdx.x == 0) store(out, sums);
}

__device__ __forceinline__ const DeviceSegment& segment_of_block(const Table& table) {
  int i = table.count - 1;
  while (table.segments[i].first_chunk > blockIdx.x) --i;
  return table.segments[i];
}

template <typename scalar_t, Mode mode>
__global__ void __launch_bounds__(kThreads, 1)
    gan_loss_fwd_partial_kernel(const __grid_constant__ Table table, float label_smoothing,
                                Sums* __restrict__ partials) {  // [blocks]
  const DeviceSegment& segment = segment_of_block(table);
  const int64_t begin = (blockIdx.x - segment.first_chunk) * kChunk;
  const int64_t size = min(kChunk, segment.numel - begin);
  const Sums sums = block_sum<kThreads>(
      sum_segment<scalar_t, mode, kThreads>(segment, begin, size, threadIdx.x, label_smoothing));
  if (threadIdx.x == 0) partials[blockIdx.x] = sums;
}

__global__ void __launch_bounds__(kThreadsOneBlock, 1)
    gan_loss_fwd_sum_kernel(const Sums* __restrict__ partials, int64_t count, Output out) {
  Sums sums{};
  for (int64_t i = threadIdx.x; i < count; i += kThreadsOneBlock) sums = sums + partials[i];
  sums = block_sum<kThreadsOneBlock>(sums);
  if (threadIdx.x == 0) store(out, sums);
}

template <typename scalar_t, Mode mode, bool real>
__device__ __forceinline__ void store_slopes(const scalar_t* __restrict__ x,
                                             scalar_t* __restrict__ grad, int64_t size,
                                             float factor, float label_smoothing) {
  const auto slope = [&](scalar_t logit) {
    return static_cast<scalar_t>(factor *
                                 slope_of<mode, real>(static_cast<float>(logit), label_smoothing));
  };
  using V = Vector<scalar_t>;
  const auto addresses = reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(grad);
  const int64_t vectors = addresses % sizeof(V) == 0 ? size / V::size : 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) {
    V v = reinterpret_cast<const V*>(x)[i];
#pragma unroll
    for (int j = 0; j < V::size; ++j) v.values[j] = slope(v.values[j]);
    reinterpret_cast<V*>(grad)[i] = v;
  }
#pragma unroll 1
  for (int64_t i = vectors * V::size + threadIdx.x; i < size; i += kThreads) grad[i] = slope(x[i]);
}

template <typename scalar_t, Mode mode>
__global__ void __launch_bounds__(kThreads, 1)
    gan_loss_bwd_kernel(const __grid_constant__ Table table, float label_smoothing,
                        const float* __restrict__ upstream) {
  const DeviceSegment& segment = segment_of_block(table);
  const int64_t begin = (blockIdx.x - segment.first_chunk) * kChunk;
  const int64_t size = min(kChunk, segment.numel - begin);
  const auto* x = static_cast<const scalar_t*>(segment.logits) + begin;
  auto* grad = static_cast<scalar_t*>(segment.grad) + begin;
  const float factor = *upstream * segment.factor;
  if (segment.real) {
    store_slopes<scalar_t, mode, true>(x, grad, size, factor, label_smoothing);
  } else {
    store_slopes<scalar_t, mode, false>(x, grad, size, factor, label_smoothing);
  }
}

// --- Host ---------------------------------------------------------------------------------------

int64_t chunks_of(const Segment& segment) { return (segment.numel + kChunk - 1) / kChunk; }

bool fits_one_block(const std::vector<Segment>& segments) {
  int64_t numel = 0;
  for (const Segment& segment : segments) numel += segment.numel;
  return numel <= kOneBlock && segments.size() <= kMaxSegments;
}

// Calls launch(table, chunks) for every kMaxSegments of the segments.
template <typename Launch>
void for_each_table(const std::vector<Segment>& segments, Launch launch) {
  for (size_t first = 0; first < segments.size(); first += kMaxSegments) {
    Table table;
    table.count = static_cast<int>(std::min<size_t>(kMaxSegments, segments.size() - first));
    int64_t chunks = 0;
    for (int i = 0; i < table.count; ++i) {
      const Segment& s = segments[first + i];
      const auto factor = static_cast<float>(s.weight / static_cast<double>(s.numel));
      table.segments[i] = {s.logits, s.grad, s.numel, factor, s.real, chunks};
      chunks += chunks_of(s);
    }
    launch(table, chunks);
  }
}

template <typename Body>
void with_dtype(c10::ScalarType dtype, Body body) {
  switch (dtype) {
    case c10::ScalarType::Float:
      return body(float());
    case c10::ScalarType::Half:
      return body(c10::Half());
    case c10::ScalarType::BFloat16:
      return body(c10::BFloat16());
    default:
      TORCH_CHECK_TYPE(false, "gan_loss: no CUDA kernel for ", dtype);
  }
}

}  // namespace

int64_t gan_loss_scratch_cuda(const std::vector<Segment>& segments) {
  if (fits_one_block(segments)) return 0;
  int64_t chunks = 0;
  for (const Segment& segment : segments) chunks += chunks_of(segment);
  return chunks * kSums;
}

void gan_loss_forward_cuda(c10::ScalarType dtype, const std::vector<Segment>& segments,
                           LossSettings settings, float* scratch, float* loss, float* stats) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto label_smoothing = static_cast<float>(settings.label_smoothing);
  int64_t real_count = 0, fake_count = 0;
  for (const Segment& segment : segments) (segment.real ? real_count : fake_count) += segment.numel;
  const Output out{loss, stats, static_cast<float>(std::max<int64_t>(real_count, 1)),
                   static_cast<float>(std::max<int64_t>(fake_count, 1))};

  const bool one_block = fits_one_block(segments);
  auto* partials = reinterpret_cast<Sums*>(scratch);
  int64_t blocks = 0;
  for_each_table(segments, [&](const Table& table, int64_t chunks) {
    with_dtype(dtype, [&](auto value) {
      using scalar_t = decltype(value);
      with_mode(settings.mode, [&](auto mode) {
        if (one_block) {
          gan_loss_fwd_one_block_kernel<scalar_t, mode()>
              <<<1, kThreadsOneBlock, 0, stream>>>(table, label_smoothing, out);
        } else {
          gan_loss_fwd_partial_kernel<scalar_t, mode()>
              <<<chunks, kThreads, 0, stream>>>(table, label_smoothing, partials + blocks);
        }
      });
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    blocks += chunks;
  });
  if (!one_block) {
    gan_loss_fwd_sum_kernel<<<1, kThreadsOneBlock, 0, stream>>>(partials, blocks, out);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void gan_loss_backward_cuda(c10::ScalarType dtype, const std::vector<Segment>& segments,
                            LossSettings settings, const float* upstream) {
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const auto label_smoothing = static_cast<float>(settings.label_smoothing);
  for_each_table(segments, [&](const Table& table, int64_t chunks) {
    with_dtype(dtype, [&](auto value) {
      using scalar_t = decltype(value);
      with_mode(settings.mode, [&](auto mode) {
        gan_loss_bwd_kernel<scalar_t, mode()>
            <<<chunks, kThreads, 0, stream>>>(table, label_smoothing, upstream);
      });
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace fastgan
