"""Many prompts at once, each answered in JSON: by a server, or by vLLM in this process.

Both are what `rag_prune.context.label` calls an Ask. vLLM is imported when its model is loaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pipelines.language_model import Endpoint, EndpointError, chat_ids
from prune_core.errors import CheckpointError, InputError, require
from rag_prune.context.label import Prompt, Reply

MAX_NEW_TOKENS = 256  # an answer and its numbers take 20 to 60

# Of one prompt, which another setting or a shorter passage may cure; 200 is a reply without text.
_REFUSALS = (200, 400, 413, 422)
_PASSING = (408, 425, 429)  # and 500 and above: the server may do better in a while


@dataclass(frozen=True)
class AskEndpoint:
    """A server that speaks OpenAI's protocol, asked `concurrency` prompts at a time.

    The schema goes as `response_format`, which vLLM turns into its own `structured_outputs` and
    other servers understand too. A server that does not answer, or is too busy, is asked again
    after `pause` seconds, then after twice that, `attempts` times in all.
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

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
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

    def _reply(self, prompt: Prompt, client: Any) -> Reply:
        messages = [{"role": "user", "content": prompt.text}]
        for attempt in range(self.attempts):
            try:
                done = self.endpoint.complete(
                    messages, self.max_new_tokens, schema=prompt.schema, client=client
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
    """A model loaded by vLLM in this process; xgrammar holds its replies to the schema."""

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
        vllm: Any = require("vllm", extra="serve", purpose="Labelling in this process")
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

    def __call__(self, prompts: Sequence[Prompt]) -> Iterator[tuple[int, Reply]]:
        """Yield the replies, a batch at a time; a prompt that is too long is `refused`."""
        sampling: Any = import_module("vllm.sampling_params")
        tokenizer = self.llm.get_tokenizer()
        longest = self.llm.llm_engine.model_config.max_model_len - MAX_NEW_TOKENS
        for first in range(0, len(prompts), self.batch):
            numbers, inputs, params = [], [], []
            for i, prompt in enumerate(prompts[first : first + self.batch], first):
                ids = chat_ids(tokenizer, [{"role": "user", "content": prompt.text}])
                if len(ids) > longest:
                    said = f"The prompt has {len(ids):,} tokens; the model reads {longest:,}."
                    yield i, Reply(said, refused=True)
                    continue
                numbers.append(i)
                inputs.append({"prompt_token_ids": ids})
                form = sampling.StructuredOutputsParams(json=prompt.schema)
                params.append(
                    sampling.SamplingParams(
                        temperature=0, max_tokens=MAX_NEW_TOKENS, structured_outputs=form
                    )
                )
            outputs = self.llm.generate(inputs, params, use_tqdm=False) if inputs else []
            for i, output in zip(numbers, outputs, strict=True):
                written = output.outputs[0]
                yield i, Reply(written.text, len(output.prompt_token_ids), len(written.token_ids))
