// What kernels/paged_attention.cu needs of CUDA, on a CPU: a thread a lane, and barriers where lanes exchange values.
// Copies happen at once, so that a missing wait is not seen.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define DEVICE inline

struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index {
  int x;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max, std::min;

struct Warp {
  std::barrier<> all{32};
  uint32_t words[32][6];
};
inline thread_local Index threadIdx, blockIdx;
inline thread_local Warp* its_warp;
inline std::barrier<>* its_block;
inline uint8_t* its_memory;

// Every lane gives words and sees all lanes' before any goes on.
template <class Use>
auto exchanged(std::initializer_list<uint32_t> mine, Use use) {
  std::copy(mine.begin(), mine.end(), its_warp->words[threadIdx.x % 32]);
  its_warp->all.arrive_and_wait();
  auto found = use(its_warp->words);
  its_warp->all.arrive_and_wait();
  return found;
}
template <class T>
uint32_t bits_of(T x) {
  uint32_t r;
  memcpy(&r, &x, 4);
  return r;
}
template <class T>
T from_bits(uint32_t x) {
  T r;
  memcpy(&r, &x, 4);
  return r;
}
template <class T>
T __shfl_sync(unsigned, T x, int lane) {
  return from_bits<T>(exchanged({bits_of(x)}, [&](auto& words) { return words[lane & 31][0]; }));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int with) {
  return __shfl_sync(mask, x, threadIdx.x % 32 ^ with);
}
inline bool __any_sync(unsigned, bool x) {
  return exchanged({x}, [](auto& words) { return std::any_of(words, words + 32, [](auto& w) { return w[0]; }); });
}
inline void __syncwarp() { its_warp->all.arrive_and_wait(); }
inline void __syncthreads() { its_block->arrive_and_wait(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline int atomicAdd(int* at, int more) { return __atomic_fetch_add(at, more, __ATOMIC_SEQ_CST); }
inline void atomicMax(int* at, int than) {
  int now = __atomic_load_n(at, __ATOMIC_SEQ_CST);
  while (now < than && !__atomic_compare_exchange_n(at, &now, than, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
}
inline float __ldcg(const float* at) { return *at; }
inline float __int_as_float(int x) { return from_bits<float>(x); }
inline int __float_as_int(float x) { return bits_of(x); }
inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }
inline unsigned __float2uint_rn(float x) { return x > 0 ? (unsigned)std::nearbyint(x) : 0; }
inline float __expf(float x) { return std::exp(x); }

template <class T>
T __ldcs(const T* from) {
  return *from;
}
inline void copy16(void* to, const void* from) { memcpy(__builtin_assume_aligned(to, 16), from, 16); }
inline void copy4(void* to, const void* from) { memcpy(to, from, 4); }
inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = (uint64_t)b << 32 | a;
  uint32_t r = 0;
  for (int i = 0; i < 4; i++) r |= (uint32_t)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return r;
}
inline uint32_t rounded(float x) {
  const uint32_t bits = bits_of(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t packed(float low, float high) { return rounded(low) | rounded(high) << 16; }
// movmatrix: row r, column c of 16-bit values is half c % 2 of lane 4 r + c / 2.
inline uint32_t transposed(uint32_t x) {
  return exchanged({x}, [](auto& words) {
    const int lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
    auto value = [&](int r, int c) { return words[4 * r + c / 2][0] >> 16 * (c % 2) & 0xffff; };
    return value(column, row) | value(column + 1, row) << 16;
  });
}
// mma.m16n8k32 of int8, as PTX lays its operands out.
inline void multiply_add(int (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  exchanged({a0, a1, a2, a3, b0, b1}, [&](auto& words) {
    auto byte = [](uint32_t word, int i) { return (int)(int8_t)(word >> 8 * i); };
    for (int i = 0; i < 4; i++) {
      const int row = threadIdx.x % 32 / 4 + i / 2 * 8, column = threadIdx.x % 4 * 2 + i % 2;
      for (int k = 0; k < 32; k++)
        sums[i] += byte(words[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], k % 4) *
                   byte(words[column * 4 + k % 16 / 4][4 + k / 16], k % 4);
    }
    return 0;
  });
}

// Runs `kernel` in `blocks` blocks of `threads` threads, one block after another.
template <class Kernel>
void launched(int blocks, int threads, int shared_bytes, Kernel kernel) {
  std::vector<uint8_t> memory(shared_bytes + 16, 0x7f);
  its_memory = (uint8_t*)(((uintptr_t)memory.data() + 15) / 16 * 16);
  std::barrier<> block(threads), blocks_apart(threads);
  its_block = &block;
  std::vector<std::unique_ptr<Warp>> warps;
  for (int i = 0; i < threads / 32; i++) warps.push_back(std::make_unique<Warp>());
  std::vector<std::thread> lanes;
  for (int i = 0; i < threads; i++)
    lanes.emplace_back([&, i] {
      threadIdx.x = i, its_warp = warps[i / 32].get();
      for (int b = 0; b < blocks; b++) {
        blockIdx.x = b;
        kernel();
        blocks_apart.arrive_and_wait();
      }
    });
  for (auto& lane : lanes) lane.join();
}
