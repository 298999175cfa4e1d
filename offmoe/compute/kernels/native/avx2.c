/* Kernels for avx2; build.py says with which flags this is compiled. */
#include <string.h>
#include "offmoe.h"
#include "constants.h"
#include "vectors_avx2.h"
#define VARIANT_TABLE kernels_avx2
#define VARIANT_NAME "avx2"
#define ENCODE encode_avx2
#define COMPARE compare_avx2
#define DECODE decode_avx2
#include "variant.h"
