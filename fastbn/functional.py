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
from fastbn import _scalars as scalars
from fastbn._primitives import (
    batch_norm_backward,
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_forward,
    batch_norm_stats,
)
from fastbn._types import Array, ArrayLike

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


def __dir__() -> list[str]:
    return sorted(__all__)


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
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
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
        The factor of the batch in the running statistics. The cumulative average, a momentum of
        None, is for layers, which count batches: ``BatchNorm2d(..., momentum=None)``.
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
    activation : None, "relu", "relu6" or "leaky_relu", optional
        What is applied to the result in the same pass over memory, before it is rounded to the
        input's dtype.
    negative_slope : float, default 0.01
        The slope of leaky_relu where the value before it is not positive.
    residual : array_like of the input's shape and dtype, optional
        Is added before the activation, in the same pass. `out` may be it.

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
        If a dtype is not one of the four, `out` or `residual` has another than `input`, or
        `unbiased` is not a bool.

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
    epilogue = activation, negative_slope, residual
    if mask is None and ghost_batch_size is None:
        options = training, momentum, eps, unbiased
        y = _quick_batch_norm(input, out, *parameters, *options, *epilogue)
        if y is not None:
            return y
    x = checks.as_input(input)
    size = scalars.as_batch_size(ghost_batch_size)
    momentum = scalars.as_momentum(momentum)
    unbiased = scalars.as_bool(unbiased, "unbiased")
    if not training:
        return normalize.by_running(
            checks.running_call(x, *parameters, eps, out=out, mask=mask, epilogue=epilogue)
        )
    call = checks.training_call(
        x,
        *parameters,
        momentum,
        eps,
        out=out,
        mask=mask,
        batch_size=size,
        unbiased=unbiased,
        epilogue=epilogue,
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
    activation: str | None,
    negative_slope: float,
    residual: ArrayLike | None,
) -> Array | None:
    """`batch_norm` of a plain call; None for any other."""
    if not training:
        if type(momentum) is not float or type(unbiased) is not bool:
            return None
        return _core.try_evaluate(
            x,
            out,
            running_mean,
            running_var,
            weight,
            bias,
            eps,
            activation,
            negative_slope,
            residual,
            None,
            None,
        )
    if momentum is None:
        return None
    result = _core.try_train(
        x,
        out,
        running_mean,
        running_var,
        weight,
        bias,
        momentum,
        eps,
        unbiased,
        activation,
        negative_slope,
        residual,
    )
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
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
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
    activation : None, "relu", "relu6" or "leaky_relu", optional
        What is applied to the result in the same pass over memory, before it is rounded to the
        input's dtype.
    negative_slope : float, default 0.01
        The slope of leaky_relu where the value before it is not positive.
    residual : array_like of the input's shape and dtype, optional
        Is added before the activation, in the same pass. `out` may be it.

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
        If a dtype is not one of the four, `out` or `residual` has another than `input`, or
        `unbiased` is not a bool.

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
    parameters = running_mean, running_var, weight, bias
    epilogue = activation, negative_slope, residual
    has_none = running_mean is None and running_var is None
    if mask is None and use_input_stats and has_none and momentum is not None:
        result = _core.try_layer_train(
            input,
            out,
            None,
            None,
            None,
            weight,
            bias,
            momentum,
            eps,
            unbiased,
            activation,
            negative_slope,
            residual,
            None,
            None,
            1,
            True,
            False,
        )
        if result is not None:
            return result[0]
    x = checks.as_input(input)
    momentum = scalars.as_momentum(momentum)
    unbiased = scalars.as_bool(unbiased, "unbiased")
    if not use_input_stats:
        return normalize.by_running(
            checks.running_call(
                x,
                *parameters,
                eps,
                out=out,
                mask=mask,
                without=WITHOUT_INPUT_STATS,
                epilogue=epilogue,
            )
        )
    call = checks.training_call(
        x,
        *parameters,
        momentum,
        eps,
        out=out,
        mask=mask,
        by_instance=True,
        unbiased=unbiased,
        epilogue=epilogue,
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
    activation: str | None = None,
    negative_slope: float = 0.01,
    residual: ArrayLike | None = None,
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
    activation : None, "relu", "relu6" or "leaky_relu", optional
        What is applied to the result in the same pass over memory, before it is rounded to the
        input's dtype.
    negative_slope : float, default 0.01
        The slope of leaky_relu where the value before it is not positive.
    residual : array_like of the input's shape and dtype, optional
        Is added before the activation, in the same pass. `out` may be it.

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
    epilogue = activation, negative_slope, residual
    parameters = num_groups, weight, bias, eps
    if mask is None:
        result = _core.try_groups(
            input,
            out,
            num_groups,
            weight,
            bias,
            eps,
            activation,
            negative_slope,
            residual,
            None,
            False,
        )
        if result is not None:
            return result[0]
    x = checks.as_input(input)
    call = checks.group_call(x, *parameters, out=out, mask=mask, epilogue=epilogue)
    return normalize.by_group(call)[0]


# Also those of `_primitives` are, to help() and pickles, functions of this module.
for _name in __all__:
    globals()[_name].__module__ = __name__
