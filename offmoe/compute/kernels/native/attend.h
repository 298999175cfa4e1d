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

/* Products of 1, 2 or 4 heads with 1 or SCORE_KEYS keys side by side: sums that do not wait for each other. The values are
 * wanted next: they come into the caches meanwhile. */
INLINE void score(const float *q, const int heads, const int keys_now, int width, const uint16_t *keys,
                  const uint16_t *values, float *scores) {
    floats sum[4][SCORE_KEYS];
    UNROLL for (int h = 0; h < heads; h++) UNROLL for (int t = 0; t < keys_now; t++) sum[h][t] = floats_zero();
    for (int i = 0; i < width; i += 2 * TILE) {
        floats even[SCORE_KEYS], odd[SCORE_KEYS];
        UNROLL for (int t = 0; t < keys_now; t++) {
            const lanes words = lanes_load(keys + (size_t)t * width + i);
            even[t] = floats_even_bf16(words), odd[t] = floats_odd_bf16(words);
            __builtin_prefetch(values + (size_t)t * width + i);
        }
        UNROLL for (int h = 0; h < heads; h++) {
            const floats low = floats_load(q + (size_t)h * width + i), high = floats_load(q + (size_t)h * width + i + TILE);
            UNROLL for (int t = 0; t < keys_now; t++)
                sum[h][t] = floats_fma(odd[t], high, floats_fma(even[t], low, sum[h][t]));
        }
    }
    UNROLL for (int h = 0; h < heads; h++) {
        if (keys_now == SCORE_KEYS)
            floats_sums(scores + h * CHUNK, sum[h]);
        else
            scores[h * CHUNK] = floats_sum(sum[h][0]);
    }
}

INLINE void scores_of(const float *q, const int heads, int width, const uint16_t *keys, const uint16_t *values, int count,
                      float *scores) {
    int t = 0;
    for (; t + SCORE_KEYS <= count; t += SCORE_KEYS)
        score(q, heads, SCORE_KEYS, width, keys + (size_t)t * width, values + (size_t)t * width, scores + t);
    for (; t < count; t++)
        score(q, heads, 1, width, keys + (size_t)t * width, values + (size_t)t * width, scores + t);
}

/* exp(scale * product - top) in place of products; into sums, the sum of these weights and top. What is less than exp(-60)
 * is nothing: it is lost beside 1, and times a value it may be subnormal, which costs an Intel processor some 100 cycles. */
static void weights_of(float *s, int count, float scale, float *sums) {
    float tops[TILE], top;
    const int whole = (count + TILE - 1) / TILE * TILE; /* at most CHUNK, whose memory a head has */
    for (int t = 0; t < count; t++) s[t] *= scale;
    for (int t = count; t < whole; t++) s[t] = -__builtin_inff();
    floats most = floats_load(s), sum = floats_zero();
    for (int t = TILE; t < whole; t += TILE) most = floats_max(most, floats_load(s + t));
    floats_store(tops, most);
    top = tops[0];
    for (int t = 1; t < TILE; t++) top = tops[t] > top ? tops[t] : top;
    for (int t = 0; t < whole; t++) {
        const float x = s[t] - top;
        s[t] = x < -60.0f ? 0.0f : exp_of(x);
    }
    for (int t = 0; t < whole; t += TILE) sum = floats_add(sum, floats_load(s + t));
    sums[0] = floats_sum(sum), sums[1] = top;
}

/* Values of `count` rows, weighted for 1 or 2 heads, are added to what `out` has: 32 * `words` columns of each. */
INLINE void weigh(const float *weights, const int heads, const int words, int width, const uint16_t *values, int count,
                  float *out) {
    floats sum[2][2 * WEIGH_WORDS];
    UNROLL for (int h = 0; h < heads; h++) UNROLL for (int i = 0; i < 2 * words; i++)
        sum[h][i] = floats_load(out + (size_t)h * (width + 2) + i * TILE);
    for (int t = 0; t < count; t++, values += width) {
        floats v[2 * WEIGH_WORDS];
        UNROLL for (int i = 0; i < words; i++) {
            const lanes word = lanes_load(values + (size_t)i * 2 * TILE);
            v[2 * i] = floats_even_bf16(word), v[2 * i + 1] = floats_odd_bf16(word);
        }
        UNROLL for (int h = 0; h < heads; h++) {
            const floats weight = floats_set(weights[h * CHUNK + t]);
            UNROLL for (int i = 0; i < 2 * words; i++) sum[h][i] = floats_fma(v[i], weight, sum[h][i]);
        }
    }
    UNROLL for (int h = 0; h < heads; h++) UNROLL for (int i = 0; i < 2 * words; i++)
        floats_store(out + (size_t)h * (width + 2) + i * TILE, sum[h][i]);
}

INLINE void weighed(const float *weights, const int heads, int width, const uint16_t *values, int count, float *out) {
    int i = 0;
    for (; i + 2 * TILE * WEIGH_WORDS <= width; i += 2 * TILE * WEIGH_WORDS)
        weigh(weights, heads, WEIGH_WORDS, width, values + i, count, out + i);
    for (; i < width; i += 2 * TILE) weigh(weights, heads, 1, width, values + i, count, out + i);
}

static void attend(const float *q, int heads, int width, const uint16_t *keys, const uint16_t *values, int count,
                   float scale, float *scores, float *partial) {
    enum { ROWS = 64 }; /* of values, which stay in the first level of the cache while all heads use them */
    const size_t step = (size_t)width + 2;
    int h = 0;
    for (; h + 4 <= heads; h += 4) scores_of(q + (size_t)h * width, 4, width, keys, values, count, scores + h * CHUNK);
    for (; h + 2 <= heads; h += 2) scores_of(q + (size_t)h * width, 2, width, keys, values, count, scores + h * CHUNK);
    for (; h < heads; h++) scores_of(q + (size_t)h * width, 1, width, keys, values, count, scores + h * CHUNK);
    for (h = 0; h < heads; h++) {
        memset(partial + h * step, 0, (size_t)width * sizeof(float));
        weights_of(scores + h * CHUNK, count, scale, partial + h * step + width);
    }
    for (int from = 0; from < count; from += ROWS) {
        const int rows = count - from < ROWS ? count - from : ROWS;
        const uint16_t *v = values + (size_t)from * width;
        const float *weights = scores + from;
        for (h = 0; h + 2 <= heads; h += 2) weighed(weights + h * CHUNK, 2, width, v, rows, partial + h * step);
        for (; h < heads; h++) weighed(weights + h * CHUNK, 1, width, v, rows, partial + h * step);
    }
}
