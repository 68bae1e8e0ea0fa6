"""What the two engines are trained on: losses of a step's questions, own passages, hard ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_prune.context.model import (
    KEEP,
    RELEVANCE,
    PrunerModel,
    alone_ids,
    fast_bfloat16,
    joint_ids,
    pad,
)
from rag_prune.context.train_rows import IGNORED, Piece


def _token_targets(pieces: Sequence[Piece], width: int) -> tuple[Tensor, Tensor]:
    """(batch, width) each: a token's sentence, −1 outside the passage, and label, IGNORED there."""
    sentence = torch.full((len(pieces), width), -1, dtype=torch.long)
    label = torch.full((len(pieces), width), IGNORED, dtype=torch.long)
    for i, p in enumerate(pieces):
        n = len(p.ids)
        if n:
            sentence[i, :n] = torch.from_numpy(p.sentence)
            label[i, :n] = torch.from_numpy(p.labels[p.sentence])
    return sentence, label


def _passage_first(values: Tensor, pieces: Sequence[Piece], lengths: Sequence[int]) -> Tensor:
    """Roll each row of (batch, width, …) so that its passage tokens begin at column 0."""
    rows = []
    for i, p in enumerate(pieces):
        start = lengths[i] - 1 - len(p.ids)  # the passage ends one [SEP] before the row does
        rows.append(torch.roll(values[i], -start, dims=0))
    return torch.stack(rows)


def _pool(values: Tensor, sentence: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mean of (batch, width, d) over sentences -> (batch, n, d), and token counts (batch, n)."""
    one_hot = F.one_hot(sentence.clamp(min=0), n).float() * (sentence >= 0).unsqueeze(-1)
    count = one_hot.sum(1)
    return torch.einsum("bwn,bwd->bnd", one_hot, values) / count.clamp(min=1).unsqueeze(-1), count


def _sentence_targets(pieces: Sequence[Piece], n: int) -> Tensor:
    target = torch.full((len(pieces), n), IGNORED, dtype=torch.long)
    for i, p in enumerate(pieces):
        target[i, : len(p.labels)] = torch.from_numpy(p.labels)
    return target


def _masked_bce(logits: Tensor, target: Tensor) -> Tensor:
    known = target >= 0
    if not known.any():
        return logits.sum() * 0
    return F.binary_cross_entropy_with_logits(logits[known], target[known].float())


def _read(
    forward: Callable[[Tensor, Tensor], Tensor], rows: list[list[int]], pad_id: int
) -> Tensor:
    """The network in bfloat16 where the processor has it; losses stay in float32."""
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
        return forward(*pad(rows, pad_id))


@dataclass(frozen=True, eq=False)
class Verdict:
    """An engine's logits on a step's own and hard passages.

    keep: (2 · questions, n_sentences), own passages first. relevance: (2 · questions,).
    """

    keep: Tensor
    relevance: Tensor

    @property
    def margin(self) -> Tensor:
        """(questions,) by how much the own passage leads the hard one."""
        own, hard = self.relevance.chunk(2)
        return own - hard


def agreement_loss(a: Verdict, b: Verdict, own: list[Piece], hard: list[Piece]) -> Tensor:
    """Both engines learn from their mean, which is better than either of them.

    Sentences by cross-entropy with the mean's probabilities, which also speak of sentences that no
    person marked; passages by the squared difference of margins (Hofstätter et al., Improving
    efficient neural ranking models with cross-architecture knowledge distillation, 2020,
    arXiv:2010.02666, §3.2), with the ensemble as the teacher (Lan et al., Knowledge distillation by
    on-the-fly native ensemble, 2018, arXiv:1806.04606).
    """
    pieces = own + hard
    read = torch.zeros_like(a.keep, dtype=torch.bool)
    for i, p in enumerate(pieces):
        read[i, p.sentence] = True
    keep = ((a.keep + b.keep) / 2).sigmoid().detach()[read]
    margin = ((a.margin + b.margin) / 2).detach()
    loss = torch.zeros(())
    for verdict in (a, b):
        loss = loss + F.binary_cross_entropy_with_logits(verdict.keep[read], keep)
        loss = loss + 0.1 * F.mse_loss(verdict.margin, margin)
    return loss


def joint_loss(
    model: PrunerModel, tokenizer: Any, own: list[Piece], hard: list[Piece]
) -> tuple[Tensor, Verdict]:
    """Keep and relevance losses of the `cross` engine on the questions' own and hard passages."""
    pieces = own + hard
    questions = [p.row.question_ids for p in own] * 2
    ids = [
        joint_ids(tokenizer, q, p.title_ids, p.ids) for q, p in zip(questions, pieces, strict=True)
    ]
    logits = _read(model.joint, ids, tokenizer.pad_token_id)
    keep = _passage_first(logits[..., KEEP], pieces, list(map(len, ids)))
    sentence, label = _token_targets(pieces, keep.shape[1])
    n = max(len(p.labels) for p in pieces)
    pooled, _ = _pool(keep.unsqueeze(-1), sentence, n)
    relevance = logits[:, 0, RELEVANCE]
    is_right = torch.tensor([float(p.row.answered) for p in own] + [0.0] * len(hard))
    pairs = torch.stack([relevance[: len(own)], relevance[len(own) :]], dim=1)
    answered = is_right[: len(own)] > 0
    ranking = (
        F.cross_entropy(pairs[answered], torch.zeros(int(answered.sum()), dtype=torch.long))
        if answered.any()
        else relevance.sum() * 0
    )
    loss = (
        _masked_bce(keep, label)
        + _masked_bce(pooled.squeeze(-1), _sentence_targets(pieces, n))
        + F.binary_cross_entropy_with_logits(relevance, is_right)
        + 0.5 * ranking
    )
    return loss, Verdict(pooled.squeeze(-1), relevance)


def late_loss(
    model: PrunerModel, tokenizer: Any, own: list[Piece], hard: list[Piece]
) -> tuple[Tensor, Verdict]:
    """Losses of the `late` engine: every passage of the batch is a candidate for every question."""
    pieces = own + hard
    ids = [alone_ids(tokenizer, p.title_ids, p.ids) for p in pieces]
    states = _read(model.states, ids, tokenizer.pad_token_id)
    states = _passage_first(states, pieces, list(map(len, ids)))
    asked = [alone_ids(tokenizer, [], p.row.question_ids) for p in own]
    question_states = _read(model.states, asked, tokenizer.pad_token_id)
    q = torch.stack(
        [x[1 : len(row) - 1].sum(0) for x, row in zip(question_states, asked, strict=True)]
    )
    q = F.normalize(q, dim=-1)
    sentence, _ = _token_targets(pieces, states.shape[1])
    n = max(len(p.labels) for p in pieces)
    pooled, count = _pool(states, sentence, n)
    s = F.normalize(pooled, dim=-1)
    whole = F.normalize((pooled * count.unsqueeze(-1)).sum(1), dim=-1)
    cos_s = torch.einsum("qd,pnd->qpn", q, s)
    cos_p = q @ whole.T
    real = (count > 0).unsqueeze(0)
    a, b, c = model.late[KEEP]
    keep = a * cos_s + b * cos_p.unsqueeze(-1) + c
    best = cos_s.masked_fill(~real, -1).amax(-1)
    relevance = (
        model.late[RELEVANCE, 0] * best
        + model.late[RELEVANCE, 1] * cos_p
        + model.late[RELEVANCE, 2]
    )

    # Question i owns passage i and faces passage len(own)+i; others are negatives unless they share
    # its title or text, when they may answer as well and are left out.
    k, m = len(own), len(pieces)
    usable = torch.ones(k, m, dtype=torch.bool)
    for i in range(k):
        for j in range(m):
            if j not in (i, k + i):
                a_row, b_row = own[i].row, pieces[j].row
                same = a_row.passage == b_row.passage or (
                    a_row.title and a_row.title == b_row.title
                )
                usable[i, j] = not same and not any(
                    x in b_row.passage for x in a_row.answers if len(x) > 3
                )
    targets = _sentence_targets(pieces, n)
    rows = torch.arange(k)
    own_target = targets[rows]
    own_keep, hard_keep = keep[rows, rows], keep[rows, rows + k]
    right, wrong = relevance[rows, rows], relevance[rows, rows + k]
    verdict = Verdict(torch.cat([own_keep, hard_keep]), torch.cat([right, wrong]))
    bce = _masked_bce(own_keep, own_target) + _masked_bce(
        hard_keep, torch.where(targets[rows + k] >= 0, 0, IGNORED)
    )
    answered = (own_target == 1).any(-1)
    if not answered.any():
        return bce, verdict
    candidates = usable.unsqueeze(-1) & real
    candidates[rows, rows] &= own_target >= 0
    energy = keep.masked_fill(~candidates, -1e4).flatten(1)
    positive = torch.zeros_like(keep, dtype=torch.bool)
    positive[rows, rows] = own_target == 1
    sentences = energy.logsumexp(1) - energy.masked_fill(~positive.flatten(1), -1e4).logsumexp(1)
    passages = F.cross_entropy(relevance.masked_fill(~usable, -1e4), rows, reduction="none")
    loss: Tensor = (
        bce
        + sentences[answered].mean()
        + passages[answered].mean()
        + F.binary_cross_entropy_with_logits(right, answered.float())
        + F.binary_cross_entropy_with_logits(wrong, torch.zeros(k))
    )
    return loss, verdict
