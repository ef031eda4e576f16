// CUDA kernels on the host: the threads of a block are threads, its barriers are barriers, and the
// blocks run one after another, the last one first. Slow, but it shows wrong indices, tails,
// reductions and missing barriers where there is no GPU. KERNELS names the translated source.
#if !__has_include(<barrier>)
#error the C++ library has no barriers
#endif

#include <algorithm>
#include <barrier>
#include <cstdint>
#include <deque>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // one block at a time
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

using std::min;
using cudaStream_t = int;

namespace c10::cuda {
inline cudaStream_t getCurrentCUDAStream() { return 0; }
}  // namespace c10::cuda

namespace {

constexpr int kWarpSize = 32;

struct Index {
  unsigned x;
};
thread_local Index threadIdx, blockIdx;

struct Block {
  explicit Block(int threads) : all(threads), lanes(threads) {
    for (int i = 0; i < threads / kWarpSize; ++i) warps.emplace_back(kWarpSize);
  }
  std::barrier<> all;
  std::deque<std::barrier<>> warps;
  std::vector<float> lanes;
};
Block* block;
int launches;

void __syncthreads() { block->all.arrive_and_wait(); }

float __shfl_down_sync(unsigned, float value, int lanes) {
  std::barrier<>& warp = block->warps[threadIdx.x / kWarpSize];
  block->lanes[threadIdx.x] = value;
  warp.arrive_and_wait();
  const bool inside = threadIdx.x % kWarpSize + lanes < kWarpSize;
  const float other = block->lanes[threadIdx.x + (inside ? lanes : 0)];
  warp.arrive_and_wait();
  return other;
}

// What kernel<<<blocks, threads, 0, stream>>>(arguments...) is translated to.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int64_t blocks, int threads, int, cudaStream_t, Arguments... arguments) {
  ++launches;
  Block state(threads);
  block = &state;
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] {
      threadIdx.x = i;
      for (int64_t b = blocks; b-- > 0;) {
        blockIdx.x = b;
        kernel(arguments...);
        __syncthreads();
      }
    });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

#include KERNELS

namespace {

std::vector<fastgan::Segment> segments_of(int count, const void** logits, void** grads,
                                          const int64_t* numels, const bool* real, double scale) {
  std::vector<fastgan::Segment> segments;
  for (int i = 0; i < count; ++i)
    segments.push_back({logits[i], grads ? grads[i] : nullptr, numels[i], scale, real[i]});
  return segments;
}

}  // namespace

// Both return the number of launches.
extern "C" int forward(int dtype, int mode, double label_smoothing, double scale, int count,
                       const void** logits, const int64_t* numels, const bool* real, float* loss,
                       float* stats) {
  const auto segments = segments_of(count, logits, nullptr, numels, real, scale);
  std::vector<float> scratch(fastgan::gan_loss_scratch_cuda(segments));
  launches = 0;
  fastgan::gan_loss_forward_cuda(static_cast<c10::ScalarType>(dtype), segments,
                                 {static_cast<fastgan::Mode>(mode), label_smoothing},
                                 scratch.data(), loss, stats);
  return launches;
}

extern "C" int backward(int dtype, int mode, double label_smoothing, double scale, int count,
                        const void** logits, const int64_t* numels, const bool* real, void** grads,
                        float upstream) {
  const auto segments = segments_of(count, logits, grads, numels, real, scale);
  launches = 0;
  fastgan::gan_loss_backward_cuda(static_cast<c10::ScalarType>(dtype), segments,
                                  {static_cast<fastgan::Mode>(mode), label_smoothing}, &upstream);
  return launches;
}
