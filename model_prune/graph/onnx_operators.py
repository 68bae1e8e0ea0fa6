"""ONNX's operators in torch: those of the networks that torch exports, of opset 13 or newer.

A function takes the node's attributes and its inputs: tensors, or numpy arrays where a value
follows from the file alone (sizes, axes). Those with a size that shrinks when channels go are in
`onnx.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from prune_core.errors import InputError

Attributes = Mapping[str, Any]
Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Of ONNX operators that this function stands for."""

    def add(function: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


def numbers(value: Any) -> list[Any]:
    """Of an input that has to be known before the network runs."""
    if isinstance(value, Tensor):
        raise InputError("a size or an axis depends on the network's inputs")
    return np.asarray(value).reshape(-1).tolist()


def pointwise(function: Callable[..., Any]) -> Operator:
    """Of an operator that has no attributes."""
    return lambda attributes, *inputs: function(*inputs)


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def fold(attributes: Attributes, first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = function(first, other)
        return first

    return fold


def _divided(a: Tensor, b: Tensor) -> Tensor:
    whole = not (a.is_floating_point() or a.is_complex())
    return torch.div(a, b, rounding_mode="trunc" if whole else None)


_POINTWISE: dict[str, Any] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Div": _divided,
    "Dropout": lambda x, *_: x,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "Log": torch.log,
    "MatMul": torch.matmul,
    "Mish": F.mish,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Where": torch.where,
    "IsNaN": torch.isnan,
}
OPERATORS |= {name: pointwise(function) for name, function in _POINTWISE.items()}
OPERATORS |= {"Max": _folded(torch.maximum), "Min": _folded(torch.minimum)}


@operator("Gelu")
def _gelu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("LeakyRelu")
def _leaky(attributes: Attributes, x: Tensor) -> Tensor:
    return F.leaky_relu(x, attributes.get("alpha", 0.01))


@operator("Elu")
def _elu(attributes: Attributes, x: Tensor) -> Tensor:
    return F.elu(x, attributes.get("alpha", 1.0))


@operator("HardSigmoid")
def _hard_sigmoid(attributes: Attributes, x: Tensor) -> Tensor:
    slope: float = attributes.get("alpha", 0.2)
    line: Tensor = slope * x + attributes.get("beta", 0.5)
    return line.clamp(0, 1)


@operator("PRelu")
def _prelu(attributes: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Clip")
def _clip(attributes: Attributes, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    least, most = (None if bound is None else numbers(bound)[0] for bound in (low, high))
    return x if least is most is None else torch.clamp(x, least, most)


@operator("Cast")
def _cast(attributes: Attributes, x: Tensor) -> Tensor:
    from onnx.helper import tensor_dtype_to_np_dtype

    like = torch.from_numpy(np.zeros(0, dtype=tensor_dtype_to_np_dtype(attributes["to"])))
    return x.to(like.dtype)


# ------------------------------------------------------------------ products
@operator("Gemm")
def _gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Any = None) -> Tensor:
    alpha: float = attributes.get("alpha", 1.0)
    beta: float = attributes.get("beta", 1.0)
    if attributes.get("transA", 0):
        a = a.T
    product = F.linear(a, b) if attributes.get("transB", 0) else torch.matmul(a, b)
    product = product if alpha == 1 else alpha * product
    if c is not None:
        product = product + (c if beta == 1 else beta * c)
    return product


@operator("Einsum")
def _einsum(attributes: Attributes, *tensors: Tensor) -> Tensor:
    return torch.einsum(attributes["equation"], *tensors)


def _padded(
    attributes: Attributes, x: Tensor, size: Sequence[int], value: float = 0.0
) -> tuple[Tensor, list[int]]:
    """The input, and what is left for the operator to pad, the same on both sides."""
    dims = len(size)
    auto = attributes.get("auto_pad", "NOTSET")
    pads = list(attributes.get("pads", [0] * (2 * dims)))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        strides = attributes.get("strides", [1] * dims)
        apart = attributes.get("dilations", [1] * dims)
        whole = [
            max(0, (-(-n // s) - 1) * s + a * (k - 1) + 1 - n)
            for n, k, s, a in zip(x.shape[2:], size, strides, apart, strict=True)
        ]
        less, more = [w // 2 for w in whole], [w - w // 2 for w in whole]
        pads = less + more if auto == "SAME_UPPER" else more + less
    before, after = pads[:dims], pads[dims:]
    if before == after:
        return x, before
    around = [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair]
    return F.pad(x, around, value=value), [0] * dims


@operator("Conv")
def _conv(attributes: Attributes, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    dims = weight.ndim - 2
    x, padding = _padded(attributes, x, weight.shape[2:])
    return (F.conv1d, F.conv2d, F.conv3d)[dims - 1](
        x,
        weight,
        bias,
        attributes.get("strides", [1] * dims),
        padding,
        attributes.get("dilations", [1] * dims),
        x.shape[1] // weight.shape[1],  # and not the attribute, as whole groups may go
    )


@operator("ConvTranspose")
def _conv_transpose(attributes: Attributes, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    dims = weight.ndim - 2
    pads = list(attributes.get("pads", [0] * (2 * dims)))
    auto = attributes.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in attributes
    if auto or pads[:dims] != pads[dims:]:
        raise InputError("a transposed convolution is padded otherwise than the same on both sides")
    return (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1](
        x,
        weight,
        bias,
        attributes.get("strides", [1] * dims),
        pads[:dims],
        attributes.get("output_padding", [0] * dims),
        attributes.get("group", 1),
        attributes.get("dilations", [1] * dims),
    )


# ------------------------------------------------------------------ pools, norms, means
@operator("MaxPool")
def _max_pool(attributes: Attributes, x: Tensor) -> Tensor:
    size = attributes["kernel_shape"]
    x, padding = _padded(attributes, x, size, -torch.inf)
    pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(size) - 1]
    return pool(  # type: ignore[no-any-return]
        x,
        size,
        attributes.get("strides", [1] * len(size)),
        padding,
        attributes.get("dilations", [1] * len(size)),
        bool(attributes.get("ceil_mode", 0)),
    )


@operator("AveragePool")
def _average_pool(attributes: Attributes, x: Tensor) -> Tensor:
    size, counted = attributes["kernel_shape"], bool(attributes.get("count_include_pad", 0))
    padded, padding = _padded(attributes, x, size)
    if padded is not x and not counted:
        raise InputError("an average leaves out padding that is not the same on both sides")
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(size) - 1]
    strides = attributes.get("strides", [1] * len(size))
    return pool(  # type: ignore[no-any-return]
        padded, size, strides, padding, bool(attributes.get("ceil_mode", 0)), counted
    )


@operator("GlobalAveragePool")
def _global_average(attributes: Attributes, x: Tensor) -> Tensor:
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max(attributes: Attributes, x: Tensor) -> Tensor:
    return x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("BatchNormalization")
def _batch_norm(
    attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, attributes.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=weight, bias=bias, eps=attributes.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(attributes: Attributes, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    axis = attributes.get("axis", -1) % x.ndim
    return F.layer_norm(x, x.shape[axis:], weight, bias, attributes.get("epsilon", 1e-5))


@operator("RMSNormalization")
def _rms_norm(attributes: Attributes, x: Tensor, weight: Tensor) -> Tensor:
    axis = attributes.get("axis", -1) % x.ndim
    return F.rms_norm(x, x.shape[axis:], weight, attributes.get("epsilon", 1e-5))


@operator("Softmax")
def _softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.softmax(x, attributes.get("axis", -1))


@operator("LogSoftmax")
def _log_softmax(attributes: Attributes, x: Tensor) -> Tensor:
    return torch.log_softmax(x, attributes.get("axis", -1))


def _reduced(function: Callable[..., Tensor]) -> Operator:
    def reduce(attributes: Attributes, x: Tensor, axes: Any = None) -> Tensor:
        given = numbers(axes) if axes is not None else attributes.get("axes")
        if not given:
            if attributes.get("noop_with_empty_axes", 0):
                return x
            given = range(x.ndim)
        return function(x, tuple(given), keepdim=bool(attributes.get("keepdims", 1)))

    return reduce


OPERATORS |= {
    "ReduceMax": _reduced(torch.amax),
    "ReduceMean": _reduced(torch.mean),
    "ReduceMin": _reduced(torch.amin),
    "ReduceSum": _reduced(torch.sum),
    "ReduceL2": _reduced(lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim).sqrt()),
}


# ------------------------------------------------------------------ what moves numbers about
@operator("Concat")
def _concat(attributes: Attributes, *parts: Tensor) -> Tensor:
    return torch.cat(parts, attributes["axis"])


@operator("Transpose")
def _transpose(attributes: Attributes, x: Tensor) -> Tensor:
    return x.permute(attributes.get("perm", list(reversed(range(x.ndim)))))


@operator("Flatten")
def _flatten(attributes: Attributes, x: Tensor) -> Tensor:
    axis = attributes.get("axis", 1)
    axis = axis % x.ndim if axis < 0 else axis
    return x.flatten(1) if axis == 1 else x.reshape(int(np.prod(x.shape[:axis])), -1)


@operator("Squeeze")
def _squeeze(attributes: Attributes, x: Tensor, axes: Any = None) -> Tensor:
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(numbers(axes)))


@operator("Unsqueeze")
def _unsqueeze(attributes: Attributes, x: Tensor, axes: Any) -> Tensor:
    rank = x.ndim + len(numbers(axes))
    for axis in sorted(axis % rank for axis in numbers(axes)):
        x = x.unsqueeze(axis)
    return x


@operator("Gather")
def _gather(attributes: Attributes, x: Tensor, index: Any) -> Tensor:
    axis = attributes.get("axis", 0) % x.ndim
    if isinstance(index, Tensor):
        if axis == 0 and x.ndim == 2 and index.dtype == torch.int64:
            return F.embedding(index, x)
        found = x.index_select(axis, (index % x.shape[axis]).flatten())
        return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])
    if np.ndim(index) == 0:
        return x.select(axis, int(index))
    if axis == 0 and x.ndim == 2:
        return F.embedding(torch.from_numpy(np.array(index, dtype=np.int64)), x)
    places = torch.from_numpy(np.array(index, dtype=np.int64) % x.shape[axis])
    found = x.index_select(axis, places.flatten())
    return found.reshape(*x.shape[:axis], *places.shape, *x.shape[axis + 1 :])


@operator("Pad")
def _pad(attributes: Attributes, x: Tensor, pads: Any, value: Any = None, axes: Any = None) -> Any:
    given = numbers(pads)
    half = len(given) // 2
    around = {
        axis % x.ndim: (given[i], given[half + i])
        for i, axis in enumerate(range(x.ndim) if axes is None else numbers(axes))
    }
    flat = [n for axis in reversed(range(x.ndim)) for n in around.get(axis, (0, 0))]
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    mode = attributes.get("mode", "constant")
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else numbers(value)[0])
    return F.pad(x, flat, mode={"edge": "replicate", "reflect": "reflect"}[mode])


@operator("Resize")
def _resize(
    attributes: Attributes, x: Tensor, roi: Any = None, scales: Any = None, sizes: Any = None
) -> Tensor:
    mode, where = (
        attributes.get(key, default)
        for key, default in (
            ("mode", "nearest"),
            ("coordinate_transformation_mode", "half_pixel"),
        )
    )
    given = numbers(sizes) if sizes is not None else []
    size = given[2:] or [int(n * s) for n, s in zip(x.shape, numbers(scales), strict=True)][2:]
    if mode == "nearest" and all(s % n == 0 for n, s in zip(x.shape[2:], size, strict=True)):
        return F.interpolate(x, size, mode="nearest")
    if mode == "linear" and x.ndim == 4 and where in ("half_pixel", "align_corners"):
        return F.interpolate(x, size, mode="bilinear", align_corners=where == "align_corners")
    raise InputError(f"images are resized by '{mode}' with '{where}'")


@operator("DepthToSpace")
def _depth_to_space(attributes: Attributes, x: Tensor) -> Tensor:
    if attributes.get("mode", "DCR") != "CRD":
        raise InputError("DepthToSpace goes by mode DCR")
    return F.pixel_shuffle(x, attributes["blocksize"])
