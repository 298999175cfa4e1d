/* Twice the values of mxfp4's nibbles, plus 12: unsigned bytes, so that they can stand where int4's nibbles do. */
static const uint8_t E2M1_PLUS_12[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
/* The values of iq4's nibbles (kvalues_iq4nl of ggml-common.h). */
static const int8_t IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
