"""What a plan takes out of a model, in numbers and on a page: smaller? faster? where does it load?

    report = Report.of("Wanda, 50 %", dims, plans, vocabulary=49_152, tied=True, bytes_per_weight=4)
    print(report); report.save("report.json"); report.to_html("report.html")

Three words are kept apart. What is *cut* is no longer stored: units and whole layers. *Zeros* are
what a mask sets to 0 in the matrices that stay; they are stored, read and multiplied like any other
number. Both together are *gone*, and a sparsity is the share that is gone.

Weights are those of the layers' seven matrices and of the embeddings, tied ones counted once. Norms
and the biases a model had are left out, under 0.1 % of it. FLOPs of a token are 2 for each stored
weight of the matrices and of the language-model head, without experts that a token does not go
through; attention's own products, which grow with the context, are not counted. Routers are left
out as norms are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from model_prune.core.plan import LayerPlan
from model_prune.core.target import MATRICES, UNITS, Dims, Family, place_of
from model_prune.core.units import kept_weights
from model_prune.evaluate import Perplexity, compare
from model_prune.graph.cut import dims_after
from prune_core.errors import InputError
from prune_core.page import write_page
from prune_core.storage import StrPath, write_json

ATTENTION, FFN = MATRICES[:4], MATRICES[4:]


@dataclass(frozen=True)
class LayerReport:
    """One decoder layer, before and after.

    after: None for a layer that is removed.
    zeros: masked weights by matrix, of those that are still stored.
    biases: numbers in biases that the plan adds.
    """

    before: Dims
    after: Dims | None
    zeros: dict[str, int]
    biases: int = 0

    @classmethod
    def of(cls, dims: Dims, plan: LayerPlan) -> LayerReport:
        """Raises InputError for units or masks that the layer does not have, and for none left."""
        if plan.removed:
            return cls(dims, None, {})
        after = dims_after(dims, plan)
        zeros = {
            name: _size(after, name) - int(kept_weights(plan, dims, name).sum())
            for name in plan.masks
        }
        return cls(dims, after, zeros, sum(bias.numel() for bias in plan.biases.values()))

    def weights(self, matrices: Iterable[str] = MATRICES) -> int:
        """Of the dense layer."""
        return sum(_size(self.before, name) for name in matrices)

    def stored(self, matrices: Iterable[str] = MATRICES) -> int:
        """What is left of them, zeros included."""
        return sum(_size(self.after, name) for name in matrices) if self.after else 0

    def gone(self, matrices: Iterable[str] = MATRICES) -> int:
        """Cut or zero."""
        names = tuple(matrices)
        zeros = sum(self.zeros.get(name, 0) for name in names)
        return self.weights(names) - self.stored(names) + zeros

    def share(self, matrices: Iterable[str] = MATRICES) -> float:
        """Of the dense weights, the part that is gone."""
        names = tuple(matrices)
        return self.gone(names) / self.weights(names)


@dataclass(frozen=True)
class TextReport:
    """Perplexity on one text before and after; low and high: the 95 % interval of the ratio."""

    before: float
    after: float
    bits_per_byte: tuple[float, float]
    ratio: float
    low: float
    high: float
    windows: int
    tokens: int

    @classmethod
    def of(cls, before: Perplexity, after: Perplexity) -> TextReport:
        """Raises InputError, as `compare`, if they were not measured alike."""
        found = compare(before, after)
        return cls(
            before.value,
            after.value,
            (before.bits_per_byte, after.bits_per_byte),
            found.ratio,
            found.low,
            found.high,
            found.windows,
            before.protocol.tokens,
        )


@dataclass(frozen=True)
class Report:
    """A pruned model in numbers; all else follows from these.

    target: names ("layers.3.mlp.down_proj") of the matrices that were to be pruned; None for all.
    perplexity: by the text's name.
    seconds: by phase, in order.
    """

    title: str
    layers: tuple[LayerReport, ...]
    vocabulary: int
    tied: bool
    bytes_per_weight: float
    target: tuple[str, ...] | None = None
    perplexity: dict[str, TextReport] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        title: str,
        dims: Sequence[Dims],
        plans: Sequence[LayerPlan],
        *,
        vocabulary: int,
        tied: bool,
        bytes_per_weight: float,
        target: Sequence[str] | None = None,
        perplexity: Mapping[str, tuple[Perplexity, Perplexity]] | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> Report:
        """Count what each plan takes from its layer; no model is needed.

        dims, plans: one for each layer of the dense model.
        vocabulary: rows of the embedding; tied: whether the head shares them.
        target: as `model_prune.core.target.matching` gives it; None for all matrices.
        perplexity: (before, after) by the text's name.

        Raises InputError if plans and layers do not belong together, for an unknown target, and
        for perplexities that were not measured alike.
        """
        if not dims or len(dims) != len(plans):
            raise InputError(
                f"A report needs a plan for each layer, got {len(plans)} plans for {len(dims)} "
                f"layers."
            )
        known = {f"layers.{i}.{name}" for i in range(len(dims)) for name in MATRICES}
        if target is not None and (not target or not known.issuperset(target)):
            wrong = sorted(set(target) - known)
            raise InputError(
                f"The target must name matrices of the {len(dims)} layers, got "
                f"{wrong[0] if wrong else 'none'!r}: pass what core.target.matching returns."
            )
        return cls(
            title,
            tuple(LayerReport.of(*pair) for pair in zip(dims, plans, strict=True)),
            vocabulary,
            tied,
            bytes_per_weight,
            None if target is None else tuple(target),
            {name: TextReport.of(*pair) for name, pair in (perplexity or {}).items()},
            dict(seconds or {}),
        )

    # ------------------------------------------------------------------ what follows
    @property
    def embeddings(self) -> int:
        """Weights of the embedding and, unless it is tied, of the head."""
        return self._head * (1 if self.tied else 2)

    @property
    def _head(self) -> int:
        return self.vocabulary * self.layers[0].before.hidden

    @property
    def zeros(self) -> int:
        """Masked weights that are stored."""
        return sum(sum(layer.zeros.values()) for layer in self.layers)

    @property
    def weights(self) -> tuple[int, int]:
        """Stored weights before and after, with zeros and biases that were added."""
        before = sum(layer.weights() for layer in self.layers)
        after = sum(layer.stored() + layer.biases for layer in self.layers)
        return before + self.embeddings, after + self.embeddings

    @property
    def size(self) -> tuple[float, float]:
        """Bytes of the file, and of the weights in memory, before and after."""
        before, after = self.weights
        return before * self.bytes_per_weight, after * self.bytes_per_weight

    @property
    def flops(self) -> tuple[int, int]:
        """Of one token, before and after: 2 x weights of matrices and head, zeros included."""
        before = sum(layer.weights() - layer.before.idle for layer in self.layers)
        after = sum(layer.stored() - layer.after.idle for layer in self.layers if layer.after)
        return 2 * (before + self._head), 2 * (after + self._head)

    @property
    def cache(self) -> tuple[float, float]:
        """Bytes of one token in the KV cache before and after, at the weights' bytes a number."""
        before = [layer.before for layer in self.layers]
        after = [layer.after for layer in self.layers if layer.after]
        one, other = (sum(2 * d.kv_groups * d.head_dim for d in sizes) for sizes in (before, after))
        return one * self.bytes_per_weight, other * self.bytes_per_weight

    @property
    def sparsity(self) -> dict[str, float]:
        """Share that is gone: of the target, of the decoder layers, of the whole model."""
        layers = [(layer.gone(), layer.weights()) for layer in self.layers]
        target = layers
        if self.target is not None:
            named = [place_of(name) for name in self.target]
            target = [(self.layers[i].gone([m]), self.layers[i].weights([m])) for i, m in named]
        gone, weights = _sums(layers)
        gone_of_target, of_target = _sums(target)
        return {
            "target": gone_of_target / of_target,
            "layers": gone / weights,
            "model": gone / (weights + self.embeddings),
        }

    @property
    def answers(self) -> dict[str, str]:
        """To the three questions that a pruned model is asked."""
        return {
            "Smaller?": self._smaller(),
            "Faster?": self._faster(),
            "Where does it load?": self._loads(),
        }

    @property
    def _is_cut(self) -> bool:
        return any(layer.after != layer.before for layer in self.layers)

    def _smaller(self) -> str:
        (before, after), (cache, cache_after) = self.size, self.cache
        if after == before:
            text = f"No: the file, and the weights in memory, stay at {_bytes(before)}."
        else:
            verdict = "Yes" if after < before else "No"
            text = (
                f"{verdict}: the file, and the weights in memory, go from {_bytes(before)} to "
                f"{_bytes(after)} ({_change(before, after)})."
            )
        if cache_after != cache:
            text += f" So does a token's KV cache, from {_bytes(cache)} to {_bytes(cache_after)}."
        if self.zeros:
            share = self.zeros / self.weights[1]
            text += (
                f" The {self.zeros:,} zeros, {_percent(share)} of what is stored, save nothing in "
                f"a dense file."
            )
        return text

    def _faster(self) -> str:
        before, after = self.flops
        if after < before:
            text = (
                f"Yes, {before / after:.2f} times at best: dense kernels do less for a token, "
                f"{_flops(after)} in place of {_flops(before)}, and read fewer weights."
            )
        else:
            text = "No: dense kernels do as much for a token as before."
        if self.zeros:
            text += (
                " Zeros bring no speed: they are multiplied too, and vLLM has no sparse kernels."
            )
        return text

    def _loads(self) -> str:
        left = [layer.after for layer in self.layers if layer.after]
        own = "Only with prunekit installed, as its own model class (per_layer_config):"
        if any(layer.biases for layer in self.layers):
            return (
                f"{own} biases were added to o_proj or down_proj, which stock classes lack unless "
                f"the dense model had them."
            )
        if not self._is_cut:
            return "Wherever the dense model does: all shapes are as before."
        if not left:
            return "Nowhere: no layer is left."
        if any(one.experts for one in left):
            return "In stock transformers and vLLM, as a mixture of fewer experts."
        if len(set(left)) > 1:
            return f"{own} layers differ in size, and stock classes build all alike."
        one = left[0]
        if one.hidden % one.heads:
            return (
                f"{own} a stock Llama refuses {one.heads} heads at a hidden size of {one.hidden}, "
                f"which they must divide."
            )
        text = "In stock transformers and vLLM, as all layers are alike"
        if one.kv_groups < max(layer.before.kv_groups for layer in self.layers):
            return f"{text}; but a Qwen2 that lost heads needs prunekit's class."
        return f"{text}."

    # ------------------------------------------------------------------ to keep and to show
    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it: what it was made of, then what follows from that."""
        follows = ("weights", "size", "flops", "cache", "sparsity", "zeros", "answers")
        return asdict(self) | {"follows": {name: getattr(self, name) for name in follows}}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Report:
        """What `to_dict` gave; raises InputError for something else."""
        try:
            given = {key: value for key, value in stored.items() if key != "follows"}
            given["layers"] = tuple(
                LayerReport(
                    Dims(**layer["before"]),
                    layer["after"] and Dims(**layer["after"]),
                    layer["zeros"],
                    layer["biases"],
                )
                for layer in given["layers"]
            )
            given["perplexity"] = {
                name: TextReport(**text | {"bits_per_byte": tuple(text["bits_per_byte"])})
                for name, text in given["perplexity"].items()
            }
            given["target"] = given["target"] and tuple(given["target"])
            return cls(**given)
        except (AttributeError, KeyError, TypeError) as error:
            raise InputError(
                f"This is no stored report ({error!r}): give what Report.to_dict made."
            ) from error

    def save(self, path: StrPath) -> None:
        """Write it as JSON, whole or not at all; `Report.load` reads it."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: StrPath) -> Report:
        """Read what `save` wrote; raises InputError for a file that is something else."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"Cannot read a report from '{path}' ({error}): give a file that Report.save wrote."
            ) from error
        return cls.from_dict(stored)

    def __str__(self) -> str:
        lines = [self.title, "", "layer  groups     neurons zeros % gone %"]
        for i, layer in enumerate(self.layers):
            if layer.after is None:
                lines.append(f"{i:>5} {'removed':>34}")
                continue
            groups, neurons = _units(layer)
            zeros = sum(layer.zeros.values()) / max(layer.stored(), 1)
            lines.append(
                f"{i:>5} {groups:>7} {neurons:>11} {100 * zeros:>7.1f} {100 * layer.share():>6.1f}"
            )
        lines += ["", self.sparsity_text, ""]
        rows = self.totals
        lines += [f"{name}: {before} -> {after} ({change})" for name, before, after, change in rows]
        for name, text in self.perplexity.items():
            lines.append(
                f"perplexity, {name}: {text.before:.2f} -> {text.after:.2f} ({text.ratio:.3f} "
                f"times; 95 %: {text.low:.3f} to {text.high:.3f}; {text.windows} windows)"
            )
        if self.seconds:
            times = ", ".join(f"{phase} {s:.1f} s" for phase, s in self.seconds.items())
            lines.append(f"time: {times}")
        lines += ["", *(f"{question} {answer}" for question, answer in self.answers.items())]
        return "\n".join(lines)

    @property
    def sparsity_text(self) -> str:
        """The three sparsities, which are never told apart from each other."""
        of = self.sparsity
        return (
            f"Gone: {_percent(of['target'])} of the target, {_percent(of['layers'])} of the "
            f"decoder layers, {_percent(of['model'])} of the whole model."
        )

    @property
    def totals(self) -> list[tuple[str, str, str, str]]:
        """Rows of (what, before, after, change)."""
        return [
            (name, shown(before), shown(after), _change(before, after))
            for name, shown, (before, after) in (
                ("weights stored", "{:,}".format, self.weights),
                ("file, weights in memory", _bytes, self.size),
                ("work for a token", _flops, self.flops),
                ("KV cache of a token", _bytes, self.cache),
            )
        ]

    def to_html(self, path: StrPath) -> None:
        """Write one page: answers, totals, a heat map of the layers, tables; see `write_page`."""
        parts = {"attention": ATTENTION, "FFN": FFN}
        if self.zeros:  # with units alone, all matrices of a part lose the same share
            parts = {name.split(".")[1].removesuffix("_proj"): (name,) for name in MATRICES}
        columns = [
            (layer, [_cell(layer.share(names)) for names in parts.values()], _units(layer))
            for layer in self.layers
        ]
        write_page(
            path,
            Path(__file__).with_name("report.html.j2"),
            title=self.title,
            report=self,
            parts=parts,
            columns=columns,
        )


def _size(dims: Dims | None, matrix: str) -> int:
    if dims is None:
        return 0
    out, columns = dims.shape(matrix)
    return out * columns


def _sums(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def _units(layer: LayerReport) -> list[str]:
    """KV groups, and neurons or experts, as "kept/all"."""
    if layer.before.experts:
        return [_kept(layer, "kv_group"), f"{_kept(layer, 'expert')} experts"]
    return [_kept(layer, family) for family in UNITS]


def _kept(layer: LayerReport, family: Family) -> str:
    kept = layer.after.count(family) if layer.after else 0
    return f"{kept}/{layer.before.count(family)}"


def _cell(share: float) -> tuple[str, int]:
    """What the heat map shows: percent, and a colour, 0 to 10. Ends only for nothing and all."""
    if share in (0, 1):
        return f"{100 * share:.0f}", round(10 * share)
    percent = f"{100 * share:.0f}"
    return {"0": "<1", "100": ">99"}.get(percent, percent), min(9, max(1, round(10 * share)))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _bytes(count: float) -> str:
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def _flops(count: float) -> str:
    return _scaled(count, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def _scaled(count: float, units: Sequence[str]) -> str:
    for unit in units[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == units[0] else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {units[-1]}"


def _change(before: float, after: float) -> str:
    if after == before:
        return "no change"
    return f"{'−' if after < before else '+'}{_percent(abs(after / before - 1))}"
