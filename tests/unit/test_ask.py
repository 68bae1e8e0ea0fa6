"""Many prompts at once, to a server (order, retries, refusals, a stop) and to vLLM."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipelines.ask import MAX_NEW_TOKENS, AskEndpoint, AskVllm
from pipelines.language_model import Endpoint, EndpointError
from prune_core.errors import InputError, MissingExtra
from rag_prune.context.label import Item, Prompt, label, prompt
from rag_prune.context.result import Passage
from tiny import toy_tokenizer

Rule = Callable[[str, int], tuple[int, str]]  # (the prompt, how often it came) -> (status, text)


class Server:
    """Answers each prompt by a rule, and notes what was asked and how much at a time."""

    def __init__(self) -> None:
        self.rule: Rule = lambda text, _: (200, f"to {text}")
        self.delay = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        lock, noted = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = body["messages"][0]["content"]
                with lock:
                    noted.bodies.append(body)
                    noted.at_once += 1
                    noted.most_at_once = max(noted.most_at_once, noted.at_once)
                    times = sum(b["messages"][0]["content"] == text for b in noted.bodies)
                time.sleep(noted.delay)
                status, said = noted.rule(text, times)
                message = {"content": said}
                usage = {"prompt_tokens": 7, "completion_tokens": 3}
                reply = {"choices": [{"message": message}], "usage": usage}
                if status != 200:
                    reply = {"error": {"message": said}}
                data = json.dumps(reply).encode()
                with lock:
                    noted.at_once -= 1
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except ConnectionError:  # the client gave up
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *args: object) -> None:
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def asks(self, timeout: float = 10, **options: Any) -> AskEndpoint:
        return AskEndpoint(Endpoint(self.url, "big", timeout=timeout), pause=0.01, **options)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


def prompts(n: int) -> list[Prompt]:
    return [Prompt(f"prompt {i}", {"type": "object"}) for i in range(n)]


def test_each_prompt_gets_its_own_reply_many_at_a_time(server: Server) -> None:
    server.delay = 0.05
    replies = dict(server.asks(concurrency=4)(prompts(20)))
    assert {i: reply.text for i, reply in replies.items()} == {
        i: f"to prompt {i}" for i in range(20)
    }
    assert (replies[3].prompt_tokens, replies[3].new_tokens, replies[3].refused) == (7, 3, False)
    assert 2 <= server.most_at_once <= 4
    assert server.bodies[0].items() >= {
        "model": "big",
        "max_tokens": MAX_NEW_TOKENS,
        "temperature": 0,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": {"type": "object"}},
        },
    }.items()  # fmt: skip


@pytest.mark.parametrize("status", [408, 429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.rule = lambda text, times: (status, "busy") if times < 3 else (200, "well")
    [(_, reply)] = server.asks()(prompts(1))
    assert (reply.text, len(server.bodies)) == ("well", 3)

    server.rule = lambda *_: (status, "busy for ever")
    with pytest.raises(EndpointError, match="busy for ever"):
        list(server.asks(attempts=2)(prompts(1)))


def test_a_reply_that_comes_too_late_is_asked_for_again(server: Server) -> None:
    server.delay = 0.3
    with pytest.raises(EndpointError, match=r"did not answer within 0\.1 seconds"):
        list(server.asks(timeout=0.1, attempts=2)(prompts(1)))
    assert len(server.bodies) == 2


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_the_server_will_not_read_stops_no_other(server: Server, status: int) -> None:
    server.rule = lambda text, _: (status, "too long") if text == "prompt 1" else (200, "well")
    replies = dict(server.asks()(prompts(3)))
    assert [replies[i].refused for i in range(3)] == [False, True, False]
    assert replies[1].text.endswith(f"status {status}: too long")
    assert len(server.bodies) == 3


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_stops_at_once(server: Server, status: int) -> None:
    server.rule = lambda *_: (status, "no")
    with pytest.raises(EndpointError, match=f"status {status}: no"):
        list(server.asks(concurrency=1)(prompts(200)))
    assert len(server.bodies) < 50


def test_who_stops_listening_sends_no_more(server: Server) -> None:
    server.delay = 0.02
    replies = server.asks(concurrency=2)(prompts(200))
    next(replies)
    replies.close()  # type: ignore[attr-defined]
    time.sleep(0.1)
    sent = len(server.bodies)
    time.sleep(0.2)
    assert len(server.bodies) == sent < 20


def test_a_server_that_dies_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    """Through the labeller: what was answered before the end is not asked again."""
    items = [Item("Who?", Passage.read(f"Pierre found {i}. It rained.", 0)) for i in range(10)]

    def rule(text: str, times: int) -> tuple[int, str]:
        said = {"answer": "Pierre", "sentences": [1]} if "Pierre" in text else None
        return 200, json.dumps(said or {"answer": None, "sentences": []})

    def dying(text: str, times: int) -> tuple[int, str]:
        return rule(text, times) if len(server.bodies) <= 5 else (503, "dying")

    server.rule = dying
    with pytest.raises(EndpointError, match="dying"):
        label(items, server.asks(concurrency=1, attempts=1), tmp_path, progress=False)
    before = [body["messages"][0]["content"] for body in server.bodies[:5]]
    server.bodies.clear()
    server.rule = rule
    labels = label(items, server.asks(), tmp_path, progress=False)
    assert [found.outcome for found in labels.labels] == ["answered"] * 10
    asked = [body["messages"][0]["content"] for body in server.bodies]
    assert len(asked) == len(set(asked))
    assert len(asked) + len(before) == 30 - 9  # without their first sentence all are the same
    assert not set(before) & set(asked)


def test_arguments() -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "big")
    with pytest.raises(InputError, match="concurrency and attempts must be at least 1, got 0"):
        AskEndpoint(endpoint, concurrency=0)


# ------------------------------------------------------------------------------------------- vLLM


class StandIn:
    """What AskVllm needs of vllm.LLM: notes what it is given, and says how long each prompt is."""

    def __init__(self) -> None:
        self.tokenizer = toy_tokenizer()
        model_config = SimpleNamespace(max_model_len=MAX_NEW_TOKENS + 200)
        self.llm_engine = SimpleNamespace(model_config=model_config)
        self.batches: list[Any] = []

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(self, inputs: Any, params: Any, use_tqdm: bool) -> Any:
        self.batches.append((inputs, params))
        return [
            SimpleNamespace(
                prompt_token_ids=given["prompt_token_ids"],
                outputs=[SimpleNamespace(text=str(len(given["prompt_token_ids"])), token_ids=[1])],
            )
            for given in inputs
        ]


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two classes that a call needs, as records of their arguments."""
    module = ModuleType("vllm.sampling_params")
    module.SamplingParams = module.StructuredOutputsParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", module)


@pytest.mark.usefixtures("no_vllm")
def test_vllm_gets_batches_with_schemas_and_no_prompt_that_is_too_long() -> None:
    llm = StandIn()
    texts = ["cat", "cat " * 500, "[SEP]", "dog"]
    asked = [Prompt(text, {"title": text}) for text in texts]
    replies = dict(AskVllm(llm, "tiny", batch=2)(asked))
    assert [replies[i].refused for i in range(4)] == [False, True, False, False]
    assert "the model reads 200" in replies[1].text
    assert [len(inputs) for inputs, _ in llm.batches] == [1, 2]
    (_, [first]), ([ended, _], _) = llm.batches
    assert (first.temperature, first.structured_outputs.json) == (0, {"title": "cat"})
    assert replies[0].prompt_tokens == int(replies[0].text)
    # A passage that spells the end of a turn does not end it.
    end = llm.tokenizer.convert_tokens_to_ids("[SEP]")
    assert end not in ended["prompt_token_ids"]


def test_without_vllm_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingExtra, match=r"prunekit\[serve\]"):
        AskVllm.from_pretrained("folder")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # vLLM's own
def test_a_real_model_keeps_to_the_schema(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM with the demo's model: every reply is read, and its numbers are those of sentences."""
    pytest.importorskip("vllm")
    from pipelines.small_model import small_model
    from rag_prune.context.label import read_reply

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    ask = AskVllm.from_pretrained(small_model(progress=False))
    text = "Marie was born in Warsaw. With Pierre she found radium. She liked cycling."
    sentences = [f"{part}." for part in text.rstrip(".").split(". ")]
    asked = [prompt("Who found radium?", None, sentences[:n]) for n in (1, 2, 3)]
    replies = dict(ask(asked))
    for i, n in enumerate((1, 2, 3)):
        assert read_reply(replies[i].text, n) is not None, replies[i]
        assert 0 < replies[i].new_tokens < MAX_NEW_TOKENS
