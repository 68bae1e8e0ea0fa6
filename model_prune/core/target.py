"""What may be pruned: decoder-only models of the Llama form, their matrices and their units.

A layer reads four inputs, and every matrix belongs to the one that it reads:

    attn_in   the normed residual stream           q_proj, k_proj, v_proj
    attn_out  the heads' outputs, side by side     o_proj
    mlp_in    the normed residual stream           gate_proj, up_proj
    mlp_mid   act(gate) * up                       down_proj

Statistics of calibration belong to these inputs ("sites"), so matrices that share one share them.

Two kinds of units can be cut out of a layer. A `neuron` is row j of gate and up and column j of
down. A `kv_group` is one key head, its value head and the query heads that read them, with their
columns of o: cutting less than a whole group would leave heads without their keys.

In a mixture of experts a layer has many FFNs, of which a router chooses some for each token, and
the unit is the `expert`. Its gate, up and down are counted as if they stood side by side: an expert
is so many rows of gate and up and columns of down; those of a shared expert come last, and stay.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prune_core.errors import InputError, did_you_mean

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # by their config's model_type
# Mixtures of experts: the field of their config that says how many a layer has.
EXPERTS = {
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_experts",
    "olmoe": "num_experts",
}
MIXTURES = tuple(EXPERTS)
PRUNED = "pruned_"  # before the model_type of a checkpoint whose layers differ: see decoders.py

SITES: dict[str, tuple[str, ...]] = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn_out": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp_mid": ("mlp.down_proj",),
}
MATRICES = tuple(name for names in SITES.values() for name in names)

Family = Literal["kv_group", "neuron", "expert"]
UNITS: tuple[Family, ...] = ("kv_group", "neuron")  # of a layer that is no mixture


@dataclass(frozen=True)
class Dims:
    """The sizes of one decoder layer.

    neurons: of the FFN, or of each expert.   experts: 0 where there is one FFN and no router.
    active: experts that a token goes through.   shared: neurons that all tokens go through.
    """

    hidden: int
    heads: int
    kv_groups: int
    head_dim: int
    neurons: int
    experts: int = 0
    active: int = 0
    shared: int = 0

    @classmethod
    def of(cls, config: Any, layer: int) -> Dims:
        """Of layer `layer`, by a config of transformers, whether its layers differ or not."""
        own = config.per_layer_config[layer] if config.is_heterogeneous else config
        size = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        sizes = (own.hidden_size, own.num_attention_heads, own.num_key_value_heads, int(size))
        if not _is_mixture(config, layer):
            return cls(*sizes, own.intermediate_size)
        return cls(
            *sizes,
            getattr(config, "moe_intermediate_size", config.intermediate_size),
            getattr(config, EXPERTS[config.model_type]),
            config.num_experts_per_tok,
            getattr(config, "shared_expert_intermediate_size", 0),
        )

    @property
    def group(self) -> int:
        """Query heads of one KV group."""
        return self.heads // self.kv_groups

    @property
    def units(self) -> tuple[Family, ...]:
        """The kinds of units that can be cut out of the layer."""
        return ("expert",) if self.experts else UNITS

    @property
    def width(self) -> int:
        """Rows of gate and of up, columns of down: the neurons of all experts."""
        return self.neurons * (self.experts or 1) + self.shared

    def count(self, family: Family) -> int:
        """Units of one family in the layer."""
        if family == "expert":
            return self.experts
        return self.kv_groups if family == "kv_group" else self.width

    def cost(self, family: Family) -> int:
        """Weights that one unit holds; biases, and an expert's row of the router, do not count."""
        if family == "kv_group":
            return (2 * self.group + 2) * self.head_dim * self.hidden
        return 3 * self.hidden * (self.neurons if family == "expert" else 1)

    @property
    def weights(self) -> int:
        """Weights of the layer's seven matrices."""
        return sum(self.count(family) * self.cost(family) for family in UNITS)

    @property
    def idle(self) -> int:
        """Those of them that a token does not meet: of experts that are not chosen for it."""
        return (self.experts - self.active) * self.cost("expert")

    def shape(self, matrix: str) -> tuple[int, int]:
        """(out, in) of one of MATRICES."""
        queries, keys = self.heads * self.head_dim, self.kv_groups * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.width, self.hidden),
            "mlp.up_proj": (self.width, self.hidden),
            "mlp.down_proj": (self.hidden, self.width),
        }[matrix]


def _is_mixture(config: Any, layer: int) -> bool:
    """By the rule of Qwen's mixtures, some of whose layers may have one FFN."""
    if config.model_type not in MIXTURES:
        return False
    every = getattr(config, "decoder_sparse_step", 1)
    return layer not in getattr(config, "mlp_only_layers", ()) and (layer + 1) % every == 0


def family_of(config: Any) -> str:
    """The one of FAMILIES or MIXTURES that a config is of, pruned or not.

    Raises InputError for an architecture that cannot be pruned, and for a quantised model.
    """
    kind = str(config.model_type)
    if kind.removeprefix(PRUNED) not in FAMILIES and kind not in MIXTURES:
        raise InputError(
            f"Models of type '{kind}' cannot be pruned yet: layers must have the form of Llama's. "
            f"{did_you_mean(kind, FAMILIES + MIXTURES)}"
        )
    if getattr(config, "quantization_config", None):
        raise InputError(
            "The model is quantised, and pruning reads and writes real weights: give the "
            "checkpoint it was quantised from, and quantise what comes out."
        )
    return kind.removeprefix(PRUNED)


def place_of(name: str) -> tuple[int, str]:
    """The layer and the matrix of a name like "layers.3.mlp.down_proj"."""
    _, layer, matrix = name.split(".", 2)
    return int(layer), matrix


def matching(patterns: Sequence[str] | None, layers: int) -> list[str]:
    """Names like "layers.3.mlp.down_proj" of the matrices that a pattern matches; None: all.

    A pattern is a name or a glob over it, and may leave out what stands before: "mlp.*",
    "down_proj", "layers.1?.self_attn.*".

    Raises InputError for a pattern that matches nothing, with the closest names.
    """
    names = [f"layers.{i}.{matrix}" for i in range(layers) for matrix in MATRICES]
    if patterns is None:
        return names
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if any(fnmatch.fnmatchcase(p, pattern) for p in _endings(n))}
        if not hits:
            endings = {ending for name in names for ending in _endings(name)}
            raise InputError(
                f"The target '{pattern}' matches none of the model's {len(names)} matrices. "
                f"{did_you_mean(pattern, _shortest(endings))}"
            )
        found |= hits
    return [name for name in names if name in found]


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _shortest(endings: Iterable[str]) -> set[str]:
    """Without a layer's number, as a list of thousands helps nobody."""
    return {ending for ending in endings if not any(p.isdigit() for p in ending.split("."))}
