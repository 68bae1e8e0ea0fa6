"""What the adapters share: how a document is read, and what its metadata gains.

Every framework's document is a text with metadata. A string `metadata["title"]` is shown to the
pruner. Cut documents gain `relevance_score`; `keep_ratio`, the share of their characters that
stayed; and `kept_spans`, [[start, end], …] into the text that was given, whose slices joined are
the new one: plain JSON types.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prune_core.errors import CheckpointError
from rag_prune.context.result import PassageLike, PrunedPassage


def as_passage(text: str, metadata: Mapping[str, Any]) -> PassageLike:
    """A document as the pruner reads it."""
    title = metadata.get("title")
    return {"text": text, "title": title if isinstance(title, str) else None}


def new_metadata(text: str, passage: PrunedPassage) -> dict[str, Any]:
    """What the metadata of a document gains; `text` is what it was, of which something stayed."""
    return {
        "relevance_score": passage.relevance,
        "keep_ratio": len(passage.text) / len(text),
        "kept_spans": [[sentence.start, sentence.end] for sentence in passage.kept],
    }


def load_tokenizer(name_or_folder: str) -> Any:
    """The transformers tokenizer of a folder or hub name; raises CheckpointError without one."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"tokenizer='{name_or_folder}' is neither a folder here nor a model on the hub with a "
            f"tokenizer: name the model that reads the text. {error}"
        ) from error
