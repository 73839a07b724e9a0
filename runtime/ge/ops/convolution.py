"""Convolutions, poolings and resamplings of images and volumes.

Tensors are [batch, channels, spatial dims]. Convolutions and AvgPoolV2 say so in data_format; for
the others torchair states it with the tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rolemesh.runtime.ge.ops.checks import FLOATS, demand, only, wide
from rolemesh.runtime.ge.ops.table import Attributes, OpTable, integers

__all__ = ["OPS"]

OPS = OpTable()


def _spatial(a: Attributes, name: str, dims: int, default: int | None = None) -> list[int]:
    """The spatial entries of an attribute that also has one for batch and channels, which are 1."""
    rank = dims + 2
    values = a.ints(name, None if default is None else [default] * rank)
    if len(values) != rank or values[:2] != [values[0]] * 2 or values[0] not in (0, 1):
        raise ValueError(f"{a.where}: no semantics for {name}={values}")
    return values[2:]


def _padded(a: Attributes, x: Tensor, dims: int) -> tuple[Tensor, list[int]]:
    """What is left to pad symmetrically once uneven pads, two for each dim, are there."""
    pads = a.ints("pads")
    befores, afters = pads[::2], pads[1::2]
    if len(pads) != 2 * dims or min(pads) < 0:
        raise ValueError(f"{a.where}: no semantics for pads={pads}")
    if befores == afters:
        return x, befores
    outward = [n for dim in reversed(range(dims)) for n in pads[2 * dim : 2 * dim + 2]]
    return functional.pad(x, outward), [0] * dims


def _convolution(
    a: Attributes,
    compute: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset_w: Tensor | None,
) -> Tensor:
    dims = _checked(a, x, weight, offset_w)
    x, padding = _padded(a, x, dims)
    stride, dilation = _spatial(a, "strides", dims), _spatial(a, "dilations", dims, 1)
    result = compute(x, weight, bias, stride, padding, dilation, a.int("groups", 1))
    return result.contiguous()


def _transposed(
    a: Attributes,
    compute: Callable[..., Tensor],
    input_size: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offset_w: Tensor | None,
) -> Tensor:
    dims = _checked(a, x, weight, offset_w)
    pads = a.ints("pads")
    if len(pads) != 2 * dims or pads[::2] != pads[1::2]:
        raise ValueError(f"{a.where}: no semantics for pads={pads}")
    result = compute(
        x,
        weight,
        bias,
        _spatial(a, "strides", dims),
        pads[::2],
        _spatial(a, "output_padding", dims, 0),
        a.int("groups", 1),
        _spatial(a, "dilations", dims, 1),
    )
    if list(result.shape) != integers(input_size):
        raise ValueError(f"{a.where}: {list(result.shape)}, not {integers(input_size)}")
    return result.contiguous()


def _checked(a: Attributes, x: Tensor, weight: Tensor, offset_w: Tensor | None) -> int:
    """The number of spatial dims; offsets belong to 8-bit numbers."""
    demand(a, FLOATS, x)
    only(a, offset_x=0)
    dims = x.dim() - 2
    layout = {2: "NCHW", 3: "NCDHW"}.get(dims)
    if offset_w is not None or weight.dim() != x.dim() or a.str("data_format", "NHWC") != layout:
        raise ValueError(
            f"{a.where}: no semantics for data_format={a.str('data_format', 'NHWC')} of"
            f" {list(x.shape)} and {list(weight.shape)}, or for offset_w"
        )
    return dims


@OPS.op("Conv2D", equal=("x", "filter", "bias"))
def conv_2d(
    a: Attributes,
    x: Tensor,
    filter: Tensor,  # noqa: A002
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
) -> Tensor:
    return _convolution(a, functional.conv2d, x, filter, bias, offset_w)


@OPS.op("Conv3D", equal=("x", "filter", "bias"))
def conv_3d(
    a: Attributes,
    x: Tensor,
    filter: Tensor,  # noqa: A002
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
) -> Tensor:
    return _convolution(a, functional.conv3d, x, filter, bias, offset_w)


@OPS.op("Conv2DTranspose", equal=("x", "filter", "bias"))
def conv_2d_transpose(
    a: Attributes,
    input_size: Tensor,
    x: Tensor,
    filter: Tensor,  # noqa: A002
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
) -> Tensor:
    """The gradient of a convolution whose input has the shape input_size."""
    return _transposed(a, functional.conv_transpose2d, input_size, x, filter, bias, offset_w)


@OPS.op("Conv3DTranspose", equal=("x", "filter", "bias"))
def conv_3d_transpose(
    a: Attributes,
    input_size: Tensor,
    x: Tensor,
    filter: Tensor,  # noqa: A002
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
) -> Tensor:
    """The gradient of a convolution whose input has the shape input_size."""
    return _transposed(a, functional.conv_transpose3d, input_size, x, filter, bias, offset_w)


@OPS.op("AvgPoolV2")
def avg_pool_v2(a: Attributes, x: Tensor) -> Tensor:
    """The mean of each window; pads count unless exclusive, a divisor replaces the count."""
    demand(a, FLOATS, x)
    only(a, padding_mode="CALCULATED", data_format="NCHW", global_pooling=False)
    pads = a.ints("pads", (0, 0, 0, 0))
    if x.dim() != 4 or pads[::2] != pads[1::2]:
        raise ValueError(f"{a.where}: no semantics for pads={pads} of {x.dim()} dims")
    pooled = functional.avg_pool2d(
        wide(x),
        _spatial(a, "ksize", 2),
        _spatial(a, "strides", 2),
        pads[::2],
        a.bool("ceil_mode", False),
        not a.bool("exclusive", True),
        a.int("divisor_override", 0) or None,
    )
    return pooled.to(x.dtype)


@OPS.op("AdaptiveAvgPool2d")
def adaptive_avg_pool_2d(a: Attributes, x: Tensor) -> Tensor:
    """The means of as many windows as output_size says."""
    demand(a, FLOATS, x)
    height, width = a.ints("output_size")
    return functional.adaptive_avg_pool2d(wide(x), (height, width)).to(x.dtype)


@OPS.op("MaxPoolWithArgmaxV1")
def max_pool_with_argmax_v1(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each window.

    The second result, a mask in an order of the hardware that nothing in torchair reads, is empty.
    The attributes have an entry before and one after those of the two spatial dims.
    """
    values, _ = _max_pool_2d(a, x, lambda name: a.ints(name)[1:3])
    return values, torch.empty(0, dtype=torch.uint16)


@OPS.op("MaxPoolWithArgmaxV3")
def max_pool_with_argmax_v3(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each window, and its place in the flattened spatial dims."""
    only(a, data_format="NCHW")
    values, places = _max_pool_2d(a, x, a.ints)
    return values, places.to(a.dtype("dtype", torch.int32))


def _max_pool_2d(
    a: Attributes, x: Tensor, pair: Callable[[str], list[int]]
) -> tuple[Tensor, Tensor]:
    demand(a, FLOATS, x)
    values, places = functional.max_pool2d(
        x,
        pair("ksize"),
        pair("strides"),
        pair("pads"),
        pair("dilation") if "dilation" in a else 1,
        a.bool("ceil_mode", False),
        return_indices=True,
    )
    return values, places


@OPS.op("MaxPool3DWithArgmaxV2")
def max_pool_3d_with_argmax_v2(a: Attributes, x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum of each window, and its place in the flattened spatial dims."""
    demand(a, FLOATS, x)
    only(a, data_format="NCDHW")
    values, places = functional.max_pool3d(
        x,
        a.ints("ksize"),
        a.ints("strides"),
        a.ints("pads"),
        a.ints("dilation", (1, 1, 1)),
        a.bool("ceil_mode", False),
        return_indices=True,
    )
    return values, places.to(a.dtype("dtype", torch.int32))


@OPS.op("ResizeNearestNeighborV2")
def resize_nearest_neighbor_v2(a: Attributes, x: Tensor, size: Tensor) -> Tensor:
    """Images of another size, each element from the one at or before its place."""
    demand(a, FLOATS, x)
    only(a, align_corners=False, half_pixel_centers=False)
    return functional.interpolate(x, integers(size), mode="nearest")


@OPS.op("GridSampler2D", equal=("x", "grid"))
def grid_sampler_2d(a: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    """Elements at the points of a grid, which spans -1 to 1."""
    return _grid_sample(a, x, grid)


@OPS.op("GridSampler3D", equal=("x", "grid"))
def grid_sampler_3d(a: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    """Elements at the points of a grid, which spans -1 to 1."""
    only(a, data_format="NCDHW")
    return _grid_sample(a, x, grid)


def _grid_sample(a: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    demand(a, FLOATS, x)
    return functional.grid_sample(
        x,
        grid,
        a.str("interpolation_mode", "bilinear"),
        a.str("padding_mode", "zeros"),
        a.bool("align_corners", False),
    ).contiguous()
