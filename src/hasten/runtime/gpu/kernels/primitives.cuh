// Instructions, numbers and the exchange of activations between blocks. No includes: NVRTC then needs no headers.
//
// Every name in capitals that is not defined here comes from hasten/runtime/gpu/shape.py as a -D option.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
#define COMPILE_TIME __host__ __device__ constexpr

#ifndef RANKS  // GPUs that compute one model together
#define RANKS 1
#define RANK 0
#define FIRST_TOKEN 0
#define TOKENS VOCAB  // of all of them
#endif

constexpr int THREADS = WARPS * 32;         // of the consumers
constexpr int ALL_THREADS = THREADS + 128;  // and of the warps that stream the weights
// Of a quarter of a multiprocessor's 512 registers a lane, in steps of 8: what the launch gives all its warps, less 24
// for the streaming one. Asking for more than the launch gave hangs the kernel for ever.
constexpr int CONSUMER_REGISTERS = WARPS == 8 ? 240 : 112;
static_assert(WARPS == 8 || WARPS == 16, "whole groups of 4 warps, whose registers are known");
constexpr u32 MOST_TRIES = 4000000;  // of any wait: a hang becomes an error, or it would hold the GPU for ever

COMPILE_TIME int ceil_div(int a, int b) { return (a + b - 1) / b; }
COMPILE_TIME int round_up(int a, int b) { return ceil_div(a, b) * b; }
COMPILE_TIME int min_of(int a, int b) { return a < b ? a : b; }
COMPILE_TIME int max_of(int a, int b) { return a > b ? a : b; }
COMPILE_TIME int gcd(int a, int b) { return b ? gcd(b, a % b) : a; }

// ---- instructions
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void consumers_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }
// A write to address 0 instead of a trap: with a trap anywhere, ptxas ignores the registers that setmaxnreg brings and
// spills (seen with 12.8 and 13.0).
DEVICE void count_try(u32& tries) {
  if (++tries > MOST_TRIES) asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(tries) : "memory");
}
// Other GPUs may be late by what their hosts do: then a wait ends when this host writes the word, or after a minute, of
// which it is told by the same word. What is computed from then on is void.
#if RANKS > 1
extern "C" __constant__ u64 stop_word = 0;  // the address of an int of the host's
#endif
DEVICE bool is_over(u32& tries) {
#if RANKS > 1
  if (++tries % 4096) return false;
  int said;
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(said) : "l"(stop_word) : "memory");
  if (tries > 15 * MOST_TRIES)
    asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(stop_word), "r"(said = 1) : "memory");
  return said;
#else
  count_try(tries);
  return false;
#endif
}
DEVICE void init_mbarrier(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
DEVICE void wait_mbarrier(u32 barrier, u32 parity) {
  u32 done, tries = 0;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    if (RANKS == 1) count_try(tries);
  } while (!done);
}
// Arrives once `loaded` is there: it depends on it through `zero`, which is 0 and the compiler does not know that. A
// plain arrive orders a load before it in the memory model, but the load may still be on its way when the copy engine,
// which is not part of that order, overwrites what it reads (seen with 16 warps: 2 to 40 of 40 repeated steps
// differed).
DEVICE void arrive_after(u32 barrier, u32 loaded, u32 zero) {
  asm volatile("{.reg .b32 at; lop3.b32 at, %1, %2, %0, 0xEA; mbarrier.arrive.shared::cta.b64 _, [at];}" ::"r"(barrier),
               "r"(loaded), "r"(zero)
               : "memory");
}
DEVICE void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void bulk_copy(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}
DEVICE u64 read_once_policy() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
DEVICE void load_shared(u32 at, u32& a, u32& b, u32& c, u32& d) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(at));
}
DEVICE void load_shared(u32 at, u32& a, u32& b) {
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(at));
}
DEVICE void load_shared(u32 at, u32& a) { asm volatile("ld.shared.u32 %0, [%1];" : "=r"(a) : "r"(at)); }
DEVICE void load_shared_half(u32 at, u32& a) {
  u16 h;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(h) : "r"(at));
  a = h;
}
DEVICE void store_shared(u32 at, u32 a) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(a) : "memory"); }
// Keys and values are written by another block in an earlier launch: past L1, which may hold an older line.
DEVICE uint4 load_global4(const void* p) {
  uint4 v;
  asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE void load_global(const void* p, u32& a, u32& b) {
  asm volatile("ld.global.cg.v2.u32 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "l"(p));
}
DEVICE void load_global(const void* p, u32& a) { asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(a) : "l"(p)); }

// ---- numbers
DEVICE float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float bf16_high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
DEVICE float from_bf16(u16 v) { return __uint_as_float((u32)v << 16); }
DEVICE u32 to_bf16_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE float round_bf16(float v) { return bf16_low(to_bf16_pair(v, 0.f)); }
DEVICE u32 to_half_pair(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
DEVICE float from_half(u32 bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((u16)bits));
  return f;
}
DEVICE u32 half2_add(u32 a, u32 b) {
  u32 r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
DEVICE u32 half2_fma(u32 a, u32 b, u32 c) {
  u32 r;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
template <u32 MASK, u32 OR>
DEVICE u32 and_or(u32 v) {  // one instruction
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(v), "n"(MASK), "n"(OR));
  return r;
}
DEVICE float warp_sum(float v) {
#pragma unroll
  for (int m = 16; m; m >>= 1) v += __shfl_xor_sync(~0u, v, m);
  return v;
}
DEVICE float tanh_of(float v) { return 1.f - 2.f / (1.f + __expf(2.f * v)); }  // tanh.approx is off by 2^-11
DEVICE float capped(float v, float cap) { return cap * tanh_of(v / cap); }
DEVICE float activated(float v) {
  if (GELU) return 0.5f * v * (1.f + tanh_of(0.7978845608028654f * (v + 0.044715f * v * v * v)));
  return v / (1.f + __expf(-v));
}

// ---- the exchange: a value and the step's tag share one 64-bit word, the largest store that is surely atomic. The
// reader polls the data itself, so that a hop costs one store and one load through L2; no barrier, fence or flag.
// (A counting grid barrier instead: 677 us a step of the 0.6B model against 534.)
//
// A buffer is written anew every layer. That is safe because a block publishes in one phase only after all its warps
// have read the phase before. Tags come from a counter in memory that is never reset.
DEVICE void publish(u64* word, float value, u32 tag) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"((u64)tag << 32 | __float_as_uint(value))
               : "memory");
}
DEVICE ulonglong2 peek(const u64* words) {
  ulonglong2 v;
#if RANKS > 1
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0,%1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(words) : "memory");
#else
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(v.x), "=l"(v.y) : "l"(words) : "memory");
#endif
  return v;
}
DEVICE bool is_tagged(ulonglong2 v, u32 tag) { return (u32)(v.x >> 32) == tag && (u32)(v.y >> 32) == tag; }
DEVICE float value_of(u64 word) { return __uint_as_float((u32)word); }
DEVICE ulonglong2 await(const u64* words, u32 tag) {
  ulonglong2 v = peek(words);
  u32 tries = 0;
  while (!is_tagged(v, tag) && !is_over(tries)) v = peek(words);
  return v;
}
// What all ranks have a part of goes to all of them, and each reads it in its own memory: a hop over NVLink.
DEVICE void publish_to_all(u64* const (&peers)[RANKS], int at, float value, u32 tag) {
#pragma unroll
  for (int r = 0; r < RANKS; r++) {
    if (RANKS == 1)
      publish(peers[r] + at, value, tag);
    else
      asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(peers[r] + at),
                   "l"((u64)tag << 32 | __float_as_uint(value))
                   : "memory");
  }
}
// A lane's part of a slice: words first + 64 p + 2 lane and the next one, for p < PAIRS; 0 from `end` on.
template <int PAIRS>
DEVICE void await_slice(const u64* first, int end, u32 tag, int lane, float (&out)[2 * PAIRS]) {
  constexpr int AT_ONCE = 8;  // loads in flight a lane
#pragma unroll
  for (int p0 = 0; p0 < PAIRS; p0 += AT_ONCE) {
    ulonglong2 v[AT_ONCE];
    bool complete;
    u32 tries = 0;
    do {
      complete = true;
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int at = (p0 + i) * 64 + 2 * lane;
        v[i].x = v[i].y = (u64)tag << 32;
        if (p0 + i < PAIRS && at < end) v[i] = peek(first + at);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) complete &= is_tagged(v[i], tag);
    } while (!complete && !is_over(tries));
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++)
      if (p0 + i < PAIRS) out[2 * (p0 + i)] = value_of(v[i].x), out[2 * (p0 + i) + 1] = value_of(v[i].y);
  }
}
