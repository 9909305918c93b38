"""The primitives of `fastbn.functional`, and the two functions that fuse them.

Like the functions with torch's signatures, they check the arguments, then let the backend of x's
array run.
"""

from __future__ import annotations

from fastbn import _checks as checks
from fastbn import _core
from fastbn import _normalize as normalize
from fastbn import _scalars as scalars
from fastbn._types import Array, ArrayLike, Statistics
from fastbn.backends import backend_of


def batch_norm_stats(
    x: ArrayLike, mask: ArrayLike | None = None
) -> tuple[int, Statistics, Statistics]:
    """Count, mean and m2 of each channel.

    m2 is the sum of the squared deviations from the mean: ``m2 / count`` is the biased variance,
    ``m2 / (count - 1)`` the unbiased one. Blocks of the batch are summed around a pivot and merge
    by the formula of Chan, Golub and LeVeque (1983), in float64.

    ``torch.batch_norm_stats`` is another function: it also takes eps, and returns mean and invstd.

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
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
) -> tuple[Array, Statistics, Statistics]:
    """Normalize by the statistics of the batch itself.

    `batch_norm_stats` and `batch_norm_elemt` with ``invstd = 1 / sqrt(m2 / count + eps)``, but
    with a channel finished while it is in the cache, and, where x is not float64, with statistics
    that are no more exact than a result in float32 needs.

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
    activation : None, "relu", "relu6" or "leaky_relu", optional
        What is applied to the result in the same pass over memory, before it is rounded to the
        input's dtype.
    negative_slope : float, default 0.01
        The slope of leaky_relu where the value before it is not positive.
    residual : array_like of the input's shape and dtype, optional
        Is added before the activation, in the same pass. `out` may be it.

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
    >>> y, mean, invstd = batch_norm_forward(x, eps=1e-12, activation="relu")
    >>> y.round(6)
    array([[0., 0.],
           [1., 1.]])
    """
    if mask is None and ghost_batch_size is None:
        result = _core.try_train(
            x,
            out,
            None,
            None,
            weight,
            bias,
            0.0,
            eps,
            True,
            activation,
            negative_slope,
            residual,
        )
        if result is not None:
            return result
    x = checks.as_input(x)
    epilogue = activation, negative_slope, residual
    call = checks.forward_call(x, weight, bias, eps, out, mask, epilogue=epilogue)
    size = scalars.as_batch_size(ghost_batch_size)
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
    count : float
        The number of values per channel that the statistics are of: an int, or a float that a sum
        over processes is. Not negative, and 0 only where x has no value that counts.
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
        If a shape or a dtype is wrong, `out` cannot serve, or count is no number of these values.

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
    mask = checks.as_mask(mask, x)
    count = checks.as_values_count(count, x, mask)
    return backend_of(x).backward_elemt(dy, x, **vectors, count=count, out=out, mask=mask)


def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    weight: ArrayLike | None,
    mean: ArrayLike,
    invstd: ArrayLike,
    *,
    bias: ArrayLike | None = checks.NOT_GIVEN,
    residual: ArrayLike | None = None,
    y: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    out: Array | None = None,
    residual_out: Array | None = None,
    mask: ArrayLike | None = None,
    ghost_batch_size: int | None = None,
) -> tuple[Array, ...]:
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
    bias : array_like of shape (C,) or None
        That of the forward. Needed with an activation, unless there is `y`.
    residual : array_like of x's shape and dtype, optional
        That of the forward.
    y : array_like of x's shape and dtype, optional
        The result of the forward, which tells the derivatives of the activation. Without it they
        are computed from `x` again and, if there was one, from the residual. The two differ where
        rounding to x's dtype has reached 0 or 6.
    activation, negative_slope
        What `batch_norm_forward` was given. The derivative is that of torch: at 0, and for relu6 at
        6, it is that of the flat side.
    out : ndarray of shape (N, C, ...), optional
        Where to write dx: `dy`, `x`, a view of exactly the elements of one of them, or an array
        that overlaps neither, of x's dtype.
    residual_out : ndarray of shape (N, C, ...), optional
        Where to write the gradient of the residual: `dy`, or an array that overlaps nothing else of
        the call, of x's dtype.
    mask, ghost_batch_size
        What `batch_norm_forward` was given. The gradient is 0 where the mask is False.

    Returns
    -------
    dx : ndarray of shape (N, C, ...)
        `out`, or a new array of x's dtype and memory layout.
    dweight, dbias : ndarray of shape (C,), float64
        The gradients of weight and bias, also where there are none.
    dresidual : ndarray of shape (N, C, ...)
        Only with `residual` or `residual_out`: the gradient of the residual, which is dy times the
        derivative of the activation.

    Raises
    ------
    ValueError, TypeError
        If a shape or a dtype is wrong, `out` or `residual_out` cannot serve, an activation is
        unknown or has neither `bias` nor `y`, or `y` does not tell its derivatives.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.functional import batch_norm_backward, batch_norm_forward
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> y, mean, invstd = batch_norm_forward(x)
    >>> dx, dweight, dbias = batch_norm_backward(y, x, None, mean, invstd)
    >>> dbias.round(6), dweight.round(4)
    (array([0.]), array([3.]))
    >>> y, mean, invstd = batch_norm_forward(x, residual=-x, activation="relu")
    >>> dx, dweight, dbias, dresidual = batch_norm_backward(
    ...     np.ones_like(x), x, None, mean, invstd, y=y, activation="relu", residual_out=-x
    ... )
    >>> dresidual.tolist()
    [[0.0], [0.0], [0.0]]
    """
    is_plain = mask is None and ghost_batch_size is None and y is None
    if is_plain and residual is None and residual_out is None:
        gradients = _core.try_backward(
            dy, x, weight, mean, invstd, out, bias, activation, negative_slope
        )
        if gradients is not None:
            return gradients
    x = checks.as_input(x)
    size = scalars.as_batch_size(ghost_batch_size)
    call = checks.backward_call(
        dy,
        x,
        weight,
        mean,
        invstd,
        out=out,
        mask=mask,
        batch_size=size,
        bias=bias,
        residual=residual,
        y=y,
        activation=activation,
        negative_slope=negative_slope,
        residual_out=residual_out,
    )
    invalid = normalize.invalid_positions(call.mask)
    gradients = normalize.backward(call)
    if call.gate is None or call.gate.derived is None:
        return gradients
    return *gradients, normalize.clear(call.gate.derived, invalid)
