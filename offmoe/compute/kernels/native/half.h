/* The sixteen bits of a float in half precision and in bf16, to nearest, ties to even; as torch and the processors do. */
#ifndef HALF_H
#define HALF_H
#include <stdint.h>
#include <string.h>
static inline uint16_t half_of(float x) {
    uint32_t b, sign;
    memcpy(&b, &x, 4);
    sign = b >> 16 & 0x8000, b &= 0x7fffffff;
    if (b > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (b >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more */
    if (b < 0x38800000) { /* subnormal: adding 0.5 leaves multiples of 2^-24 in the lowest bits */
        float magnitude;
        memcpy(&magnitude, &b, 4);
        magnitude += 0.5f;
        memcpy(&b, &magnitude, 4);
        return (uint16_t)(sign | (b - 0x3f000000));
    }
    return (uint16_t)(sign | (b + 0xfff + (b >> 13 & 1) - 0x38000000) >> 13);
}

static inline float of_half(uint16_t h) {
    uint32_t b = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    float x;
    if (b >= 0x0f800000)
        b += 0x70000000; /* infinite, or not a number */
    else if (b >= 0x00800000)
        b += 0x38000000;
    else { /* subnormal: it loses a leading one again */
        b += 0x38800000;
        memcpy(&x, &b, 4);
        x -= 6.103515625e-05f;
        memcpy(&b, &x, 4);
    }
    b |= sign;
    memcpy(&x, &b, 4);
    return x;
}

static inline float of_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline __attribute__((always_inline)) uint16_t bf16_of(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    const uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    return (uint16_t)((b & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
#endif
