// The kernels of a step, compiled when the engine starts for one model:
//   KIND          type of weights, of the cache and of what products read: 0 f32, 1 bf16, 2 f16
//   HEADS, KV_HEADS, DIM   heads of queries, heads of keys and values, elements of a head
//   SHARED_HEADS  query heads that one block of `attend` computes; all share one head of keys
//   WARPS         warps of a block of `attend`
//   PAGE          tokens of a page
//
// A column is a token of a step. Every kernel computes a column from that column alone and its pages, in an order that
// depends on its position only: the same bits in any company.

typedef unsigned int u32;
typedef unsigned long long u64;

#if KIND == 0
typedef float elem;
static __device__ __forceinline__ float wide(elem x) { return x; }
static __device__ __forceinline__ elem narrow(float x) { return x; }
#elif KIND == 1
typedef unsigned short elem;
static __device__ __forceinline__ float wide(elem x) { return __uint_as_float((u32)x << 16); }
static __device__ __forceinline__ elem narrow(float x) {
    // Rounds to nearest, ties to even. NaN stays NaN.
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (elem)((bits >> 16) | 0x40u);
    return (elem)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
#else
typedef unsigned short elem;
static __device__ __forceinline__ float wide(elem x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
static __device__ __forceinline__ elem narrow(float x) {
    elem y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}
#endif

#define ALL_LANES 0xffffffffu
#define MINUS_INFINITY (__int_as_float(0xff800000))
#define QKV ((HEADS + 2 * KV_HEADS) * DIM)
#define HALF (DIM / 2)

/// Elements that one load of 16 bytes brings.
#if KIND == 0
#define WIDTH 4
#else
#define WIDTH 8
#endif

/// `WIDTH` elements from an address that is a multiple of 16.
static __device__ __forceinline__ void load(const elem* from, float* to) {
    uint4 words = *(const uint4*)from;
#if KIND == 0
    to[0] = __uint_as_float(words.x);
    to[1] = __uint_as_float(words.y);
    to[2] = __uint_as_float(words.z);
    to[3] = __uint_as_float(words.w);
#else
    u32 all[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = wide((elem)(all[i] & 0xffffu));
        to[2 * i + 1] = wide((elem)(all[i] >> 16));
    }
#endif
}

static __device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(ALL_LANES, x, apart);
    return x;
}

/// The residual stream of each column: its token's row of the embedding.
extern "C" __global__ void embed(const elem* table, const u32* tokens, float* residual, u32 hidden) {
    const elem* row = table + (u64)tokens[blockIdx.x] * hidden;
    float* to = residual + (u64)blockIdx.x * hidden;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = wide(row[i]);
}

/// Cosine and sine of each column's angles, `[column, DIM / 2]`. The angle is a product of f32, as HF has it.
extern "C" __global__ void turn(const u32* positions, const float* frequencies, float2* turns) {
    float position = (float)positions[blockIdx.x];
    for (u32 i = threadIdx.x; i < HALF; i += blockDim.x) {
        double sine, cosine;
        sincos((double)__fmul_rn(position, frequencies[i]), &sine, &cosine);
        turns[(u64)blockIdx.x * HALF + i] = make_float2((float)cosine, (float)sine);
    }
}

/// RMSNorm of the rows `rows[..count]` of the residual stream (of row `c` for column `c`, if there are none), to which
/// `bias` is added before, if there is one. Columns from `count` on are zeroes.
extern "C" __global__ void rms_norm(
    float* residual, const float* bias, const float* weight, const u32* rows, elem* out, u32 hidden, u32 count, float eps
) {
    __shared__ float sums[32];
    elem* to = out + (u64)blockIdx.x * hidden;
    if (blockIdx.x >= count) {
        for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = narrow(0.0f);
        return;
    }
    u64 row = rows ? rows[blockIdx.x] : blockIdx.x;
    float* x = residual + row * hidden;
    float squares = 0.0f;
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) {
        float value = x[i];
        if (bias) {
            value += bias[i];
            x[i] = value;
        }
        squares += value * value;
    }
    squares = sum_of_warp(squares);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = squares;
    __syncthreads();
    float total = 0.0f;
    for (u32 warp = 0; warp < blockDim.x / 32; warp++) total += sums[warp];
    float scale = 1.0f / sqrtf(total / (float)hidden + eps);
    for (u32 i = threadIdx.x; i < hidden; i += blockDim.x) to[i] = narrow(x[i] * scale * weight[i]);
}

/// Adds the biases, norms the heads of queries and keys where the model does, turns them to their position, and writes
/// keys and values into their page. Queries stay where they are. A block is a column, a warp takes a head at a time.
extern "C" __global__ void place(
    float* qkv, const float* bias, const float* query_norm, const float* key_norm, const float2* turns,
    const u32* positions, const u32* tables, const u64* pages, u64 layer_elems, float eps
) {
    u32 column = blockIdx.x, lane = threadIdx.x % 32;
    u32 position = positions[column];
    elem* page = (elem*)pages[tables[column] + position / PAGE] + layer_elems;
    const float2* turn = turns + (u64)column * HALF;
    for (u32 head = threadIdx.x / 32; head < HEADS + 2 * KV_HEADS; head += blockDim.x / 32) {
        float* x = qkv + (u64)column * QKV + head * DIM;
        const float* added = bias ? bias + head * DIM : 0;
        if (head >= HEADS + KV_HEADS) {
            u32 kv = head - HEADS - KV_HEADS;
            elem* to = page + ((u64)(2 * kv + 1) * PAGE + position % PAGE) * DIM;
            for (u32 i = lane; i < DIM; i += 32) to[i] = narrow(added ? x[i] + added[i] : x[i]);
            continue;
        }
        int is_query = head < HEADS;
        const float* weights = is_query ? query_norm : key_norm;
        float scale = 1.0f;
        if (weights) {
            float squares = 0.0f;
            for (u32 i = lane; i < DIM; i += 32) {
                float value = added ? x[i] + added[i] : x[i];
                squares += value * value;
            }
            scale = 1.0f / sqrtf(sum_of_warp(squares) / (float)DIM + eps);
        }
        elem* to = page + ((u64)(2 * (head - HEADS)) * PAGE + position % PAGE) * DIM;
        for (u32 i = lane; i < HALF; i += 32) {
            float low = x[i], high = x[i + HALF];
            if (added) {
                low += added[i];
                high += added[i + HALF];
            }
            if (weights) {
                low = low * scale * weights[i];
                high = high * scale * weights[i + HALF];
            }
            float2 at = turn[i];
            float first = low * at.x - high * at.y;
            float second = high * at.x + low * at.y;
            if (is_query) {
                x[i] = first;
                x[i + HALF] = second;
            } else {
                to[i] = narrow(first);
                to[i + HALF] = narrow(second);
            }
        }
    }
}

/// Elements of a head that one lane adds up.
#define OWN ((DIM + 31) / 32)

/// Attention of each column over its sequence's tokens up to itself, by an online softmax (Milakov and Gimelshein 2018). A block
/// is a column and some query heads that share keys; its warps take every `WARPS`th page, and are put together in their
/// order at the end.
extern "C" __global__ void __launch_bounds__(32 * WARPS) attend(
    const float* qkv, const u32* positions, const u32* tables, const u64* pages, u64 layer_elems, elem* out
) {
    const u32 parts = HEADS / KV_HEADS / SHARED_HEADS;
    u32 part = blockIdx.x % parts, kv = blockIdx.x / parts % KV_HEADS;
    u32 column = blockIdx.x / (parts * KV_HEADS);
    u32 first_head = kv * (HEADS / KV_HEADS) + part * SHARED_HEADS;
    u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    u32 tokens = positions[column] + 1;
    const u64* table = pages + tables[column];

    __shared__ __align__(16) float queries[SHARED_HEADS][DIM];
    __shared__ __align__(16) float shares[WARPS][SHARED_HEADS][PAGE];
    __shared__ float greatest[WARPS][SHARED_HEADS];
    __shared__ float totals[WARPS][SHARED_HEADS];
    __shared__ float sums[WARPS][SHARED_HEADS][DIM];

    const float scale = 1.0f / sqrtf((float)DIM);
    const float* from = qkv + (u64)column * QKV + first_head * DIM;
    for (u32 i = threadIdx.x; i < SHARED_HEADS * DIM; i += 32 * WARPS) ((float*)queries)[i] = from[i] * scale;
    __syncthreads();

    float most[SHARED_HEADS], total[SHARED_HEADS], sum[SHARED_HEADS][OWN];
#pragma unroll
    for (int h = 0; h < SHARED_HEADS; h++) {
        most[h] = MINUS_INFINITY;
        total[h] = 0.0f;
#pragma unroll
        for (int i = 0; i < OWN; i++) sum[h][i] = 0.0f;
    }
    // Two lanes have a token's key, in turns of one load.
    u32 token = lane / 2, side = lane % 2;
    for (u32 at = warp; at * PAGE < tokens; at += WARPS) {
        const elem* keys = (const elem*)table[at] + layer_elems + (u64)(2 * kv) * PAGE * DIM;
        const elem* values = keys + PAGE * DIM;
        u32 count = min(PAGE, tokens - at * PAGE);
        float score[SHARED_HEADS];
#pragma unroll
        for (int h = 0; h < SHARED_HEADS; h++) score[h] = 0.0f;
        if (token < count) {
            const elem* key = keys + token * DIM;
#if DIM % (2 * WIDTH) == 0
#pragma unroll
            for (int i = 0; i < DIM / (2 * WIDTH); i++) {
                float k[WIDTH];
                u32 first = (2 * i + side) * WIDTH;
                load(key + first, k);
#pragma unroll
                for (int h = 0; h < SHARED_HEADS; h++) {
#pragma unroll
                    for (int e = 0; e < WIDTH; e += 4) {
                        float4 q = *(const float4*)&queries[h][first + e];
                        score[h] += q.x * k[e] + q.y * k[e + 1] + q.z * k[e + 2] + q.w * k[e + 3];
                    }
                }
            }
#else
            for (u32 i = side; i < DIM; i += 2) {
                float k = wide(key[i]);
#pragma unroll
                for (int h = 0; h < SHARED_HEADS; h++) score[h] += queries[h][i] * k;
            }
#endif
        }
        __syncwarp();
#pragma unroll
        for (int h = 0; h < SHARED_HEADS; h++) {
            float s = score[h] + __shfl_xor_sync(ALL_LANES, score[h], 1);
            s = token < count ? s : MINUS_INFINITY;
            float now = s;
#pragma unroll
            for (int apart = 2; apart < 32; apart *= 2) now = fmaxf(now, __shfl_xor_sync(ALL_LANES, now, apart));
            now = fmaxf(now, most[h]);
            float share = expf(s - now), all = share;
#pragma unroll
            for (int apart = 2; apart < 32; apart *= 2) all += __shfl_xor_sync(ALL_LANES, all, apart);
            float kept = expf(most[h] - now);
            total[h] = total[h] * kept + all;
            most[h] = now;
#pragma unroll
            for (int i = 0; i < OWN; i++) sum[h][i] *= kept;
            if (side == 0) shares[warp][h][token] = share;
        }
        __syncwarp();
#pragma unroll 4
        for (u32 t = 0; t < count; t++) {
            const elem* value = values + t * DIM;
            float v[OWN];
#if DIM % 64 == 0 && KIND != 0
#pragma unroll
            for (int i = 0; i < OWN; i += 2) {
                u32 two = *(const u32*)(value + 32 * i + 2 * lane);
                v[i] = wide((elem)(two & 0xffffu));
                v[i + 1] = wide((elem)(two >> 16));
            }
#else
#pragma unroll
            for (int i = 0; i < OWN; i++) v[i] = 32 * i + lane < DIM ? wide(value[32 * i + lane]) : 0.0f;
#endif
#pragma unroll
            for (int h = 0; h < SHARED_HEADS; h++) {
                float share = shares[warp][h][t];
#pragma unroll
                for (int i = 0; i < OWN; i++) sum[h][i] += share * v[i];
            }
        }
        __syncwarp();
    }
#pragma unroll
    for (int h = 0; h < SHARED_HEADS; h++) {
        if (lane == 0) {
            greatest[warp][h] = most[h];
            totals[warp][h] = total[h];
        }
#pragma unroll
        for (int i = 0; i < OWN; i++) {
#if DIM % 64 == 0 && KIND != 0
            sums[warp][h][32 * (i & ~1) + 2 * lane + (i & 1)] = sum[h][i];
#else
            if (32 * i + lane < DIM) sums[warp][h][32 * i + lane] = sum[h][i];
#endif
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < SHARED_HEADS * DIM; i += 32 * WARPS) {
        u32 h = i / DIM, d = i % DIM;
        float now = greatest[0][h];
#pragma unroll
        for (int w = 1; w < WARPS; w++) now = fmaxf(now, greatest[w][h]);
        float all = 0.0f, added = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float kept = expf(greatest[w][h] - now);
            all += kept * totals[w][h];
            added += kept * sums[w][h][d];
        }
        out[(u64)column * (HEADS * DIM) + first_head * DIM + i] = narrow(added / all);
    }
}

/// SwiGLU (Shazeer 2020) of each column's gate and other factor, which lie behind each other.
extern "C" __global__ void gated(const float* gate_up, const float* bias, elem* out, u32 inner, u32 blocks) {
    u32 column = blockIdx.x / blocks;
    const float* gates = gate_up + (u64)column * 2 * inner;
    for (u32 i = blockIdx.x % blocks * blockDim.x + threadIdx.x; i < inner; i += blocks * blockDim.x) {
        float gate = gates[i], up = gates[inner + i];
        if (bias) {
            gate += bias[i];
            up += bias[inner + i];
        }
        out[(u64)column * inner + i] = narrow(gate / (1.0f + expf(-gate)) * up);
    }
}
