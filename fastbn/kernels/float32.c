/* The kernels for float32, compiled once per instruction set, with ISA set to its name. */
#define DTYPE float32
#define T float
#define ELEMENT_BITS 32
#define ARITHMETIC_BITS 32
#include "dtype.h"
