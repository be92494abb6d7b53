/* The elementwise work of a step on a CPU: one pass over memory where torch's operations take five.

   Compiled by `cpu_kernels.py` where there is a compiler. Arrays hold float32, are dense and laid out alike, so that
   loops walk over memory and know little of shapes. A sum has one part for each block, or each row of a matrix, and
   parts are added in order: it is the same for any number of threads. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* BLOCK, the elements of one part of a sum, comes with the command that compiles. Adding and subtracting 1.5 * 2^23 leaves the nearest integer, ties to even; grids end far below. */
#define ROUND 12582912.0f
#define LOG2_E 1.44269504f

typedef int64_t size;

static size blocks(size n) { return (n + BLOCK - 1) / BLOCK; }

static size end(size block, size n) { return (block + 1) * BLOCK < n ? (block + 1) * BLOCK : n; }

static float added(const float *parts, size count)
{
    double total = 0.0;
    for (size k = 0; k < count; k++)
        total += parts[k];
    return (float)total;
}

/* Comparisons, not fminf and fmaxf: NaN stays NaN. */
static inline float clamped(float x, float low, float high)
{
    x = x < low ? low : x;
    return x > high ? high : x;
}

static inline float rounded(float position, float low, float high)
{
    return (clamped(position, low, high) + ROUND) - ROUND;
}

/* 2^x to some units in the last place, NaN for NaN: the power's integer goes to the exponent, Taylor's series takes the
   rest. */
static inline float exp2_of(float x)
{
    x = clamped(x, -126.0f, 127.0f);
    float whole = (x + ROUND) - ROUND, f = x - whole;
    float y = 1.52527338e-5f;
    y = y * f + 1.54035304e-4f;
    y = y * f + 1.33335581e-3f;
    y = y * f + 9.61812911e-3f;
    y = y * f + 5.55041087e-2f;
    y = y * f + 2.40226507e-1f;
    y = y * f + 6.93147181e-1f;
    y = y * f + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)(x == x ? whole : 0.0f) + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return y * power;
}

/* log2(x) for x >= 0, about -127 for 0: the series of the inverse hyperbolic tangent around 1, exact there. */
static inline float log2_of(float x)
{
    int32_t bits, exponent;
    memcpy(&bits, &x, sizeof bits);
    exponent = (bits - 0x3f3504f3) >> 23; /* so that the mantissa is between the roots of 1/2 and of 2 */
    bits -= exponent * (1 << 23);
    float m;
    memcpy(&m, &bits, sizeof m);
    float t = (m - 1.0f) / (m + 1.0f), square = t * t;
    float y = 3.20598898e-1f; /* 2 / ln 2 over 9, 7, 5, 3 and 1 */
    y = y * square + 4.12198583e-1f;
    y = y * square + 5.77078016e-1f;
    y = y * square + 9.61796694e-1f;
    y = y * square + 2.88539008f;
    return (float)exponent + y * t + (x - x); /* NaN stays NaN */
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp2_of(-LOG2_E * x)); }

/* Where `keep` (n,) is 0 the element stays as it is; without it all are quantized. */
void fake_quantize(const float *restrict x, const uint8_t *restrict keep, float *restrict y, size n,
                   const float *scale_at, float low, float high, int threads)
{
    float scale = *scale_at;
#pragma omp parallel for num_threads(threads)
    for (size k = 0; k < blocks(n); k++) {
        if (keep) {
#pragma omp simd
            for (size i = k * BLOCK; i < end(k, n); i++) {
                float value = rounded(x[i] / scale, low, high) * scale;
                y[i] = keep[i] ? value : x[i];
            }
        } else {
#pragma omp simd
            for (size i = k * BLOCK; i < end(k, n); i++)
                y[i] = rounded(x[i] / scale, low, high) * scale;
        }
    }
}

/* `total` is the sum of `grad` times the output's derivative by the logarithm of the scale. */
void fake_quantize_backward(const float *restrict grad, const float *restrict x, const uint8_t *restrict keep,
                            float *restrict grad_x, float *restrict parts, float *total, size n, const float *scale_at,
                            float low, float high, float factor, int threads)
{
    float scale = *scale_at;
#pragma omp parallel for num_threads(threads)
    for (size k = 0; k < blocks(n); k++) {
        float sum = 0.0f;
        if (keep) {
#pragma omp simd reduction(+ : sum)
            for (size i = k * BLOCK; i < end(k, n); i++) {
                float position = x[i] / scale;
                float value = rounded(position, low, high) * scale;
                int outside = (position <= low - 0.5f) | (position >= high + 0.5f);
                float moved = value - (outside ? 0.0f : x[i]);
                outside &= keep[i] != 0;
                grad_x[i] = outside ? 0.0f : grad[i];
                sum += grad[i] * (keep[i] ? moved : 0.0f);
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (size i = k * BLOCK; i < end(k, n); i++) {
                float position = x[i] / scale;
                float value = rounded(position, low, high) * scale;
                int outside = (position <= low - 0.5f) | (position >= high + 0.5f);
                grad_x[i] = outside ? 0.0f : grad[i];
                sum += grad[i] * (value - (outside ? 0.0f : x[i]));
            }
        }
        parts[k] = sum;
    }
    *total = factor * added(parts, blocks(n));
}

void mix(const float *restrict drawn, const float *restrict other, const uint8_t *restrict keep, float *restrict out,
         size n, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (size k = 0; k < blocks(n); k++) {
#pragma omp simd
        for (size i = k * BLOCK; i < end(k, n); i++)
            out[i] = keep[i] ? drawn[i] : other[i];
    }
}

/* Sum of weights * (student - teacher)^2 over arrays (rows, columns). A row has `columns` weights of its own, all the
   same if `across` is 0, and what weights there are (count,) come again after so many rows. */
void weighted_error(const float *restrict student, const float *restrict teacher, const float *restrict weights,
                    float *restrict parts, float *total, size rows, size columns, size count, int across, float factor,
                    int threads)
{
    size height = BLOCK / columns + 1, number = (rows + height - 1) / height;
#pragma omp parallel for num_threads(threads)
    for (size k = 0; k < number; k++) {
        float sum = 0.0f;
        for (size row = k * height; row < (k + 1) * height && row < rows; row++) {
            const float *a = student + row * columns, *b = teacher + row * columns;
            float part = 0.0f;
            if (across) {
#pragma omp simd reduction(+ : part)
                for (size j = 0; j < columns; j++)
                    part += weights[j] * (a[j] - b[j]) * (a[j] - b[j]);
                sum += part;
            } else {
#pragma omp simd reduction(+ : part)
                for (size j = 0; j < columns; j++)
                    part += (a[j] - b[j]) * (a[j] - b[j]);
                sum += weights[row % count] * part;
            }
        }
        parts[k] = sum;
    }
    *total = factor * added(parts, number);
}

void weighted_error_backward(const float *restrict student, const float *restrict teacher,
                             const float *restrict weights, const float *factor_at, float *restrict grad, size rows,
                             size columns, size count, int across, float scale, int threads)
{
    float factor = *factor_at * scale;
    size height = BLOCK / columns + 1, number = (rows + height - 1) / height;
#pragma omp parallel for num_threads(threads)
    for (size k = 0; k < number; k++) {
        for (size row = k * height; row < (k + 1) * height && row < rows; row++) {
            const float *a = student + row * columns, *b = teacher + row * columns;
            float *out = grad + row * columns;
            if (across) {
#pragma omp simd
                for (size j = 0; j < columns; j++)
                    out[j] = factor * weights[j] * (a[j] - b[j]);
            } else {
                float weight = factor * weights[row % count];
#pragma omp simd
                for (size j = 0; j < columns; j++)
                    out[j] = weight * (a[j] - b[j]);
            }
        }
    }
}

/* h = clamp(span * sigmoid(alpha) + start, 0, 1), weight = (low + step * h) * gain, over arrays (rows, columns); one
   gain for each row, or for all. */
void soft_round(const float *restrict alpha, const float *restrict low, const float *restrict step,
                const float *restrict log_gain, float *restrict weight, float *restrict h, size rows, size columns,
                int gains, float span, float start, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (size row = 0; row < rows; row++) {
        float gain = expf(log_gain[gains ? row : 0]);
#pragma omp simd
        for (size i = row * columns; i < (row + 1) * columns; i++) {
            h[i] = clamped(sigmoid(alpha[i]) * span + start, 0.0f, 1.0f);
            weight[i] = (low[i] + step[i] * h[i]) * gain;
        }
    }
}

/* `grad_gain` (rows,); `grad_h` may be missing. */
void soft_round_backward(const float *restrict alpha, const float *restrict step, const float *restrict log_gain,
                         const float *restrict weight, const float *restrict grad_weight, const float *restrict grad_h,
                         float *restrict grad_alpha, float *restrict grad_gain, size rows, size columns, int gains,
                         float span, float start, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (size row = 0; row < rows; row++) {
        float gain = expf(log_gain[gains ? row : 0]), sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (size i = row * columns; i < (row + 1) * columns; i++) {
            float s = sigmoid(alpha[i]), stretched = s * span + start;
            float grad = grad_weight[i] * gain * step[i] + (grad_h ? grad_h[i] : 0.0f);
            int outside = (stretched <= 0.0f) | (stretched >= 1.0f);
            grad_alpha[i] = outside ? 0.0f : grad * s * (1.0f - s) * span;
            sum += grad_weight[i] * weight[i];
        }
        grad_gain[row] = sum;
    }
}

/* Sum of 1 - |2 h - 1|^beta, added to `total`. */
void undecided(const float *restrict h, float *restrict parts, float *total, size n, float beta, int threads)
{
#pragma omp parallel for num_threads(threads)
    for (size k = 0; k < blocks(n); k++) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (size i = k * BLOCK; i < end(k, n); i++)
            sum += 1.0f - exp2_of(beta * log2_of(fabsf(2.0f * h[i] - 1.0f)));
        parts[k] = sum;
    }
    *total += added(parts, blocks(n));
}

void undecided_backward(const float *restrict h, const float *grad_at, float *restrict grad_h, size n, float beta,
                        int threads)
{
    float factor = -2.0f * beta * *grad_at;
#pragma omp parallel for num_threads(threads)
    for (size k = 0; k < blocks(n); k++) {
#pragma omp simd
        for (size i = k * BLOCK; i < end(k, n); i++) {
            float u = 2.0f * h[i] - 1.0f;
            grad_h[i] = factor * copysignf(exp2_of((beta - 1.0f) * log2_of(fabsf(u))), u);
        }
    }
}
