"""What a causal language model says of rows: how well it foretells the response, and how it sees
the text. The model and its tokenizer are given, in evaluation mode; nothing is loaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from data_prune.fingerprint import fingerprint
from data_prune.pairs import batches, encode, padded
from prune_core.errors import InputError

_LOGITS = 2**27  # numbers at once: half a gigabyte in float32
_TOKENS = 8192  # at once, where only hidden states are made


class _Model:
    """A model with its tokenizer, known again by what its answers depend on."""

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int | None, usual: int) -> None:
        if model.training:
            raise InputError(
                "The model is in training mode, where dropout makes its answers random: call "
                "model.eval() first."
            )
        window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or usual
        if max_tokens is None:
            max_tokens = min(usual, window)
        if not 2 <= max_tokens <= window:
            raise InputError(
                f"max_tokens must be a whole number from 2 to {window}, which the model reads at "
                f"once, got {max_tokens!r}: longer texts are cut there."
            )
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the weights, the architecture and the vocabulary, and where texts are cut."""
        return {**fingerprint(self.model, self.tokenizer), "tokens": self.max_tokens}


class Losses(_Model):
    """Mean loss a token of each response: after its prompt, and alone.

    What stands before a response is "{prompt}\\n" and "\\n", so that both times it begins a line
    and its first token counts; the tokens scored are the same. Prompt and response are cut
    together, at the response's end, to `max_tokens`; where the prompt leaves no room both are NaN.

    model, tokenizer: a causal model of transformers, in evaluation mode.   max_tokens: 1,024 as in
    Superfiltering's code, or the model's window if that is shorter; Cherry's code cuts at 512.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int | None = None) -> None:
        super().__init__(model, tokenizer, max_tokens, usual=1024)
        self._alone = encode(tokenizer, "\n", "", self.max_tokens)[0]
        if not self._alone:
            raise InputError(
                "The tokenizer makes no token of a line break and begins with none, so nothing "
                "would stand before a response alone: use the tokenizer of a causal model."
            )

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float32]:
        """(n, 2) negative log-likelihoods in nats: [conditional, alone].

        The same pair gets the same two numbers in any company, up to the last bits.
        """
        after = [
            encode(self.tokenizer, f"{prompt}\n", response, self.max_tokens)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        alone = [(self._alone + ids[start:], len(self._alone)) for ids, start in after]
        return np.array([self._mean(after), self._mean(alone)], dtype=np.float32).T

    def _mean(self, sequences: list[tuple[list[int], int]]) -> list[float]:
        means = [float("nan")] * len(sequences)
        some = [i for i, (ids, start) in enumerate(sequences) if len(ids) > start]
        lengths = [len(sequences[i][0]) for i in some]
        for batch in batches(lengths, _LOGITS // self.model.config.get_text_config().vocab_size):
            rows = [some[j] for j in batch]
            inputs = padded([sequences[i][0] for i in rows], self.model.device)
            # Logits of position p are of token p + 1; those before the first response are not made.
            first = min(sequences[i][1] for i in rows) - 1
            places = torch.arange(first, inputs["input_ids"].shape[1], device=self.model.device)
            logits = self.model(**inputs, use_cache=False, logits_to_keep=places).logits
            for j, i in enumerate(rows):
                ids, start = sequences[i]
                said = logits[j, start - 1 - first : len(ids) - 1 - first].float()
                means[i] = float(cross_entropy(said, inputs["input_ids"][j, start : len(ids)]))
        return means


class Representations(_Model):
    """An encoder: the mean of a text's last hidden states, of which later ones count for more.

    Token i of T has the weight i / (1 + 2 + … + T), since only late tokens of a causal model have
    seen the text (Muennighoff, "SGPT", 2022, arXiv:2202.08904, as RDS+ does, arXiv:2503.01807; its
    code also writes marks of the roles and a last </s>: here the text is as it is).

    model, tokenizer: a causal model of transformers, in evaluation mode.   max_tokens: 2,048 as in
    RDS+'s code, or the model's window if that is shorter.
    """

    def __init__(self, model: Any, tokenizer: Any, *, max_tokens: int | None = None) -> None:
        super().__init__(model, tokenizer, max_tokens, usual=2048)

    @torch.inference_mode()
    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """(n, width) float32, not normalised; zeros for a text without tokens."""
        sequences = [encode(self.tokenizer, text, "", self.max_tokens)[0] for text in texts]
        some = [i for i, ids in enumerate(sequences) if ids]
        width = self.model.config.get_text_config().hidden_size
        vectors = np.zeros((len(texts), width), dtype=np.float32)
        for batch in batches([len(sequences[i]) for i in some], _TOKENS):
            rows = [some[j] for j in batch]
            inputs = padded([sequences[i] for i in rows], self.model.device)
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state.float()
            weights = inputs["attention_mask"].cumsum(1) * inputs["attention_mask"]
            weights = weights / weights.sum(dim=1, keepdim=True)
            vectors[rows] = (weights[:, :, None] * hidden).sum(dim=1).cpu().numpy()
        return vectors
