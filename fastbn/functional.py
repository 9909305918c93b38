"""Batch normalization as functions: check the arguments, then let the backend of x's array run.

`batch_norm`, `instance_norm` and `group_norm` have the signatures of the functions of these names
in ``torch.nn.functional``. The primitives under them are what synchronized, masked or otherwise
composed batch normalization is made of; `batch_norm_forward` and `batch_norm_backward` fuse them.

Arrays have the shape (N, C, ...): N samples of C channels, and any number of further axes. They are
float32, float64, float16 or ml_dtypes' bfloat16, of any strides. One that is C-contiguous, or would
be with the channels last, is read as it lies; others are copied. Arithmetic is done in float32
(float64 for float64 arrays), sums in float64; the fused functions may add up to eight terms of a
sum in float32. Every result has the same bits whatever the number of threads.

CuPy arrays are taken as well, by all functions: then every array of a call is one of CuPy's, on the
current device, and so are the results. The kernels run on CuPy's current stream.

All functions check everything before they write anything.
"""

from __future__ import annotations

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _normalize as normalize
from fastbn._types import Array, ArrayLike, Statistics
from fastbn.backends import backend_of

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_elemt",
    "batch_norm_backward_reduce",
    "batch_norm_elemt",
    "batch_norm_forward",
    "batch_norm_stats",
    "group_norm",
    "instance_norm",
]
WITHOUT_INPUT_STATS = (
    "without use_input_stats, got None; use_input_stats=True normalizes each sample by its own "
    "statistics"
)


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
    unbiased: bool = True,
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
        (over n - 1) of the batch; see `unbiased`. They may be views of one array, of any float
        dtype.
    weight, bias : array_like of shape (C,), optional
        Of any float dtype. None stands for ones and for zeros.
    training : bool, default False
        Whether to normalize by the statistics of the batch.
    momentum : float, default 0.1
        The factor of the batch in the running statistics.
    eps : float, default 1e-5
        Added to the variance. Greater than 0 in training, otherwise not less.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result. It has input's dtype, and is `input`, or a view of exactly its
        elements, or does not overlap it.
    mask : array_like of bool, optional
        Which positions are valid, of a shape that broadcasts to (N, 1, ...): the others add nothing
        to the statistics, and the result is 0 there.
    ghost_batch_size : int, optional
        Normalize each so many samples by themselves (Hoffer, Hubara and Soudry 2017), and what is
        left over at the end as well; the running statistics take one after the other. Without
        effect outside training.
    unbiased : bool, default True
        Whether running_var takes the unbiased variance of the batch or, with False, that of the
        population (over n), as ONNX, Keras and Flax do.

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
        If a dtype is not one of the four, `out` has another than `input`, or `unbiased` is not a
        bool.

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
    parameters = running_mean, running_var, weight, bias
    if mask is None and ghost_batch_size is None:
        y = _quick_batch_norm(input, out, *parameters, training, momentum, eps, unbiased)
        if y is not None:
            return y
    x = checks.as_input(input)
    size = checks.as_batch_size(ghost_batch_size)
    if not training:
        return normalize.by_running(checks.running_call(x, *parameters, eps, out=out, mask=mask))
    momentum = checks.as_real(momentum, "momentum")
    call = checks.training_call(
        x,
        *parameters,
        momentum,
        eps,
        out=out,
        mask=mask,
        batch_size=size,
        unbiased=unbiased,
    )
    return normalize.by_batch(call)[0]


def _quick_batch_norm(
    x: ArrayLike,
    out: Array | None,
    running_mean: Array | None,
    running_var: Array | None,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    training: bool,
    momentum: float,
    eps: float,
    unbiased: bool,
) -> Array | None:
    """`batch_norm` of a plain call; None for any other."""
    running = running_mean, running_var
    if not training:
        return _core.try_evaluate(x, out, *running, weight, bias, eps, None, None)
    if momentum is None:
        return None
    result = _core.try_train(x, out, *running, weight, bias, momentum, eps, unbiased)
    return None if result is None else result[0]


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
    unbiased: bool = True,
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
        samples, of mean and unbiased variance; see `unbiased`. They may be views of one array, of
        any float dtype.
    weight, bias : array_like of shape (C,), optional
        Of any float dtype. None stands for ones and for zeros.
    use_input_stats : bool, default True
        Whether to normalize by the statistics of each sample.
    momentum : float, default 0.1
        The factor of the samples in the running statistics.
    eps : float, default 1e-5
        Added to the variance. Not less than 0.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result. It has input's dtype, and is `input`, or a view of exactly its
        elements, or does not overlap it.
    mask : array_like of bool, optional
        Which positions are valid, of a shape that broadcasts to (N, 1, ...): the others add nothing
        to the statistics, and the result is 0 there. A sample may have none, or one, whose variance
        is then 0; such a sample moves no running statistics.
    unbiased : bool, default True
        Whether running_var takes the unbiased variances or, with False, those of the population.

    Returns
    -------
    ndarray of shape (N, C, ...)
        `out`, or a new array of input's dtype and memory layout.

    Raises
    ------
    ValueError
        If a shape is wrong, samples that are to be normalized by their own statistics have a single
        value per channel and no mask, running statistics are needed and not there, or `out` cannot
        be written or overlaps `input` in part.
    TypeError
        If a dtype is not one of the four, `out` has another than `input`, or `unbiased` is not a
        bool.

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
    x = checks.as_input(input)
    parameters = running_mean, running_var, weight, bias
    if not use_input_stats:
        return normalize.by_running(
            checks.running_call(
                x, *parameters, eps, out=out, mask=mask, without=WITHOUT_INPUT_STATS
            )
        )
    momentum = checks.as_real(momentum, "momentum")
    call = checks.training_call(
        x,
        *parameters,
        momentum,
        eps,
        out=out,
        mask=mask,
        by_instance=True,
        unbiased=unbiased,
    )
    return normalize.by_instance(call)[0]


def group_norm(
    input: ArrayLike,
    num_groups: int,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
    mask: ArrayLike | None = None,
) -> Array:
    """Normalize groups of channels of each sample, as ``torch.nn.functional.group_norm`` does.

    ``y = (input - mean) / sqrt(var + eps) * weight + bias``, where mean and var are those of the
    ``C / num_groups`` neighbouring channels of the sample that are in the same group (Wu and He
    2018).

    Parameters
    ----------
    input : array_like of shape (N, C, ...)
        float32, float64, float16 or bfloat16.
    num_groups : int
        Into how many groups the channels are divided: a divisor of C.
    weight, bias : array_like of shape (C,), optional
        Of any float dtype. None stands for ones and for zeros.
    eps : float, default 1e-5
        Added to the variance. Not less than 0.
    out : ndarray of shape (N, C, ...), optional
        Where to write the result. It has input's dtype, and is `input`, or a view of exactly its
        elements, or does not overlap it.
    mask : array_like of bool, optional
        Which positions are valid, of a shape that broadcasts to (N, 1, ...): the others add nothing
        to the statistics, and the result is 0 there.

    Returns
    -------
    ndarray of shape (N, C, ...)
        `out`, or a new array of input's dtype and memory layout.

    Raises
    ------
    ValueError
        If a shape is wrong, C is not divisible by `num_groups`, the groups of all samples have a
        single value together, or `out` cannot be written or overlaps `input` in part.
    TypeError
        If a dtype is not one of the four, or `out` has another than `input`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import group_norm
    >>> x = np.array([[1.0, 3.0, 50.0, 70.0]])
    >>> group_norm(x, 2, eps=1e-12).round(6)
    array([[-1.,  1., -1.,  1.]])
    >>> group_norm(x, 2, bias=[0.0, 0.0, 5.0, 5.0], eps=1e-12).round(6)
    array([[-1.,  1.,  4.,  6.]])
    """
    x = checks.as_input(input)
    call = checks.group_call(x, num_groups, weight, bias, eps, out=out, mask=mask)
    return normalize.by_group(call)[0]


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
        Which positions are valid, of a shape that broadcasts to (N, 1, ...).

    Returns
    -------
    count : int
        The number of valid values of a channel.
    mean, m2 : ndarray of shape (C,), float64
        Zeros if no position is valid.

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
    x = checks.as_input(x)
    mask = checks.as_mask(mask, x)
    mean, m2 = backend_of(x).stats(x, mask)
    return normalize.values_per_channel(x, mask), mean, m2


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
    x = checks.as_input(x)
    vectors = checks.as_vectors(x, mean=mean, invstd=invstd, weight=weight, bias=bias)
    out = checks.check_out(out, x, **vectors)
    return backend_of(x).elemt(x, **vectors, out=out, mask=checks.as_mask(mask, x))


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
        Which positions are valid, of a shape that broadcasts to (N, 1, ...): the others add nothing
        to the statistics, and the result is 0 there.
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
    if mask is None and ghost_batch_size is None:
        result = _core.try_train(x, out, None, None, weight, bias, 0.0, eps, True)
        if result is not None:
            return result
    x = checks.as_input(x)
    call = checks.forward_call(x, weight, bias, eps, out, mask)
    size = checks.as_batch_size(ghost_batch_size)
    return normalize.by_batch(call._replace(batch_size=size))


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
        Which positions are valid, of a shape that broadcasts to (N, 1, ...).

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
    x = checks.as_input(x)
    statistics = checks.as_vectors(x, mean=mean, invstd=invstd)
    dy, mask = checks.as_gradient(dy, x), checks.as_mask(mask, x)
    return backend_of(x).backward_reduce(dy, x, **statistics, mask=mask)


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
    x = checks.as_input(x)
    dy = checks.as_gradient(dy, x)
    statistics = {"mean": mean, "invstd": invstd}
    sums = {"sum_dy": sum_dy, "sum_dy_xhat": sum_dy_xhat}
    vectors = checks.as_vectors(x, **statistics, weight=weight, **sums)
    out = checks.check_out(out, x, dy, **vectors)
    count = checks.as_real(count, "count")
    return backend_of(x).backward_elemt(
        dy, x, **vectors, count=count, out=out, mask=checks.as_mask(mask, x)
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
    if mask is None and ghost_batch_size is None:
        gradients = _core.try_backward(dy, x, weight, mean, invstd, out)
        if gradients is not None:
            return gradients
    x = checks.as_input(x)
    size = checks.as_batch_size(ghost_batch_size)
    return normalize.backward(
        checks.backward_call(dy, x, weight, mean, invstd, out=out, mask=mask, batch_size=size)
    )
