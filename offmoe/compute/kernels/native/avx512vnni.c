/* Kernels for avx512vnni; build.py says with which flags this is compiled. */
#include <string.h>
#include "offmoe.h"
#include "constants.h"
#include "vectors_avx512.h"
#define VARIANT_TABLE kernels_avx512vnni
#define VARIANT_NAME "avx512vnni"
#define ENCODE encode_avx512
#define COMPARE compare_avx512
#define DECODE decode_avx512
#include "variant.h"
