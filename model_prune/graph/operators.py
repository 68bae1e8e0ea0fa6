"""What operators say of channels: a rule a kind, by the names that torch.export gives them.

A rule takes the trace, the shape of what comes out and the operator's arguments, tensors among them
as `Traced`, and gives what comes out as `Traced`. What an operator without a rule reads stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from model_prune.graph.channels import Labels, Trace, Traced

Shape = tuple[int, ...]
Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
# Which only move numbers about: see Trace.moved.
MOVES = {
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"),
    *("permute", "transpose", "swapaxes", "movedim", "t", "expand", "repeat", "flip", "roll"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "slice", "select", "narrow"),
    *("pixel_shuffle", "pixel_unshuffle"),
}
# Which give what they are given.
COPIES = {
    *("clone", "contiguous", "detach", "alias", "to", "type_as", "_to_copy"),
    *("dropout", "feature_dropout", "lift_fresh_copy"),
}
# Of which any part does as well, such as the first state of a cell.
CONSTANTS = {
    *("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_full"),
}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Of operators that behave alike."""

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


@rule("cat", "concat", "concatenate")
def _joined(trace: Trace, shape: Shape, parts: Sequence[Traced], dim: int = 0) -> Traced:
    at = dim % len(shape)
    labels = trace.pointwise([_without(part, at) for part in parts], _removed(shape, at)).labels
    own = [part.labels[at] for part in parts]
    joined: Labels = None
    if any(labels is not None for labels in own):  # what has none stays, beside what may go
        sizes = (part.shape[at] for part in parts)
        joined = np.concatenate(
            [
                np.zeros(n, dtype=np.int64) if one is None else one
                for one, n in zip(own, sizes, strict=True)
            ]
        )
    return Traced(shape, [*labels[:at], joined, *labels[at:]])


@rule("stack")
def _stacked(trace: Trace, shape: Shape, parts: Sequence[Traced], dim: int = 0) -> Traced:
    at = dim % len(shape)
    labels = trace.pointwise(parts, _removed(shape, at)).labels
    return Traced(shape, [*labels[:at], None, *labels[at:]])


def _removed(shape: Sequence[Any], at: int) -> tuple[Any, ...]:
    return (*shape[:at], *shape[at + 1 :])


def _without(x: Traced, at: int) -> Traced:
    return Traced(_removed(x.shape, at), list(_removed(x.labels, at)))


@rule("pad", "constant_pad_nd")
def _padded(
    trace: Trace, shape: Shape, x: Traced, pad: Sequence[int], *_: Any, **__: Any
) -> Traced:
    labels = list(x.labels)
    for k in range(len(pad) // 2):
        own, before, after = labels[-1 - k], pad[2 * k], pad[2 * k + 1]
        if own is None or not (before or after):
            continue
        if min(before, after) < 0:
            trace.stay(own)
            labels[-1 - k] = None
        else:  # the padding stays: nobody's weights make it
            labels[-1 - k] = np.pad(own, (before, after))
    return Traced(shape, labels)


# ------------------------------------------------------------------ products
@rule("linear")
def _linear(
    trace: Trace, shape: Shape, x: Traced, weight: Traced, bias: Traced | None = None
) -> Traced:
    trace.same(x.labels[-1], weight.labels[1])
    written = weight.labels[0]
    if bias is not None:
        written = trace.same(written, bias.labels[0])
    return Traced(shape, [*x.labels[:-1], written])


@rule("matmul", "mm", "bmm")
def _product(trace: Trace, shape: Shape, a: Traced, b: Traced) -> Traced:
    if len(a.shape) < 2 or len(b.shape) < 2:
        return trace.opaque([a, b], shape)
    trace.same(a.labels[-1], b.labels[-2])
    batch = trace.pointwise(
        [Traced(x.shape[:-2], x.labels[:-2]) for x in (a, b)], shape[:-2]
    ).labels
    return Traced(shape, [*batch, a.labels[-2], b.labels[-1]])


@rule("addmm", "baddbmm")
def _product_and_sum(
    trace: Trace, shape: Shape, bias: Traced, a: Traced, b: Traced, **_: Any
) -> Traced:
    return trace.pointwise([bias, _product(trace, shape, a, b)], shape)


@rule("scaled_dot_product_attention")
def _attention(
    trace: Trace,
    shape: Shape,
    query: Traced,
    key: Traced,
    value: Traced,
    attn_mask: Traced | None = None,
    *_: Any,
    **__: Any,
) -> Traced:
    """Heads of keys and values may be fewer, each for as many neighbours among the queries'."""
    trace.same(query.labels[-1], key.labels[-1])
    for x in (key, value):
        trace.stay(x.labels[-2])
    heads = [query.labels[-3]]
    for x in (key, value):
        own, times = x.labels[-3], query.shape[-3] // x.shape[-3]
        heads.append(None if own is None else np.repeat(own, times))
    joined = trace.same(*heads) if query.shape[-3] > 1 else None
    if attn_mask is not None and len(attn_mask.shape) > 2 and attn_mask.shape[-3] > 1:
        joined = trace.same(joined, attn_mask.labels[-3])
    return Traced(shape, [*query.labels[:-3], joined, query.labels[-2], value.labels[-1]])


def _convolved(
    dims: tuple[int, int],
    trace: Trace,
    shape: Shape,
    x: Traced,
    weight: Traced,
    bias: Traced | None = None,
    *args: Any,
    groups: int = 1,
    **_: Any,
) -> Traced:
    """dims: those of the weight that is written, and that is read."""
    groups = args[3] if len(args) > 3 else groups
    if groups > 1 and dims == (1, 0):  # whose groups lie in the dimension that is read
        return trace.opaque([x, weight, bias], shape)
    written, read = (weight.labels[dim] for dim in dims)
    if bias is not None:
        written = trace.same(written, bias.labels[0])
    incoming = x.labels[1]
    if groups == 1:
        trace.same(incoming, read)
    else:  # a group goes whole, with what it reads; a depthwise convolution's is a channel
        trace.stay(read)
        if incoming is None or written is None:
            trace.same(incoming, written)
            trace.stay(incoming)
            trace.stay(written)
        else:
            for own in (incoming.reshape(groups, -1), written.reshape(groups, -1)):
                for column in own.T:
                    trace.same(written.reshape(groups, -1)[:, 0], column)
    for labels in (*x.labels[2:], *weight.labels[2:]):
        trace.stay(labels)
    return Traced(shape, [x.labels[0], written, *[None] * (len(shape) - 2)])


rule("conv1d", "conv2d", "conv3d")(partial(_convolved, (0, 1)))
rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")(partial(_convolved, (1, 0)))


@rule("embedding")
def _embedding(
    trace: Trace, shape: Shape, weight: Traced, ids: Traced, *_: Any, **__: Any
) -> Traced:
    trace.stay(weight.labels[0])
    return Traced(shape, [*[None] * (len(shape) - 1), weight.labels[1]])


@rule("where", "hardswish", "log_sigmoid", "fmod", "floor_divide")
def _of_positions(trace: Trace, shape: Shape, *inputs: Any, **_: Any) -> Traced:
    """Which torch does not call pointwise, and which are."""
    return trace.pointwise(inputs, shape)


@rule("prelu")
def _slopes(trace: Trace, shape: Shape, x: Traced, slopes: Traced) -> Traced:
    labels = list(x.labels)
    if slopes.shape[0] > 1:
        labels[1] = trace.same(labels[1], slopes.labels[0])
    return Traced(shape, labels)


@rule("glu")
def _gated(trace: Trace, shape: Shape, x: Traced, dim: int = -1) -> Traced:
    """The second half of a dimension gates the first."""
    labels = list(x.labels)
    own, half = labels[dim], shape[dim]
    labels[dim] = None if own is None else trace.same(own[:half], own[half:])
    return Traced(shape, labels)


@rule("index_select")
def _selected(trace: Trace, shape: Shape, x: Traced, dim: int, index: Traced) -> Traced:
    """Positions that are taken by their numbers stay."""
    labels = list(x.labels)
    trace.stay(labels[dim])
    labels[dim] = None
    return Traced(shape, labels)


@rule("einsum")
def _summed(trace: Trace, shape: Shape, said: str, tensors: Sequence[Traced], **_: Any) -> Traced:
    """Dimensions of one letter are one."""
    read, arrow, written = said.replace(" ", "").partition("->")
    letters = read.split(",")
    if not arrow or "." in said or any(len(set(one)) < len(one) for one in letters):
        return trace.opaque(tensors, shape)
    found: dict[str, list[Labels]] = {}
    for one, x in zip(letters, tensors, strict=True):
        for letter, labels, size in zip(one, x.labels, x.shape, strict=True):
            if size != 1:
                found.setdefault(letter, []).append(labels)
    joined = {letter: trace.same(*meet) for letter, meet in found.items()}
    return Traced(shape, [joined.get(letter) for letter in written])


# ------------------------------------------------------------------ cells
@rule("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(
    trace: Trace,
    shape: Any,
    x: Traced,
    state: Any,
    weight_ih: Traced,
    weight_hh: Traced,
    bias_ih: Traced | None = None,
    bias_hh: Traced | None = None,
) -> Any:
    """Every gate has a row for each position of the state."""
    states = state if isinstance(state, list | tuple) else [state]
    width = weight_hh.shape[1]
    trace.same(x.labels[-1], weight_ih.labels[1])
    kept = trace.same(*(one.labels[-1] for one in states), weight_hh.labels[1])
    for part in (weight_ih, weight_hh, bias_ih, bias_hh):
        if part is not None:
            own = part.labels[0]
            for gate in range(part.shape[0] // width):
                trace.same(kept, None if own is None else own[gate * width : (gate + 1) * width])
    batch = trace.pointwise(
        [Traced(one.shape[:-1], one.labels[:-1]) for one in states], states[0].shape[:-1]
    )
    out = Traced(tuple(states[0].shape), [*batch.labels, kept])
    return [out, out] if isinstance(state, list | tuple) else out


@rule("gru", "lstm", "rnn_tanh", "rnn_relu")
def _recurrent(
    trace: Trace,
    shape: Any,
    x: Traced,
    state: Any,
    weights: Any,
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool = False,
) -> Any:
    """Layers and directions have one width: a position of the state is that of all of them."""
    states = state if isinstance(state, list | tuple) else [state]
    directions = 2 if bidirectional else 1
    width = states[0].shape[-1]
    each = len(weights) // (layers * directions)
    sizes = [part.shape for part in weights]
    if each != (4 if has_biases else 2) or any(size[1] != width for size in sizes[1::each]):
        trace.opaque([x, *states, *weights], ())  # projections, or sequences that are packed
        return [Traced(tuple(value.shape), [None] * value.ndim) for value in shape]
    kept = trace.same(*(one.labels[-1] for one in states))
    read = x.labels[-1]
    for layer in range(layers):
        for direction in range(directions):
            at = (layer * directions + direction) * each
            trace.same(read, weights[at].labels[1])
            kept = trace.same(kept, weights[at + 1].labels[1])
            for part in weights[at : at + each]:
                rows = part.labels[0]
                for gate in range(part.shape[0] // width):
                    one = None if rows is None else rows[gate * width : (gate + 1) * width]
                    kept = trace.same(kept, one)
        read = None if kept is None else np.tile(kept, directions)
    for labels in (*x.labels[:-1], *(n for one in states for n in one.labels[:-1])):
        trace.stay(labels)
    outputs = [Traced(tuple(value.shape), [None, None, kept]) for value in shape]
    outputs[0].labels[-1] = read
    return outputs


# ------------------------------------------------------------------ norms, means, pools
@rule("batch_norm", "_native_batch_norm_legit_no_training")
def _batch_norm(trace: Trace, shape: Shape, x: Traced, *own: Any, **_: Any) -> Traced:
    parts = [part for part in own if isinstance(part, Traced)]
    labels = list(x.labels)
    labels[1] = trace.same(labels[1], *(part.labels[0] for part in parts))
    return Traced(shape, labels)


@rule("instance_norm")
def _instance_norm(trace: Trace, shape: Shape, x: Traced, *own: Any, **_: Any) -> Traced:
    return _norm_of_groups(trace, shape, x, x.shape[1], own)


@rule("group_norm")
def _group_norm(trace: Trace, shape: Shape, x: Traced, groups: int, *own: Any, **_: Any) -> Traced:
    return _norm_of_groups(trace, shape, x, groups, own)


def _norm_of_groups(
    trace: Trace, shape: Shape, x: Traced, groups: int, own: Sequence[Any]
) -> Traced:
    """A group goes whole, as its channels are averaged over."""
    joined = trace.same(x.labels[1], *(p.labels[0] for p in own if isinstance(p, Traced)))
    if joined is not None:
        rows = joined.reshape(groups, -1)
        for column in rows.T[1:]:
            trace.same(rows[:, 0], column)
    for labels in x.labels[2:]:
        trace.stay(labels)
    return Traced(shape, [x.labels[0], joined, *[None] * (len(shape) - 2)])


@rule("layer_norm", "rms_norm")
def _layer_norm(
    trace: Trace, shape: Shape, x: Traced, normalised: Sequence[int], *own: Any, **_: Any
) -> Traced:
    """All channels of a token are averaged over, so all stay."""
    inner = len(shape) - len(normalised)
    for part in own:
        if isinstance(part, Traced):
            trace.opaque([part], part.shape)
    for labels in x.labels[inner:]:
        trace.stay(labels)
    return Traced(shape, [*x.labels[:inner], *[None] * len(normalised)])


@rule("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum")
def _softmax(trace: Trace, shape: Shape, x: Traced, dim: int, *_: Any, **__: Any) -> Traced:
    labels = list(x.labels)
    trace.stay(labels[dim])
    labels[dim] = None
    return Traced(shape, labels)


@rule("mean", "sum", "amax", "amin", "var", "std")
def _reduced(
    trace: Trace,
    shape: Shape,
    x: Traced,
    dim: Any = None,
    keepdim: bool = False,
    *_: Any,
    **__: Any,
) -> Traced:
    """A mean over channels counts them, so they stay."""
    every = range(len(x.shape))
    given = [dim] if isinstance(dim, int) else dim or every
    gone = [d % len(x.shape) for d in given]
    labels: list[Labels] = []
    for i in every:
        if i in gone:
            trace.stay(x.labels[i])
            labels += [None] if keepdim else []
        else:
            labels.append(x.labels[i])
    return Traced(shape, labels)


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d",
      "upsample_nearest2d", "upsample_bilinear2d")  # fmt: skip
def _pooled(trace: Trace, shape: Shape, x: Traced, *_: Any, **__: Any) -> Traced:
    spatial = min(2, len(shape) - 1)
    for labels in x.labels[spatial:]:
        trace.stay(labels)
    return Traced(shape, [*x.labels[:spatial], *[None] * (len(shape) - spatial)])
