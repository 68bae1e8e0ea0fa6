"""Passages a second against the code paths of other pruners, and where the time goes; in one run.

    python benchmarks/context/throughput.py --dev runs/context/dev.jsonl

Everything runs the same weights on the same questions and passages of held-back titles: their
natural lengths (`mixed`), and as many cut to one length (`equal`), where no order saves padding.
Rounds go through all paths in turn, so that a noisy machine wrongs none, and ratios are taken
within a round. `matrices` is the bare network on the very batches of ours, already tokenised;
`ours_fast32` is what `precision="fast"` does where the processor does not multiply bfloat16.
Writes results/throughput.json and throughput.svg; some minutes on two cores.
"""

import argparse
import random
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peers import MAX_LENGTH, Asked, open_provence, provence
from tqdm import tqdm

from prune_core.provenance import provenance
from prune_core.storage import read_jsonl, write_json
from rag_prune import ContextPruner
from rag_prune.context.engine import BATCH_LIMITS
from rag_prune.context.model import fast_dtype, pad
from rag_prune.context.pruner import TOGETHER
from rag_prune.context.result import Request
from rag_prune.context.windows import batches, encode_plain

HERE = Path(__file__).parent / "results"
PASSAGES = 8  # a question
EQUAL = 128  # tokens of a passage in `equal`


def sample(rows: list[dict[str, Any]], n: int) -> list[tuple[str, list[str]]]:
    """`n` questions, each with its own passage and others of any source, in random order."""
    draw = random.Random(0)
    chosen = draw.sample(rows, n)
    texts = sorted({row["passage"] for row in rows})
    asked = []
    for row in chosen:
        passages = [row["passage"], *draw.sample(texts, PASSAGES - 1)]
        draw.shuffle(passages)
        asked.append((row["question"], passages))
    return asked


def cut_equal(tokenizer: Any, rows: list[dict[str, Any]], n: int) -> list[tuple[str, list[str]]]:
    """The same kind of requests, every passage cut after its 128th token."""
    texts = sorted({row["passage"] for row in rows})
    offsets = encode_plain(tokenizer, texts)["offset_mapping"]
    cut = [t[: o[EQUAL - 1][1]] for t, o in zip(texts, offsets, strict=True) if len(o) >= EQUAL]
    draw = random.Random(0)
    return [(row["question"], draw.sample(cut, PASSAGES)) for row in draw.sample(rows, n)]


class Bare:
    """The network alone, on the batches that a pruner makes of the same requests."""

    def __init__(self, pruner: ContextPruner, asked: Asked) -> None:
        self.checkpoint = pruner.scorer.checkpoint
        rows, run = [], pruner.scorer.run

        def noting(forward, given):
            rows.append(given)
            return run(forward, given)

        pruner.scorer.run = noting
        try:
            pruner.prune_many(asked)
        finally:
            del pruner.scorer.run
        self.batches = []
        for given in rows:  # as `Engine.run` has them: equal rows once
            once = list(dict.fromkeys(map(tuple, given)))
            for batch in batches([len(row) for row in once], *BATCH_LIMITS["cpu"]):
                self.batches.append([once[i] for i in batch])
        self.real = sum(len(row) for batch in self.batches for row in batch)
        self.computed = sum(len(batch[0]) * len(batch) for batch in self.batches)

    def __call__(self) -> None:
        multiply_in, pad_id = self.checkpoint.multiply_in, self.checkpoint.tokenizer.pad_token_id
        fast = multiply_in != torch.float32
        with torch.inference_mode(), torch.autocast("cpu", multiply_in, enabled=fast):
            for batch in self.batches:
                self.checkpoint.model.joint(*pad(batch, pad_id))


def in_float32(pruner: ContextPruner) -> ContextPruner:
    """Make OpenVINO compile the network now, as it does on a processor without bfloat16."""
    with patch("rag_prune.context.openvino.fast_bfloat16", lambda: False):
        pruner.prune("What is it?", ["It is a passage."])
    return pruner


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def spread(values: np.ndarray, digits: int = 2) -> dict[str, float]:
    return {
        "median": round(float(np.median(values)), digits),
        "min": round(float(values.min()), digits),
        "max": round(float(values.max()), digits),
    }


def over(seconds: dict[str, list[float]], slow: str, quick: str, digits: int = 2) -> dict[str, Any]:
    """How many times as long `slow` takes, round by round."""
    return spread(np.array(seconds[slow]) / np.array(seconds[quick]), digits)


def agreement(a: ContextPruner, b: ContextPruner, asked: Asked) -> dict[str, Any]:
    """Share of equal sentence decisions at the default threshold, and of equal best passages."""
    same, best, furthest = [], [], 0.0
    for x, y in zip(a.prune_many(asked), b.prune_many(asked), strict=True):
        best.append([p.rank for p in x.passages].index(0) == [p.rank for p in y.passages].index(0))
        for p, q in zip(x.passages, y.passages, strict=True):
            same += (p._kept == q._kept).tolist()
            furthest = max(furthest, float(np.abs(p._scores - q._scores).max(initial=0)))
    return {
        "sentences": len(same),
        "equal_decisions": round(float(np.mean(same)), 5),
        "equal_best_passage": round(float(np.mean(best)), 4),
        "largest_difference_in_probability": round(furthest, 4),
    }


def lengths(tokenizer: Any, asked: Asked) -> dict[str, float]:
    ids = encode_plain(tokenizer, [text for _, passages in asked for text in passages])["input_ids"]
    n = np.array([len(i) for i in ids])
    marks = {"min": 0, "p25": 25, "median": 50, "p75": 75, "p95": 95, "max": 100}
    of: dict[str, float] = {name: int(np.percentile(n, mark)) for name, mark in marks.items()}
    return of | {"mean": round(float(n.mean()), 1), "over_512": int((n > MAX_LENGTH).sum())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dev", type=Path, required=True)
    parser.add_argument("--pruner", default=None)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE)
    args = parser.parse_args()
    rows = list(read_jsonl(args.dev))
    ours, fast, late = (
        ContextPruner.from_pretrained(args.pruner, method=method, device="cpu", precision=precision)
        for method, precision in (("provence", "float32"), ("provence", "fast"), ("late", "fast"))
    )
    fast32 = in_float32(
        ContextPruner.from_pretrained(
            args.pruner, method="provence", device="cpu", precision="fast"
        )
    )
    checkpoint = ours.scorer.checkpoint
    mixed = sample(rows, args.questions)
    equal = cut_equal(checkpoint.tokenizer, rows, max(1, args.questions // 3))
    late.scorer.index([text for _, passages in mixed for text in passages])
    bare, bare_fast = Bare(ours, mixed), Bare(fast, mixed)

    read: list[Request] = []

    def split() -> None:
        read[:] = [Request.read(question, passages) for question, passages in mixed]

    def tokenise() -> None:
        for start in range(0, len(read), TOGETHER):
            ours.scorer.begin(read[start : start + TOGETHER])

    paths: dict[str, Callable[[], Any]] = {
        "open_provence": lambda: open_provence(checkpoint, mixed),
        "provence": lambda: provence(checkpoint, mixed),
        "ours": lambda: ours.prune_many(mixed),
        "ours_fast": lambda: fast.prune_many(mixed),
        "ours_fast32": lambda: fast32.prune_many(mixed),
        "matrices": bare,
        "matrices_fast": bare_fast,
        "split": split,
        "tokenise": tokenise,
        "late": lambda: late.prune_many(mixed),
        "open_provence, equal": lambda: open_provence(checkpoint, equal),
        "provence, equal": lambda: provence(checkpoint, equal),
        "ours, equal": lambda: ours.prune_many(equal),
        "ours_fast, equal": lambda: fast.prune_many(equal),
        "ours_fast32, equal": lambda: fast32.prune_many(equal),
    }
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    with tqdm(total=args.rounds * len(paths), unit="path") as bar:
        for _ in range(args.rounds):
            for name, path in paths.items():
                bar.set_postfix_str(name)
                seconds[name].append(timed(path))
                bar.update()
    agree, agree32 = agreement(ours, fast, mixed), agreement(ours, fast32, mixed)

    n = {"mixed": PASSAGES * len(mixed), "equal": PASSAGES * len(equal)}
    peers = ("open_provence", "provence")
    report = {
        "questions": len(mixed),
        "passages": n,
        "tokens_of_a_passage": {
            "mixed": lengths(checkpoint.tokenizer, mixed),
            "equal": lengths(checkpoint.tokenizer, equal),
        },
        "passages_per_second": {
            name: round(n["equal" if name.endswith("equal") else "mixed"] / float(np.median(s)), 1)
            for name, s in seconds.items()
        },
        "times_as_fast": {
            f"{path} / {peer}{form}": over(seconds, peer + form, path + form)
            for form in ("", ", equal")
            for path in ("ours", "ours_fast32", "ours_fast")
            for peer in peers
        },
        "over_matrices": {
            "ours": over(seconds, "ours", "matrices", 3),
            "ours_fast": over(seconds, "ours_fast", "matrices_fast", 3),
        },
        "late_over_ours": over(seconds, "ours", "late", 1),
        "late_over_ours_fast": over(seconds, "ours_fast", "late", 1),
        "computed_over_real_tokens": round(bare.computed / bare.real, 3),
        "seconds": {name: round(float(np.median(s)), 4) for name, s in seconds.items()},
        "fast": {
            "multiplies_in": str(fast_dtype(torch.device("cpu"))),
            "openvino": find_spec("openvino") is not None,
            **agree,
        },
        "fast32": agree32,
        "threads": torch.get_num_threads(),
        "provenance": provenance(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "throughput.json", report)
    draw(report, args.out / "throughput.svg")
    for key in ("passages_per_second", "times_as_fast", "over_matrices", "late_over_ours", "fast"):
        print(key, report[key])


def draw(report: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
    names = {
        "open_provence": "OpenProvence's path",
        "provence": "Provence's path",
        "ours": "ours, float32",
        "ours_fast32": "ours, fast without bfloat16",
        "ours_fast": "ours, fast",
    }
    rates = report["passages_per_second"]
    left.barh(list(names.values()), [rates[name] for name in names], color="#4878a8")
    left.invert_yaxis()
    left.set(title="mixed lengths", xlabel="passages a second")
    for row, (path, matrices) in enumerate((("ours", "matrices"), ("ours_fast", "matrices_fast"))):
        s, at = report["seconds"], 0.0
        padding = s[matrices] * (1 - 1 / report["computed_over_real_tokens"])
        parts = {
            "matrices": s[matrices] - padding,
            "padding": padding,
            "tokenising": s["tokenise"],
            "splitting": s["split"],
        }
        parts["scores and the rest"] = max(0.0, s[path] - sum(parts.values()))
        for i, (part, value) in enumerate(parts.items()):
            label = part if row == 0 else None
            right.barh(names[path], value, left=at, color=f"C{i}", label=label)
            at += value
    right.invert_yaxis()
    right.set(title="where the time goes", xlabel="seconds")
    right.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    main()
