"""Prompts with their responses as tokens, cut exactly between the two, in batches of like lengths.

tokenizer: of transformers, for a causal model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Template = Literal["plain", "chat"]


def begin(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text: Llama's has one, GPT-2's none."""
    return [token for token in tokenizer("")["input_ids"] if token == tokenizer.bos_token_id]


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Of the text alone, however long. Nothing of the tokenizer is set, so threads may share it."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def worded(tokenizer: Any, prompt: str, template: Template) -> str:
    """What stands before the response: "plain", the prompt on lines of its own; "chat", a user's
    turn in the words of the model's own template, up to where the assistant begins to speak."""
    if template == "plain":
        return f"{prompt}\n"
    turn = [{"role": "user", "content": prompt}]
    text: str = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return text


def encode(
    tokenizer: Any, prompt: str, response: str, max_tokens: int | None = None
) -> tuple[list[int], int]:
    """The first `max_tokens` tokens of both, or all, and where the response starts among them.

    They are encoded apart, so that no token is of both: what is scored belongs to the response,
    and is the same tokens whatever the prompt. The response is cut, and empty where the prompt
    fills all of it; then its start is `max_tokens`.
    """
    before = tokens_of(tokenizer, prompt)
    first = begin(tokenizer)
    if before[: len(first)] != first:  # a chat template may have begun the text itself
        before = first + before
    before = before[:max_tokens]
    ids = [*before, *tokens_of(tokenizer, response)][:max_tokens]
    return ids, len(before)


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Places of all sequences, the shortest first, in batches of at most `tokens`, padding counted.

    A longer sequence has a batch of its own.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if found and (len(found[-1]) + 1) * lengths[i] <= tokens:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def padded(sequences: Sequence[Sequence[int]], device: Any = None) -> dict[str, Tensor]:
    """input_ids and attention_mask, (sequences, longest), padded on the right: by a token 0, which
    a causal model sees only after all that counts."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for j, sequence in enumerate(sequences):
        ids[j, : len(sequence)] = torch.tensor(sequence)
        mask[j, : len(sequence)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
