"""The memory of a simulated device: fresh memory is not zero, and its surroundings are watched."""

import ctypes
import weakref

import numpy as np

from simulated_gpu.module import SANITIZED

ALIGNMENT, GUARD = 512, 512
FRESH, BEYOND = 0xFF, 0xA5  # the former is a NaN in every format

overwritten = []  # what has been written outside of any allocation
allocations = weakref.WeakSet()


class Memory:
    """An allocation between two guards."""

    def __init__(self, nbytes, device_id):
        raw = np.full(nbytes + 2 * GUARD + ALIGNMENT, BEYOND, np.uint8)
        begin = GUARD + -(raw.ctypes.data + GUARD) % ALIGNMENT
        self.buffer = raw[begin : begin + nbytes]
        self.buffer[...] = FRESH
        self.guards = raw[begin - GUARD : begin], raw[begin + nbytes : begin + nbytes + GUARD]
        self.device_id = device_id
        if SANITIZED:
            for guard in self.guards:
                poison(guard)
        allocations.add(self)
        weakref.finalize(self, freed, raw, self.guards, nbytes)

    def owns(self, array):
        """Whether an array of NumPy's lies in this memory."""
        begin = self.buffer.ctypes.data
        return array.size > 0 and begin <= array.ctypes.data < begin + self.buffer.size


def freed(raw, guards, nbytes):
    if SANITIZED:
        poison(raw, closed=False)
    check(guards, nbytes)


def check(guards, nbytes):
    if not SANITIZED and any((guard != BEYOND).any() for guard in guards):
        overwritten.append(f"around {nbytes} bytes")


def check_all():
    """What has been written outside of any allocation since the last time."""
    for memory in list(allocations):
        check(memory.guards, memory.buffer.size)
    found = list(overwritten)
    overwritten.clear()
    return found


def poison(array, closed=True):
    """Let the address sanitizer end a process that reads or writes an array, or no longer."""
    name = f"__asan_{'' if closed else 'un'}poison_memory_region"
    getattr(ctypes.CDLL(None), name)(
        ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
    )
