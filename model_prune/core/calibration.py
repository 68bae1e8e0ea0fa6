"""The text that statistics are gathered on, as windows of tokens of one length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prune_core.errors import InputError
from prune_core.storage import StrPath, read_text


@dataclass(frozen=True, eq=False)
class Calibration:
    """windows: token ids, int64 [windows, tokens].   source: what they were cut from, in words."""

    windows: Tensor
    source: str = "tokens given"

    def __post_init__(self) -> None:
        if self.windows.ndim != 2 or self.windows.dtype != torch.int64 or not len(self.windows):
            raise InputError(
                f"Calibration windows must be whole numbers [windows, tokens], at least one "
                f"window, got {self.windows.dtype} {tuple(self.windows.shape)}."
            )

    def check(self, config: Any) -> None:
        """Raise InputError for windows that a model, by its config, does not read.

        That is for tokens that it does not know, and for windows longer than it attends over: here
        every token of a window sees all before it, so a sliding attention must be as long.
        """
        lowest, highest = (int(end) for end in self.windows.aminmax())
        if lowest < 0 or highest >= config.vocab_size:
            raise InputError(
                f"The calibration windows hold tokens from {lowest} to {highest}, and the model "
                f"knows 0 to {config.vocab_size - 1}: tokenise the text with the model's own "
                f"tokenizer."
            )
        tokens = self.windows.shape[1]
        kinds = set(getattr(config, "layer_types", None) or ())
        sliding = getattr(config, "sliding_window", None)
        if sliding and tokens > sliding and (not kinds or "sliding_attention" in kinds):
            raise InputError(
                f"The model attends to {sliding} tokens at a time, and a calibration window has "
                f"{tokens}: give windows of at most {sliding} tokens."
            )
        limit = getattr(config, "max_position_embeddings", None)
        if limit and tokens > limit:
            raise InputError(
                f"The model reads at most {limit} tokens, and a calibration window has {tokens}: "
                f"give shorter windows."
            )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the windows."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """What a plan says of it."""
        windows, tokens = self.windows.shape
        return {
            "source": self.source,
            "windows": windows,
            "tokens": tokens,
            "sha256": self.fingerprint,
        }

    @classmethod
    def from_text(
        cls,
        text: str,
        tokenizer: Any,
        *,
        windows: int,
        tokens: int,
        seed: int = 0,
        source: str = "text given",
    ) -> Calibration:
        """Cut a text into windows that do not overlap, and draw `windows` of them.

        A text that holds fewer gives all that it has; what was used is in `to_dict`. The windows
        stay in the text's order, so that only which ones were drawn depends on the seed.

        Raises InputError for a text shorter than one window.
        """
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) // tokens
        if not whole:
            raise InputError(
                f"The calibration text has {len(ids)} tokens, and one window is {tokens}: give "
                f"more text, or shorter windows."
            )
        cut = torch.tensor(ids[: whole * tokens], dtype=torch.int64).view(whole, tokens)
        if whole > windows:
            drawn = np.random.default_rng(seed).choice(whole, size=windows, replace=False)
            cut = cut[torch.from_numpy(np.sort(drawn))]
        return cls(cut, source)

    @classmethod
    def read(
        cls, files: Sequence[StrPath], tokenizer: Any, *, windows: int, tokens: int, seed: int = 0
    ) -> Calibration:
        """From text files, UTF-8, plain or .gz; raises InputError for one that cannot be read."""
        texts = [read_text(file) for file in files]
        names = ", ".join(Path(file).name for file in files)
        return cls.from_text(
            "\n\n".join(texts), tokenizer, windows=windows, tokens=tokens, seed=seed, source=names
        )
