"""The ranks of an MPI communicator: one all-reduce of a call, in which they also agree to go on.

Every rank contributes one record of float64 to the all-reduce of a call: whether it has failed, who
it is, what it is about to do, and then count, mean and m2 of each channel, or the sums of a
backward. Records merge in the order of the ranks, so that the result depends on their number alone.
mpi4py is imported when the first communicator is needed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastbn.moments import Moments

Record = NDArray[np.float64]
Result = TypeVar("Result")

# A record: these, then 1 + 2 * C numbers. Where ranks differ, RANK is one of them, and the other is
# in the place of SIGNATURE.
STATUS, RANK, SIGNATURE = range(3)
HEADER = 3
OTHER_RANK = SIGNATURE
AGREED, FAILED, DIFFERENT = 0.0, 1.0, 2.0

DTYPES = ("float16", "bfloat16", "float32", "float64")
FORWARD, BACKWARD = 0, 1000  # what the signature of a record begins with


@functools.cache
def mpi() -> ModuleType:
    """mpi4py's MPI; raise ImportError where there is none."""
    try:
        return importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:  # the latter where there is no MPI library
        raise ImportError(
            f"SyncBatchNorm needs mpi4py and an MPI library: "
            f"pip install 'fastbn[mpi]' mpich, in a clone pip install -e '.[mpi]' mpich ({error})"
        ) from error


def as_communicator(comm: Any) -> Any:
    """A communicator; MPI.COMM_WORLD for None."""
    if comm is None:
        return mpi().COMM_WORLD
    if not hasattr(comm, "Allreduce"):
        raise TypeError(
            f"comm must be an mpi4py.MPI.Intracomm, or None for MPI.COMM_WORLD, "
            f"got {type(comm).__name__}"
        )
    return comm


class Ranks:
    """What the ranks that share a layer do together."""

    def __init__(self, comm: Any, num_features: int) -> None:
        """Meet the other ranks: all of them must call this, and have as many channels."""
        self.comm = comm
        self._length = HEADER + 1 + 2 * num_features
        self._awaited = False  # whether the others wait for this rank in an all-reduce
        everywhere = comm.allgather(num_features)
        for rank, other in enumerate(everywhere):
            if other != everywhere[0]:
                raise ValueError(
                    f"rank {rank} has a layer of {other} channels, rank 0 one of {everywhere[0]}"
                )

    def together(self, function: Callable[[], Result]) -> Result:
        """Call a function that reduces once; if it fails before that, on all ranks it fails."""
        self._awaited = True
        try:
            return function()
        except Exception as error:
            if self._awaited:
                self._agree(FAILED, 0.0, np.zeros(0), f"{type(error).__name__}: {error}")
            error.add_note(f"on rank {self.comm.rank} of {self.comm.size}")
            raise

    def total_moments(self, x: NDArray[Any], moments: Moments) -> Moments:
        """The moments of all ranks."""
        record = self._reduced(FORWARD, x, _payload(moments))
        return _moments(record)

    def total_sums(
        self, x: NDArray[Any], sum_dy: Record, sum_dy_xhat: Record
    ) -> tuple[Record, Record]:
        """The two sums of a backward, over all ranks."""
        record = self._reduced(BACKWARD, x, np.concatenate([[0.0], sum_dy, sum_dy_xhat]))
        first, second = np.split(record[HEADER + 1 :], 2)
        return first, second

    def anywhere(self, condition: bool) -> bool:
        """Whether something is so on any of the ranks, all of which must ask."""
        return bool(self.comm.allreduce(condition, mpi().LOR))

    def _reduced(self, direction: int, x: NDArray[Any], payload: Record) -> Record:
        """The merged record of all ranks, if all of them do the same and none has failed."""
        signature = direction + 100 * DTYPES.index(x.dtype.name) + x.ndim
        name = "forward" if direction == FORWARD else "backward"
        text = f"a {name} of {x.ndim} axes of {x.dtype}"
        record, reason = self._agree(AGREED, signature, payload, text)
        if reason is None:
            return record
        raise RuntimeError(reason)

    def _agree(
        self, status: float, signature: float, payload: Record, text: str
    ) -> tuple[Record, str | None]:
        """All-reduce the records; return the merged one and, if there is one, the reason to stop.

        The reason is what a rank that failed has to say, or two that differ from each other. It is
        sent in that case only.
        """
        record = np.zeros(self._length)
        self._awaited = False
        record[:HEADER] = status, self.comm.rank, signature
        record[HEADER : HEADER + payload.size] = payload
        # One element of a type of the record's length: a record is merged as a whole.
        buffer = [record, 1, _record_type(self._length)]
        self.comm.Allreduce(mpi().IN_PLACE, buffer, _operation())
        if record[STATUS] == AGREED:
            return record, None
        rank = int(record[RANK])
        of_rank = self.comm.bcast(text, rank)
        if record[STATUS] == FAILED:
            return record, f"rank {rank} failed with {of_rank}"
        other = int(record[OTHER_RANK])
        return record, f"rank {rank} has {of_rank}, rank {other} {self.comm.bcast(text, other)}"


@functools.cache
def _record_type(length: int) -> Any:
    return mpi().DOUBLE.Create_contiguous(length).Commit()


@functools.cache
def _operation() -> Any:
    return mpi().Op.Create(_merge_into, commute=False)


def _merge_into(lower: Any, upper: Any, _: Any) -> None:
    """What MPI calls: set the record of the upper ranks to that of both."""
    record = np.frombuffer(upper)
    record[:] = merged(np.frombuffer(lower), record)


def merged(a: Record, b: Record) -> Record:
    """The record of two groups of ranks, a's before b's."""
    for record in (a, b):
        if record[STATUS] != AGREED:
            return record
    if a[SIGNATURE] != b[SIGNATURE]:
        return np.concatenate([[DIFFERENT, b[RANK], a[RANK]], b[HEADER:]])
    if a[SIGNATURE] >= BACKWARD:
        return np.concatenate([a[:HEADER], a[HEADER:] + b[HEADER:]])
    return np.concatenate([a[:HEADER], _payload(_moments(a) + _moments(b))])


def _payload(moments: Moments) -> Record:
    return np.concatenate([[float(moments.count)], moments.mean, moments.m2])


def _moments(record: Record) -> Moments:
    mean, m2 = np.split(record[HEADER + 1 :], 2)
    return Moments(int(record[HEADER]), mean, m2)
