#pragma once

#ifdef __CUDACC__
#define FASTGAN_INLINE __host__ __device__ __forceinline__
#else
#define FASTGAN_INLINE inline __attribute__((always_inline))
#endif

// The same of a lambda, written after its parameters.
#define FASTGAN_LAMBDA __attribute__((always_inline))

// FASTGAN_CLONES on a function compiles it for AVX-512, AVX2 and the baseline; the loader picks the
// best that the processor has. Helpers that such a function calls must be FASTGAN_INLINE, lambdas
// FASTGAN_LAMBDA.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define FASTGAN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTGAN_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
#else
#define FASTGAN_CLONES  // elsewhere the baseline, NEON on ARM, vectorises as it is
#endif
