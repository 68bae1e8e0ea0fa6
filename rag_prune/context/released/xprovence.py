"""XProvence (naver/xprovence-reranker-bgem3-v1, -v2): Provence's rule on XLM-R, 8192 tokens.

Paper: XProvence: zero-cost multilingual context pruning (2026), arXiv:2601.18886; the owners'
    training code in naver/bergen, pull request 49 (scripts/xprovence).
Keeps and differs as Provence does. The released files could not be read where this was written:
    the names of the tensors are those of the training code. A file in which the ranking head is
    still the one of the reranker that training began with (`classifier.dense`, `classifier.
    out_proj`) loads too; anything else is refused with its names. That the question is normalised
    as Provence's is assumed, not verified.
Cost: one pass a window of each passage, for every question.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers import XLMRobertaModel
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaClassificationHead

from rag_prune.context.released.base import columns, positions, sub_config
from rag_prune.context.released.provence import Provence


class XProvenceNetwork(nn.Module):
    """XLM-R with a ranking head, pooled or the reranker's, and a linear keep head."""

    def __init__(self, config: Any, pooled: bool) -> None:
        super().__init__()
        self.roberta: nn.Module = XLMRobertaModel(  # type: ignore[no-untyped-call]
            config, add_pooling_layer=pooled
        )
        self.classifier: nn.Module = (
            nn.Linear(config.hidden_size, config.num_labels)
            if pooled
            else XLMRobertaClassificationHead(config)  # type: ignore[no-untyped-call]
        )
        self.token_classifier = nn.Linear(config.hidden_size, 2)

    def joint(self, ids: Tensor, mask: Tensor) -> Tensor:
        out = self.roberta(input_ids=ids, attention_mask=mask)
        states = out.last_hidden_state
        ranking = self.classifier(states if out.pooler_output is None else out.pooler_output)
        return columns(self.token_classifier(states), ranking[:, 0])


class XProvence(Provence):
    """Provence's rule over another encoder."""

    name = "xprovence"

    @classmethod
    def build(cls, config: dict[str, Any], names: Iterable[str]) -> tuple[nn.Module, int]:
        stock = sub_config("xlm-roberta", config)
        pooled = not any(name.startswith("classifier.dense.") for name in names)
        return XProvenceNetwork(stock, pooled), positions(stock)
