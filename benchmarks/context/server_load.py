"""A real server under 64 clients that ask well, wrongly, too much and without a key; in one run.

    python benchmarks/context/server_load.py [--seconds 60]

`prunekit serve-context` runs as a process of its own with the bundled pruner. Every good answer is
compared with `ContextPruner.prune` called directly (decisions equal, scores to 1e-5), every bad one
has to be the 4xx that it earns with a sentence in it. Some clients hang up early. The server's
memory is read each second, /health is asked ten times a second. At the end SIGTERM comes while
requests are under way, and they have to be answered. What batching gains is measured before, in
process: the same concurrent requests with shared batches and with one request a batch, rounds
alternating. Good requests are drawn from a fixed set: the pruner's cache of passages is full after
the warm-up, and equal rows of a batch are run once, so good_per_second is no figure of new text.
Linux only. Writes results/server_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from pipelines.demo.corpus import demo_passages, demo_questions
from pipelines.retrieve import Retriever
from prune_core.provenance import provenance
from prune_core.storage import write_json
from rag_prune import ContextPruner
from rag_prune.context.result import Budget
from rag_prune.server.batching import Batcher

HERE = Path(__file__).parent / "results"
KEY = "a-key-for-the-benchmark"
WARM_UP = 0.5  # share of the time after which memory has to stay
START = "from pipelines.cli import main; main()"
MAX_BYTES = 200_000
PATIENCE = 900  # seconds; a busy machine is slow, and slow is no fault here


@dataclass(frozen=True)
class Shot:
    """A request and what has to come back; `direct` is the answer expected of a good one."""

    kind: str
    path: str
    body: bytes
    status: int = 200
    key: str = KEY
    direct: Any = None
    chunked: bool = False
    leaves: bool = False


def asked(n: int) -> list[tuple[str, list[Any]]]:
    """Questions on Python's reference, five retrieved passages each, of mixed lengths."""
    retriever = Retriever(demo_passages())
    questions = [q["question"] for q in demo_questions()][:n]
    out: list[tuple[str, list[Any]]] = []
    for i, question in enumerate(questions):
        texts = [p["text"][:900] for p in retriever.search(question, 5)]
        cut = [text[: 100 + 150 * j] if (i + j) % 3 == 0 else text for j, text in enumerate(texts)]
        out.append(
            (question, [{"text": t, "title": "Python"} if j == 1 else t for j, t in enumerate(cut)])
        )
    return out


def good(pruner: ContextPruner, requests: list[tuple[str, list[Any]]]) -> list[Shot]:
    budgets: list[dict[str, Any]] = [{}, {"threshold": 0.3}, {"keep_ratio": 0.4, "top_k": 3}]
    shots = []
    for i, (question, passages) in enumerate(requests):
        budget = budgets[i % len(budgets)]
        direct = pruner.prune(question, passages, **budget)
        body = {"question": question, "passages": passages, **budget}
        shots.append(Shot("prune", "/v1/prune", dumped(body), direct=direct))
        body = {"model": "any", "query": question, "documents": passages, "top_n": 4}
        shots.append(Shot("rerank", "/v1/rerank", dumped(body), direct=direct))
    for empty in ([], [""], ["", " \n"]):
        body = {"question": "Is anything here?", "passages": empty}
        direct = pruner.prune("Is anything here?", empty)
        shots.append(Shot("empty", "/v1/prune", dumped(body), direct=direct))
    return shots


def bad() -> list[Shot]:
    fine = {"question": "Who?", "passages": ["She did."]}
    malformed: list[Any] = [
        *(b"", b"{", b"\xff\xfe", b"[" * 50_000, b'{"threshold": NaN}', b'"text"'),
        {"question": "", "passages": ["a"]},
        {"question": "Who?"},
        fine | {"passages": [{"txt": "a"}]},
        fine | {"passages": "one string"},
        fine | {"threshold": 0.1, "keep_ratio": 0.5},
        fine | {"threshold": "high"},
        fine | {"top_k": -1},
        fine | {"kep_ratio": 0.5},
    ]
    shots = [Shot("malformed", "/v1/prune", dumped(body), 400) for body in malformed]
    huge = b'{"question": "Who?", "passages": ["' + b"She did. " * (MAX_BYTES // 4) + b'"]}'
    many = dumped(fine | {"passages": ["a"] * 2000})
    long = dumped(fine | {"question": "Who? " * 300, "passages": ["She did."] * 500})
    shots += [
        Shot("huge", "/v1/prune", huge, 413),
        Shot("huge", "/v1/prune", huge, 413, chunked=True),
        Shot("huge", "/v1/prune", many, 413),
        Shot("huge", "/v1/prune", long, 413),
    ]
    for key in ("", "wrong"):
        shots.append(Shot("unauthorised", "/v1/prune", dumped(fine), 401, key))
        shots.append(Shot("unauthorised", "/v1/rerank", huge[:100_000], 401, key))
    return shots


def dumped(body: Any) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()


def fault(shot: Shot, response: httpx.Response) -> str | None:
    """What is wrong with an answer, or None."""
    if response.status_code != shot.status:
        return f"{shot.kind}: {response.status_code} for {shot.status}: {response.text[:200]}"
    told = response.json()
    if shot.status != 200:
        message = told["error"]["message"]
        return None if re.search(r"\w+ \w+.*[.…]$", message) else f"{shot.kind}: says {message!r}"
    direct = shot.direct
    if shot.kind == "rerank":
        expected = sorted(direct.passages, key=lambda p: p.rank)[:4]
        found = [(r["index"], r["relevance_score"]) for r in told["results"]]
        right = [i for i, _ in found] == [p.index for p in expected] and np.allclose(
            [score for _, score in found], [p.relevance for p in expected], atol=1e-5
        )
        return None if right else f"rerank: {found}"
    spans = [[(s["start"], s["end"]) for s in p["kept"]] for p in told["passages"]]
    if told["text"] != direct.text or spans != [
        [(s.start, s.end) for s in p.kept] for p in direct.passages
    ]:
        return f"{shot.kind}: other sentences kept for {direct.question!r}"
    scores = [s["score"] for p in told["passages"] for s in (*p["kept"], *p["dropped"])]
    expected = [s.score for p in direct.passages for s in (*p.kept, *p.dropped)]
    return None if np.allclose(scores, expected, atol=1e-5) else f"{shot.kind}: other scores"


@contextmanager
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address."""
    arguments = [
        "serve-context",
        "--port",
        "0",
        "--max-bytes",
        str(MAX_BYTES),
        "--max-seconds",
        str(PATIENCE),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PRUNEKIT_API_KEY": KEY},
    )
    assert process.stderr
    try:
        for line in process.stderr:
            if found := re.search(r"Serving on (\S+)", line):
                break
        else:
            raise SystemExit(f"The server did not start: exit code {process.wait()}.")
        asyncio.get_running_loop().run_in_executor(None, process.stderr.read)  # or the pipe fills
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def resident(pid: int) -> float:
    """MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


async def chunks(body: bytes) -> Any:
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


async def fire(client: httpx.AsyncClient, shot: Shot) -> httpx.Response:
    headers = {"content-type": "application/json"}
    if shot.key:
        headers["authorization"] = f"Bearer {shot.key}"
    content = chunks(shot.body) if shot.chunked else shot.body
    timeout = 0.05 if shot.leaves else PATIENCE
    return await client.post(shot.path, content=content, headers=headers, timeout=timeout)


async def load(
    seconds: float, clients: int, shots: list[Shot], wrong: list[Shot]
) -> dict[str, Any]:
    answered: Counter[str] = Counter()
    faults: list[str] = []
    took: defaultdict[str, list[float]] = defaultdict(list)
    memory: list[tuple[float, float]] = []
    with server() as (process, url):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=url, limits=limits) as client:
            started = time.perf_counter()

            def now() -> float:
                return time.perf_counter() - started

            async def one(number: int) -> None:
                dice = random.Random(number)
                while now() < seconds:
                    if number % 4:
                        shot = dice.choice(shots)
                        if dice.random() < 0.05:
                            shot = Shot("left early", shot.path, shot.body, leaves=True)
                    else:  # every fourth client errs all the time, however long the good ones wait
                        shot = dice.choice(wrong)
                        await asyncio.sleep(0.2 * dice.random())
                    begun = time.perf_counter()
                    try:
                        response = await fire(client, shot)
                    except httpx.TimeoutException:
                        answered[shot.kind] += 1
                        if not shot.leaves:
                            faults.append(f"{shot.kind}: no answer")
                        continue
                    except httpx.HTTPError as error:
                        faults.append(f"{shot.kind}: {error!r}")
                        continue
                    took[shot.kind].append(time.perf_counter() - begun)
                    answered[shot.kind] += 1
                    if not shot.leaves and (found := fault(shot, response)):
                        faults.append(found)

            async def watch() -> None:
                while now() < seconds:
                    memory.append((now(), resident(process.pid)))
                    await asyncio.sleep(1)

            async def health() -> None:
                while now() < seconds:
                    begun = time.perf_counter()
                    response = await client.get("/health", timeout=30)
                    took["health"].append(time.perf_counter() - begun)
                    if response.status_code != 200:
                        faults.append(f"health: {response.status_code}")
                    await asyncio.sleep(0.1)

            await asyncio.gather(*(one(i) for i in range(clients)), watch(), health())
            lasted = now()
            page = (await client.get("/metrics", headers={"authorization": f"Bearer {KEY}"})).text
            last = [asyncio.create_task(fire(client, shot)) for shot in shots[:16]]
            await asyncio.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            after = await asyncio.gather(*last, return_exceptions=True)
            stopped = sum(
                isinstance(response, httpx.Response) and fault(shot, response) is None
                for shot, response in zip(shots, after, strict=False)
            )
            code = await asyncio.to_thread(process.wait, PATIENCE)
    counted = dict(
        line.rsplit(" ", 1) for line in page.splitlines() if line.startswith("prunekit_batch")
    )
    batches = float(counted["prunekit_batch_requests_count"])
    settled = [size for at, size in memory if at >= WARM_UP * seconds]
    edge = max(1, len(settled) // 8)
    return {
        "seconds": round(lasted, 1),
        "clients": clients,
        "answered": dict(sorted(answered.items())),
        "faults": len(faults),
        "first_faults": faults[:5],
        "good_per_second": round(
            sum(answered[kind] for kind in ("prune", "rerank", "empty")) / lasted, 2
        ),
        "milliseconds": {
            kind: dict(
                zip(
                    ("p50", "p90", "p99", "max"),
                    (1000 * np.percentile(times, [50, 90, 99, 100])).round(1).tolist(),
                    strict=True,
                )
            )
            for kind, times in sorted(took.items())
        },
        "requests_a_batch": round(float(counted["prunekit_batch_requests_sum"]) / batches, 2),
        "memory_mib": {
            "after_warm_up": round(float(np.median(settled[:edge])), 1),
            "end": round(float(np.median(settled[-edge:])), 1),
            "most": round(max(size for _, size in memory), 1),
            "samples": [round(size, 1) for _, size in memory],
        },
        "sigterm": {"under_way": len(last), "answered_right": stopped, "exit_code": code},
    }


async def gain(
    pruner: ContextPruner, requests: list[tuple[str, list[Any]]], passages: int, rounds: int
) -> dict[str, Any]:
    """All requests at once, with shared batches and with one request a batch."""
    seconds: dict[str, list[float]] = {"shared": [], "one a batch": []}
    for _ in range(rounds):
        for name, size in (("shared", 40_000), ("one a batch", 1)):
            pruner.scorer.late._recent.clear()  # type: ignore[attr-defined]
            batcher = Batcher(pruner, batch_characters=size)
            begun = time.perf_counter()
            await asyncio.gather(
                *(
                    batcher.prune(q, given[:passages], Budget(threshold=0.1))
                    for q, given in requests
                )
            )
            seconds[name].append(time.perf_counter() - begun)
            await batcher.close()
    ratios = np.array(seconds["one a batch"]) / np.array(seconds["shared"])
    return {
        "requests": len(requests),
        "passages_a_request": passages,
        "rounds": rounds,
        "gain": {
            "median": round(float(np.median(ratios)), 2),
            "min": round(float(ratios.min()), 2),
            "max": round(float(ratios.max()), 2),
        },
    }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    pruner = ContextPruner.from_pretrained()
    requests = asked(args.questions)
    await gain(pruner, requests[:4], 5, 1)  # warm up
    gains = [await gain(pruner, requests, n, args.rounds) for n in (1, 5)]
    report = await load(args.seconds, args.clients, good(pruner, requests), bad())
    return report | {"batching": gains, "provenance": provenance()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    report = asyncio.run(run(args))
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "server_load.json", report)
    print(json.dumps({k: v for k, v in report.items() if k != "provenance"}, indent=1))


if __name__ == "__main__":
    main()
