"""PH3: cut the attention heads that make a language model trust its memory over the passage.

When a passage says other than what a causal language model learned, heads of its later layers
pull the answer in opposite directions: *memory heads* bring up the learned one, *context heads*
copy the passage's. Path patching tells which is which, and pruning the one kind lets the other
win; no weight is trained.

    scores = PH3.find(model, tokenizer, conflicts)              # once a model; scores.save(path)
    ph3 = PH3(prefer="context", heads=8, scores=scores)
    with ph3.apply(model):                                      # while the block runs, or
        model.generate(...)
    ph3.fold(model).save_pretrained(folder)                     # for good, served anywhere

Source: after Jin et al., "Cutting Off the Head Ends the Conflict" (2024, arXiv:2402.18154), of
which only the abstract and public uses could be read, so the scores are not compared with its
code. Path patching is that of Wang et al. (arXiv:2211.00593, section 3.1): the last token's output
of one head is replaced by the one it has for a *corrupted* prompt, which tells of another subject;
all other heads are held, MLPs and the final norm are computed again, and the change of the logits
is read. Ours: effects are logits of the answers' first tokens, a head's rank is the effect on the
memory's answer less that on the context's, and the corrupted prompt is the caller's.

Cost: two forward passes a conflict, and the MLPs once more for the last token of every head.
Nothing is added at run time, and folding removes nothing of the model's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from prune_core.errors import InputError
from prune_core.storage import Shards, StrPath, write_json
from rag_prune.kv.models import head_size

Head = tuple[int, int]
PREFERENCES = ("context", "memory")
# Logits put together from the parts must be the model's own, up to rounding.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Conflict:
    """A prompt whose context contradicts what the model learned.

    prompt: the text up to where the answer starts, chat template included.
    corrupted: the same words about another subject, so that neither answer is in it.
    memory, context: the two answers as they would go on, mostly with a space before (" Paris").
    """

    prompt: str
    corrupted: str
    memory: str
    context: str


@dataclass(frozen=True, eq=False)
class HeadScores:
    """What each head adds to the logits of the two answers, float64 [layers, heads].

    memory, context: mean over the conflicts of the logit of that answer's first token, less the
    logit when the head is patched; positive where the head speaks for that answer.
    conflicts: how many were averaged.
    """

    memory: np.ndarray
    context: np.ndarray
    conflicts: int

    def ranked(self, prefer: str) -> list[Head]:
        """(layer, head) of all heads, those to prune first in front; ties by layer and head.

        Raises InputError unless `prefer` is "context" or "memory".
        """
        _check_preference(prefer)
        against = self.memory - self.context
        order = np.argsort(against if prefer == "memory" else -against, axis=None, kind="stable")
        return [divmod(int(i), against.shape[1]) for i in order]

    def save(self, path: StrPath) -> None:
        """Write the scores as JSON, whole or not at all."""
        scores = {"memory": self.memory.tolist(), "context": self.context.tolist()}
        write_json(path, {**scores, "conflicts": self.conflicts})

    @classmethod
    def load(cls, path: StrPath) -> HeadScores:
        """Read what `save` wrote; raises InputError for a file that is something else."""
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
            memory, context = (np.array(stored[k], dtype=float) for k in ("memory", "context"))
            conflicts = int(stored["conflicts"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"Cannot read head scores from '{path}' ({error}): give a file that "
                f"HeadScores.save wrote."
            ) from error
        if memory.ndim != 2 or memory.shape != context.shape:
            raise InputError(
                f"The head scores in '{path}' must be two tables of layers × heads, got the shapes "
                f"{memory.shape} and {context.shape}: find them again."
            )
        return cls(memory, context, conflicts)


@dataclass(frozen=True, kw_only=True)
class PH3:
    """Prune the heads that work against what is preferred.

    prefer: "context" prunes memory heads, "memory" prunes context heads.
    heads: how many of the best ranked, 0 or more; or which, as (layer, head) pairs.
    scores: from `find`; needed when `heads` is a number.

    Raises InputError for another preference, a number without scores or larger than their heads,
    or a head given twice.
    """

    prefer: str = "context"
    heads: int | tuple[Head, ...]
    scores: HeadScores | None = None

    def __post_init__(self) -> None:
        _check_preference(self.prefer)
        if isinstance(self.heads, int):
            if self.scores is None:
                raise InputError(
                    f"heads={self.heads} asks for the best ranked heads, and there are no scores "
                    f"to rank by: pass scores=PH3.find(…), or heads as (layer, head) pairs."
                )
            if not 0 <= self.heads <= self.scores.memory.size:
                raise InputError(
                    f"heads must be in [0, {self.scores.memory.size}], the heads that were scored, "
                    f"got {self.heads}."
                )
        elif len(set(self.heads)) < len(self.heads):
            twice = next(head for head in self.heads if self.heads.count(head) > 1)
            raise InputError(f"heads names {twice} twice: name each (layer, head) once.")

    @property
    def pruned(self) -> tuple[Head, ...]:
        """(layer, head) of each head that is pruned, the best ranked first."""
        if not isinstance(self.heads, int):
            return self.heads
        assert self.scores is not None  # checked when this was made
        return tuple(self.scores.ranked(self.prefer)[: self.heads])

    @staticmethod
    def find(
        model: Any,
        tokenizer: Any,
        conflicts: Sequence[Conflict],
        *,
        batch_size: int = 16,
        resume: StrPath | None = None,
        progress: bool = True,
    ) -> HeadScores:
        """Score every head of a causal language model by path patching.

        model: of transformers, with decoder layers like Llama's, Mistral's or Qwen's; evaluated as
            it is, and left so.
        tokenizer: the model's.
        conflicts: a few dozen of them, best on facts that the model knows.
        resume: a folder that keeps what is done, so that a stopped run can go on.

        Raises InputError for no conflicts, answers that start with the same token, or a model of
        another build.
        """
        if not conflicts or batch_size < 1:
            raise InputError(
                f"PH3 needs at least one conflict and a batch size of 1 or more, got "
                f"{len(conflicts)} and {batch_size}."
            )
        outputs = _outputs(model)
        answers = [_answer_tokens(tokenizer, conflict) for conflict in conflicts]
        starts = range(0, len(conflicts), batch_size)

        def work() -> Iterator[tuple[int, list[np.ndarray]]]:
            for i, start in enumerate(tqdm(starts, desc="patching heads", disable=not progress)):
                part = slice(start, start + batch_size)
                if shards is not None and i in shards:
                    continue
                yield i, list(_effects(model, tokenizer, conflicts[part], answers[part]))

        shards = None
        if resume is None:
            rows = [effect for _, batch in work() for effect in batch]
        else:
            shards = Shards(resume, _fingerprint(outputs, conflicts, batch_size))
            for i, batch in work():
                shards.write(i, ({"effect": effect.tolist()} for effect in batch))
            rows = [np.array(row["effect"]) for row in shards.rows()]
        memory, context = np.mean(rows, axis=0, dtype=float)
        return HeadScores(memory, context, len(conflicts))

    @contextmanager
    def apply(self, model: Any) -> Iterator[Any]:
        """Mask the pruned heads of `model` inside the block; gone after it, also after an error.

        Raises InputError for heads that the model does not have.
        """
        hooks = []
        try:
            for output, columns in self._columns(model):
                hooks.append(output.register_forward_pre_hook(_masking(columns)))
            yield model
        finally:
            for hook in hooks:
                hook.remove()

    def fold(self, model: Any) -> Any:
        """Zero the pruned heads' columns of each `o_proj` in place, and return the model.

        Logits are those under `apply`; names and shapes stay, so that whatever serves the model
        serves the saved one. Raises InputError for heads that the model does not have.
        """
        with torch.no_grad():
            for output, columns in self._columns(model):
                output.weight[:, columns] = 0
        return model

    def _columns(self, model: Any) -> list[tuple[nn.Linear, Tensor]]:
        """The output projections that lose heads, and the inputs they lose."""
        outputs, size = _outputs(model), head_size(model.config)
        count = model.config.num_attention_heads
        if self.scores is not None and self.scores.memory.shape != (len(outputs), count):
            raise InputError(
                f"The scores are of {_layers_heads(*self.scores.memory.shape)}, the model has "
                f"{_layers_heads(len(outputs), count)}: find the heads of this model."
            )
        columns: dict[int, list[int]] = {}
        for layer, head in self.pruned:
            if not (0 <= layer < len(outputs) and 0 <= head < count):
                raise InputError(
                    f"There is no head {(layer, head)}: the model has "
                    f"{_layers_heads(len(outputs), count)}, counted from 0."
                )
            columns.setdefault(layer, []).extend(range(head * size, (head + 1) * size))
        return [(outputs[layer], torch.tensor(lost)) for layer, lost in columns.items()]


def _masking(columns: Tensor) -> Any:
    def hook(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        return (inputs[0].index_fill(-1, columns.to(inputs[0].device), 0),)

    return hook


def _check_preference(prefer: str) -> None:
    if prefer not in PREFERENCES:
        raise InputError(f"prefer must be 'context' or 'memory', got {prefer!r}.")


def _layers_heads(layers: int, heads: int) -> str:
    return f"{layers} layers of {heads} heads"


def _outputs(model: Any) -> list[nn.Linear]:
    """Each layer's projection from the heads, side by side, to the residual stream."""
    try:
        found = [layer.self_attn.o_proj for layer in model.base_model.layers]
        width = model.config.num_attention_heads * head_size(model.config)
    except AttributeError as error:
        raise InputError(
            f"PH3 needs decoder layers with `self_attn.o_proj`, like Llama's, Mistral's or Qwen's, "
            f"and {type(model).__name__} has none ({error})."
        ) from error
    for number, output in enumerate(found):
        if output.weight.shape[1] != width:
            raise InputError(
                f"`o_proj` of layer {number} must read {width} numbers, the heads times their "
                f"size, and reads {output.weight.shape[1]}: give the model as it was loaded, "
                f"not quantised or cut."
            )
    return found


def _tokens(tokenizer: Any, text: str) -> list[int]:
    # A rendered chat template starts with the special token that the tokenizer would add.
    bos = tokenizer.bos_token
    return list(tokenizer(text, add_special_tokens=not (bos and text.startswith(bos))).input_ids)


def _answer_tokens(tokenizer: Any, conflict: Conflict) -> tuple[int, int]:
    """The first token of either answer."""
    prompt = _tokens(tokenizer, conflict.prompt)
    first = []
    for answer in (conflict.memory, conflict.context):
        whole = _tokens(tokenizer, conflict.prompt + answer)
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise InputError(
                f"The answer {answer!r} does not go on from {conflict.prompt[-40:]!r} with a token "
                f"of its own: end the prompt before a space, and start the answer with it."
            )
        first.append(whole[len(prompt)])
    if first[0] == first[1]:
        raise InputError(
            f"The answers {conflict.memory!r} and {conflict.context!r} start with the same token, "
            f"so the logits cannot tell them apart: choose another one."
        )
    return first[0], first[1]


def _fingerprint(
    outputs: list[nn.Linear], conflicts: Sequence[Conflict], batch_size: int
) -> dict[str, Any]:
    weights = hashlib.sha256()
    for output in outputs:
        weights.update(output.weight.detach().float().cpu().numpy().tobytes())
    told = json.dumps([asdict(conflict) for conflict in conflicts]).encode()
    return {
        "o_proj": weights.hexdigest(),
        "conflicts": hashlib.sha256(told).hexdigest(),
        "batch_size": batch_size,
    }


@dataclass(frozen=True)
class _LastToken:
    """What a prompt's last token meets: per layer [batch, …], and its state after the last norm."""

    residual: list[Tensor]  # before the layer, [batch, hidden]
    heads: list[Tensor]  # the heads side by side, [batch, heads × size]
    final: Tensor  # [batch, hidden]


def _last_token(model: Any, tokenizer: Any, prompts: Sequence[str]) -> _LastToken:
    ids = [_tokens(tokenizer, prompt) for prompt in prompts]
    last = torch.tensor([len(row) - 1 for row in ids], device=model.device)
    at = (torch.arange(len(ids), device=model.device), last)
    # Padded on the right: no token sees a later one, so the padding changes nothing.
    padded = torch.zeros(len(ids), int(last.max()) + 1, dtype=torch.long, device=model.device)
    mask = torch.zeros_like(padded)
    for row, tokens in enumerate(ids):
        padded[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    residual: list[Tensor] = []
    heads: list[Tensor] = []
    hooks = []
    try:
        for layer in model.base_model.layers:
            hooks.append(
                layer.register_forward_pre_hook(lambda _, inputs: residual.append(inputs[0][at]))
            )
            hooks.append(
                layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda _, inputs: heads.append(inputs[0][at])
                )
            )
        out = model.base_model(input_ids=padded, attention_mask=mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return _LastToken(residual, heads, out.last_hidden_state[at])


@torch.no_grad()
def _effects(
    model: Any,
    tokenizer: Any,
    conflicts: Sequence[Conflict],
    answers: Sequence[tuple[int, int]],
) -> np.ndarray:
    """What each head adds to the logits of memory and context, [conflicts, 2, layers, heads].

    All heads of all layers go through the network together: a layer adds a row for each of its
    heads, in which this head alone is patched, to the rows that earlier layers began. Row 0 is
    the prompt as it is.
    """
    clean = _last_token(model, tokenizer, [c.prompt for c in conflicts])
    corrupted = _last_token(model, tokenizer, [c.corrupted for c in conflicts])
    base, size, batch = model.base_model, head_size(model.config), len(conflicts)
    rows = clean.residual[0][:, None]  # [batch, rows, hidden]
    for layer, own, other in zip(base.layers, clean.heads, corrupted.heads, strict=True):
        output = layer.self_attn.o_proj
        change = (other - own).view(batch, -1, size)
        weight = output.weight.view(output.weight.shape[0], -1, size)
        frozen = rows + output(own)[:, None]
        patched = frozen[:, :1] + torch.einsum("bhs,ohs->bho", change, weight)
        middle = torch.cat([frozen, patched], dim=1)
        rows = middle + layer.mlp(layer.post_attention_layernorm(middle))
    rows = base.norm(rows)
    if not torch.allclose(rows[:, 0], clean.final, rtol=_TOLERANCE, atol=_TOLERANCE):
        raise InputError(
            f"The decoder layers of {type(model).__name__} are not attention plus MLP, each behind "
            f"one norm: PH3 cannot follow the path from its heads to the logits. It knows layers "
            f"like Llama's, Mistral's and Qwen's."
        )
    unembedding = model.get_output_embeddings().weight[torch.tensor(answers, device=rows.device)]
    logits = torch.einsum("brh,bah->bar", rows, unembedding).float()  # a: memory, context
    effects = logits[..., :1] - logits[..., 1:]
    return effects.view(batch, 2, len(base.layers), -1).cpu().numpy()
