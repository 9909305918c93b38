"""Every kind of layer: what makes one, and the shape of an input that it takes."""

from functools import partial

import fastbn

SHAPES = {"1d": (6, 3, 5), "2d": (6, 3, 5, 2), "3d": (6, 3, 5, 2, 2)}


class OneRank:
    """What a layer asks of MPI and of a communicator, where the others have nothing to add."""

    rank, size, IN_PLACE, LOR = 0, 1, None, None

    def allgather(self, value):
        return [value]

    def allreduce(self, value, _):
        return value

    def bcast(self, value, _):
        return value

    def Allreduce(self, *_):
        pass


def synchronized(**options):
    """A layer whose tests call `internals.alone_on_its_rank`."""
    return fastbn.SyncBatchNorm(3, comm=OneRank(), **options)


# Layers of three channels with running statistics, all with the parameters of their kind.
BATCH = {
    **{f"batch {d}": (partial(getattr(fastbn, f"BatchNorm{d}"), 3), SHAPES[d]) for d in SHAPES},
    **{f"lazy batch {d}": (getattr(fastbn, f"LazyBatchNorm{d}"), SHAPES[d]) for d in SHAPES},
    "ghost batches": (partial(fastbn.BatchNorm2d, 3, ghost_batch_size=3), SHAPES["2d"]),
    "synchronized": (synchronized, SHAPES["2d"]),
}
INSTANCE = {
    **{
        f"instance {d}": (
            partial(getattr(fastbn, f"InstanceNorm{d}"), 3, affine=True, track_running_stats=True),
            SHAPES[d],
        )
        for d in SHAPES
    },
    **{f"lazy instance {d}": (getattr(fastbn, f"LazyInstanceNorm{d}"), SHAPES[d]) for d in SHAPES},
}
TRACKING = BATCH | INSTANCE
KINDS = TRACKING | {"group": (partial(fastbn.GroupNorm, 1, 3), SHAPES["2d"])}
