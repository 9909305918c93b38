"""Every kind of layer: what makes one, and the shape of an input that it takes."""

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


def layer(name, **always):
    """What makes layers of a class, with further options."""

    def make(channels=3, **options):
        return getattr(fastbn, name)(channels, **always, **options)

    return make


def lazy(name):
    """What makes lazy layers of a class, which take their channels from an input."""

    def make(channels=None, **options):
        return getattr(fastbn, name)(**options)

    return make


def synchronized(channels=3, **options):
    """A layer whose tests call `internals.alone_on_its_rank`."""
    return fastbn.SyncBatchNorm(channels, comm=OneRank(), **options)


def group(channels=3, **options):
    """A layer that normalizes all channels of a sample together."""
    return fastbn.GroupNorm(1, channels, **options)


# Layers of three channels, if not told otherwise, with all parameters and running statistics that
# their kind has.
ALL = {"affine": True, "track_running_stats": True}
BATCH = {
    **{f"batch {d}": (layer(f"BatchNorm{d}"), SHAPES[d]) for d in SHAPES},
    **{f"lazy batch {d}": (lazy(f"LazyBatchNorm{d}"), SHAPES[d]) for d in SHAPES},
    "ghost batches": (layer("BatchNorm2d", ghost_batch_size=3), SHAPES["2d"]),
    "synchronized": (synchronized, SHAPES["2d"]),
}
INSTANCE = {
    **{f"instance {d}": (layer(f"InstanceNorm{d}", **ALL), SHAPES[d]) for d in SHAPES},
    **{f"lazy instance {d}": (lazy(f"LazyInstanceNorm{d}"), SHAPES[d]) for d in SHAPES},
}
TRACKING = BATCH | INSTANCE
KINDS = TRACKING | {"group": (group, SHAPES["2d"])}
