"""What the families share: weights checked name by name, sentences tokenised apart, one rule."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_weights
from scipy.special import expit, logit
from tokenizers import models
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerFast

from prune_core.errors import CheckpointError
from rag_prune.context.checkpoints import Settings, weight_files
from rag_prune.context.engine import Engine, Floats, Frame, Logits
from rag_prune.context.model import KEEP, RELEVANCE
from rag_prune.context.result import Request, Scores
from rag_prune.context.windows import Tokens, encode_plain

_NAMED = 12  # tensors that an error lists before it counts the others
_NEVER = -1e4  # score of a piece that is never the best way to write a text
# Not weights: numbers 0, 1, 2, … that older versions of transformers stored.
_COUNTERS = ("embeddings.position_ids", "embeddings.token_type_ids")
# Fields of a config.json that say how it was saved, not what the network is.
_NOT_NETWORK = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype")


@dataclass(frozen=True, eq=False)
class Released:
    """A family's checkpoint: network (float32, evaluation mode), fast tokenizer, config.json."""

    model: Any
    tokenizer: Any
    settings: Settings
    config: dict[str, Any]
    fingerprint: str
    multiply_in: torch.dtype = torch.float32


class ReleasedEngine(Engine):
    """A family of released checkpoints. Its network has `joint(ids, mask)`: (batch, tokens, 2),
    the keep logit of each token and, at every token, the passage's ranking logit.
    """

    def __init__(self, checkpoint: Released) -> None:
        self.checkpoint: Any = checkpoint

    @classmethod
    @abstractmethod
    def build(cls, config: dict[str, Any], names: Iterable[str]) -> tuple[nn.Module, int]:
        """The network for a config.json and its tensors' names, and the tokens it reads at once."""

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The released tensors under the network's names."""
        return state

    @classmethod
    def read_release(cls, folder: Path, config: dict[str, Any]) -> Released:
        """Read a released folder.

        Raises:
            CheckpointError: Weights that are not safetensors or not exactly the family's, a
                config.json without a field that is needed, no tokenizer.json.
        """
        digest = hashlib.sha256()
        state: dict[str, Tensor] = {}
        try:
            for file in weight_files(folder):
                data = file.read_bytes()
                digest.update(data)
                state |= load_weights(data)
        except SafetensorError as error:
            raise CheckpointError(f"The weights in {folder} cannot be read: {error}") from error
        state = {k: v.float() for k, v in state.items() if not k.endswith(_COUNTERS)}
        try:
            model, window = cls.build(config, state)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder / 'config.json'} does not describe a network of {cls.name}: {error!r}."
            ) from error
        fit(model, cls.rename(state), f"{folder} ({cls.name})")
        model.eval()
        settings = Settings(window=window)
        return Released(model, tokenizer(folder), settings, config, digest.hexdigest()[:16])

    @abstractmethod
    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        """For each request its passages' scores by the family's own rule."""

    def begin_score(self, requests: Sequence[Request]) -> Callable[[], list[list[Scores]]]:
        """`score` in one step."""
        return partial(self.score, requests)

    def logits(self, requests: Sequence[Request]) -> Logits:
        """The scores as logits: what a calibration starts from."""
        return [
            [(logit(s.sentences), float(logit(s.relevance))) for s in passages]
            for passages in self.score(requests)
        ]

    def read(
        self, tokens: Sequence[Tokens], frames: Sequence[Frame]
    ) -> tuple[list[Floats], Floats]:
        """For each passage its tokens' keep logits, and its ranking logit: the best window's.

        −inf is the ranking logit of a passage without a token.
        """
        keep = [np.empty(len(t.ids)) for t in tokens]
        ranking = np.full(len(tokens), -np.inf)
        for i, (low, high), logits, first in self.run_windows(
            self.checkpoint.model.joint, tokens, frames
        ):
            keep[i][low:high] = logits[:, KEEP]
            ranking[i] = max(ranking[i], float(first[RELEVANCE]))
        return keep, ranking


def sub_config(model_type: str, fields: Mapping[str, Any]) -> Any:
    """The stock configuration of a `model_type` from a released config.json's fields."""
    known = {k: v for k, v in fields.items() if k not in _NOT_NETWORK and not k.startswith("_")}
    return AutoConfig.for_model(model_type, **known)


def positions(config: Any) -> int:
    """Tokens that an encoder has positions for; RoBERTa's begin after the padding token's."""
    first = config.pad_token_id + 1 if "roberta" in config.model_type else 0
    return int(config.max_position_embeddings) - first


def fit(model: nn.Module, state: Mapping[str, Tensor], what: str) -> None:
    """Load weights that match the network name by name and shape by shape, or say what does not."""
    wanted = model.state_dict()
    wrong = [
        f"{name} has the shape {tuple(state[name].shape)} and not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name].shape != wanted[name].shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(sorted(names)[:_NAMED])}"
        + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        for kind, names in (
            ("missing", list(wanted.keys() - state.keys())),
            ("unknown", list(state.keys() - wanted.keys())),
            ("misshapen", wrong),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The weights of {what} are not those of a known release, and none was loaded: "
            f"{'; '.join(problems)}. Use a released file as it is, or report its layout."
        )
    model.load_state_dict(state, strict=True)


def tokenizer(folder: Path) -> Any:
    """The tokenizer exactly as its tokenizer.json has it, whatever class its config names."""
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json. Save the tokenizer in its fast form beside the "
            "weights: AutoTokenizer.from_pretrained(…).save_pretrained(…)."
        )
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    backend = fast.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if model["type"] == "Unigram":
        # Its vocabulary has the special tokens at the best score of all. `encode_plain` would read
        # "</s>" in a text as unknown; spelled by other pieces it is what the owners' scores see.
        special = set(fast.all_special_tokens) - {fast.unk_token}
        vocabulary = [(piece, _NEVER if piece in special else s) for piece, s in model["vocab"]]
        backend.model = models.Unigram(
            vocabulary, model["unk_id"], model.get("byte_fallback", False)
        )
    return fast


def tokenise_apart(tokenizer: Any, passages: Sequence[Sequence[str]]) -> list[Tokens]:
    """Tokens of each passage, every sentence tokenised by itself, as all these families do."""
    encoded = iter(encode_plain(tokenizer, [s for p in passages for s in p])["input_ids"])
    out = []
    for passage in passages:
        parts = [next(encoded) for _ in passage]
        owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        out.append(Tokens(np.array([i for p in parts for i in p], dtype=np.int64), owner))
    return out


def columns(keep: Tensor, ranking: Tensor) -> Tensor:
    """`joint`'s output from the keep head's (batch, tokens, 2) and the ranking logits (batch,)."""
    logits = keep.float()
    ranked = ranking.float().unsqueeze(1).expand(logits.shape[:2])
    return torch.stack([logits[..., 1] - logits[..., 0], ranked], dim=-1)


def probabilities(logits: Floats) -> NDArray[np.float32]:
    """Keep probabilities in single precision, as the owners' code has them: they reach 0 and 1."""
    return np.asarray(expit(logits.astype(np.float32)))


def strictly(value: float) -> float:
    """The score s with: s >= threshold exactly when value > threshold, the families' rule."""
    return max(float(np.nextafter(value, -np.inf)), 0.0)
