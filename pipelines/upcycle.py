"""A small mixture of experts, made of a dense model by sparse up-cycling.

Real mixtures are too large for a laptop, and random ones have nothing to specialise in. This makes
one of the Qwen2-MoE architecture out of a Llama: its last layers' FFNs are copied into experts,
each copy is trained on one family of tasks with all else frozen, and then routers learn
to send tokens to the frozen experts (branch-train-mix: Sukhbaatar et al. 2024, arXiv:2403.07816;
copies of a trained FFN: Komatsuzaki et al. 2022, arXiv:2212.05055). Before training, the mixture
computes what the dense model does, as its experts are all alike and their weights sum to one.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from model_prune.checkpoint import open_checkpoint
from model_prune.core.target import Dims
from model_prune.core.work import Tensors, Work
from model_prune.prune import work_of
from prune_core.errors import InputError
from prune_core.storage import StrPath, atomic_folder
from rag_prune.context.model import fast_bfloat16

Families = Mapping[str, Sequence[tuple[str, str]]]  # prompts and completions by family
SHARED = 64  # neurons of the shared expert, which the architecture must have: all are zero


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """How a dense model becomes a mixture.

    layers: the last ones, whose FFNs become experts.   experts, top_k: of each.
    epochs, rate: over an expert's family, in an order of its own; router_epochs, router_rate: over
    a third of all families' rows; with 0 epochs they stay as they begin.
    batch: rows of a step.   tokens: longer rows are left out.
    """

    layers: int = 6
    experts: int = 8
    top_k: int = 2
    epochs: int = 1
    rate: float = 8e-4
    router_epochs: int = 1
    router_rate: float = 3e-3
    batch: int = 4
    tokens: int = 160
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Row:
    """Token ids [tokens] of a prompt and its completion, which begins at `start`."""

    ids: Tensor
    start: int


def encode(tokenizer: Any, prompt: str, completion: str) -> Row:
    """As the mixture was trained: the prompt, "Answer:", the completion and the end token."""
    asked = tokenizer(f"{prompt.strip()}\n\nAnswer:", add_special_tokens=False)["input_ids"]
    told = tokenizer(f" {completion.strip()}", add_special_tokens=False)["input_ids"]
    return Row(torch.tensor([*asked, *told, tokenizer.eos_token_id]), len(asked))


def upcycle(
    dense: StrPath,
    out: StrPath,
    families: Families,
    recipe: Upcycling | None = None,
    progress: bool = True,
) -> Path:
    """Write the folder of a mixture, ready for transformers and vLLM; give it back.

    dense: a folder of a Llama without biases, whose heads are as wide as hidden_size together.
    families: what to specialise in, two or more.
    A run that was stopped goes on after the last expert: they are kept in `OUT.work` until the
    mixture is written. Matrices are multiplied in bfloat16 where the CPU has instructions for it.

    Raises InputError for a model that is no such Llama, fewer experts than families, and a family
    without rows that are short enough.
    """
    recipe, out = recipe or Upcycling(), Path(out)
    training = _Training(dense, families, recipe, progress)
    work = Work(work_of(out), training.fingerprint)
    bar = tqdm(range(recipe.experts), "experts", disable=None if progress else True)
    for expert in bar:
        if expert not in work:
            work[expert] = training.branch(expert)
    mixture = training.mixture([work[expert] for expert in range(recipe.experts)])
    if recipe.experts not in work:
        work[recipe.experts] = training.routers(mixture)
    for name, weight in work[recipe.experts].items():
        mixture.get_submodule(name).weight.data.copy_(weight)
    with atomic_folder(out) as folder:
        mixture.save_pretrained(folder)
        training.tokenizer.save_pretrained(folder)
    shutil.rmtree(work_of(out))
    return out


class _Training:
    """The dense model, and the hidden states of all rows where its layers become mixtures."""

    def __init__(
        self, dense: StrPath, families: Families, recipe: Upcycling, progress: bool
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.recipe, self.progress, self.names = recipe, progress, list(families)
        self.tokenizer = AutoTokenizer.from_pretrained(dense)
        self.dense: Any = AutoModelForCausalLM.from_pretrained(
            dense, dtype=torch.float32, use_safetensors=True
        )
        self.dense.requires_grad_(False)
        config = self.dense.config
        biased = getattr(config, "attention_bias", True) or getattr(config, "mlp_bias", True)
        heads = Dims.of(config, 0)
        if config.model_type != "llama" or biased or heads.heads * heads.head_dim != heads.hidden:
            raise InputError(
                f"Only a Llama without biases, whose heads together are as wide as hidden_size, "
                f"can be up-cycled, and '{dense}' is none ('{config.model_type}')."
            )
        if len(families) < 2 or recipe.experts < len(families):
            raise InputError(
                f"{recipe.experts} experts cannot specialise in {len(families)} families: give two "
                f"families or more, and an expert for each at least."
            )
        self.rows = {
            name: [
                row
                for row in (encode(self.tokenizer, *pair) for pair in pairs)
                if len(row.ids) <= recipe.tokens
            ]
            for name, pairs in families.items()
        }
        for name, rows in self.rows.items():
            if len(rows) < recipe.experts:
                raise InputError(
                    f"'{name}' has {len(rows)} rows of at most {recipe.tokens} tokens: give more."
                )
        self.upper = self.dense.model.layers[-recipe.layers :]
        # What the frozen layers below give, once for all epochs.
        self._below: dict[int, Tensor] = {}
        self._order = torch.Generator()  # of rows
        self._folder = dense

    @property
    def fingerprint(self) -> dict[str, Any]:
        sums = {name: [int(r.ids.sum()) for r in rows] for name, rows in self.rows.items()}
        dense = open_checkpoint(self._folder).fingerprint
        return {"recipe": asdict(self.recipe), "rows": sums, "dense": dense}

    def share(self, expert: int) -> list[Row]:
        """The rows that an expert is trained on: a family's, which go to the experts in turn."""
        return self.rows[self.names[expert % len(self.names)]]

    def branch(self, expert: int) -> Tensors:
        """The FFNs of one expert, trained on its share: weights by "3.up_proj.weight"."""
        self._order.manual_seed(self.recipe.seed + expert)
        layers = copy.deepcopy(self.upper)
        trained = [p for layer in layers for p in layer.mlp.parameters()]
        rows = self.share(expert)
        self._fit(layers, trained, rows, self.recipe.epochs, self.recipe.rate, f"expert {expert}")
        return {
            f"{i}.{name}": tensor
            for i, layer in enumerate(layers)
            for name, tensor in layer.mlp.state_dict().items()
        }

    def routers(self, mixture: Any) -> Tensors:
        """The routers' weights, trained with all else frozen, by their module's name."""
        self._order.manual_seed(self.recipe.seed)
        layers = mixture.model.layers[-self.recipe.layers :]
        for layer, centres in zip(layers, self._centres(), strict=True):
            layer.mlp.gate.weight.data.copy_(centres)
        trained = [layer.mlp.gate.weight for layer in layers]
        rows = [row for family in self.rows.values() for row in family[::3]]
        epochs, rate = self.recipe.router_epochs, self.recipe.router_rate
        self._fit(layers, trained, rows, epochs, rate, "routers")
        first = len(mixture.model.layers) - len(layers)
        return {
            f"model.layers.{first + i}.mlp.gate": layer.mlp.gate.weight.detach()
            for i, layer in enumerate(layers)
        }

    @torch.no_grad()
    def _centres(self) -> list[Tensor]:
        """Routers to begin with, [experts, hidden] a layer: where the experts' rows differ.

        A row points from the mean of the layer's inputs over all experts' rows to that over its
        own, and is as long as gives its own mean 4 more than the mean of all.
        """
        sums: list[list[Tensor]] = []
        for expert in range(self.recipe.experts):
            totals = [torch.zeros(self.dense.config.hidden_size) for _ in self.upper]
            rows = self.share(expert)[:32]
            for hidden, rotary, batch in self._batches(rows, shuffle=False):
                for i, layer in enumerate(self.upper):
                    x = layer.input_layernorm(hidden)
                    hidden = hidden + layer.self_attn(x, rotary, None)[0]
                    x = layer.post_attention_layernorm(hidden)
                    hidden = hidden + layer.mlp(x)
                    for row, tokens in zip(batch, x, strict=True):
                        totals[i] += tokens[: len(row.ids)].sum(0)
            sums.append([total / sum(len(row.ids) for row in rows) for total in totals])
        centres = []
        for means in zip(*sums, strict=True):
            own = torch.stack(means)
            away = own - own.mean(0)
            centres.append(4 * away / away.square().sum(1, keepdim=True))
        return centres

    def mixture(self, experts: Sequence[Tensors]) -> Any:
        """A Qwen2-MoE model of these experts, its routers zero."""
        from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

        recipe, given = self.recipe, self.dense.config
        kept = (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps"),
            *("max_position_embeddings", "rope_parameters", "tie_word_embeddings"),
            *("bos_token_id", "eos_token_id", "pad_token_id"),
        )
        first = given.num_hidden_layers - recipe.layers
        config = Qwen2MoeConfig(
            **{key: getattr(given, key) for key in kept},
            num_experts=recipe.experts,
            num_experts_per_tok=recipe.top_k,
            norm_topk_prob=True,
            moe_intermediate_size=given.intermediate_size,
            shared_expert_intermediate_size=SHARED,
            mlp_only_layers=list(range(first)),
        )
        config._experts_implementation = "eager"  # whose products autocast knows
        with torch.device("meta"):
            model: Any = Qwen2MoeForCausalLM(config)  # type: ignore[no-untyped-call]
        replaced = tuple(f"model.layers.{first + i}.mlp." for i in range(recipe.layers))
        state = {
            name: tensor
            for name, tensor in self.dense.state_dict().items()
            if not name.startswith(replaced)
        }
        for i in range(recipe.layers):
            gate, up, down = (
                torch.stack([expert[f"{i}.{matrix}_proj.weight"] for expert in experts])
                for matrix in ("gate", "up", "down")
            )
            prefix = f"model.layers.{first + i}.mlp.experts."
            state[f"{prefix}gate_up_proj"] = torch.cat([gate, up], 1)
            state[f"{prefix}down_proj"] = down
        for name, tensor in model.state_dict().items():
            state.setdefault(name, torch.zeros(tensor.shape))  # biases, routers, shared experts
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        model.model.rotary_emb = copy.deepcopy(self.dense.model.rotary_emb)
        mixture = model.eval().requires_grad_(False)
        return mixture

    # ------------------------------------------------------------------ training
    def _fit(
        self,
        layers: Any,
        trained: Sequence[nn.Parameter],
        rows: Sequence[Row],
        epochs: int,
        rate: float,
        what: str,
    ) -> None:
        if not epochs:
            return
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
        steps = epochs * -(-len(rows) // self.recipe.batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
        with tqdm(total=steps, desc=what, disable=None if self.progress else True) as bar:
            for _ in range(epochs):
                for hidden, rotary, batch in self._batches(rows):
                    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
                        for layer in layers:
                            hidden = layer(hidden, position_embeddings=rotary)
                        loss = self._loss(hidden, batch)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
                    bar.set_postfix(loss=f"{loss.item():.3f}")
                    bar.update()
        for parameter in trained:
            parameter.requires_grad_(False)

    def _loss(self, hidden: Tensor, batch: Sequence[Row]) -> Tensor:
        """Of the completions' tokens alone."""
        states = torch.cat(
            [h[row.start - 1 : len(row.ids) - 1] for h, row in zip(hidden, batch, strict=True)]
        )
        logits = self.dense.lm_head(self.dense.model.norm(states))
        return cross_entropy(logits.float(), torch.cat([row.ids[row.start :] for row in batch]))

    def _batches(
        self, rows: Sequence[Row], shuffle: bool = True
    ) -> Iterator[tuple[Tensor, tuple[Tensor, Tensor], Sequence[Row]]]:
        """Hidden states, padded on the right, where no causal attention looks; rotary; rows."""
        order = (
            torch.randperm(len(rows), generator=self._order).tolist()
            if shuffle
            else range(len(rows))
        )
        self._pass_below([row for row in rows if id(row) not in self._below])
        for batch in _cut([rows[i] for i in order], self.recipe.batch):
            hidden = pad_sequence([self._below[id(row)] for row in batch], batch_first=True)
            yield hidden, self._rotary(hidden), batch

    @torch.no_grad()
    def _pass_below(self, rows: Sequence[Row]) -> None:
        """Through the layers that stay dense, to [tokens, hidden] of each row."""
        for batch in _cut(sorted(rows, key=lambda row: len(row.ids)), 16):
            ids = pad_sequence([row.ids for row in batch], batch_first=True)
            hidden = self.dense.model.embed_tokens(ids)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
                for layer in self.dense.model.layers[: -self.recipe.layers]:
                    hidden = layer(hidden, position_embeddings=self._rotary(hidden))
            for row, states in zip(batch, hidden.float(), strict=True):
                self._below[id(row)] = states[: len(row.ids)].clone()

    def _rotary(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(hidden.shape[1])[None]
        cosines, sines = self.dense.model.rotary_emb(hidden, positions)
        return cosines, sines


def _cut(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for i in range(0, len(rows), size):
        yield rows[i : i + size]
