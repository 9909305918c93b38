/* The kernels for float16, compiled once per instruction set, with ISA set to its name. */
#define DTYPE float16
#define T uint16_t
#define ELEMENT_BITS 16
#define ARITHMETIC_BITS 32
#include "dtype.h"
