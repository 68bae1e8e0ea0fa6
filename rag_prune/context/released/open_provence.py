"""OpenProvence (hotchpotch/open-provence-reranker-*) and what is built like it (Zilliz).

Source: github.com/hotchpotch/open_provence (MIT), modeling_open_provence_standalone.py.
Keeps: a sentence whose mean keep probability is above the threshold. One of more tokens than half
    of `max_length` is cut into fragments of that size and scored by the mean of their means.
    Fragments fill blocks greedily, each block with the question in front; a passage's relevance is
    that of its best block. Blocks and all, so that decisions are the owners' at any length.
Two traps: under transformers 5 the last hidden state moved behind ModernBERT's `final_norm`, and
    the keep head was trained on what enters it; older files name the ranking model's tensors
    without `ranking_model.` in front.
Differs from the release: offsets into the caller's string; our sentence ends, and not Punkt's or
    fast-bunkai's; "[SEP]" in a passage is text; with a title the owners' code reads each
    sentence's probabilities as many tokens too early as the title has, and this reads them where
    they stand; a passage that keeps nothing keeps its relevance, which there becomes 0.
Cost: one pass a block of each passage, for every question.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from rag_prune.context.engine import fit_question
from rag_prune.context.model import KEEP, RELEVANCE
from rag_prune.context.released.base import (
    Released,
    ReleasedEngine,
    columns,
    positions,
    probabilities,
    strictly,
    sub_config,
)
from rag_prune.context.result import Passage, Request, Scores
from rag_prune.context.windows import encode_plain

DEFAULT_THRESHOLD = 0.1

Fragment = tuple[int, list[int]]  # number of its sentence, token ids


class OpenProvenceNetwork(nn.Module):
    """Any sequence classifier of transformers, and a linear keep head on its encoder's states."""

    def __init__(self, config: Any, sep: int | None = None) -> None:
        super().__init__()
        config.tie_last_hidden_states = False  # the states that enter ModernBERT's final_norm
        self.ranking_model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
        self.pruning_head = nn.ModuleDict({"classifier": nn.Linear(config.hidden_size, 2)})
        self.sep = sep

    def joint(self, ids: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.sep is not None:  # an encoder with two token types; the passage's is 1
            seps = (ids == self.sep).long()
            inputs["token_type_ids"] = ((seps.cumsum(1) - seps) > 0).long() * mask
        out = self.ranking_model(**inputs, output_hidden_states=True)
        keep = self.pruning_head["classifier"](out.hidden_states[-1])
        return columns(keep, out.logits.reshape(len(ids), -1)[:, 0])


class OpenProvence(ReleasedEngine):
    """Sentences by their mean probability, passages by the ranking model."""

    name = "open_provence"

    def __init__(self, checkpoint: Released) -> None:
        super().__init__(checkpoint)
        config, tokenizer, network = checkpoint.config, checkpoint.tokenizer, checkpoint.model
        given = config.get("default_threadshold", config.get("default_threshold"))  # sic
        self.default_threshold = DEFAULT_THRESHOLD if given is None else float(given)
        self._head, self._middle, self._tail = around(tokenizer)
        stock = network.ranking_model.config
        if getattr(stock, "type_vocab_size", 0) > 1:
            network.sep = tokenizer.sep_token_id
        self._longest = positions(stock)

    @classmethod
    def build(cls, config: dict[str, Any], names: Iterable[str]) -> tuple[nn.Module, int]:
        base = config["base_model_config"]
        stock = sub_config(base["model_type"], base)
        stock.num_labels = config.get("num_labels") or 1
        return OpenProvenceNetwork(stock), int(config.get("max_length", 512))

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if any(name.startswith("ranking_model.") for name in state):
            return state
        return {
            name if name.startswith("pruning_head.") else f"ranking_model.{name}": value
            for name, value in state.items()
        }

    def score(self, requests: Sequence[Request]) -> list[list[Scores]]:
        """For each request its passages' scores, in order; no request sways another."""
        tokenizer, window = self.checkpoint.tokenizer, self.checkpoint.settings.window
        passages = [p for request in requests for p in request.passages]
        questions = encode_plain(tokenizer, [r.question for r in requests])["input_ids"]
        fitted = [fit_question(ids, window - window // 8) for ids in questions]
        asked = [q for q, r in zip(fitted, requests, strict=True) for _ in r.passages]
        fragments = self._fragments(passages)
        special = len(self._head) + len(self._middle) + len(self._tail)
        rows: list[list[int]] = []
        places: list[tuple[int, int, list[Fragment]]] = []
        for i, question in enumerate(asked):
            room = max(1, min(window - 3, self._longest - special) - len(question))
            front = [*self._head, *question, *self._middle]
            for block in blocks(fragments[i], room):
                rows.append([*front, *(t for _, ids in block for t in ids), *self._tail])
                places.append((i, len(front), block))
        means: list[list[list[float]]] = [[[] for _ in range(len(p.spans) + 1)] for p in passages]
        relevance = np.zeros(len(passages))
        # In the order of the rows: a sentence's fragments are summed from first to last.
        for row, values in sorted(
            self.run(self.checkpoint.model.joint, rows), key=lambda pair: pair[0]
        ):
            i, at, block = places[row]
            relevance[i] = max(relevance[i], float(expit(values[0, RELEVANCE])))
            for sentence, ids in block:
                means[i][sentence].append(
                    float(probabilities(values[at : at + len(ids), KEEP]).mean())
                )
                at += len(ids)
        scored = iter(
            Scores(
                float(relevance[i]),
                np.array([strictly(float(np.mean(m))) if m else 0.0 for m in means[i][1:]]),
            )
            for i in range(len(passages))
        )
        return [[next(scored) for _ in request.passages] for request in requests]

    def _fragments(self, passages: Sequence[Passage]) -> list[list[Fragment]]:
        """Each passage's fragments; sentence 0 is the title, which is read and not scored."""
        tokenizer, window = self.checkpoint.tokenizer, self.checkpoint.settings.window
        step = max(16, window // 2)
        texts = [
            [_title(p), *(p.text[start:end] for start, end in p.spans if p.text.strip())]
            for p in passages
        ]
        encoded = iter(encode_plain(tokenizer, [t for ts in texts for t in ts])["input_ids"])
        special = set(tokenizer.all_special_ids)
        out = []
        for sentences in texts:
            cut = [
                (i, ids[low : low + step])
                for i, ids in enumerate(next(encoded) for _ in sentences)
                for low in range(0, len(ids), step)
            ]
            # What would decode to nothing, such as characters the vocabulary lacks, is left out.
            out.append([(i, f) for i, f in cut if not special & set(f) or self._decodes(f)])
        return out

    def _decodes(self, ids: list[int]) -> bool:
        return bool(self.checkpoint.tokenizer.decode(ids, skip_special_tokens=True))


def around(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before, between and after a pair of texts, as the tokenizer sets them."""
    pair = tokenizer("a", "a")
    ids, parts = pair["input_ids"], pair.sequence_ids()
    first, second = parts.index(0), parts.index(1)
    between = [
        i for i, part in zip(ids[first:second], parts[first:second], strict=True) if part is None
    ]
    after = [i for i, part in zip(ids[second:], parts[second:], strict=True) if part is None]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    if not first or not between:  # a template without marks: the owners' code sets its own
        return [cls], [sep], [sep]
    return ids[:first], between, after


def blocks(fragments: Sequence[Fragment], room: int) -> list[list[Fragment]]:
    """Fragments in order, as many as fit in `room` tokens a block; one too long alone is cut."""
    out: list[list[Fragment]] = []
    used = 0
    for sentence, ids in fragments:
        if not out or used + len(ids) > room:
            out.append([])
            used, ids = 0, ids[:room]
        out[-1].append((sentence, ids))
        used += len(ids)
    return out


def _title(passage: Passage) -> str:
    title = (passage.title or "").strip()
    return f"{title}\n" if title else ""
