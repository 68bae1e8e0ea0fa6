"""Decoders whose layers differ, in transformers: `PrunedLlamaForCausalLM` and its kin.

A pruned checkpoint is a plain folder. What differs between its layers stands in transformers' own
field `per_layer_config`, a sparse map from a layer's index to the attributes that are not the
global ones. transformers 5.19 parses, saves and guards that field and sizes its caches by it, but
the Llama-like families do not build their layers from it yet; the subclasses here do. Importing
this module makes the Auto classes know them. Parameters have the stock classes' names.

    PrunedLlamaConfig, PrunedLlamaModel, PrunedLlamaForCausalLM; so of Mistral, Qwen2 and Qwen3

Their `output_bias` says that o_proj and down_proj of every layer have a bias, which not every
family can have of itself.

Mixtures of experts lose the same number in every layer, so theirs remain the stock classes.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.llama import configuration_llama, modeling_llama
from transformers.models.mistral import configuration_mistral, modeling_mistral
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe import modeling_olmoe
from transformers.models.qwen2 import configuration_qwen2, modeling_qwen2
from transformers.models.qwen2_moe import modeling_qwen2_moe
from transformers.models.qwen3 import configuration_qwen3, modeling_qwen3
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from model_prune.core.plan import LayerPlan
from model_prune.core.target import EXPERTS, MIXTURES, PRUNED, Dims, family_of
from model_prune.graph.cut import BIASED, dims_after, no_biases, prune_state
from prune_core.errors import InputError

# By the attribute of a config, the size that it holds.
SIZES = {
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_groups",
    "intermediate_size": "neurons",
}


# ------------------------------------------------------------------------------ classes
def _validate_architecture(config: Any) -> None:
    """Replaces Llama's check, that heads divide hidden_size, though their size is free."""
    for i in range(config.num_hidden_layers):
        dims = Dims.of(config, i)
        if dims.heads % dims.kv_groups:
            raise ValueError(
                f"Layer {i} has {dims.heads} query heads for {dims.kv_groups} KV heads: every KV "
                f"head must have the same number of query heads."
            )


def _without_layers(config: Any) -> Any:
    """What a stock constructor may read of a config: no layers, and nothing that differs."""
    plain = copy.copy(config)
    plain.per_layer_config, plain.num_hidden_layers = None, 0
    return plain


def _fill(model: Any, config: Any) -> None:
    """Give a model that was made without layers its own."""
    # The stock constructor resolved it; without it, layers would attend by the slow way.
    config._attn_implementation = model.config._attn_implementation
    model.config = config
    model.layers = nn.ModuleList(_layer(config, i) for i in range(config.num_hidden_layers))
    model.post_init()


def _layer(config: Any, i: int) -> Any:
    layer = _LAYERS[family_of(config)](config.per_layer_config[i], i)
    if getattr(config, "output_bias", False):
        for name in BIASED:
            linear = layer.get_submodule(name)
            if linear.bias is None:
                weight = linear.weight
                linear.bias = nn.Parameter(torch.zeros_like(weight[:, 0]))
    _belong(layer, config)
    return layer


def _belong(layer: Any, config: Any) -> None:
    """One config for all layers, so that they hear of a change of the attention's implementation.

    Nothing reads sizes from it once the layer is made.
    """
    layer.self_attn.config = layer.mlp.config = config
    if hasattr(layer.mlp, "experts"):
        layer.mlp.experts.config = config


def _family(name: str, configuration: Any, modeling: Any) -> tuple[Any, Any, Any]:
    """A family's three classes, known to the Auto classes."""
    stock_config = getattr(configuration, f"{name}Config")
    stock_model = getattr(modeling, f"{name}Model")
    stock_lm = getattr(modeling, f"{name}ForCausalLM")

    # vLLM's backend for models of transformers asks whether arguments are instances of these.
    def init_model(self: object, config: object) -> None:
        stock_model.__init__(self, _without_layers(config))
        _fill(self, config)

    def init_lm(self: Any, config: Any) -> None:
        stock_lm.__init__(self, _without_layers(config))
        self.model.__class__ = model_class
        _fill(self.model, config)
        self.config = config
        self.post_init()

    members = {
        "__module__": __name__,
        "__annotations__": {"output_bias": bool},
        "model_type": PRUNED + stock_config.model_type,
        "output_bias": False,
        "validate_architecture": _validate_architecture,
    }
    # `strict` collects a class's validators: a subclass's own count only where it is applied anew.
    config_class: Any = strict(type(f"Pruned{name}Config", (stock_config,), members))
    members = {"__module__": __name__, "config_class": config_class}
    model_class: Any = type(
        f"Pruned{name}Model", (stock_model,), members | {"__init__": init_model}
    )
    lm_class: Any = type(f"Pruned{name}ForCausalLM", (stock_lm,), members | {"__init__": init_lm})
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, lm_class, exist_ok=True)
    # A stock constructor notes this, by class, and ours can come to a model after it was made.
    _CAN_RECORD_REGISTRY[str(model_class)] = stock_model._can_record_outputs
    for stock, pruned in ((stock_model, model_class), (stock_lm, lm_class)):
        _CLASSES[stock] = _CLASSES[pruned] = (stock, pruned)
    _CONFIGS[stock_config.model_type] = (stock_config, config_class)
    _know(stock_config.model_type, name, modeling)
    return config_class, model_class, lm_class


def _know(family: str, name: str, modeling: Any) -> None:
    _LAYERS[family] = getattr(modeling, f"{name}DecoderLayer")
    _ROTARY[family] = getattr(modeling, f"{name}RotaryEmbedding")


def _mixture(family: str, name: str, modeling: Any) -> None:
    """A family of which only the stock classes are needed."""
    _know(family, name, modeling)
    for kind in ("Model", "ForCausalLM"):
        stock = getattr(modeling, f"{name}{kind}")
        _CLASSES[stock] = (stock, stock)


_LAYERS: dict[str, Any] = {}  # by family
_ROTARY: dict[str, Any] = {}
_CONFIGS: dict[str, tuple[Any, Any]] = {}  # stock and pruned, by family
_CLASSES: dict[Any, tuple[Any, Any]] = {}  # stock and pruned, by either

PrunedLlamaConfig, PrunedLlamaModel, PrunedLlamaForCausalLM = _family(
    "Llama", configuration_llama, modeling_llama
)
PrunedMistralConfig, PrunedMistralModel, PrunedMistralForCausalLM = _family(
    "Mistral", configuration_mistral, modeling_mistral
)
PrunedQwen2Config, PrunedQwen2Model, PrunedQwen2ForCausalLM = _family(
    "Qwen2", configuration_qwen2, modeling_qwen2
)
PrunedQwen3Config, PrunedQwen3Model, PrunedQwen3ForCausalLM = _family(
    "Qwen3", configuration_qwen3, modeling_qwen3
)
_mixture("mixtral", "Mixtral", modeling_mixtral)
_mixture("qwen2_moe", "Qwen2Moe", modeling_qwen2_moe)
_mixture("qwen3_moe", "Qwen3Moe", modeling_qwen3_moe)
_mixture("olmoe", "Olmoe", modeling_olmoe)


# ------------------------------------------------------------------------------ configs
def pruned_config(
    config: Any, dims: Sequence[Dims], *, biases: bool, kept_layers: Sequence[int]
) -> Any:
    """The config of a model of which layers were cut or removed.

    config: of the model before, stock or pruned itself; it is not changed.
    dims: the sizes of the layers that stay; kept_layers: which they were, ascending.
    biases: whether o_proj and down_proj of all layers now have a bias.

    Returns the stock config where that can say it all, so that the model loads without prunekit:
    all layers alike, no biases but the family's own, and heads that stock code accepts. Otherwise
    the family's pruned one.

    Raises InputError if no layer stays, or dims and kept_layers do not belong together; of a
    mixture, if anything but experts goes, or layers do not keep the same number of them.
    """
    family = family_of(config)
    if family in MIXTURES:
        return _fewer_experts(config, family, dims, biases)
    if not dims or len(dims) != len(kept_layers):
        raise InputError(
            f"{len(dims)} layers have sizes and {len(kept_layers)} are kept: keep one layer at "
            f"least, and give the sizes of each."
        )
    given = config.to_dict()
    for key in ("model_type", "per_layer_config", "transformers_version"):
        given.pop(key, None)
    for key in ("layer_types", "mlp_layer_types"):
        if given.get(key) is not None:
            given[key] = [given[key][i] for i in kept_layers]
    given["num_hidden_layers"] = len(dims)
    # Where layers differ, the largest, for readers that know no layers and ask what to allocate.
    given |= {key: max(getattr(d, size) for d in dims) for key, size in SIZES.items()}
    bias = given.pop("output_bias", False) or (biases and not _has_biases(config, family))
    alike = len(set(dims)) == 1
    stock, pruned = _CONFIGS[family]
    if alike and not bias and _stock_accepts(family, dims[0]):
        given["architectures"] = [f"{stock.__name__.removesuffix('Config')}ForCausalLM"]
        if "head_dim" in given:  # Qwen2 has no such field
            given["head_dim"] = dims[0].head_dim
        result = stock(**given)
    else:
        given["architectures"] = [f"{pruned.__name__.removesuffix('Config')}ForCausalLM"]
        given["head_dim"] = dims[0].head_dim
        given["per_layer_config"] = {
            i: {key: getattr(d, size) for key, size in SIZES.items()} for i, d in enumerate(dims)
        }
        result = pruned(**given, output_bias=bias)
    result._attn_implementation = config._attn_implementation
    return result


def _fewer_experts(config: Any, family: str, dims: Sequence[Dims], biases: bool) -> Any:
    counts = sorted({each.experts for each in dims if each.experts})
    before = [Dims.of(config, i) for i in range(config.num_hidden_layers)]
    one, other = ([replace(each, experts=0) for each in sizes] for sizes in (dims, before))
    if one != other or biases:
        raise InputError(
            f"Of a mixture only experts can go, and all of its {len(before)} layers must stay: "
            f"plan with a method of the family 'experts'."
        )
    if len(counts) != 1:
        raise InputError(
            f"All layers of a mixture must have as many experts, and these would have {counts}: "
            f"keep the same number everywhere."
        )
    if counts[0] < config.num_experts_per_tok:
        raise InputError(
            f"The model sends a token to {config.num_experts_per_tok} experts, and the plan keeps "
            f"{counts[0]}: keep as many at least."
        )
    result = copy.deepcopy(config)
    setattr(result, EXPERTS[family], counts[0])
    return result


def _has_biases(config: Any, family: str) -> bool:
    """Whether the stock class gives both of BIASED a bias."""
    return family == "llama" and config.attention_bias and config.mlp_bias


def _stock_accepts(family: str, dims: Dims) -> bool:
    if family == "llama":  # LlamaConfig.validate_architecture
        return dims.hidden % dims.heads == 0
    if family == "qwen2":  # has no field for a head's size, so vLLM's class takes it from these
        return dims.heads * dims.head_dim == dims.hidden
    return True


# ------------------------------------------------------------------------------ models
def build_layer(config: Any, i: int) -> Any:
    """Decoder layer `i` of a stock or pruned config, without memory, attending through SDPA.

    Its parameters are on the device "meta": load_state_dict(state, assign=True) puts real ones in.
    """
    own = copy.copy(config)
    own._attn_implementation = "sdpa"
    own._experts_implementation = "eager"
    with torch.device("meta"):
        return _layer(own, i)


def build_rotary(config: Any) -> Any:
    """The module that gives positions their cosines and sines, for all layers."""
    return _ROTARY[family_of(config)](config=_without_layers(config))


@torch.no_grad()
def apply_in_place(model: Any, layers: Sequence[LayerPlan]) -> Any:
    """Apply the plans of all layers to a loaded model, which is changed and returned.

    New weights and zeros go into the parameters that are there; a parameter that changes its shape
    is replaced, so an optimizer has to be made afterwards. Modules and their hooks stay. If the
    layers then differ, the model becomes one of the classes of this module, and its config one of
    theirs, so that save_pretrained writes what from_pretrained reads.

    Raises InputError for a model that is not of a family's plain or causal class, another number
    of plans, and what `prune_state` refuses; the model is then as it was.
    """
    if type(model) not in _CLASSES:
        known = sorted(kind.__name__ for kind in _CLASSES if kind.__name__.endswith("LM"))
        raise InputError(
            f"A model of class {type(model).__name__} cannot be pruned in place: give one of "
            f"{', '.join(known)}, without wrappers such as an adapter's."
        )
    config, base = model.config, model.base_model
    family_of(config)
    if len(layers) != len(base.layers):
        raise InputError(
            f"The plan is for {len(layers)} layers, and the model has {len(base.layers)}: they "
            f"belong to different models."
        )
    kept = [i for i, plan in enumerate(layers) if not plan.removed]
    before = [Dims.of(config, i) for i in kept]
    dims = [dims_after(old, layers[i]) for i, old in zip(kept, before, strict=True)]
    biases = False
    for i, old in zip(kept, before, strict=True):
        there = base.layers[i].state_dict()
        # Without memory, to find what does not fit before anything is changed.
        empty = {name: tensor.to("meta") for name, tensor in there.items()}
        biases |= prune_state(empty, layers[i], old).keys() != there.keys()
    after = config
    if biases or dims != before or len(kept) < len(layers):
        after = pruned_config(config, dims, biases=biases, kept_layers=kept)
    for new, i in enumerate(kept):
        layer = base.layers[i]
        state = prune_state(layer.state_dict(), layers[i], before[new])
        if biases:
            state |= no_biases(state)
        _refit(layer, state)
        layer.self_attn.layer_idx = new
        _belong(layer, after)
    base.layers = nn.ModuleList(base.layers[i] for i in kept)
    for part in {id(part): part for part in (base, model)}.values():
        part.config = after
        part.__class__ = _CLASSES[type(part)][after.model_type.startswith(PRUNED)]
        if hasattr(part, "num_experts"):  # of which training's balance reads it
            part.num_experts = getattr(after, EXPERTS[after.model_type])
    return model


def _refit(layer: Any, state: dict[str, torch.Tensor]) -> None:
    """Give a layer the tensors of `state`; hooks, modes and gradients of its modules stay."""
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        module = layer.get_submodule(owner)
        old = getattr(module, kind)
        if old is not None and old.shape == tensor.shape:
            if old.data_ptr() != tensor.data_ptr():
                old.copy_(tensor)
            continue
        trained = (module.weight if old is None else old).requires_grad
        setattr(module, kind, nn.Parameter(tensor, requires_grad=trained))
        if isinstance(module, nn.Linear) and kind == "weight":
            module.out_features, module.in_features = tensor.shape
    if hasattr(layer.mlp, "experts"):
        layer.mlp.gate.num_experts = layer.mlp.experts.num_experts = len(layer.mlp.gate.weight)
    else:
        layer.mlp.intermediate_size = layer.mlp.down_proj.in_features
