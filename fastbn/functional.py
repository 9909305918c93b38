"""Batch normalization as functions: check the arguments, then let the backend of x's array run.

`batch_norm` and `instance_norm` have the signatures of the functions of these names in
``torch.nn.functional``. The primitives under them are what synchronized, masked or otherwise
composed batch normalization is made of; `batch_norm_forward` and `batch_norm_backward` fuse them
and give the same bits.

Arrays have the shape (N, C, ...): N samples of C channels, and any number of further axes. They are
float32, float64, float16 or ml_dtypes' bfloat16, of any strides. One that is C-contiguous, or would
be with the channels last, is read as it lies; others are copied. Arithmetic is done in float32
(float64 for float64 arrays), sums in float64. Every result has the same bits whatever the number of
threads.

CuPy arrays are taken as well, by all functions: then every array of a call is one of CuPy's, on the
current device, and so are the results. The kernels run on CuPy's current stream.

All functions check everything before they write anything.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastbn.backends import backend_of, is_cupy

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_elemt",
    "batch_norm_forward",
    "batch_norm_stats",
    "instance_norm",
]

Array = NDArray[Any]
Statistics = NDArray[np.float64]


def batch_norm(
    input: ArrayLike,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
    mask: ArrayLike | None = None,
    ghost_batch_size: int | None = None,
) -> Array:
    """Normalize each channel of a batch, as ``torch.nn.functional.batch_norm`` does.

    ``y = (input - mean) / sqrt(var + eps) * weight + bias``, where mean and var are those of the
    batch in training (Ioffe and Szegedy 2015, algorithm 1) and the running ones otherwise.

    Parameters
    ----------
    input : array_like of shape (N, C, ...)
        float32, float64, float16 or bfloat16.
    running_mean, running_var : ndarray of shape (C,) or None
        In training they are updated in place, unless they are None:
        ``running = (1 - momentum) * running + momentum * batch``, with the unbiased variance
        (over n - 1) of the batch. They may be views of one array, of any float dtype.
    weight, bias : array_like of shape (C,), optional
        Of any float dtype. None stands for ones and for zeros.
    training : bool, default False
        Whether to normalize by the statistics of the batch.
    momentum : float, default 0.1
        The factor of the batch in the running statistics.
    eps : float, default 1e-5
        Added to the variance. Greater than 0.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result. It has input's dtype, and is `input`, or a view of exactly its
        elements, or does not overlap it.
    mask : array_like of bool, optional
        Which positions count, of a shape that broadcasts to (N, 1, ...): those where it is False
        add nothing to the statistics, and the result is 0 there.
    ghost_batch_size : int, optional
        Normalize each so many samples by themselves (Hoffer, Hubara and Soudry 2017), and what is
        left over at the end as well; the running statistics take one after the other. Without
        effect outside training.

    Returns
    -------
    ndarray of shape (N, C, ...)
        `out`, or a new array of input's dtype and memory layout.

    Raises
    ------
    ValueError
        If a shape is wrong, a training batch has a single value per channel or its mask leaves
        none, running statistics are needed and not there, or `out` cannot be written or overlaps
        `input` in part.
    TypeError
        If a dtype is not one of the four, or `out` has another than `input`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> mean, var = np.zeros(2), np.ones(2)
    >>> batch_norm(x, mean, var, training=True, eps=1e-12).round(6)
    array([[-1.,  0.],
           [ 1.,  0.]])
    >>> mean, var
    (array([0.2, 0.5]), array([1.1, 0.9]))
    """
    x = as_input(input)
    mask = as_mask(mask, x)
    size = as_batch_size(ghost_batch_size)
    running = running_mean, running_var
    if not training:
        return forward_by_running(x, *running, weight, bias, eps, out=out, mask=mask)
    factor = as_real(momentum, "momentum")
    return forward_by_batch(
        x, *running, weight, bias, factor, eps, out=out, mask=mask, batch_size=size
    )[0]


def instance_norm(
    input: ArrayLike,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    """Normalize each channel of each sample, as ``torch.nn.functional.instance_norm`` does.

    ``y = (input - mean) / sqrt(var + eps) * weight + bias``, where mean and var are those of the
    sample (Ulyanov, Vedaldi and Lempitsky 2016) or, without `use_input_stats`, the running ones.

    Parameters
    ----------
    input : array_like of shape (N, C, ...)
        float32, float64, float16 or bfloat16.
    running_mean, running_var : ndarray of shape (C,), optional
        With `use_input_stats` they are updated in place, unless they are None:
        ``running = (1 - momentum) * running + momentum * statistic``, with the means, over the
        samples, of mean and unbiased variance. They may be views of one array, of any float dtype.
    weight, bias : array_like of shape (C,), optional
        Of any float dtype. None stands for ones and for zeros.
    use_input_stats : bool, default True
        Whether to normalize by the statistics of each sample.
    momentum : float, default 0.1
        The factor of the samples in the running statistics.
    eps : float, default 1e-5
        Added to the variance. Greater than 0.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result. It has input's dtype, and is `input`, or a view of exactly its
        elements, or does not overlap it.
    mask : array_like of bool, optional
        Which positions count, of a shape that broadcasts to (N, 1, ...): those where it is False
        add nothing to the statistics, and the result is 0 there.

    Returns
    -------
    ndarray of shape (N, C, ...)
        `out`, or a new array of input's dtype and memory layout.

    Raises
    ------
    ValueError
        If a shape is wrong, a sample that is to be normalized by its own statistics has a single
        value per channel or its mask leaves none, running statistics are needed and not there, or
        `out` cannot be written or overlaps `input` in part.
    TypeError
        If a dtype is not one of the four, or `out` has another than `input`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import instance_norm
    >>> x = np.array([[[1.0, 3.0]], [[50.0, 70.0]]])
    >>> mean, var = np.zeros(1), np.ones(1)
    >>> instance_norm(x, mean, var, momentum=0.5, eps=1e-12).round(6)
    array([[[-1.,  1.]],
    <BLANKLINE>
           [[-1.,  1.]]])
    >>> mean, var
    (array([15.5]), array([51.]))
    """
    x = as_input(input)
    mask = as_mask(mask, x)
    running = running_mean, running_var
    if use_input_stats:
        factor = as_real(momentum, "momentum")
        return forward_by_instance(x, *running, weight, bias, factor, eps, out=out, mask=mask)[0]
    if running_mean is None and running_var is None:
        raise ValueError(
            "running_mean and running_var are needed without use_input_stats, got None; "
            "use_input_stats=True normalizes each sample by its own statistics"
        )
    return forward_by_running(x, *running, weight, bias, eps, out=out, mask=mask)


def batch_norm_stats(
    x: ArrayLike, mask: ArrayLike | None = None
) -> tuple[int, Statistics, Statistics]:
    """Count, mean and m2 of each channel.

    m2 is the sum of the squared deviations from the mean: ``m2 / count`` is the biased variance,
    ``m2 / (count - 1)`` the unbiased one. Blocks of the batch are summed around a pivot and merge
    by the formula of Chan, Golub and LeVeque (1983), in float64.

    Parameters
    ----------
    x : array_like of shape (N, C, ...)
        float32, float64, float16 or bfloat16.
    mask : array_like of bool, optional
        Which positions count, of a shape that broadcasts to (N, 1, ...).

    Returns
    -------
    count : int
        The number of values of a channel that count.
    mean, m2 : ndarray of shape (C,), float64
        Zeros if nothing counts.

    Raises
    ------
    ValueError, TypeError
        If x has fewer than two axes, or another dtype; if the mask does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm_stats
    >>> batch_norm_stats(np.array([[1.0, 5.0], [3.0, 5.0]]))
    (2, array([2., 5.]), array([2., 0.]))
    >>> batch_norm_stats(np.array([[1.0, 5.0], [3.0, 5.0]]), mask=[[True], [False]])
    (1, array([1., 5.]), array([0., 0.]))
    """
    x = as_input(x)
    mask = as_mask(mask, x)
    mean, m2 = backend_of(x).stats(x, mask)
    return values_per_channel(x, mask), mean, m2


def batch_norm_elemt(
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    out: Array | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    """Normalize by given statistics: ``(x - mean) * invstd * weight + bias``.

    Parameters
    ----------
    x : array_like of shape (N, C, ...)
        float32, float64, float16 or bfloat16.
    mean, invstd : array_like of shape (C,)
        The mean and ``1 / sqrt(var + eps)``, of any float dtype.
    weight, bias : array_like of shape (C,), optional
        Of any float dtype. None stands for ones and for zeros.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result: `x`, a view of exactly its elements, or an array that does not
        overlap it, of x's dtype.
    mask : array_like of bool, optional
        Of a shape that broadcasts to (N, 1, ...): where it is False, the result is 0.

    Returns
    -------
    ndarray of shape (N, C, ...)
        `out`, or a new array of x's dtype and memory layout.

    Raises
    ------
    ValueError, TypeError
        If a shape or a dtype is wrong, or `out` cannot serve.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm_elemt
    >>> x = np.array([[1.0, 5.0], [3.0, 5.0]])
    >>> batch_norm_elemt(x, mean=[2.0, 4.0], invstd=[1.0, 2.0])
    array([[-1.,  2.],
           [ 1.,  2.]])
    """
    x = as_input(x)
    c = x.shape[1]
    mean, invstd = as_vector(mean, "mean", c, x), as_vector(invstd, "invstd", c, x)
    weight = as_optional_vector(weight, "weight", c, x)
    bias = as_optional_vector(bias, "bias", c, x)
    out = check_out(out, x, mean=mean, invstd=invstd, weight=weight, bias=bias)
    mask = as_mask(mask, x)
    return backend_of(x).elemt(  # type: ignore[no-any-return]
        x, mean, invstd, weight, bias, out, mask=mask
    )


def batch_norm_forward(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
    mask: ArrayLike | None = None,
    ghost_batch_size: int | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """Normalize by the statistics of the batch itself.

    `batch_norm_stats` and `batch_norm_elemt` with ``invstd = 1 / sqrt(m2 / count + eps)``, but
    with a channel finished while it is in the cache.

    Parameters
    ----------
    x : array_like of shape (N, C, ...)
        float32, float64, float16 or bfloat16. A single value per channel is not an error here.
    weight, bias : array_like of shape (C,), optional
        Of any float dtype. None stands for ones and for zeros.
    eps : float, default 1e-5
        Added to the variance. Greater than 0.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result: `x`, a view of exactly its elements, or an array that does not
        overlap it, of x's dtype.
    mask : array_like of bool, optional
        Which positions count, of a shape that broadcasts to (N, 1, ...): those where it is False
        add nothing to the statistics, and the result is 0 there.
    ghost_batch_size : int, optional
        Normalize each so many samples by themselves (Hoffer, Hubara and Soudry 2017), and what is
        left over at the end as well.

    Returns
    -------
    y : ndarray of shape (N, C, ...)
        `out`, or a new array of x's dtype and memory layout.
    mean, invstd : ndarray of shape (C,), float64
        What `batch_norm_backward` needs. With ghost batches a row for each of them.

    Raises
    ------
    ValueError, TypeError
        If a shape or a dtype is wrong, or `out` cannot serve.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm_forward
    >>> x = np.array([[1.0, 5.0], [3.0, 9.0]])
    >>> y, mean, invstd = batch_norm_forward(x, eps=1e-12, out=x)
    >>> y is x, x.round(6), mean, invstd.round(6)
    (True, array([[-1., -1.],
           [ 1.,  1.]]), array([2., 7.]), array([1. , 0.5]))
    """
    x = as_input(x)
    c = x.shape[1]
    weight = as_optional_vector(weight, "weight", c, x)
    bias = as_optional_vector(bias, "bias", c, x)
    out = check_out(out, x, weight=weight, bias=bias)
    mask, size = as_mask(mask, x), as_batch_size(ghost_batch_size)
    return backend_of(x).forward(  # type: ignore[no-any-return]
        x, weight, bias, as_eps(eps), out, mask=mask, batch_size=size
    )


def batch_norm_backward_reduce(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    *,
    mask: ArrayLike | None = None,
) -> tuple[Statistics, Statistics]:
    """The two sums of a backward: the gradients of bias and of weight.

    Parameters
    ----------
    dy : array_like of shape (N, C, ...)
        The gradient of the output. Of another float dtype than x it is converted.
    x : array_like of shape (N, C, ...)
        What was normalized: float32, float64, float16 or bfloat16.
    mean, invstd : array_like of shape (C,)
        The statistics by which it was normalized.
    mask : array_like of bool, optional
        Which positions count, of a shape that broadcasts to (N, 1, ...).

    Returns
    -------
    sum_dy, sum_dy_xhat : ndarray of shape (C,), float64
        The sums of ``dy`` and of ``dy * xhat``, with ``xhat = (x - mean) * invstd``.

    Raises
    ------
    ValueError, TypeError
        If a shape or a dtype is wrong.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm_backward_reduce
    >>> x = np.array([[1.0], [3.0]])
    >>> batch_norm_backward_reduce(np.array([[1.0], [5.0]]), x, mean=[2.0], invstd=[1.0])
    (array([6.]), array([4.]))
    """
    x = as_input(x)
    c = x.shape[1]
    mean, invstd = as_vector(mean, "mean", c, x), as_vector(invstd, "invstd", c, x)
    return backend_of(x).backward_reduce(  # type: ignore[no-any-return]
        as_gradient(dy, x), x, mean, invstd, as_mask(mask, x)
    )


def batch_norm_backward_elemt(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    invstd: ArrayLike,
    weight: ArrayLike | None,
    sum_dy: ArrayLike,
    sum_dy_xhat: ArrayLike,
    count: float,
    *,
    out: Array | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    """The gradient of x, from the two sums of `batch_norm_backward_reduce`.

    ``dx = (dy - sum_dy / count - xhat * sum_dy_xhat / count) * invstd * weight``, with
    ``xhat = (x - mean) * invstd`` (Ioffe and Szegedy 2015, section 3, simplified).

    Parameters
    ----------
    dy : array_like of shape (N, C, ...)
        The gradient of the output. Of another float dtype than x it is converted.
    x : array_like of shape (N, C, ...)
        What was normalized: float32, float64, float16 or bfloat16.
    mean, invstd : array_like of shape (C,)
        The statistics by which it was normalized.
    weight : array_like of shape (C,) or None
        None stands for ones.
    sum_dy, sum_dy_xhat : array_like of shape (C,)
        The two sums, over all of the batch that the statistics are of.
    count : int
        The number of values per channel that the statistics are of.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result: `dy`, `x`, a view of exactly the elements of one of them, or an
        array that overlaps neither, of x's dtype.
    mask : array_like of bool, optional
        Of a shape that broadcasts to (N, 1, ...): where it is False, the gradient is 0.

    Returns
    -------
    ndarray of shape (N, C, ...)
        `out`, or a new array of x's dtype and memory layout.

    Raises
    ------
    ValueError, TypeError
        If a shape or a dtype is wrong, or `out` cannot serve.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm_backward_elemt
    >>> x, dy = np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [0.0], [0.0]])
    >>> batch_norm_backward_elemt(dy, x, [2.0], [1.0], None, [1.0], [-1.0], 3).round(6)
    array([[ 0.333333],
           [-0.333333],
           [ 0.      ]])
    """
    x = as_input(x)
    dy = as_gradient(dy, x)
    c = x.shape[1]
    vectors = {
        "mean": as_vector(mean, "mean", c, x),
        "invstd": as_vector(invstd, "invstd", c, x),
        "weight": as_optional_vector(weight, "weight", c, x),
        "sum_dy": as_vector(sum_dy, "sum_dy", c, x),
        "sum_dy_xhat": as_vector(sum_dy_xhat, "sum_dy_xhat", c, x),
    }
    out = check_out(out, x, dy, **vectors)
    return backend_of(x).backward_elemt(  # type: ignore[no-any-return]
        dy, x, **vectors, count=as_real(count, "count"), out=out, mask=as_mask(mask, x)
    )


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None,
    mean: ArrayLike,
    invstd: ArrayLike,
    *,
    out: Array | None = None,
    mask: ArrayLike | None = None,
    ghost_batch_size: int | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """The gradients of `batch_norm_forward`.

    `batch_norm_backward_reduce` and `batch_norm_backward_elemt`, but with a channel finished while
    it is in the cache.

    Parameters
    ----------
    dy : array_like of shape (N, C, ...)
        The gradient of the output. Of another float dtype than x it is converted.
    x : array_like of shape (N, C, ...)
        What was normalized: float32, float64, float16 or bfloat16.
    weight : array_like of shape (C,) or None
        None stands for ones.
    mean, invstd : array_like of shape (C,)
        What `batch_norm_forward` returned; with ghost batches a row for each of them.
    out : ndarray of shape (N, C, ...), optional
        Where to write dx: `dy`, `x`, a view of exactly the elements of one of them, or an array
        that overlaps neither, of x's dtype.
    mask, ghost_batch_size
        What `batch_norm_forward` was given. The gradient is 0 where the mask is False.

    Returns
    -------
    dx : ndarray of shape (N, C, ...)
        `out`, or a new array of x's dtype and memory layout.
    dweight, dbias : ndarray of shape (C,), float64
        The gradients of weight and bias, also where there are none.

    Raises
    ------
    ValueError, TypeError
        If a shape or a dtype is wrong, or `out` cannot serve.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm_backward, batch_norm_forward
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = batch_norm_forward(x)
    >>> dx, dweight, dbias = batch_norm_backward(y, x, None, mean, invstd)
    >>> dbias.round(6), dweight.round(4)
    (array([0.]), array([3.]))
    """
    x = as_input(x)
    dy = as_gradient(dy, x)
    c = x.shape[1]
    mask, size = as_mask(mask, x), as_batch_size(ghost_batch_size)
    weight = as_optional_vector(weight, "weight", c, x)
    mean, invstd = as_rows(mean, "mean", size, x), as_rows(invstd, "invstd", size, x)
    out = check_out(out, x, dy, weight=weight, mean=mean, invstd=invstd)
    return backward_by_batch(dy, x, weight, mean, invstd, out=out, mask=mask, batch_size=size)


# What `batch_norm`, `instance_norm` and the layers share.


def forward_by_batch(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float | None,
    eps: float,
    *,
    counter: Array | None = None,
    out: Array | None,
    mask: Array | None = None,
    batch_size: int = 0,
) -> tuple[Array, Statistics, Statistics]:
    """Normalize by the statistics of the batch, then move the running ones towards them.

    The counter of batches is increased; a momentum of None stands for 1 / counter, or for 0 without
    one. Returns y and, for the backward, mean and invstd. A batch size makes several batches of x.
    """
    c = x.shape[1]
    check_running(running_mean, running_var, x, writeable=True)
    counts = checked_counts(x, mask, batch_size, "value per channel")
    if counter is not None:
        check_counter(counter, len(counts))
    weight = as_optional_vector(weight, "weight", c, x)
    bias = as_optional_vector(bias, "bias", c, x)
    if out is not None:
        mean, var = running_mean, running_var
        out = check_out(out, x, weight=weight, bias=bias, running_mean=mean, running_var=var)
    return backend_of(x).forward(  # type: ignore[no-any-return]
        x,
        weight,
        bias,
        as_eps(eps),
        out,
        running_mean,
        running_var,
        momentum,
        counter,
        mask=mask,
        batch_size=batch_size,
        counts=counts,
    )


def forward_by_instance(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    momentum: float,
    eps: float,
    *,
    out: Array | None,
    mask: Array | None,
) -> tuple[Array, Statistics, Statistics]:
    """Normalize each sample by its own statistics; the running ones move towards their means."""
    n, c = x.shape[:2]
    check_running(running_mean, running_var, x, writeable=True)
    counts = checked_counts(x, mask, 1, "spatial element")
    weight = as_optional_vector(weight, "weight", c, x)
    bias = as_optional_vector(bias, "bias", c, x)
    out = check_out(
        out, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    eps, run = as_eps(eps), backend_of(x).forward
    if running_mean is None or running_var is None or not x.size:
        return run_by_instance(run, x, weight, bias, eps, out, None, None, momentum, counts, mask)
    mean, var = (np.tile(v.astype(np.float64), (n, 1)) for v in (running_mean, running_var))
    means = [np.empty_like(mean, shape=c) for _ in range(2)]  # before anything is written
    result = run_by_instance(run, x, weight, bias, eps, out, mean, var, momentum, counts, mask)
    mean.mean(axis=0, out=means[0])
    var.mean(axis=0, out=means[1])
    with np.errstate(all="ignore"):  # What their dtype cannot hold is inf there.
        running_mean[...], running_var[...] = means
    return result


def run_by_instance(
    run: Callable[..., tuple[Array, Statistics, Statistics]],
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array | None,
    mean_rows: Array | None,
    var_rows: Array | None,
    momentum: float,
    counts: list[int],
    mask: Array | None,
) -> tuple[Array, Statistics, Statistics]:
    """A backend's forward of each sample by itself."""
    if mask is not None or not is_sequence_of_runs(x, out):
        running = mean_rows, var_rows, momentum
        return run(x, weight, bias, eps, out, *running, mask=mask, batch_size=1, counts=counts)
    flat = flat_shape(x)
    parameters = tiled(weight, x), tiled(bias, x), eps
    running = flat_rows(mean_rows), flat_rows(var_rows), momentum
    target = None if out is None else out.reshape(flat)
    y, mean, invstd = run(x.reshape(flat), *parameters, target, *running, counts=counts[:1])
    y = y.reshape(x.shape) if out is None else out
    return y, mean.reshape(x.shape[:2]), invstd.reshape(x.shape[:2])


# An array of the shape (N, C, ...) that is C-contiguous is also one sample of N * C channels, of
# which the core walks many together where they are short.


def is_sequence_of_runs(*arrays: Array | None) -> bool:
    """Tell whether arrays of one shape, and not empty, can be seen as one sample."""
    return all(a is None or (a.flags.c_contiguous and len(a) > 0) for a in arrays)


def flat_shape(x: Array) -> tuple[int, ...]:
    """The shape of x as one sample."""
    return (1, x.shape[0] * x.shape[1], *x.shape[2:])


def flat_rows(rows: Array | None) -> Array | None:
    """A row for each sample as one vector, a view."""
    return None if rows is None else rows.reshape(-1)


def tiled(vector: Array | None, x: Array) -> Array | None:
    """One value per channel, or a row of them for each sample, for x as one sample."""
    if vector is None or vector.ndim == 2:
        return flat_rows(vector)
    return np.tile(vector, len(x))


def forward_by_running(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    eps: float,
    *,
    out: Array | None,
    mask: Array | None = None,
) -> Array:
    """Normalize by the running statistics."""
    if running_mean is None or running_var is None:
        check_running(running_mean, running_var, x, writeable=False)
        raise ValueError(
            "running_mean and running_var are needed outside training, got None; "
            "training=True normalizes by the batch"
        )
    c = x.shape[1]
    mean = as_vector(running_mean, "running_mean", c, x)
    var = as_vector(running_var, "running_var", c, x)
    weight = as_optional_vector(weight, "weight", c, x)
    bias = as_optional_vector(bias, "bias", c, x)
    if out is not None:
        out = check_out(out, x, running_mean=mean, running_var=var, weight=weight, bias=bias)
    return backend_of(x).elemt(  # type: ignore[no-any-return]
        x, mean, None, weight, bias, out, var=var, eps=as_eps(eps), mask=mask
    )


def backward_by_batch(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    invstd: Array,
    *,
    out: Array | None,
    mask: Array | None,
    batch_size: int,
) -> tuple[Array, Statistics, Statistics]:
    """The gradients of `forward_by_batch`, of arguments that have been checked."""
    run = backend_of(x).backward
    if not batch_size:
        dx, sum_dy, sum_dy_xhat = run(dy, x, weight, mean, invstd, out, mask=mask)
        return dx, sum_dy_xhat, sum_dy
    # Before anything is written: room for the sums over batches.
    totals = [np.empty_like(mean, shape=x.shape[1]) for _ in range(2)]
    if batch_size == 1 and mask is None and is_sequence_of_runs(x, dy, out):
        flat = flat_shape(x)
        target = None if out is None else out.reshape(flat)
        statistics = tiled(weight, x), tiled(mean, x), tiled(invstd, x)
        dx, *sums = run(dy.reshape(flat), x.reshape(flat), *statistics, target)
        dx = dx.reshape(x.shape) if out is None else out
    else:
        dx, *sums = run(dy, x, weight, mean, invstd, out, mask=mask, batch_size=batch_size)
    for of_batches, total in zip(sums, totals, strict=True):
        of_batches.reshape(-1, x.shape[1]).sum(axis=0, out=total)
    return dx, totals[1], totals[0]


def running_statistics(
    running_mean: Array, running_var: Array, eps: float
) -> tuple[Statistics, Statistics]:
    """Mean and invstd, in float64, of running statistics that have been checked."""
    with np.errstate(all="ignore"):  # A variance below -eps gives NaN, as in torch.
        invstd = 1.0 / np.sqrt(running_var.astype(np.float64) + eps)
    return running_mean.astype(np.float64), invstd


def values_per_channel(x: Array, mask: Array | None = None) -> int:
    """The number of values of x that a channel has, or of those that count."""
    if mask is not None:
        return int(np.count_nonzero(mask))
    return math.prod(x.shape[:1] + x.shape[2:])


def batches_of(x: Array, batch_size: int) -> int:
    """The number of batches, of so many samples, that x is."""
    return max(-(-len(x) // batch_size), 1) if batch_size else 1


def values_of_batches(x: Array, mask: Array | None, batch_size: int) -> list[int]:
    """The number of values that count of each batch, of so many samples."""
    if not batch_size:
        return [values_per_channel(x, mask)]
    n = len(x)
    if mask is None:
        (full, rest), positions = divmod(n, batch_size), math.prod(x.shape[2:])
        return [batch_size * positions] * full + [rest * positions] * (rest > 0)
    of_samples = on_host(np.count_nonzero(mask, axis=tuple(range(1, mask.ndim))), "mask")
    return (
        [int(count) for count in np.add.reduceat(of_samples, range(0, n, batch_size))] if n else []
    )


def checked_counts(x: Array, mask: Array | None, batch_size: int, values: str) -> list[int]:
    """The number of values that count of each batch, if there is something to normalize by.

    An empty batch is legal. While a graph is captured, a mask has no values that can be counted.
    """
    if mask is not None and not backend_of(x).readable():
        return values_of_batches(x, None, batch_size)
    counts = values_of_batches(x, mask, batch_size)
    masked = "" if mask is None else " and a mask"
    if 1 in counts:
        raise ValueError(
            f"Expected more than 1 {values} when training, got input size {x.shape}{masked}"
            f"{samples_of(counts.index(1), batch_size, len(x))}; evaluation mode by running "
            f"statistics takes single values"
        )
    if mask is not None and 0 in counts and x.size:
        raise ValueError(
            f"mask leaves no value per channel, expected at least 2 when training, got input size "
            f"{x.shape}{samples_of(counts.index(0), batch_size, len(x))}; leave out a batch of "
            f"which nothing counts"
        )
    return counts


def samples_of(batch: int, batch_size: int, n: int) -> str:
    """Which samples a batch has, for a message; nothing if it is all of them."""
    if not batch_size:
        return ""
    first, last = batch * batch_size, min((batch + 1) * batch_size, n) - 1
    if first == last:
        return f", in which sample {first} is normalized by itself"
    return f", in which samples {first} to {last} are normalized by themselves"


# The checks. None of them writes.


NATIVE_FLOATS = frozenset(np.dtype(code) for code in "efd")


def is_float(dtype: np.dtype[Any]) -> bool:
    """Tell whether it is one of the four dtypes, in any byte order."""
    return dtype in NATIVE_FLOATS or dtype.char in "efd" or dtype.name == "bfloat16"


def is_array(value: Any) -> bool:
    """Tell whether it is an array of NumPy's or CuPy's."""
    return isinstance(value, np.ndarray) or is_cupy(value)


def is_masked(value: Any) -> bool:
    """Tell whether it is a masked array; np.ma is slow to import, so the others are not asked."""
    return type(value) is not np.ndarray and isinstance(value, np.ma.MaskedArray)


def mask_is_lost(name: str) -> str:
    """What is wrong with a masked array."""
    return (
        f"{name} is a masked array, whose mask would be lost: pass {name}.filled(0) and, with x, "
        f"mask= for the positions that count"
    )


def as_array(value: Any, name: str) -> Array:
    """An array-like or DLPack object as an ndarray of one of the four dtypes."""
    if type(value) is np.ndarray and value.dtype in NATIVE_FLOATS:
        return value
    if is_cupy(value):
        backend_of(value).check(value, name)
    elif type(value) is not np.ndarray:
        if is_masked(value):
            raise TypeError(mask_is_lost(name))
        if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
            value = from_dlpack(value, name)
        value = np.asarray(value)
    if not is_float(value.dtype):
        mend = "convert it, for example by astype(np.float32)"
        if value.dtype == bool and name not in ("x", "dy"):
            mend = "a mask is passed by name: mask=..."
        raise TypeError(
            f"{name} must be float32, float64, float16 or bfloat16, got {value.dtype}; {mend}"
        )
    return value  # type: ignore[no-any-return]


def from_dlpack(value: Any, name: str) -> Array:
    """An ndarray of the memory of a DLPack object."""
    try:
        array: Array = np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TypeError(
            f"{name} of type {type(value).__name__} cannot be read: "
            f"{str(error).rstrip('.')}{dlpack_hint(value, name)}"
        ) from error
    return array


CUDA_DEVICES = (2, 13)  # DLPack's numbers of CUDA memory, and of CUDA's managed memory


def dlpack_hint(value: Any, name: str) -> str:
    """Suggest how to pass a DLPack object that NumPy cannot read."""
    if value.__dlpack_device__()[0] in CUDA_DEVICES:
        return f"; on a GPU, pass cupy.from_dlpack({name})"
    if str(getattr(value, "dtype", "")) == "torch.bfloat16":
        as_bits = f"{name}.view(torch.int16).numpy()"
        return f"; of torch's bfloat16, pass {as_bits}.view(ml_dtypes.bfloat16)"
    return ""


def not_an_array(value: Any, name: str) -> str:
    """What is wrong with what is no array and should be written to."""
    hint = f"; np.from_dlpack({name}) shares its memory" if hasattr(value, "__dlpack__") else ""
    return f"{name} must be an ndarray, got {type(value).__name__}{hint}"


def on_host(value: Any, name: str) -> Array:
    """An array-like, CuPy array or torch tensor, Parameter or not, as an ndarray of any dtype."""
    if is_masked(value):
        raise TypeError(mask_is_lost(name))
    if is_cupy(value):
        return backend_of(value).to_host(value)  # type: ignore[no-any-return]
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        try:
            return np.asarray(value)
        except TypeError:  # NumPy does not know torch's bfloat16
            return np.asarray(value.float())
    return np.asarray(value)


def as_input(x: Any) -> Array:
    """x as an ndarray of shape (N, C, ...)."""
    x = as_array(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must have the shape (N, C, ...), got {x.shape}")
    return x  # type: ignore[no-any-return]


def as_array_beside(x: Array, value: Any, name: str) -> Array:
    """An array-like as an array of the kind that x is, NumPy's or CuPy's."""
    value = as_array(value, name)
    check_beside(x, value, name)
    return value  # type: ignore[no-any-return]


def check_beside(x: Array, array: Array, name: str) -> None:
    """Refuse an array of another kind than x: NumPy's beside CuPy's."""
    if isinstance(array, np.ndarray) != isinstance(x, np.ndarray):
        kind, other, device = ("CuPy", "NumPy", "cuda") if is_cupy(x) else ("NumPy", "CuPy", "cpu")
        convert = "cupy.asarray" if is_cupy(x) else "cupy.asnumpy"
        raise TypeError(
            f"{name} must be a {kind} array, as x is, got a {other} array: {convert}({name}), or "
            f"to({device!r}) for a layer"
        )


def as_gradient(dy: Any, x: Array) -> Array:
    """dy as an array of x's shape."""
    dy = as_array_beside(x, dy, "dy")
    if dy.shape != x.shape:
        raise ValueError(f"dy must have x's shape {x.shape}, got {dy.shape}")
    return dy  # type: ignore[no-any-return]


def as_vector(value: Any, name: str, c: int, x: Array) -> Array:
    """One value per channel, as an array beside x, of native byte order."""
    if type(value) is type(x) and value.dtype in NATIVE_FLOATS and value.shape == (c,):
        return value
    value = as_array_beside(x, value, name)
    if value.shape != (c,):
        raise ValueError(
            f"{name} must have the shape ({c},), one value per channel of x, got {value.shape}"
        )
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    return value  # type: ignore[no-any-return]


def as_optional_vector(value: Any, name: str, c: int, x: Array) -> Array | None:
    """One value per channel, as an array beside x, or None."""
    return None if value is None else as_vector(value, name, c, x)


def as_mask(mask: Any, x: Array) -> Array | None:
    """The positions of x that count, as a boolean array of shape (N, 1, ...)."""
    if mask is None:
        return None
    if is_masked(mask):
        raise TypeError(
            "mask is a masked array, whose own mask would be lost: pass mask.filled(False)"
        )
    if is_cupy(mask):
        backend_of(mask).check(mask, "mask")
    else:
        mask = np.asarray(mask)
    check_beside(x, mask, "mask")
    if mask.dtype != bool:
        raise TypeError(
            f"mask must be boolean, True where x counts, got {mask.dtype}; compare it, for example "
            f"mask != 0"
        )
    shape = (x.shape[0], 1, *x.shape[2:])
    mask = mask.view(np.uint8) != 0  # True may be any byte but 0 in another array's view
    if mask.shape == shape:
        return mask  # type: ignore[no-any-return]
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        hint = ""
        if mask.shape == shape[:1] + shape[2:]:
            hint = "; pass mask[:, np.newaxis]"
        elif mask.shape == (*shape[:1], *shape[2:], 1):
            hint = "; pass np.moveaxis(mask, -1, 1)"
        elif mask.shape == x.shape:
            hint = "; it is the same for all channels: pass that of one, mask[:, :1]"
        raise ValueError(
            f"mask must broadcast to the shape {shape}, x's with one channel, "
            f"got {mask.shape}{hint}"
        ) from None


def as_batch_size(value: Any) -> int:
    """A number of samples of a batch, at least 1; 0 for None, which stands for all of them."""
    if value is None:
        return 0
    if isinstance(value, bool):
        raise TypeError("ghost_batch_size must be an integer or None, got a bool")
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(
            f"ghost_batch_size must be an integer or None, got {type(value).__name__}"
        ) from None
    if size < 1:
        raise ValueError(f"ghost_batch_size must be at least 1, got {size}")
    return min(size, sys.maxsize)


def as_rows(value: Any, name: str, batch_size: int, x: Array) -> Array:
    """One value per channel or, with a batch size, per batch and channel."""
    c = x.shape[1]
    if not batch_size:
        return as_vector(value, name, c, x)
    value = as_array_beside(x, value, name)
    shape = (batches_of(x, batch_size), c)
    if value.shape != shape:
        raise ValueError(
            f"{name} must have the shape {shape}, one value per batch and channel of x, "
            f"got {value.shape}"
        )
    return value.astype(value.dtype.newbyteorder("="), copy=False)  # type: ignore[no-any-return]


def check_running(
    running_mean: Array | None, running_var: Array | None, x: Array, *, writeable: bool
) -> None:
    """Refuse running statistics that cannot be read, or updated in place."""
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or both be None")
    for value, name in ((running_mean, "running_mean"), (running_var, "running_var")):
        if value is not None:
            as_vector(value, name, x.shape[1], x)
            check_ndarray(value, name, writeable=writeable)


def check_ndarray(value: Any, name: str, *, writeable: bool) -> None:
    """Refuse what cannot be updated in place."""
    if not is_array(value):
        raise TypeError(not_an_array(value, name))
    if writeable and not backend_of(value).writeable(value):
        raise ValueError(f"{name} must be writeable, got a read-only array")


def check_counter(counter: Any, batches: int = 1) -> None:
    """Refuse what cannot count more batches. A value on a GPU is not read: that would wait."""
    check_ndarray(counter, "num_batches_tracked", writeable=True)
    if counter.shape != () or counter.dtype.kind not in "iu" or not counts_on(counter, batches):
        raise ValueError(
            f"num_batches_tracked must be a non-negative integer array of shape (), and less than "
            f"the largest of its dtype, got {counter!r}"
        )


def counts_on(counter: Array, batches: int) -> bool:
    """Tell whether a counter is not negative and its dtype has the number after more batches."""
    if is_cupy(counter):
        return True
    value = int(counter)
    bits = 8 * counter.itemsize - (counter.dtype.kind == "i")
    return value >= 0 and (value + batches).bit_length() <= bits


def as_real(value: Any, name: str) -> float:
    """A real number, which a bool is not, as a float."""
    if type(value) is float:
        return value
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold") from None


def as_eps(eps: Any) -> float:
    """A real number greater than 0."""
    eps = as_real(eps, "eps")
    if not eps > 0.0:
        raise ValueError(f"eps must be greater than 0, got {eps}")
    return float(eps)


def check_out(out: Any, x: Array, dy: Array | None = None, /, **vectors: Any) -> Array | None:
    """Refuse an `out` that cannot hold the result, or whose writing would spoil the reading.

    The vectors are what it must not overlap at all.
    """
    if out is None:
        return None
    if type(out) is not np.ndarray or type(x) is not np.ndarray:
        if not is_array(out) or is_masked(out):
            raise TypeError(not_an_array(out, "out"))
        check_beside(x, out, "out")
    if out.shape != x.shape:
        raise ValueError(f"out must have x's shape {x.shape}, got {out.shape}")
    dtype = x.dtype if x.dtype.isnative else x.dtype.newbyteorder("=")
    if out.dtype != dtype:
        raise TypeError(f"out must have x's dtype {dtype}, got {out.dtype}")
    if not backend_of(out).writeable(out):
        raise ValueError("out must be writeable, got a read-only array")
    if not out.flags.c_contiguous and overlaps_itself(out):
        raise ValueError(f"out must have elements of its own, got the strides {out.strides}")
    for name, array in (("x", x), ("dy", dy)):
        if array is not None and share_memory(out, array) and not same_elements(out, array):
            raise ValueError(f"out must be {name}, or not overlap it; it overlaps {name} in part")
    if vectors:
        check_apart(out, vectors)
    return out  # type: ignore[no-any-return]


def check_apart(out: Array, vectors: dict[str, Array | None]) -> None:
    """Refuse an `out` that overlaps a vector."""
    base = out.base
    owner = out if base is None else base
    known = base is None or getattr(base, "base", base) is None
    for name, vector in vectors.items():
        # Arrays that own their memory have none in common, which is the cheapest proof.
        if vector is None or (known and vector.base is None and vector is not owner):
            continue
        if share_memory(out, vector):
            raise ValueError(f"out must not overlap {name}")


def overlaps_itself(array: Array) -> bool:
    """Tell whether elements of an array share memory; where strides do not nest, yes."""
    extent = array.itemsize
    axes = [(abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n != 1]
    for stride, n in sorted(axes):
        if stride < extent:
            return array.size > 0
        extent += stride * (n - 1)
    return False


def share_memory(a: Array, b: Array) -> bool:
    """Tell whether two arrays have memory in common; where that is too hard to tell, yes."""
    if a is b:
        return True
    backend = backend_of(a)
    a, b = backend.addresses(a), backend.addresses(b)
    try:
        return np.may_share_memory(a, b) and np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def same_elements(a: Array, b: Array) -> bool:
    """Tell whether two arrays of one shape have each element at the same place."""
    if a is b:
        return True
    backend = backend_of(a)
    a, b = backend.addresses(a), backend.addresses(b)
    return (
        a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
        and a.itemsize == b.itemsize
        and all(
            s == t for s, t, size in zip(a.strides, b.strides, a.shape, strict=True) if size > 1
        )
    )
