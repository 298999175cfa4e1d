/* What stands around the projections of attention for one new token: RMS norms, rotations, and the token among the keys
 * and values of before. The first token that needs a chunk of keys reads it from memory; everything else is in caches.
 */

static inline void store_bf16(uint16_t *p, floats v) {
    float x[TILE];
    floats_store(x, floats_round_bf16(v));
    for (int i = 0; i < TILE; i++) p[i] = (uint16_t)((uint32_t)bits_of(x[i]) >> 16);
}

static void norm(const uint16_t *x, const uint16_t *w, int rows, int width, float eps, int how, uint16_t *out) {
    for (int row = 0; row < rows; row++, x += width, out += width) {
        floats squares = floats_zero();
        for (int i = 0; i < width; i += TILE) {
            const floats v = floats_bf16(x + i);
            squares = floats_fma(v, v, squares);
        }
        const floats inverse = floats_set(1.0f / __builtin_sqrtf(floats_sum(squares) / (float)width + eps));
        for (int i = 0; i < width; i += TILE) {
            floats v = floats_mul(floats_bf16(x + i), inverse), weight = floats_bf16(w + i);
            if (how == NORM_ROUNDS_TWICE) v = floats_round_bf16(v);
            if (how == NORM_OF_ONE_MORE) weight = floats_add(weight, floats_set(1.0f));
            store_bf16(out + i, floats_mul(weight, v));
        }
    }
}

static void rotate(float *x, const float *cos, const float *sin, int rotary) {
    const int half = rotary / 2;
    float *low = x, *high = x + half;
    for (int i = 0; i < half; i++) {
        const float a = low[i], b = high[i];
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[half + i] + a * sin[half + i];
    }
}

/* Scores of 1, 2 or 4 heads. The values are wanted next: they come into the caches meanwhile. */
INLINE void score(const float *q, int heads, int width, const uint16_t *keys, const uint16_t *values, int count,
                  float scale, float *scores) {
    for (int t = 0; t < count; t++, keys += width, values += width) {
        floats sum[4] = {floats_zero(), floats_zero(), floats_zero(), floats_zero()};
        for (int i = 0; i < width; i += 2 * TILE) {
            const lanes words = lanes_load(keys + i);
            const floats even = floats_even_bf16(words), odd = floats_odd_bf16(words);
            __builtin_prefetch(values + i);
            UNROLL for (int h = 0; h < heads; h++) {
                const float *with = q + (size_t)h * width + i;
                sum[h] = floats_fma(odd, floats_load(with + TILE), floats_fma(even, floats_load(with), sum[h]));
            }
        }
        UNROLL for (int h = 0; h < heads; h++) scores[h * CHUNK + t] = floats_sum(sum[h]) * scale;
    }
}

/* Values weighted for 1 or 2 heads. */
INLINE void weigh(const float *weights, int heads, int width, const uint16_t *values, int count, float *out) {
    for (int i = 0; i < width; i += 2 * TILE) {
        floats even[2] = {floats_zero(), floats_zero()}, odd[2] = {floats_zero(), floats_zero()};
        for (int t = 0; t < count; t++) {
            const lanes words = lanes_load(values + (size_t)t * width + i);
            const floats e = floats_even_bf16(words), o = floats_odd_bf16(words);
            UNROLL for (int h = 0; h < heads; h++) {
                const floats weight = floats_set(weights[h * CHUNK + t]);
                even[h] = floats_fma(e, weight, even[h]);
                odd[h] = floats_fma(o, weight, odd[h]);
            }
        }
        UNROLL for (int h = 0; h < heads; h++) {
            floats_store(out + (size_t)h * (width + 2) + i, even[h]);
            floats_store(out + (size_t)h * (width + 2) + i + TILE, odd[h]);
        }
    }
}

static void attend(const float *q, int heads, int width, const uint16_t *keys, const uint16_t *values, int count,
                   float scale, float *scores, float *partial) {
    int h = 0;
    for (; h + 4 <= heads; h += 4) score(q + (size_t)h * width, 4, width, keys, values, count, scale, scores + h * CHUNK);
    for (; h + 2 <= heads; h += 2) score(q + (size_t)h * width, 2, width, keys, values, count, scale, scores + h * CHUNK);
    for (; h < heads; h++) score(q + (size_t)h * width, 1, width, keys, values, count, scale, scores + h * CHUNK);
    for (h = 0; h < heads; h++) {
        float *s = scores + h * CHUNK, *sums = partial + (size_t)h * (width + 2) + width, top = s[0], total = 0;
        for (int t = 1; t < count; t++) top = s[t] > top ? s[t] : top;
        for (int t = 0; t < count; t++) s[t] = exp_of(s[t] - top);
        for (int t = 0; t < count; t++) total += s[t];
        sums[0] = total, sums[1] = top;
    }
    for (h = 0; h + 2 <= heads; h += 2) weigh(scores + h * CHUNK, 2, width, values, count, partial + (size_t)h * (width + 2));
    for (; h < heads; h++) weigh(scores + h * CHUNK, 1, width, values, count, partial + (size_t)h * (width + 2));
}
