"""What a request may say and what an answer looks like: JSON bodies in, JSON bodies out.

`/v1/prune` is ours and strict: a misspelt field is an error. `/v1/rerank` is the schema that Jina,
Cohere (v1 and v2) and vLLM share, and lenient where theirs differ: fields that only steer how their
models read are ignored, since here every document is read whole. Cohere's `relevant_spans`
(v2) is answered from the kept sentences.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prune_core.errors import InputError, did_you_mean
from rag_prune.context.pruner import DEFAULT_THRESHOLD
from rag_prune.context.result import Budget, PassageLike, PrunedContext

BUDGETS = ("threshold", "keep_ratio", "max_tokens")
PRUNE_FIELDS = ("model", "question", "passages", *BUDGETS, "top_k", "reorder")


@dataclass(frozen=True)
class Asked:
    """A request that was understood.

    top_n, return_documents, max_spans: of `/v1/rerank` alone; `max_spans` is 0 without
    `relevant_spans`.
    """

    question: str
    passages: Sequence[PassageLike]
    budget: Budget
    reorder: bool = True
    top_n: int | None = None
    return_documents: bool = True
    max_spans: int = 0

    @property
    def texts(self) -> list[str]:
        return [p if isinstance(p, str) else p["text"] for p in self.passages]


def read_json(body: bytes) -> dict[str, Any]:
    """Raises InputError unless the body is one JSON object, without NaN or a field twice."""
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_no_repeat)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8
        raise InputError(f"The body is not JSON ({error}): send one JSON object.") from None
    if not isinstance(value, dict):
        raise InputError(f"The body must be a JSON object, got {_kind(value)}.")
    return value


def read_prune(body: Mapping[str, Any], tokenizer: Any = None) -> Asked:
    """The body of `/v1/prune`. `tokenizer` is what `max_tokens` counts with.

    Raises InputError for an unknown field, a wrong type, two budgets, or one outside its range.
    """
    for name in body:
        if name not in PRUNE_FIELDS:
            raise InputError(f"Unknown field {name!r}. {did_you_mean(name, PRUNE_FIELDS)}")
    _typed(body, "model", str)
    budgets = {name: body.get(name) for name in BUDGETS}
    if budgets["max_tokens"] is not None and tokenizer is None:
        raise InputError(
            "max_tokens needs the tokenizer of the model that reads the text, and this server was "
            "started without --tokenizer: use threshold or keep_ratio."
        )
    if all(value is None for value in budgets.values()):
        budgets["threshold"] = DEFAULT_THRESHOLD
    return Asked(
        _required(body, "question", str),
        _required(body, "passages", list),
        Budget(**budgets, tokenizer=tokenizer, top_k=body.get("top_k")),
        reorder=_typed(body, "reorder", bool, default=True),
    )


def read_rerank(body: Mapping[str, Any]) -> Asked:
    """The body of `/v1/rerank`. Raises InputError for a wrong type or value."""
    _typed(body, "model", str)
    documents = _required(body, "documents", list)
    for name in _typed(body, "rank_fields", list, default=[]):
        if name not in ("title", "text"):
            raise InputError(
                f"rank_fields may name 'title' and 'text', got {name!r}: put what shall be ranked "
                "into a document's 'text'."
            )
    spans = _typed(body, "relevant_spans", dict, default={})
    mode = spans.get("mode", "disabled")
    if mode not in ("enabled", "disabled"):
        raise InputError(f"relevant_spans.mode must be 'enabled' or 'disabled', got {mode!r}.")
    threshold = spans.get("threshold")
    most = _count(spans, "max_spans", least=1)
    return Asked(
        _required(body, "query", str),
        documents,
        Budget(threshold=DEFAULT_THRESHOLD if threshold is None else threshold),
        top_n=_count(body, "top_n", least=0) or None,  # vLLM's clients send 0 for "all"
        return_documents=_typed(body, "return_documents", bool, default=True),
        max_spans=(most or 10**9) if mode == "enabled" else 0,
    )


def prune_answer(result: PrunedContext, model: str) -> dict[str, Any]:
    """`text` of a passage is what is kept of it; `start` and `end` count in the text sent."""
    whole = result.to_dict()
    passages = [
        told | {"text": passage.text}
        for told, passage in zip(whole["passages"], result.passages, strict=True)
    ]
    return {"id": f"prune-{uuid.uuid4().hex}", "model": model} | whole | {"passages": passages}


def rerank_answer(asked: Asked, result: PrunedContext, model: str, tokens: int) -> dict[str, Any]:
    """Documents best first; `tokens` were read for it."""
    results, texts = [], asked.texts
    for passage in sorted(result.passages, key=lambda p: p.rank)[: asked.top_n]:
        told: dict[str, Any] = {"index": passage.index, "relevance_score": passage.relevance}
        if asked.return_documents:
            told["document"] = {"text": texts[passage.index]}
        best = sorted(passage.kept, key=lambda s: -s.score)[: asked.max_spans]
        if best:
            told["relevant_spans"] = [
                {"start": s.start, "end": s.end, "score": s.score} for s in best
            ]
        results.append(told)
    return {
        "id": f"rerank-{uuid.uuid4().hex}",
        "object": "list",
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"billed_units": {"search_units": 0}, "tokens": {"input_tokens": tokens}},
    }


def write_json(value: Any) -> bytes:
    # JSON may spell a lone surrogate, which UTF-8 cannot hold: it stays spelled.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def _no_constant(name: str) -> None:
    raise InputError(f"The body has {name}, which is not JSON: send a number.")


def _no_repeat(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"The field {twice!r} stands twice in one object: send it once.")
    return seen


_KINDS = {
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def _kind(value: object) -> str:
    return _KINDS[type(value)]


def _typed(body: Mapping[str, Any], name: str, kind: type, *, default: Any = None) -> Any:
    """The field, or `default` where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise InputError(f"'{name}' must be {_KINDS[kind]}, got {_kind(value)}.")
    return value


def _required(body: Mapping[str, Any], name: str, kind: type) -> Any:
    value = _typed(body, name, kind)
    if value is None:
        raise InputError(f"The body must have '{name}', {_KINDS[kind]}; it has {sorted(body)}.")
    return value


def _count(body: Mapping[str, Any], name: str, least: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"'{name}' must be a whole number >= {least}, got {json.dumps(value)}.")
    return value
