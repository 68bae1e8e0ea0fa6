"""What a pruned model forgot, row by row: how far its next tokens are from the original's."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data_prune.fingerprint import fingerprint, hash_of
from data_prune.pairs import Template, batches, encode, padded, worded
from prune_core.errors import InputError, check_count

LN2 = math.log(2)
_NEVER = -1e4  # a log-probability whose exponential is 0 in every type, in place of -inf
_COMPARED = 2**21  # numbers at once: 8 MiB in each of some eight working arrays


@torch.no_grad()
def jensen_shannon(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats: KL(p ‖ m) / 2 + KL(q ‖ m) / 2, where m = (p + q) / 2.

    log_p, log_q: [..., V] logits, which are normalised here, or log-probabilities; -inf is allowed.
    Returns [...] in [0, ln 2], in float32, or float64 where one is: exactly 0 for equal inputs,
    exactly the same when they are exchanged, NaN only where an input holds NaN or no distribution.
    Its absolute error in float32 is below 1e-6.

    Raises InputError for shapes that differ.

    Written in the gap d = |ln p - ln q|, where all of it is exact at p = q: with u = 1 - e^-d,
    ln m = max(ln p, ln q) + log1p(-u / 2), which is log-sum-exp(ln p, ln q) - ln 2, and a token
    adds -max(p, q) · [(2 - u) log1p(-u / 2) + (1 - u) d] / 2. No quotient p / m is taken: that is
    NaN where p underflows, as in PASER's code.
    """
    if log_p.shape != log_q.shape:
        raise InputError(
            f"The two models' logits must have one shape, got {tuple(log_p.shape)} and "
            f"{tuple(log_q.shape)}: compare the same places over the same vocabulary."
        )
    dtype = torch.promote_types(torch.float32, torch.promote_types(log_p.dtype, log_q.dtype))
    log_p, log_q = (
        torch.log_softmax(x, dim=-1, dtype=dtype).clamp_(min=_NEVER) for x in (log_p, log_q)
    )
    gap = (log_p - log_q).abs_()
    u = torch.expm1(-gap).neg_()
    terms = torch.log1p(u / -2).mul_(u - 2).sub_(gap.mul_(1 - u))
    terms.mul_(torch.maximum(log_p, log_q).exp_())
    return terms.sum(dim=-1).div_(2).clamp_(0, LN2)


class ResponseDivergence:
    """Mean Jensen-Shannon divergence of two models' next-token distributions over each response.

    d(x, y) = 1/|y| Σ_m JSD(P_original(· | x, y_<m), P_pruned(· | x, y_<m)), in nats, in [0, ln 2]:
    high where pruning hurt what the row asks for.

    Source: He et al., "PASER: post-training data selection for efficient pruned large language
    model recovery" (arXiv:2502.12594), the degradation of a row. The authors' code forwards the
    instruction alone and sums over its tokens, so that longer prompts score higher; here, as in
    the paper, it is the mean over the response. Temperature 1; the whole vocabulary.
    Cost: a forward pass of both models over prompt and response, heads on responses only.

    original, pruned: causal models of transformers in evaluation mode, each on its own device, with
    one vocabulary.   tokenizer: of both.
    template: how a prompt is worded (see `data_prune.pairs.worded`); take the way that the pruned
    model will be trained.
    max_response_tokens: tokens of a response that count, its first; None for all.
    logits_mb: MiB of both models' logits in memory at once, counted as float32. It settles how many
    rows make a batch. A response too long for it is read again for each part of it that fits.

    `truncated` counts the rows so far that did not fit into the models' window: the left of their
    prompts was cut off, after the token that begins every text.

    Raises InputError for a model in training mode, models whose vocabularies are not of one size, a
    tokenizer with more tokens, settings out of range, and a chat template that is not there.
    """

    def __init__(
        self,
        original: Any,
        pruned: Any,
        tokenizer: Any,
        *,
        template: Template = "plain",
        max_response_tokens: int | None = 128,
        logits_mb: int = 512,
    ) -> None:
        numbers = {"max_response_tokens": max_response_tokens, "logits_mb": logits_mb}
        for name, number in numbers.items():
            if number is not None:
                check_count(name, number)
        if template not in get_args(Template):
            raise InputError(f"template must be 'plain' or 'chat', got {template!r}.")
        if template == "chat" and not tokenizer.chat_template:
            raise InputError(
                "template is 'chat', but the tokenizer has no chat template: take 'plain', or set "
                "tokenizer.chat_template."
            )
        if original.training or pruned.training:
            raise InputError(
                "A model is in training mode, where dropout makes its answers random: call "
                "original.eval() and pruned.eval() first."
            )
        configs = [model.config.get_text_config() for model in (original, pruned)]
        sizes = [config.vocab_size for config in configs]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"The original model has a vocabulary of {sizes[0]:,} tokens and the pruned one of "
                f"{sizes[1]:,}: distributions can be compared only over the same tokens. Compare "
                f"models of one vocabulary, or score the rows by their answers."
            )
        if len(tokenizer) > sizes[0]:
            raise InputError(
                f"The tokenizer has {len(tokenizer):,} tokens and the models only {sizes[0]:,}: "
                f"pass the tokenizer that belongs to them."
            )
        windows = [getattr(config, "max_position_embeddings", None) for config in configs]
        self.original, self.pruned, self.tokenizer = original, pruned, tokenizer
        self.template, self.max_response_tokens = template, max_response_tokens
        self.truncated = 0
        self._window = min((window for window in windows if window), default=sys.maxsize)
        self._room = max(1, logits_mb * 2**20 // (2 * 4 * sizes[0]))  # places of both models

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that a score depends on besides its row; reads all weights, the first time."""
        chat = self.tokenizer.chat_template if self.template == "chat" else None
        return {
            "original": fingerprint(self.original, self.tokenizer),
            "pruned": fingerprint(self.pruned, self.tokenizer),
            "template": self.template if chat is None else hash_of(chat),
            "max_response_tokens": self.max_response_tokens,
        }

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> NDArray[np.float64]:
        """(n,) mean divergence of each response, in the order given; NaN for an empty response.

        A row's score is the same in any company, up to float noise.

        Raises InputError for prompts and responses of different number, and for a model whose
        logits are NaN.
        """
        if len(prompts) != len(responses):
            raise InputError(
                f"Each prompt needs its response, got {len(prompts):,} prompts and "
                f"{len(responses):,} responses."
            )
        rows = [self._tokens(*pair) for pair in zip(prompts, responses, strict=True)]
        found = np.full(len(rows), np.nan)
        some = [i for i, (ids, first) in enumerate(rows) if len(ids) > first]
        lengths = [len(rows[i][0]) for i in some]
        with tqdm(desc="divergence", total=len(some), unit="row", disable=None, leave=False) as bar:
            for batch in batches(lengths, self._room):
                places = [some[j] for j in batch]
                found[places] = self._mean([rows[i] for i in places])
                bar.update(len(places))
        return found

    def _tokens(self, prompt: str, response: str) -> tuple[list[int], int]:
        """Tokens of a row within the window, and the first of those that count."""
        ids, start = encode(self.tokenizer, worded(self.tokenizer, prompt, self.template), response)
        if self.max_response_tokens is not None:
            ids = ids[: start + self.max_response_tokens]
        if len(ids) > max(start, self._window):
            self.truncated += 1
            ids = ids[: max(start, 1) + self._window - 1]
            keep = int(start > 0 and ids[0] == self.tokenizer.bos_token_id)
            over = len(ids) - self._window
            ids, start = ids[:keep] + ids[keep + over :], start - over
        return ids, max(start, 1)  # nothing foretells the first token of all

    def _mean(self, rows: list[tuple[list[int], int]]) -> NDArray[np.float64]:
        inputs = padded([ids for ids, _ in rows])
        # Logits of a place are of the token after it.
        first, last = min(start for _, start in rows) - 1, inputs["input_ids"].shape[1] - 1
        counts = torch.zeros(len(rows), last - first, dtype=torch.bool)
        for j, (ids, start) in enumerate(rows):
            counts[j, start - 1 - first : len(ids) - 1 - first] = True
        sums = torch.zeros(len(rows), dtype=torch.float64)
        step = max(1, self._room // len(rows))
        for at in range(first, last, step):
            places = torch.arange(at, min(at + step, last))
            counted = counts[:, places - first]
            divergences = torch.zeros(counted.shape, dtype=torch.float64)
            divergences[counted] = self._divergences(inputs, places, counted)
            sums += divergences.sum(dim=1)
        mean: NDArray[np.float64] = (sums / counts.sum(dim=1)).numpy()
        return mean

    def _divergences(self, inputs: dict[str, Tensor], places: Tensor, counted: Tensor) -> Tensor:
        """JSD at the places that count, float64, in the order of their rows."""
        end = int(places[-1]) + 1
        inputs = {name: tensor[:, :end] for name, tensor in inputs.items()}
        (which,) = counted.flatten().nonzero(as_tuple=True)
        logits = [_logits(model, inputs, places) for model in (self.original, self.pruned)]
        found = []
        step = max(1, _COMPARED // logits[0].shape[-1])
        for at in range(0, len(which), step):
            p, q = (x[which[at : at + step].to(x.device)] for x in logits)
            found.append(jensen_shannon(p, q.to(p.device)))
        divergences = torch.cat(found).double().cpu()
        if divergences.isnan().any():
            name = "original" if logits[0].isnan().any() else "pruned"
            raise InputError(
                f"The {name} model's logits are not numbers (NaN): its weights are broken, or too "
                f"large for {logits[0].dtype}. Load it in float32 or bfloat16."
            )
        return divergences


def _logits(model: Any, inputs: dict[str, Tensor], places: Tensor) -> Tensor:
    """(rows · places, V) by the model's own forward, which may scale or cap what its head says."""
    device = model.device
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    out = model(**inputs, use_cache=False, logits_to_keep=places.to(device))
    logits: Tensor = out.logits
    if logits.shape[1] != len(places):
        raise InputError(
            f"{type(model).__name__} gives logits of all places where some were asked for "
            f"(logits_to_keep): pass a causal model of transformers itself, adapters merged."
        )
    return logits.flatten(0, 1)
