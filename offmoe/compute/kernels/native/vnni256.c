/* Kernels for vnni256; build.py says with which flags this is compiled. */
#include <string.h>
#include "offmoe.h"
#include "constants.h"
#include "vectors_avx2.h"
#define VARIANT_TABLE kernels_vnni256
#define VARIANT_NAME "vnni256"
#define ENCODE encode_avx2
#define COMPARE compare_avx2
#define DECODE decode_avx512
#include "variant.h"
