"""Convolutions, poolings and resamplings against loops over numpy arrays."""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from tests.runtime.ge.ops.calls import (
    BF16,
    F32,
    Case,
    Refusal,
    check,
    check_refused,
    each_dtype,
    each_refusal,
    ints,
    reals,
    types_of,
)

from rolemesh.runtime.ge.ops.convolution import OPS

IMAGE = reals(2, 4, 7, 6)
VOLUME = reals(1, 2, 4, 5, 6)
BIAS = reals(6, seed=1)
LOOSE = 20
"""Terms of a sum cancel, so that its error is relative to them and not to it."""


def _padded(x: np.ndarray, pads: list[int], value: float = 0.0) -> np.ndarray:
    pairs = [(0, 0), (0, 0), *zip(pads[::2], pads[1::2], strict=True)]
    return np.pad(x, pairs, constant_values=value)


def _windows(x: np.ndarray, size: tuple[int, ...], stride: list[int], dilation: list[int]):
    """(place in the result, window [batch, channels, *size]) of a padded x."""
    counts = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[2:], size, stride, dilation, strict=True)
    ]
    for place in np.ndindex(*counts):
        spans = [
            slice(p * s, p * s + d * (k - 1) + 1, d)
            for p, k, s, d in zip(place, size, stride, dilation, strict=True)
        ]
        yield place, x[(slice(None), slice(None), *spans)]


def _convolution(stride: list[int], pads: list[int], dilation: list[int], groups: int = 1):
    def expect(x: np.ndarray, weight: np.ndarray, *bias: np.ndarray) -> np.ndarray:
        over = list(range(1, x.ndim))
        found = {
            place: np.concatenate(
                [
                    np.tensordot(part, filters, (over, over))
                    for part, filters in zip(
                        np.split(window, groups, 1), np.split(weight, groups), strict=True
                    )
                ],
                1,
            )
            for place, window in _windows(_padded(x, pads), weight.shape[2:], stride, dilation)
        }
        counts = [max(place[i] for place in found) + 1 for i in range(len(stride))]
        result = np.zeros((x.shape[0], weight.shape[0], *counts))
        for place, values in found.items():
            result[(slice(None), slice(None), *place)] = values
        return result + bias[0].reshape(-1, *[1] * len(stride)) if bias else result

    return expect


def _transposed(stride: list[int], pads: list[int], groups: int = 1):
    """Each element of x adds its multiple of the filter to the result."""

    def expect(
        size: np.ndarray, x: np.ndarray, weight: np.ndarray, *bias: np.ndarray
    ) -> np.ndarray:
        kernel, dims = weight.shape[2:], len(stride)
        room = [
            n + before + after
            for n, before, after in zip(size[2:], pads[::2], pads[1::2], strict=True)
        ]
        full = np.zeros((*size[:2], *room))
        for place in np.ndindex(*x.shape[2:]):
            for offset in np.ndindex(*kernel):
                at = [p * s + o for p, s, o in zip(place, stride, offset, strict=True)]
                if all(a < n for a, n in zip(at, room, strict=True)):
                    full[(slice(None), slice(None), *at)] += np.concatenate(
                        [
                            part @ filters
                            for part, filters in zip(
                                np.split(x[(slice(None), slice(None), *place)], groups, 1),
                                np.split(weight[(slice(None), slice(None), *offset)], groups),
                                strict=True,
                            )
                        ],
                        1,
                    )
        inner = [slice(before, before + n) for before, n in zip(pads[::2], size[2:], strict=True)]
        result = full[(slice(None), slice(None), *inner)]
        return result + bias[0].reshape(-1, *[1] * dims) if bias else result

    return expect


def _pooled(size: int, stride: int, pad: int, value: float, pick: object):
    def expect(x: np.ndarray) -> np.ndarray:
        dims = x.ndim - 2
        padded = _padded(x, [pad] * 2 * dims, value)
        found = dict(_windows(padded, (size,) * dims, [stride] * dims, [1] * dims))
        counts = [max(place[i] for place in found) + 1 for i in range(dims)]
        result = np.zeros((*x.shape[:2], *counts))
        for place, window in found.items():
            result[(slice(None), slice(None), *place)] = pick(window.reshape(*x.shape[:2], -1))
        return result

    return expect


def _mean(window: np.ndarray) -> np.ndarray:
    return np.nanmean(window, -1)


def _places(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Where in the flattened spatial dims each maximum is; all elements of x differ."""
    result = np.zeros(values.shape, np.int64)
    for place in np.ndindex(values.shape):
        flat = x[place[:2]].reshape(-1)
        (result[place],) = np.flatnonzero(flat == values[place])
    return result


def _maxima(kind: type):
    def expect(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values = _pooled(3, 2, 1, -math.inf, lambda window: window.max(-1))(x)
        return values, _places(values, x).astype(kind)

    return expect


def _adaptive(x: np.ndarray) -> np.ndarray:
    result = np.zeros((2, 4, 3, 4))
    for i, j in np.ndindex(3, 4):
        rows = slice(i * 7 // 3, -(-(i + 1) * 7 // 3))
        columns = slice(j * 6 // 4, -(-(j + 1) * 6 // 4))
        result[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return result


def _at(x: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
    inside = all(0 <= p < n for p, n in zip(place, x.shape[1:], strict=True))
    return x[(slice(None), *place)] if inside else np.zeros(x.shape[0])


def _sampled(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Bilinear samples with zeros outside; the corners of the grid are those of the pixels."""
    result = np.zeros((*x.shape[:2], *grid.shape[1:-1]))
    for batch, *place in np.ndindex(grid.shape[:-1]):
        point = grid[(batch, *place)][::-1]
        exact = [((p + 1) * n - 1) / 2 for p, n in zip(point, x.shape[2:], strict=True)]
        low = [math.floor(e) for e in exact]
        for corner in itertools.product((0, 1), repeat=len(low)):
            weight = math.prod(
                (e - b) if c else 1 - (e - b) for e, b, c in zip(exact, low, corner, strict=True)
            )
            at = tuple(b + c for b, c in zip(low, corner, strict=True))
            result[(batch, slice(None), *place)] += weight * _at(x[batch], at)
    return result


def _nearest_border(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The nearest element, held within x; the corners of the grid are the outermost elements."""
    result = np.zeros((*x.shape[:2], *grid.shape[1:-1]))
    for batch, *place in np.ndindex(grid.shape[:-1]):
        point = grid[(batch, *place)][::-1]
        at = tuple(
            int(np.rint(np.clip((p + 1) / 2 * (n - 1), 0, n - 1)))
            for p, n in zip(point, x.shape[2:], strict=True)
        )
        result[(batch, slice(None), *place)] = x[(batch, slice(None), *at)]
    return result


DISTINCT = (torch.randperm(336, generator=torch.Generator().manual_seed(0)) - 168).float()
PIXELS = DISTINCT[: 2 * 3 * 7 * 6].reshape(2, 3, 7, 6)
VOXELS = DISTINCT[: 2 * 4 * 5 * 6].reshape(1, 2, 4, 5, 6)
POOL = {"ksize": [1, 1, 3, 3], "strides": [1, 1, 2, 2], "pads": [1, 1, 1, 1]}
FRAME = {"strides": [1, 1, 1, 1], "pads": [0, 0, 0, 0], "data_format": "NCHW"}

CASES = [
    Case(
        "Conv2D",
        {"x": IMAGE, "filter": reals(6, 2, 3, 2), "bias": BIAS},
        _convolution([2, 1], [1, 1, 0, 0], [1, 2], 2),
        {
            "strides": [1, 1, 2, 1],
            "pads": [1, 1, 0, 0],
            "dilations": [1, 1, 1, 2],
            "groups": 2,
            "data_format": "NCHW",
        },
        loose=LOOSE,
    ),
    # A causal convolution of each channel, as in state-space models.
    Case(
        "Conv2D",
        {"x": reals(2, 4, 1, 9), "filter": reals(4, 1, 1, 3)},
        _convolution([1, 1], [0, 0, 2, 0], [1, 1], 4),
        {**FRAME, "pads": [0, 0, 2, 0], "groups": 4},
        loose=LOOSE,
    ),
    Case(
        "Conv3D",
        {"x": VOLUME, "filter": reals(3, 2, 2, 3, 2), "bias": BIAS[:3]},
        _convolution([1, 2, 1], [0, 1, 1, 1, 0, 0], [1, 1, 2]),
        {
            "strides": [1, 1, 1, 2, 1],
            "pads": [0, 1, 1, 1, 0, 0],
            "dilations": [1, 1, 1, 1, 2],
            "data_format": "NCDHW",
        },
        dtypes=(F32,),
        loose=LOOSE,
    ),
    Case(
        "Conv2DTranspose",
        {
            "input_size": ints(2, 6, 14, 6),
            "x": IMAGE,
            "filter": reals(4, 3, 3, 3),
            "bias": BIAS,
        },
        _transposed([2, 1], [1, 1, 1, 1], 2),
        {
            "strides": [1, 1, 2, 1],
            "pads": [1, 1, 1, 1],
            "groups": 2,
            "data_format": "NCHW",
            "output_padding": [0, 0, 1, 0],
        },
        dtypes=(F32,),
        loose=LOOSE,
    ),
    Case(
        "Conv3DTranspose",
        {"input_size": ints(1, 3, 7, 6, 6), "x": VOLUME, "filter": reals(2, 3, 3, 2, 1)},
        _transposed([2, 1, 1], [1, 1, 0, 0, 0, 0]),
        {
            "strides": [1, 1, 2, 1, 1],
            "pads": [1, 1, 0, 0, 0, 0],
            "data_format": "NCDHW",
        },
        dtypes=(F32,),
        loose=LOOSE,
    ),
    Case("AvgPoolV2", {"x": IMAGE}, _pooled(3, 2, 1, np.nan, _mean), POOL, loose=LOOSE),
    Case(
        "AvgPoolV2",
        {"x": IMAGE},
        _pooled(3, 2, 1, 0, _mean),
        {**POOL, "exclusive": False},
        loose=LOOSE,
    ),
    Case(
        "AvgPoolV2",
        {"x": IMAGE},
        _pooled(3, 2, 1, 0, lambda window: window.sum(-1) / 5),
        {**POOL, "divisor_override": 5},
        loose=LOOSE,
    ),
    Case(
        "AvgPoolV2",
        {"x": reals(1, 2, 5, 5)},
        lambda x: _pooled(2, 2, 0, 0, _mean)(np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)), "edge")),
        {"ksize": [1, 1, 2, 2], "strides": [1, 1, 2, 2], "ceil_mode": True},
        loose=LOOSE,
    ),
    Case("AdaptiveAvgPool2d", {"x": IMAGE}, _adaptive, {"output_size": [3, 4]}, loose=LOOSE),
    Case(
        "MaxPoolWithArgmaxV1",
        {"x": PIXELS},
        lambda x: (_maxima(np.int64)(x)[0], np.zeros(0, np.uint16)),
        {"ksize": [1, 3, 3, 1], "strides": [1, 2, 2, 1], "pads": [1, 1, 1, 1]},
        dtypes=(F32, BF16),
    ),
    Case(
        "MaxPoolWithArgmaxV3",
        {"x": PIXELS},
        _maxima(np.int64),
        {"ksize": [3, 3], "strides": [2, 2], "pads": [1, 1], "dtype": 9, "dilation": [1, 1]},
    ),
    Case(
        "MaxPool3DWithArgmaxV2",
        {"x": VOXELS},
        _maxima(np.int32),
        {"ksize": [3, 3, 3], "strides": [2, 2, 2], "pads": [1, 1, 1]},
    ),
    Case(
        "ResizeNearestNeighborV2",
        {"x": IMAGE, "size": ints(9, 4)},
        lambda x, _: x[:, :, [i * 7 // 9 for i in range(9)]][..., [j * 6 // 4 for j in range(4)]],
    ),
    Case(
        "GridSampler2D",
        {"x": IMAGE, "grid": reals(2, 3, 5, 2, low=-1.25, high=1.25)},
        _sampled,
        dtypes=(F32,),
        loose=LOOSE,
    ),
    Case(
        "GridSampler2D",
        {"x": IMAGE, "grid": reals(2, 3, 5, 2, low=-1.25, high=1.25)},
        _nearest_border,
        {"interpolation_mode": "nearest", "padding_mode": "border", "align_corners": True},
        dtypes=(F32,),
    ),
    Case(
        "GridSampler3D",
        {"x": VOLUME, "grid": reals(1, 2, 3, 2, 3, low=-1.25, high=1.25)},
        _sampled,
        dtypes=(F32,),
        loose=LOOSE,
    ),
]

FILTER = reals(6, 4, 3, 3)
REFUSED: list[Refusal] = [
    (
        "Conv2D",
        {"x": IMAGE, "filter": FILTER},
        {**FRAME, "data_format": "NHWC"},
        "data_format=NHWC",
    ),
    ("Conv2D", {"x": IMAGE, "filter": FILTER}, {**FRAME, "offset_x": 1}, "offset_x=1"),
    ("Conv2D", {"x": IMAGE, "filter": FILTER}, {**FRAME, "pads": [-1, 0, 0, 0]}, "pads="),
    ("Conv2D", {"x": IMAGE, "filter": FILTER}, {**FRAME, "strides": [2, 1, 1, 1]}, "strides="),
    ("Conv2D", {"x": IMAGE, "filter": FILTER, "offset_w": FILTER}, FRAME, "or for offset_w"),
    (
        "Conv2DTranspose",
        {"input_size": ints(2, 6, 9, 9), "x": IMAGE, "filter": reals(4, 6, 3, 3)},
        FRAME,
        r"\[2, 6, 9, 8\], not \[2, 6, 9, 9\]",
    ),
    ("AvgPoolV2", {"x": IMAGE}, {**POOL, "global_pooling": True}, "global_pooling=True"),
    ("AvgPoolV2", {"x": IMAGE}, {**POOL, "padding_mode": "SAME"}, "padding_mode='SAME'"),
    ("AvgPoolV2", {"x": IMAGE}, {**POOL, "pads": [1, 0, 0, 0]}, "pads="),
    (
        "ResizeNearestNeighborV2",
        {"x": IMAGE, "size": ints(9, 4)},
        {"half_pixel_centers": True},
        "half_pixel_centers=True",
    ),
]


@each_dtype(CASES)
def test_value(case: Case, dtype: torch.dtype) -> None:
    check(OPS, case, dtype)


def test_every_op_has_a_case() -> None:
    assert types_of(CASES) == set(OPS.ops)


@each_refusal(REFUSED)
def test_refused(refusal: Refusal) -> None:
    check_refused(OPS, refusal)
