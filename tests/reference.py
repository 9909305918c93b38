"""Batch normalization in plain NumPy: every formula once, wide arithmetic, nothing fast.

Everything is computed in `numpy.longdouble`, which has 64 bits of mantissa on x86-64 and never
fewer than float64. Statistics are of the biased kind unless a name says otherwise.
"""

import numpy as np

# Bits of the mantissa behind the leading one, and the exponent of the smallest normal number.
FORMATS = {
    "float16": (10, -14),
    "bfloat16": (7, -126),
    "float32": (23, -126),
    "float64": (52, -1022),
}


def wide(a):
    """`a` as longdouble; exact for each of the library's dtypes."""
    a = np.asarray(a)
    return a if a.dtype == np.longdouble else a.astype(np.float64).astype(np.longdouble)


def ulp(size, dtype):
    """Distance of neighbouring numbers of `dtype` at the size of `size`."""
    mantissa, smallest = FORMATS[np.dtype(dtype).name]
    size = wide(size)
    _, exponent = np.frexp(np.abs(size))
    exponent = np.where(size == 0, smallest, np.maximum(exponent - 1, smallest))
    return np.ldexp(np.longdouble(1), exponent - mantissa)


def largest(dtype):
    """The largest finite number of `dtype`."""
    mantissa, smallest = FORMATS[np.dtype(dtype).name]
    return np.ldexp(np.longdouble(2) - np.ldexp(1.0, -mantissa), 1 - smallest)


def over_channels(values, ndim):
    """(C,) values, shaped to broadcast against an (N, C, ...) array."""
    return wide(values).reshape((-1,) + (1,) * (ndim - 2))


def channel_axes(x):
    """Every axis but the channels'."""
    return (0, *range(2, x.ndim))


def moments(x):
    """Count, mean and variance of each channel, in two passes with the residual put back."""
    x = wide(x)
    axes = channel_axes(x)
    mean = x.mean(axis=axes)
    deviation = x - over_channels(mean, x.ndim)
    residual = deviation.mean(axis=axes)
    count = x.size // x.shape[1]
    return count, mean + residual, (deviation**2).mean(axis=axes) - residual**2


def normalize(x, mean, var, weight=None, bias=None, eps=1e-5):
    """(x - mean) / sqrt(var + eps) * weight + bias."""
    x = wide(x)
    invstd = 1 / np.sqrt(wide(var) + np.longdouble(eps))
    y = (x - over_channels(mean, x.ndim)) * over_channels(invstd, x.ndim)
    if weight is not None:
        y = y * over_channels(weight, x.ndim)
    if bias is not None:
        y = y + over_channels(bias, x.ndim)
    return y


def forward(x, weight=None, bias=None, eps=1e-5):
    """y of a training forward."""
    _, mean, var = moments(x)
    return normalize(x, mean, var, weight, bias, eps)


def updated(x, running_mean, running_var, momentum, unbiased=True):
    """The running statistics after a training forward of x; their variance is the unbiased one."""
    count, mean, var = moments(x)
    var = var * count / (count - 1) if unbiased else var
    momentum = np.longdouble(momentum)
    return (
        (1 - momentum) * wide(running_mean) + momentum * mean,
        (1 - momentum) * wide(running_var) + momentum * var,
    )


def backward(dy, x, weight=None, eps=1e-5):
    """(dx, dweight, dbias) of a training forward, whose statistics depend on x."""
    count, mean, var = moments(x)
    xhat = normalize(x, mean, var, eps=eps)
    dy = wide(dy)
    axes = channel_axes(dy)
    dweight, dbias = (dy * xhat).sum(axis=axes), dy.sum(axis=axes)
    dx = dy - (over_channels(dbias, dy.ndim) + xhat * over_channels(dweight, dy.ndim)) / count
    return dx * scale(var, weight, eps, dy.ndim), dweight, dbias


def in_groups(x, groups):
    """The values of each group of channels of each sample, as a channel of its own."""
    return wide(x).reshape(len(x) * groups, -1).T


def group_moments(x, groups):
    """Mean and variance of the group of each sample and channel, of the shape (N, C)."""
    channels = x.shape[1] // groups
    of_groups = moments(in_groups(x, groups))[1:]
    return [np.repeat(values.reshape(len(x), groups), channels, axis=1) for values in of_groups]


def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """y of a group normalization."""
    y = forward(in_groups(x, groups), eps=eps).T.reshape(x.shape)
    y = y if weight is None else y * over_channels(weight, x.ndim)
    return y if bias is None else y + over_channels(bias, x.ndim)


def group_norm_backward(dy, x, groups, weight=None, eps=1e-5):
    """(dx, dweight, dbias) of a group normalization."""
    xhat, axes = group_norm(x, groups, eps=eps), channel_axes(x)
    dy = wide(dy)
    weighted = dy if weight is None else dy * over_channels(weight, x.ndim)
    dx = backward(in_groups(weighted, groups), in_groups(x, groups), eps=eps)[0]
    return dx.T.reshape(x.shape), (dy * xhat).sum(axis=axes), dy.sum(axis=axes)


def backward_frozen(dy, x, mean, var, weight=None, eps=1e-5):
    """(dx, dweight, dbias) where the statistics are constants."""
    dy = wide(dy)
    axes = channel_axes(dy)
    xhat = normalize(x, mean, var, eps=eps)
    dx = dy * scale(var, weight, eps, dy.ndim)
    return dx, (dy * xhat).sum(axis=axes), dy.sum(axis=axes)


def scale(var, weight, eps, ndim):
    """weight / sqrt(var + eps) per channel, ready to broadcast."""
    weight = np.ones_like(wide(var)) if weight is None else wide(weight)
    return over_channels(weight / np.sqrt(wide(var) + np.longdouble(eps)), ndim)


def forward_bound(y, dtype, weight=None, bias=None, offset=0.0):
    """How far an output may lie from the exact y, element by element.

    4 ulp of float32 at the size of max(|y|, |weight|, |bias|) where the arithmetic is in float32,
    and half an ulp of a 16-bit output on top; 1e-14 (1 + |mean|/std) in float64, where `offset`
    is |mean|/std.
    """
    y = wide(y)
    size = np.abs(y)
    for parameter in (np.ones(y.shape[1]) if weight is None else weight, bias):
        if parameter is not None:
            size = np.maximum(size, np.abs(over_channels(parameter, y.ndim)))
    if dtype.itemsize == 8:
        offset = np.broadcast_to(offset, y.shape[1:2])
        return np.longdouble(1e-14) * (1 + over_channels(offset, y.ndim)) * size
    rounding = ulp(y, dtype) / 2 if dtype.itemsize == 2 else 0
    return 4 * ulp(size, np.float32) + rounding


def gradient_bounds(dy, x, dtype, mean, var, weight=None, eps=1e-5, relative=None):
    """How far (dx, dweight, dbias) may lie from the exact ones.

    Relative to the channel's largest |weight invstd dy| for dx, to the sums of magnitudes for the
    other two; the default is 1e-5 for arithmetic in float32 and 1e-12 in float64.
    """
    if relative is None:
        relative = 1e-12 if dtype.itemsize == 8 else 1e-5
    dy = wide(dy)
    axes = channel_axes(dy)
    dx_size = np.abs(scale(var, weight, eps, dy.ndim) * dy).max(axis=axes, keepdims=True)
    rounding = ulp(dx_size, dtype) if dtype.itemsize == 2 else 0
    xhat = normalize(x, mean, var, eps=eps)
    return (
        relative * dx_size + rounding,
        relative * np.abs(dy * xhat).sum(axis=axes),
        relative * np.abs(dy).sum(axis=axes),
    )


# Activations and residuals.


def activate(z, activation, slope=0.01):
    """An activation of z; NaN stays NaN."""
    z = wide(z)
    if activation is None:
        return z
    if activation == "leaky_relu":
        return np.where(z > 0, z, z * np.longdouble(slope))
    z = np.where(z < 0, 0, z)
    return np.where(z > 6, 6, z) if activation == "relu6" else z


def derivative(z, activation, slope=0.01):
    """The derivative of an activation at z, at its kinks that of the flat side, as torch has it."""
    z = wide(z)
    if activation is None:
        return np.ones_like(z)
    if activation == "leaky_relu":
        return np.where(z > 0, 1, np.longdouble(slope))
    flat = (z <= 0) | (z >= 6) if activation == "relu6" else z <= 0
    return np.where(flat, np.longdouble(0), 1)
