"""The middleware inside vLLM's own server, asked through OpenAI's own client."""

import asyncio
import json
import re

import httpx
import pytest

from rag_prune import ContextPruner
from serving import HERE, served

pytestmark = pytest.mark.slow
MIDDLEWARE = "rag_prune.integrations.vllm_middleware.ContextPruning"
USER = {"role": "user", "content": "Who discovered radium?"}
DOCUMENTS = [
    {
        "title": "Paris",
        "text": "Paris is the capital of France. It has two million inhabitants. " * 4,
    },
    {
        "title": "Radium",
        "text": "Marie Curie was born in Warsaw. With Pierre Curie she discovered radium in 1898. "
        "She liked cycling.",
    },
]
ON = {"documents": DOCUMENTS, "prunekit": {}}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    from pipelines.small_model import small_model

    with served(
        tmp_path_factory.mktemp("vllm") / "log",
        *("--model", str(small_model()), "--served-model-name", "small"),
        *("--max-model-len", "2048", "--chat-template", str(HERE / "serve" / "documents.jinja")),
        *("--middleware", MIDDLEWARE, "--api-key", "secret"),
        VLLM_API_KEY="not-this-one",  # the option wins
    ) as url:
        yield url


@pytest.fixture(scope="module")
def ask(url):
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)

    def ask(messages=(USER,), **extra):
        raw = client.chat.completions.with_raw_response.create(
            model="small", messages=list(messages), max_tokens=12, temperature=0, extra_body=extra
        )
        return raw.parse(), {k: v for k, v in raw.headers.items() if "prunekit" in k}

    yield ask
    client.close()


def counted(url):
    """The middleware's own counters, in vLLM's metrics."""
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r'^(prunekit_\w+_total\{\w+="\w+"\}) (\S+)', text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def test_the_prompt_is_shorter_and_the_answer_that_of_the_pruned_documents(ask):
    full, no_headers = ask(documents=DOCUMENTS)
    pruned, headers = ask(**ON)
    result = ContextPruner.from_pretrained(device="cpu").prune(
        USER["content"], DOCUMENTS, reorder=False
    )
    by_hand, _ = ask(documents=result.pruned)
    assert 0 < len(result.pruned[0]["text"]) < sum(len(d["text"]) for d in DOCUMENTS)
    assert pruned.usage.prompt_tokens == by_hand.usage.prompt_tokens < full.usage.prompt_tokens
    assert pruned.choices[0].message.content == by_hand.choices[0].message.content
    kept = sum(len(p["text"]) for p in result.pruned)
    assert no_headers == {}
    assert headers["x-prunekit-kept-chars"] == str(kept)
    assert headers["x-prunekit-dropped-chars"] == str(sum(len(d["text"]) for d in DOCUMENTS) - kept)


def test_streaming(url):
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key="secret") as client:

        def stream(**extra):
            chunks = client.chat.completions.create(
                model="small",
                messages=[USER],
                max_tokens=12,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=extra,
            )
            *parts, last = chunks
            return [c.choices[0].delta.content for c in parts], last.usage.prompt_tokens

        parts, tokens = stream(**ON)
        _, full = stream(documents=DOCUMENTS)
    assert len(parts) > 5
    assert tokens < full


@pytest.mark.parametrize("key", ["wrong", "not-this-one"])
def test_who_may_not_ask_gets_a_401_and_no_work(url, key):
    from openai import AuthenticationError, OpenAI

    before = counted(url)
    with (
        OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(AuthenticationError) as refused,
    ):
        client.chat.completions.create(model="small", messages=[USER], extra_body=ON)
    assert not [name for name in refused.value.response.headers if "prunekit" in name]
    assert counted(url) == before


def test_counters_are_in_vllms_metrics(url, ask):
    def pruned():
        return counted(url).get('prunekit_middleware_requests_total{outcome="pruned"}', 0)

    before = pruned()
    ask(**ON)
    assert pruned() == before + 1


def test_tool_messages(ask):
    call = {"id": "1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
    messages = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": json.dumps(DOCUMENTS)},
    ]
    full, _ = ask(messages)
    pruned, headers = ask(messages, prunekit={"threshold": 0.3})
    assert pruned.usage.prompt_tokens < full.usage.prompt_tokens
    assert int(headers["x-prunekit-dropped-chars"]) > int(headers["x-prunekit-kept-chars"]) > 0


def test_what_cannot_be_pruned_is_answered_all_the_same(url, ask):
    full, _ = ask(documents=DOCUMENTS)
    for bad in ({"treshold": 0.1}, {"max_tokens": 5}, 3):
        answer, headers = ask(documents=DOCUMENTS, prunekit=bad)
        assert set(headers) == {"x-prunekit-skipped"}
        assert answer.usage.prompt_tokens == full.usage.prompt_tokens
    sent = {"authorization": "Bearer secret", "content-type": "application/json"}
    for body in (b'{"prunekit": {}, "messages": [', b'["prunekit"]', b'{"prunekit": {}}'):
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=sent)
        assert 400 <= answer.status_code < 500


def test_many_at_once(url):
    from openai import AsyncOpenAI

    async def all_at_once():
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0) as client:
            return await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="small",
                        messages=[USER],
                        max_tokens=4,
                        extra_body=ON if i % 2 else {"documents": DOCUMENTS},
                    )
                    for i in range(16)
                )
            )

    tokens = [answer.usage.prompt_tokens for answer in asyncio.run(all_at_once())]
    full, pruned = set(tokens[::2]), set(tokens[1::2])
    assert len(full) == len(pruned) == 1
    assert pruned.pop() < full.pop()
