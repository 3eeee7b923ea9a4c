// The passes over units in a GPU's memory. Compiled when the program runs; no header is needed.
//
// Every operation is rounded on its own, as on the host: no multiply is fused with an add, so that a step on a GPU has
// the bits of a step on the host.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// f32, bf16 and f16, by their numbers; the half-precision types are handled as bits.
template <int P> struct Type { typedef u16 T; };
template <> struct Type<0> { typedef float T; };

template <int P> __device__ float wide(typename Type<P>::T value);

template <> __device__ float wide<0>(float value) { return value; }

template <> __device__ float wide<1>(u16 value) { return __uint_as_float((u32)value << 16); }

template <> __device__ float wide<2>(u16 value) {
    u32 sign = ((u32)value & 0x8000u) << 16, exponent = (value >> 10) & 0x1fu, fraction = value & 0x3ffu;
    if (exponent == 31) {
        // A NaN is made quiet.
        return __uint_as_float(sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u));
    }
    if (exponent == 0) {
        // A multiple of 2^-24, which f32 holds exactly.
        return __uint_as_float(sign | __float_as_uint(__fmul_rn((float)fraction, 5.9604644775390625e-8f)));
    }
    return __uint_as_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

template <int P> __device__ typename Type<P>::T narrow(float value);

template <> __device__ float narrow<0>(float value) { return value; }

// The same operations as in `optim/narrow.rs`.
template <> __device__ u16 narrow<1>(float value) {
    u32 bits = __float_as_uint(value);
    u32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return (u16)(nan ? ((bits >> 16) | 0x40u) : rounded);
}

template <> __device__ u16 narrow<2>(float value) {
    u32 bits = __float_as_uint(value);
    u32 sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
    u32 rebiased = size - (112u << 23);
    u32 normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
    u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(size), 0.5f)) - 0x3f000000u;
    u32 quiet = 0x7e00u | ((size >> 13) & 0x3ffu);
    u32 number = size >= 0x47800000u ? 0x7c00u : size < 0x38800000u ? subnormal : normal;
    return (u16)(sign | (size > 0x7f800000u ? quiet : number));
}

__device__ u64 first() { return (u64)blockIdx.x * blockDim.x + threadIdx.x; }

__device__ u64 stride() { return (u64)gridDim.x * blockDim.x; }

template <int INTO, int FROM, bool ADD>
__device__ void combine(typename Type<INTO>::T *into, const typename Type<FROM>::T *from, u64 elems) {
    for (u64 i = first(); i < elems; i += stride()) {
        float value = wide<FROM>(from[i]);
        into[i] = narrow<INTO>(ADD ? __fadd_rn(wide<INTO>(into[i]), value) : value);
    }
}

#define COMBINE(INTO, FROM)                                                                                  \
    extern "C" __global__ void set_##INTO##FROM(Type<INTO>::T *into, const Type<FROM>::T *from, u64 elems) { \
        combine<INTO, FROM, false>(into, from, elems);                                                       \
    }                                                                                                        \
    extern "C" __global__ void add_##INTO##FROM(Type<INTO>::T *into, const Type<FROM>::T *from, u64 elems) { \
        combine<INTO, FROM, true>(into, from, elems);                                                        \
    }

COMBINE(0, 0)
COMBINE(0, 1)
COMBINE(0, 2)
COMBINE(1, 0)
COMBINE(1, 1)
COMBINE(1, 2)
COMBINE(2, 0)
COMBINE(2, 1)
COMBINE(2, 2)

// As `Scalars` in `optim/kernel.rs`.
struct Scalars {
    float clip, keep, weight1, beta2, weight2, scale2, eps, step_size;
};

// Interval k ends before element runs[k]; runs[count + k] is 0 where it is left alone, 1 where it decays, else 2.
extern "C" __global__ void adamw(float *param, const float *grad, float *exp_avg, float *exp_avg_sq, u64 elems,
                                 const long long *runs, u64 count, Scalars s) {
    for (u64 i = first(); i < elems; i += stride()) {
        u64 low = 0, high = count - 1;
        while (low < high) {
            u64 middle = (low + high) / 2;
            if ((u64)runs[middle] > i) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        long long rule = runs[count + low];
        if (rule == 0) {
            continue;
        }
        float keep = rule == 1 ? s.keep : 1.0f;
        float g = __fmul_rn(grad[i], s.clip), m = exp_avg[i], v = exp_avg_sq[i];
        m = __fadd_rn(m, __fmul_rn(s.weight1, __fsub_rn(g, m)));
        v = __fadd_rn(__fmul_rn(s.beta2, v), __fmul_rn(s.weight2, __fmul_rn(g, g)));
        float scale = __fadd_rn(__fmul_rn(__fsqrt_rn(v), s.scale2), s.eps);
        param[i] = __fsub_rn(__fmul_rn(param[i], keep), __fdiv_rn(__fmul_rn(s.step_size, m), scale));
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
    }
}

// average <- average + weight (value - average)
extern "C" __global__ void blend(float *average, const float *values, u64 elems, float weight) {
    for (u64 i = first(); i < elems; i += stride()) {
        average[i] = __fadd_rn(average[i], __fmul_rn(weight, __fsub_rn(values[i], average[i])));
    }
}

extern "C" __global__ void swap(float *values, float *others, u64 elems) {
    for (u64 i = first(); i < elems; i += stride()) {
        float value = values[i];
        values[i] = others[i];
        others[i] = value;
    }
}

// The sum of a block's numbers, in an order that is always the same.
__device__ double sum_of_block(double mine) {
    __shared__ double sums[256];
    sums[threadIdx.x] = mine;
    for (u32 half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) {
            sums[threadIdx.x] += sums[threadIdx.x + half];
        }
    }
    __syncthreads();
    return sums[0];
}

// Block b sums the squares of its piece of `piece` elements into partial[b]: 256 threads a block.
extern "C" __global__ void squares(const float *values, u64 elems, u64 piece, double *partial) {
    u64 begin = blockIdx.x * piece, end = begin + piece < elems ? begin + piece : elems;
    double sum = 0.0;
    for (u64 i = begin + threadIdx.x; i < end; i += 256) {
        double value = values[i];
        sum = __dadd_rn(sum, __dmul_rn(value, value));
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = sum;
    }
}

// Adds all partial sums to the total: one block of 256 threads.
extern "C" __global__ void add_partials(const double *partial, u64 count, double *total) {
    double sum = 0.0;
    for (u64 i = threadIdx.x; i < count; i += 256) {
        sum += partial[i];
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) {
        *total += sum;
    }
}
