/* Activations before and between the kernels: quantized or rearranged into blocks, and the gated activation functions.
 * Plain loops that the compiler vectorizes for the file that includes this; nothing here touches weights.
 */
enum { MAX_GROUP = 128 };

/* Adding 1.5 * 2^23 rounds a float below 2^22 to an integer that stands in its lowest bits. */
#define ROUNDING 12582912.0f
static inline int32_t bits_of(float x) { int32_t b; memcpy(&b, &x, 4); return b; }
static inline float float_of(int32_t b) { float x; memcpy(&x, &b, 4); return x; }

/* Even bytes of eight, in order. */
static inline uint32_t even_bytes(uint64_t v) {
    v &= 0x00ff00ff00ff00ffu;
    v = (v | v >> 8) & 0x0000ffff0000ffffu;
    return (uint32_t)(v | v >> 16);
}

/* One group of one token to int8; returns the scale. Symmetric, 127 for the largest; what is not a number makes the scale
 * not a number, and with it the result. */
static float quantize_group(const float *x, int group, int8_t *q, int32_t *sum) {
    int32_t peak = 0, total = 0;
    for (int i = 0; i < group; i++) {
        int32_t magnitude = bits_of(x[i]) & 0x7fffffff; /* floats of one sign are ordered as their bits */
        peak = magnitude > peak ? magnitude : peak;
    }
    const float top = float_of(peak), inverse = top > 1e-30f ? 127.0f / top : 0.0f;
    for (int i = 0; i < group; i++) {
        int32_t level = bits_of(x[i] * inverse + ROUNDING) - bits_of(ROUNDING);
        q[i] = (int8_t)level;
        total += level;
    }
    *sum = total;
    return top > 1e-30f ? top / 127.0f : top * 0.0f;
}

static void pack(const struct weight *w, int precision, const float *x, size_t stride, int valid, int start, int count,
                 struct block *out) {
    const int M = out->tokens, group = w->kind == KIND_BF16 ? 32 : w->group;
    const int nibbles = w->kind == KIND_INT4, octets = w->kind == KIND_INT2 || w->kind == KIND_INT3 || w->kind == KIND_INT5 || w->kind == KIND_INT6;
    const enum form form = form_of(w, w->kind);
    float unit[8]; /* of the codes that an input is multiplied with */
    for (int i = 0; i < 8; i++) unit[i] = nibbles ? nibble_unit(i) : octets ? octet_unit(i / 2) : 1.0f;
    for (int c = start; c < start + count; c += group, x += group) {
        const int g = c / group;
        for (int m = 0; m < M; m++) {
            static const float nothing[MAX_GROUP];
            const float *v = m < valid ? x + m * stride : nothing;
            if (w->kind == KIND_BF16) {
                float *to = (float *)out->data + ((size_t)g * M + m) * 32;
                for (int i = 0; i < 16; i++) to[i] = v[2 * i], to[16 + i] = v[2 * i + 1];
            } else if (precision == ACTIVATIONS_FLOAT || w->kind == KIND_FP8) {
                float *to = (float *)out->data + (size_t)c * M + m, total = 0;
                for (int i = 0; i < group; i += 8)
                    for (int j = 0; j < 8; j++) to[(i + j) * M] = v[i + j] * unit[j];
                for (int i = 0; i < group; i++) total += v[i];
                ((float *)out->sum)[(size_t)g * M + m] = total;
            } else {
                int8_t q[MAX_GROUP];
                int32_t sum;
                const size_t at = (size_t)g * M + m;
                const float scale = out->scale[at] = quantize_group(v, group, q, &sum);
                if (form == FORM_PLAIN)
                    ((int32_t *)out->sum)[at] = -zero_of(w->kind) * sum;
                else
                    ((float *)out->sum)[at] = -(float)sum * (form == FORM_MINIMA ? scale : 1.0f);
                if (w->kind == KIND_INT8 || w->kind == KIND_INT8_GROUPS) {
                    int32_t *to = (int32_t *)out->data + (size_t)c / 4 * M + m;
                    for (int j = 0; j < group / 4; j++) memcpy(to + j * M, q + 4 * j, 4);
                } else {
                    uint32_t *to = (uint32_t *)out->data + ((size_t)c / 8 * M + m) * 2;
                    for (int j = 0; j < group / 8; j++) {
                        uint64_t eight;
                        memcpy(&eight, q + 8 * j, 8);
                        to[2 * j * M] = even_bytes(eight);
                        to[2 * j * M + 1] = even_bytes(eight >> 8);
                    }
                }
            }
        }
    }
}

/* Relative error below 3e-7 (Cephes' polynomial), from -87 to 88. */
static inline float exp_of(float x) {
    float n, r, p;
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    n = x * 1.44269504088896341f + ROUNDING;
    const int32_t power = bits_of(n) - bits_of(ROUNDING);
    n -= ROUNDING;
    r = x - n * 0.693359375f + n * 2.12194440e-4f;
    p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * float_of((power + 127) << 23);
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

static void activate(int glu, float limit, float alpha, float *gate, const float *up, size_t count) {
    if (glu == GLU_SILU) {
        for (size_t i = 0; i < count; i++) gate[i] = gate[i] * sigmoid(gate[i]) * up[i];
    } else if (glu == GLU_GELU_TANH) { /* (1 + tanh(x)) / 2 is the sigmoid of 2 x */
        for (size_t i = 0; i < count; i++) {
            float x = gate[i];
            gate[i] = x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x)) * up[i];
        }
    } else { /* gpt-oss */
        for (size_t i = 0; i < count; i++) {
            float x = gate[i] > limit ? limit : gate[i], u = up[i] > limit ? limit : up[i];
            u = u < -limit ? -limit : u;
            gate[i] = x * sigmoid(alpha * x) * (u + 1.0f);
        }
    }
}

typedef uint64_t line __attribute__((vector_size(64)));

/* Four streams, each prefetched: 12.1 GB/s on one core of a Cascade Lake where one stream reads 9.0 and two 11.3. */
static uint64_t read_all(const uint8_t *p, size_t nbytes) {
    enum { STREAMS = 4, FAR = 2048 };
    const size_t part = nbytes / STREAMS / 64 * 64;
    line sums[STREAMS] = {{0}}, total;
    uint64_t sum = 0;
    for (size_t i = 0; i < part; i += 64)
        UNROLL for (int s = 0; s < STREAMS; s++) {
            line v;
            memcpy(&v, p + s * part + i, 64);
            __builtin_prefetch(p + s * part + i + FAR);
            sums[s] ^= v;
        }
    total = sums[0] ^ sums[1] ^ sums[2] ^ sums[3];
    for (int l = 0; l < 8; l++) sum ^= total[l];
    return sum;
}
