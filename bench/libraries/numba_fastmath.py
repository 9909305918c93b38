"""numba as one writes it for speed: fastmath, and sums in the dtype of the arrays."""

from bench.libraries import numba


class Library(numba.Library):
    """The same loops over (N, C, H*W) arrays."""

    fastmath = True
    api = "@njit(parallel=True, fastmath=True) loops over channels, sums in the arrays' dtype"
