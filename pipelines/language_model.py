"""What answers: a local transformers model, or any server that speaks OpenAI's protocol.

Errors raised here, besides prune_core's:

    PruneError
    └── EndpointError    a server that cannot be reached, refuses, or answers something else
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from prune_core.errors import CheckpointError, InputError, PruneError

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]


class EndpointError(PruneError):
    """A server that cannot be reached, refuses the request, or answers something else.

    `status` is the HTTP status of the reply; None where there was none.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Completion:
    """A model's answer and what it cost."""

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float


class LanguageModel(Protocol):
    """Anything that continues a conversation."""

    def complete(self, messages: Sequence[Message], max_new_tokens: int = 64) -> Completion:
        """Answer `messages`, each with a `role` (system, user or assistant) and its `content`."""
        ...


class LocalModel:
    """A causal language model of transformers, in float32 on the CPU, decoding greedily.

    Args:
        model: A transformers model that generates.
        tokenizer: Its tokenizer. Its chat template words the prompt; without one the messages are
            written plainly, as "User: …" and "Assistant:".
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name_or_folder: str | os.PathLike[str]) -> LocalModel:
        """Load a folder, or a name on the model hub: safetensors only, and never remote code.

        Raises:
            CheckpointError: There is no such model, or it holds no safetensors, or asks for code
                of its own.
        """
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                name_or_folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"Cannot load a language model from '{name_or_folder}': pass a folder, or a name "
                f"on the hub, with a config, a tokenizer and safetensors weights. {error}"
            ) from error
        return cls(model, tokenizer)

    def complete(self, messages: Sequence[Message], max_new_tokens: int = 64) -> Completion:
        """Answer `messages`; the likeliest token is taken every time.

        Raises:
            InputError: There are no messages, `max_new_tokens` is below 1, or the prompt and the
                new tokens do not fit into the model's context.
        """
        messages = _checked(messages, max_new_tokens)
        started = time.perf_counter()
        ids = chat_ids(self.tokenizer, messages)
        longest = self.longest
        if longest is not None and len(ids) + max_new_tokens > longest:
            raise InputError(
                f"The prompt has {len(ids):,} tokens and {max_new_tokens:,} new ones are asked "
                f"for, but this model reads at most {longest:,} together: prune the context "
                "more, or retrieve fewer passages."
            )
        [new] = self.continue_all([ids], max_new_tokens)
        return Completion(
            text=self.tokenizer.decode(new, skip_special_tokens=True).strip(),
            prompt_tokens=len(ids),
            new_tokens=len(new),
            seconds=time.perf_counter() - started,
        )

    @property
    def longest(self) -> int | None:
        """The most tokens that it reads and writes together; None where it does not say."""
        config = self.model.config.get_text_config()
        most: int | None = getattr(config, "max_position_embeddings", None)
        return most

    def continue_all(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, draw: Any = None
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to and with the one that ends it, all in one batch.

        The likeliest token is taken every time, of the logits as `draw`, a logits processor of
        transformers, leaves them.
        """
        import torch
        from transformers import GenerationConfig

        ends = self.model.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        if not isinstance(ends, list):
            ends = [] if ends is None else [ends]
        pad = ends[0] if ends else 0  # any token: nobody attends to it
        width = max(map(len, prompts))
        # On the left, so that every prompt ends where its continuation begins.
        padded = [[pad] * (width - len(ids)) + list(ids) for ids in prompts]
        read = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self.model.device
        with torch.inference_mode():
            output = self.model.generate(
                torch.tensor(padded, device=device),
                attention_mask=torch.tensor(read, device=device),
                logits_processor=None if draw is None else [draw],
                # Not the model's own, which may ask for sampling.
                generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    eos_token_id=ends or None,
                    pad_token_id=pad,
                ),
            )
        rows: list[list[int]] = output[:, width:].tolist()
        last = [next((i for i, token in enumerate(row) if token in ends), None) for row in rows]
        return [row if i is None else row[: i + 1] for row, i in zip(rows, last, strict=True)]


@dataclass(frozen=True)
class Endpoint:
    """A model behind any server that speaks OpenAI's protocol: vLLM, llama.cpp and others.

    Args:
        base_url: Up to and with the version, as in "http://127.0.0.1:8000/v1".
        model: The name that the server knows the model by.
        api_key: Sent as a bearer token. It is never read from the environment.
        timeout: Seconds to wait for the server before giving up.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout: float = 60

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise InputError(
                f"base_url must begin with http:// or https://, got '{self.base_url}': write it "
                "like http://127.0.0.1:8000/v1."
            )
        if self.api_key and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InputError(
                "api_key must be printable ASCII without line breaks, which the one given is not: "
                "copy it again."
            )
        if not self.timeout > 0:
            raise InputError(f"timeout must be a number of seconds above 0, got {self.timeout}.")

    def complete(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0,
        seed: int | None = None,
        schema: Mapping[str, Any] | None = None,
        client: httpx.Client | None = None,
    ) -> Completion:
        """Ask the server to answer `messages`.

        Args:
            messages: The conversation so far.
            max_new_tokens: The longest answer, in the model's tokens.
            temperature: Of drawing its tokens; at 0 the likeliest is taken.
            seed: Of drawing, for servers that heed it.
            schema: A JSON schema that the answer shall obey; servers differ in what they heed.
            client: Connections to use, and use again, where there are many questions.

        Raises:
            InputError: There are no messages, or `max_new_tokens` is below 1.
            EndpointError: The server cannot be reached, takes too long, refuses the request, or
                answers something that is not a chat completion with its token counts.
        """
        import httpx

        messages = _checked(messages, max_new_tokens)
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        started = time.perf_counter()
        try:
            response = (client or httpx).post(
                url,
                json={
                    "model": self.model,
                    "messages": messages,
                    "max_tokens": max_new_tokens,
                    "temperature": temperature,
                    **({} if seed is None else {"seed": seed}),
                    **({} if schema is None else {"response_format": _json_form(schema)}),
                },
                headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
                timeout=self.timeout,
            )
        except httpx.TimeoutException as error:
            raise EndpointError(
                f"The server at {self.base_url} did not answer within {self.timeout:g} seconds: "
                "ask for fewer tokens, or give it longer (timeout)."
            ) from error
        except (httpx.RequestError, httpx.InvalidURL) as error:
            raise EndpointError(
                f"The server at {self.base_url} cannot be reached ({error}): check the address "
                "and that it runs."
            ) from error
        seconds = time.perf_counter() - started
        if not response.is_success:
            raise EndpointError(
                f"The server at {self.base_url} refused the request with status "
                f"{response.status_code}: {_server_message(response)}",
                response.status_code,
            )
        try:
            reply = response.json()
            text = reply["choices"][0]["message"]["content"]
            prompt_tokens = reply["usage"]["prompt_tokens"]
            new_tokens = reply["usage"]["completion_tokens"]
            if not isinstance(text, str):
                raise TypeError(f"its content is {text!r}")
            return Completion(text.strip(), int(prompt_tokens), int(new_tokens), seconds)
        except (ValueError, LookupError, TypeError) as error:
            raise EndpointError(
                f"The server at {self.base_url} answered something that is not a chat completion "
                f"with its token counts ({type(error).__name__}: {error}): "
                f"{response.text[:200]!r}. Check that base_url is the root of an OpenAI-compatible "
                "API.",
                response.status_code,
            ) from error


def _checked(messages: Sequence[Message], max_new_tokens: int) -> list[Message]:
    if not messages:
        raise InputError("There are no messages to answer: pass at least one.")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    # A lone surrogate, which broken documents hold, is no character: neither tokenizers nor
    # servers take it.
    return [
        {key: value.encode("utf-8", "replace").decode() for key, value in message.items()}
        for message in messages
    ]


def _json_form(schema: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's form of asking for JSON, which vLLM, SGLang and llama.cpp understand as well."""
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": dict(schema)}}


def _server_message(response: Any) -> str:
    """Find the sentence in an error reply, whose form differs from server to server."""
    try:
        found = response.json()
        for key in ("error", "message", "detail"):
            if isinstance(found, dict):
                found = found.get(key, found)
    except ValueError:
        found = response.text
    return str(found)[:500].strip() or "(no message)"


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The token ids that ask a model to answer `messages`, worded by its chat template."""
    safe = [{**message, "content": _as_text(tokenizer, message["content"])} for message in messages]
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(safe, add_generation_prompt=True, tokenize=False)
    else:
        turns = [f"{message['role'].capitalize()}: {message['content']}" for message in safe]
        prompt = "\n\n".join([*turns, "Assistant:"])
    ids: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids


def _as_text(tokenizer: Any, content: str) -> str:
    """Break special tokens: a passage that holds `<|im_end|>` must not end the user's turn."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special:
            broken = f"{token.content[0]}\u200b{token.content[1:]}"
            content = content.replace(token.content, broken)
    return content
