"""vLLM hosts the pruner: its network runs as a pooling model, question and passages come as text.

    python -m rag_prune.context.export pruner-f32
    vllm serve pruner-f32 --runner pooling --dtype float32

    POST /pooling {"model": …, "data": {"question": …, "passages": […], "threshold": 0.1}}

The answer's `data` is `PrunedContext.to_dict()`. Sentences, tokens and windows are those of the
in-process engine `provence`, because they are made by it: vLLM only runs the rows it asks for, so
decisions are the same as long as logits are. `late` and `both` need states that vLLM does not give
back beside a token classifier's logits.

vLLM finds this file through the entry point `vllm.io_processor_plugins`, and an exported
config.json asks for it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer
from vllm import PoolingParams
from vllm.plugins.io_processors.interface import IOProcessor

from prune_core.errors import CheckpointError, InputError
from prune_core.recipe import parse_recipe
from rag_prune.context.checkpoints import Checkpoint, read_section
from rag_prune.context.cross import Cross
from rag_prune.context.engine import Floats
from rag_prune.context.model import PrunerModel
from rag_prune.context.pruner import DEFAULT_THRESHOLD
from rag_prune.context.result import Budget, PrunedContext, Request

MAX_PASSAGES = 1_000  # a request
MAX_CHARACTERS = 1_000_000  # a request, question and titles included
MAX_PENDING = 1_024  # requests; what vLLM never answers (a client that left) must not pile up

Rows = dict[tuple[int, ...], Floats | None]


@dataclass(frozen=True)
class Question:
    """The `data` of a request; the fields are arguments of `ContextPruner.prune`."""

    question: str
    passages: list[Any]
    threshold: float | None = None
    keep_ratio: float | None = None
    top_k: int | None = None
    reorder: bool = True


@dataclass(frozen=True)
class Job:
    """A request under way."""

    request: Request
    budget: Budget
    reorder: bool


class HostedCross(Cross):
    """`Cross` with its network elsewhere: each row of token ids is looked up in `known`.

    A row that is not there is noted with no output, so a first call of `score` says what to run.
    """

    def __init__(self, checkpoint: Checkpoint, known: Rows) -> None:
        super().__init__(checkpoint)
        self.known = known

    def run(
        self, forward: Callable[[Tensor, Tensor], Tensor], rows: Sequence[list[int]]
    ) -> Iterator[tuple[int, Floats]]:
        for i, row in enumerate(rows):
            if (values := self.known.setdefault(tuple(row), None)) is not None:
                yield i, values


class PruningProcessor(IOProcessor[Job, dict[str, Any]]):  # type: ignore[misc]
    """From text to rows of token ids, and from their logits to spans."""

    def __init__(self, vllm_config: Any, renderer: Any) -> None:
        super().__init__(vllm_config, renderer)
        model = vllm_config.model_config
        section = getattr(model.hf_config, "prunekit", None)
        if not isinstance(section, dict):
            raise CheckpointError(
                f"{model.model} has no 'prunekit' section in its config.json, so it is not a "
                "prunekit pruner. Write one with `python -m rag_prune.context.export FOLDER`."
            )
        settings, _ = read_section(section, model.model)
        if model.max_model_len < settings.window:
            raise CheckpointError(
                f"{model.model} reads windows of {settings.window} tokens, and vLLM was told to "
                f"read {model.max_model_len}: leave out --max-model-len."
            )
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=False
        )
        self.checkpoint = Checkpoint(PrunerModel(None), tokenizer, settings, "hosted by vLLM")
        # By the identity of vLLM's id string, which is kept alive here: its text may be the
        # client's X-Request-Id, and two clients may send the same one.
        self.pending: OrderedDict[int, tuple[str | None, Job]] = OrderedDict()

    def parse_data(self, data: object) -> Job:
        """Raises InputError, which vLLM answers as a 400, for all that `prune` refuses."""
        if not isinstance(data, dict):
            raise InputError(
                f"`data` must be an object with a question and passages, got {type(data).__name__}."
            )
        asked = parse_recipe(data, Question)
        threshold = asked.threshold
        if threshold is None and asked.keep_ratio is None:
            threshold = DEFAULT_THRESHOLD
        budget = Budget(threshold, asked.keep_ratio, top_k=asked.top_k)
        if len(asked.passages) > MAX_PASSAGES:
            raise InputError(
                f"A request may have {MAX_PASSAGES} passages, got {len(asked.passages)}: send "
                "several requests."
            )
        # Sentences are split only after the size is known to be fair.
        size = len(asked.question) + sum(
            len(part)
            for p in asked.passages
            for part in ((p.get("text"), p.get("title")) if isinstance(p, dict) else (p,))
            if isinstance(part, str)
        )
        if size > MAX_CHARACTERS:
            raise InputError(
                f"A request may have {MAX_CHARACTERS} characters, got {size}: send several "
                "requests."
            )
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"The request holds half of a character ({error.object[error.start]!r}, a lone "
                "surrogate), which the answer could not: send whole ones."
            ) from error
        return Job(Request.read(asked.question, asked.passages), budget, asked.reorder)

    def pre_process(
        self, prompt: Job, request_id: str | None = None, **kwargs: Any
    ) -> list[dict[str, list[int]]]:
        rows: Rows = {}
        HostedCross(self.checkpoint, rows).score([prompt.request])
        self.pending[id(request_id)] = request_id, prompt
        while len(self.pending) > MAX_PENDING:
            self.pending.popitem(last=False)
        # vLLM wants at least one prompt, and passages without a token ask for none.
        return [{"prompt_token_ids": list(row)} for row in rows or [self._bare_row()]]

    def merge_pooling_params(self, params: PoolingParams | None = None) -> PoolingParams:
        """Raw logits: an activation would mix the two rows."""
        return PoolingParams(task="token_classify", use_activation=False)

    def post_process(
        self, model_output: Sequence[Any], request_id: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        if id(request_id) not in self.pending:
            raise InputError(
                f"More than {MAX_PENDING} requests came after this one before it was answered: "
                "send it again."
            )
        _, job = self.pending.pop(id(request_id))
        logits: Rows = {
            tuple(output.prompt_token_ids): output.outputs.data.double().cpu().numpy()
            for output in model_output
        }
        [scores] = HostedCross(self.checkpoint, logits).score([job.request])
        return PrunedContext.from_scores(
            job.request, scores, job.budget, method=Cross.name, reorder=job.reorder
        ).to_dict()

    def _bare_row(self) -> tuple[int, int]:
        return self.checkpoint.tokenizer.cls_token_id, self.checkpoint.tokenizer.sep_token_id


def register() -> str:
    """The entry point: where vLLM finds the class."""
    return f"{__name__}.{PruningProcessor.__name__}"
