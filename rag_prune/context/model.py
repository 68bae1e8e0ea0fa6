"""The network behind both engines: one encoder with two linear rows on its raw token states.

Row 0 of the token classifier says whether a token's sentence helps to answer; row 1, read at the
first token, whether the passage does (Provence, arXiv:2501.16214, §3: one pass prunes and ranks).
Token types stay zero and both heads are linear, so the same checkpoint is a stock token classifier
for transformers and vLLM. The `late` engine uses the same encoder on question and passage apart,
and six numbers more: how cosines become logits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

KEEP, RELEVANCE = 0, 1


class PrunerModel(nn.Module):
    """`classifier` is any transformers token classifier with two labels; `late` is (2, 3):
    for keep and relevance, the weights of cos(question, sentence), cos(question, passage) and 1.
    """

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        # Where an untrained encoder already stands: half the passage's cosine helps its sentences.
        self.late = nn.Parameter(torch.tensor([[18.0, 7.0, -14.0], [8.0, 16.0, -12.0]]))

    def joint(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, 2) logits of joint reading."""
        logits: Tensor = self.classifier(input_ids=ids, attention_mask=mask).logits
        return logits.float()

    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens, hidden) last hidden states."""
        encoder = getattr(self.classifier, self.classifier.base_model_prefix)
        states: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states.float()


def pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Right-pad id rows to one (batch, tokens) tensor and its attention mask."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), pad_id, dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself; elsewhere it is many times slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def fast_dtype(device: torch.device) -> torch.dtype:
    """The shortest type that the device multiplies faster than float32, or float32 itself."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if device.type == "cpu" and fast_bfloat16() else torch.float32


def joint_ids(
    tokenizer: Any, question: list[int], title: list[int], passage: list[int]
) -> list[int]:
    """[CLS] question [SEP] title [SEP] passage [SEP]; without a title its part is left out."""
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [cls, *question, sep, *([*title, sep] if title else []), *passage, sep]


def alone_ids(tokenizer: Any, title: list[int], passage: list[int]) -> list[int]:
    """[CLS] title [SEP] passage [SEP]."""
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [cls, *([*title, sep] if title else []), *passage, sep]
