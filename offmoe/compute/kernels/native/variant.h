/* The end of every variant's file: its table. E2M1_PLUS_12 stands before the vectors that look it up. */
#include "tiles.h"
#include "activations.h"
#include "attend.h"
#include "multiply.h"

const struct kernels VARIANT_TABLE = {
    .name = VARIANT_NAME,
    .max_block = LARGEST_BLOCK,
    .many_tokens = MANY_TOKENS,
    .tile = TILES,
    .pair = PAIRS,
    .pack = pack,
    .activate = activate,
    .read = read_all,
    .encode = ENCODE,
    .compare = COMPARE,
    .decode = DECODE,
    .norm = norm,
    .rotate = rotate,
    .attend = attend,
    .columns = columns_bf16,
    .multiply = multiply,
};
