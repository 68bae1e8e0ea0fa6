"""Many prompts at once, each answered: by a server, or in this process by vLLM or transformers.

All are what `rag_prune.context.label` calls an Ask, whose prompts are answered in JSON, and what
`data_prune.self_distill` calls one. vLLM is imported when its model is loaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from data_prune.self_distill import Request
from pipelines.language_model import Endpoint, EndpointError, LocalModel, chat_ids
from prune_core.errors import CheckpointError, InputError, require
from rag_prune.context.label import Prompt, Reply

MAX_NEW_TOKENS = 256  # of a label: an answer and its numbers take 20 to 60

# Of one prompt, which another setting or a shorter passage may cure; 200 is a reply without text.
_REFUSALS = (200, 400, 413, 422)
_PASSING = (408, 425, 429)  # and 500 and above: the server may do better in a while


def _request(
    prompt: Prompt | Request, max_new_tokens: int = MAX_NEW_TOKENS
) -> tuple[Request, Mapping[str, Any] | None]:
    """A prompt of either kind as a request, and the JSON schema of its reply."""
    if isinstance(prompt, Request):
        return prompt, None
    messages = ({"role": "user", "content": prompt.text},)
    return Request(messages, max_new_tokens, temperature=0, seed=0), prompt.schema


def _too_long(tokens: int, longest: int) -> Reply:
    said = f"The prompt has {tokens:,} tokens; the model reads {longest:,}."
    return Reply(said, refused=True)


@dataclass(frozen=True)
class AskEndpoint:
    """A server that speaks OpenAI's protocol, asked `concurrency` prompts at a time.

    The schema goes as `response_format`, which vLLM turns into its own `structured_outputs` and
    other servers understand too. A server that does not answer, or is too busy, is asked again
    after `pause` seconds, then after twice that, `attempts` times in all. `max_new_tokens` is for
    prompts that do not say their own.
    """

    endpoint: Endpoint
    concurrency: int = 32
    max_new_tokens: int = MAX_NEW_TOKENS
    attempts: int = 6
    pause: float = 1.0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.attempts < 1:
            raise InputError(
                "concurrency and attempts must be at least 1, got "
                f"{self.concurrency} and {self.attempts}."
            )

    @property
    def name(self) -> str:
        """The model's name, which stands for its replies."""
        return self.endpoint.model

    def __call__(self, prompts: Sequence[Prompt | Request]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies as they come; a prompt that the server will not read is `refused`.

        Raises:
            EndpointError: The server stays unreachable or busy, or does not know the model or key.
        """
        import httpx

        unlimited = httpx.Limits(max_connections=None, max_keepalive_connections=self.concurrency)
        with httpx.Client(limits=unlimited) as client:
            pool = ThreadPoolExecutor(self.concurrency)
            try:
                futures = {
                    pool.submit(self._reply, prompt, client): i for i, prompt in enumerate(prompts)
                }
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:  # also when the caller stops: nothing more is sent
                pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, prompt: Prompt | Request, client: Any) -> Reply:
        request, schema = _request(prompt, self.max_new_tokens)
        for attempt in range(self.attempts):
            try:
                done = self.endpoint.complete(
                    request.messages,
                    request.max_new_tokens,
                    temperature=request.temperature,
                    seed=request.seed if request.temperature else None,
                    schema=schema,
                    client=client,
                )
                return Reply(done.text, done.prompt_tokens, done.new_tokens)
            except EndpointError as error:
                if error.status in _REFUSALS:
                    return Reply(str(error), refused=True)
                passing = error.status is None or error.status >= 500 or error.status in _PASSING
                if not passing or attempt + 1 == self.attempts:
                    raise
                time.sleep(self.pause * 2**attempt)
        raise AssertionError("the last attempt returns or raises")


class AskVllm:
    """A model loaded by vLLM in this process; xgrammar holds its replies to a schema."""

    def __init__(self, llm: Any, name: str, *, batch: int = 512) -> None:
        self.llm = llm
        self.name = name
        self.batch = batch

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str]) -> AskVllm:
        """Load a folder or a hub name: safetensors only, and never remote code.

        Raises:
            MissingExtra: vLLM is not installed.
            CheckpointError: vLLM cannot load the model.
        """
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        vllm: Any = require("vllm", extra="serve", purpose="Asking a model in this process")
        platforms: Any = import_module("vllm.platforms")
        on_cpu = platforms.current_platform.is_cpu()
        # A start without compiling, and numbers that every processor multiplies fast.
        settings = {"enforce_eager": True, "dtype": "float32"} if on_cpu else {}
        try:
            llm = vllm.LLM(
                model=os.fspath(name_or_folder),
                load_format="safetensors",
                trust_remote_code=False,
                seed=0,
                # Small models fill their reply with spaces where the grammar allows some.
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                **settings,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"vLLM cannot load '{name_or_folder}': name a folder, or a name on the hub, with a "
                f"config, a tokenizer and safetensors weights. {error}"
            ) from error
        return cls(llm, Path(name_or_folder).name, batch=32 if on_cpu else 512)

    def __call__(self, prompts: Sequence[Prompt | Request]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies, a batch at a time; a prompt that is too long is `refused`."""
        sampling: Any = import_module("vllm.sampling_params")
        tokenizer = self.llm.get_tokenizer()
        window = self.llm.llm_engine.model_config.max_model_len
        for first in range(0, len(prompts), self.batch):
            numbers, inputs, params = [], [], []
            for i, prompt in enumerate(prompts[first : first + self.batch], first):
                request, schema = _request(prompt)
                ids = chat_ids(tokenizer, request.messages)
                longest = window - request.max_new_tokens
                if len(ids) > longest:
                    yield i, _too_long(len(ids), longest)
                    continue
                numbers.append(i)
                inputs.append({"prompt_token_ids": ids})
                form = None if schema is None else sampling.StructuredOutputsParams(json=schema)
                params.append(
                    sampling.SamplingParams(
                        temperature=request.temperature,
                        seed=request.seed if request.temperature else None,
                        max_tokens=request.max_new_tokens,
                        structured_outputs=form,
                    )
                )
            outputs = self.llm.generate(inputs, params, use_tqdm=False) if inputs else []
            for i, output in zip(numbers, outputs, strict=True):
                written = output.outputs[0]
                yield i, Reply(written.text, len(output.prompt_token_ids), len(written.token_ids))


class AskLocal:
    """A transformers model in this process; nothing holds its replies to a schema.

    A reply is drawn with its own seed. Which other prompts are in its batch changes its logits by
    rounding errors alone; `batch=1` rules out even those.
    """

    def __init__(self, model: LocalModel, name: str, *, batch: int = 8) -> None:
        if batch < 1:
            raise InputError(f"batch must be at least 1, got {batch}.")
        self.model = model
        self.name = name
        self.batch = batch

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str], *, batch: int = 8) -> AskLocal:
        """Load a folder or a hub name in float32, see `LocalModel.from_pretrained`."""
        model = LocalModel.from_pretrained(name_or_folder)
        return cls(model, Path(name_or_folder).name, batch=batch)

    def __call__(self, prompts: Sequence[Prompt | Request]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies, a batch at a time; a prompt that is too long is `refused`."""
        tokenizer = self.model.tokenizer
        window = self.model.longest
        asked: list[tuple[int, list[int], Request]] = []
        for i, prompt in enumerate(prompts):
            request, _ = _request(prompt)
            ids = chat_ids(tokenizer, request.messages)
            if window is not None and len(ids) + request.max_new_tokens > window:
                yield i, _too_long(len(ids), window - request.max_new_tokens)
            else:
                asked.append((i, ids, request))
        # Like lengths together, for little padding; the longest first, which need most memory.
        asked.sort(key=lambda each: -len(each[1]))
        for first in range(0, len(asked), self.batch):
            numbers, inputs, requests = zip(*asked[first : first + self.batch], strict=True)
            most = max(request.max_new_tokens for request in requests)
            written = self.model.continue_all(inputs, most, _Draw(requests))
            for i, ids, request, new in zip(numbers, inputs, requests, written, strict=True):
                new = new[: request.max_new_tokens]
                text = tokenizer.decode(new, skip_special_tokens=True).strip()
                yield i, Reply(text, len(ids), len(new))


class _Draw:
    """A logits processor after which the likeliest token is one drawn from the softmax.

    The largest of logits / temperature + Gumbel noise is such a draw (Gumbel, 1954), and noise,
    unlike torch's own sampling of a batch, can be each row's own. At temperature 0 there is none.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        import torch

        self.requests = requests
        # On the CPU, so that other devices draw the same.
        self.noise = [torch.Generator().manual_seed(request.seed) for request in requests]

    def __call__(self, ids: Any, logits: Any) -> Any:
        import torch

        logits = logits.float()
        for row, request, noise in zip(logits, self.requests, self.noise, strict=True):
            if request.temperature:
                drawn = torch.empty(row.shape).exponential_(generator=noise).log()
                row.div_(request.temperature).sub_(drawn.to(row.device))
        return logits
