"""What pruning cost: perplexity by one stated protocol, and whether a difference is noise.

    before = perplexity(model, tokenizer, text)
    plan.apply(model)
    after = perplexity(model, tokenizer, text)
    print(compare(before, after))       # 1.042 times the perplexity (95 %: 1.031 to 1.053), …

The protocol is that of SparseGPT's and Wanda's published code: the lines of a test text are joined
by an empty line and tokenised once, as one text; it is cut into floor(N / T) windows of T tokens
that do not overlap, and the last part is dropped. A window's loss is the mean negative
log-likelihood of its last T - 1 tokens, each given those before it in the window; the perplexity is
exp of the mean over windows. The published numbers differ in T (128 to 4,096), which alone changes
them by far more than a method does, so `compare` refuses results that were not measured alike.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from model_prune.core.mode import evaluating
from model_prune.core.target import family_of
from prune_core.errors import CheckpointError, InputError, require
from prune_core.storage import StrPath

RESAMPLES = 2000
_LOGIT_BYTES = 2**28  # of float32 logits at once; a vocabulary times a window can be gigabytes


@dataclass(frozen=True)
class Protocol:
    """How a perplexity was measured; results compare only where all of it is the same.

    tokens: length of a window, T.
    separator: what the text's lines were joined by.
    bos: whether a start token was put before the text; here never.
    dtype: of the model's weights, "float32"; the losses are float32 in any case.
    text: SHA-256 of the text as given.
    ids: SHA-256 of the tokens scored, as int64: models of two tokenizers do not compare.
    windows: how many were scored, from the first; None for all.
    """

    tokens: int
    separator: str
    bos: bool
    dtype: str
    text: str
    ids: str
    windows: int | None


@dataclass(frozen=True, eq=False)
class Perplexity:
    """A model's losses on one text.

    window_nll: float64 [windows], the mean negative log-likelihood of each window, in nats.
    scored_bytes: of the text, as UTF-8, that the scored tokens stand for.
    """

    window_nll: np.ndarray
    scored_bytes: int
    seconds: float
    protocol: Protocol

    @property
    def value(self) -> float:
        """The perplexity, exp of the mean over windows."""
        return float(np.exp(self.window_nll.mean()))

    @property
    def bits_per_byte(self) -> float:
        """Bits lost for each byte of the scored text; models of two tokenizers compare by it."""
        nats = self.window_nll.sum() * (self.protocol.tokens - 1)
        return float(nats / math.log(2) / self.scored_bytes)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON can hold it, with the two numbers that follow from it."""
        return {
            "value": self.value,
            "bits_per_byte": self.bits_per_byte,
            "window_nll": self.window_nll.tolist(),
            "scored_bytes": self.scored_bytes,
            "seconds": self.seconds,
            "protocol": asdict(self.protocol),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Perplexity:
        """What `to_dict` gave; raises InputError for something else."""
        try:
            return cls(
                np.array(stored["window_nll"], dtype=np.float64),
                int(stored["scored_bytes"]),
                float(stored["seconds"]),
                Protocol(**stored["protocol"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"This is no stored perplexity ({error!r}): give what Perplexity.to_dict made."
            ) from error


@dataclass(frozen=True)
class Comparison:
    """The perplexity of b over that of a, on the same windows.

    low, high: the ends of the 95 % interval; a difference is claimed only where 1 is outside.
    windows: how many pairs it rests on.
    """

    ratio: float
    low: float
    high: float
    windows: int

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 1."""
        return not self.low <= 1 <= self.high

    def __str__(self) -> str:
        verdict = "" if self.differs else "; no difference is shown"
        return (
            f"{self.ratio:.3f} times the perplexity (95 %: {self.low:.3f} to {self.high:.3f}), "
            f"{self.windows} windows{verdict}"
        )


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    tokens: int = 512,
    max_windows: int | None = None,
    separator: str = "\n\n",
    batch: int = 4,
    progress: bool = True,
) -> Perplexity:
    """Measure a causal language model on a text, by the protocol above.

    model: of transformers, of one of the families that can be pruned; it is read where it is, with
        dropout off, and left as it was.
    tokenizer: the model's, a fast one (with offsets).
    text: its lines are joined by `separator`; "\\n" leaves it as it is.
    tokens: length of a window; 2,048 is what most papers use.
    max_windows: score only so many, from the first; None for all.
    batch: windows at once; it changes nothing but time and memory.

    Raises InputError for a text shorter than one window, numbers out of range, a slow tokenizer,
    a model of another family, and losses that are not finite, naming the window.
    """
    family_of(model.config)  # their logits are the head's outputs, with nothing done to them
    if tokens < 2 or batch < 1 or (max_windows is not None and max_windows < 1):
        raise InputError(
            f"A window needs 2 tokens or more, and batch and max_windows must be 1 or more, got "
            f"tokens={tokens}, batch={batch} and max_windows={max_windows}."
        )
    if not tokenizer.is_fast:
        raise InputError(
            "Bits per byte need to know which text a token stands for, and a slow tokenizer cannot "
            "tell: load it with AutoTokenizer, use_fast=True."
        )
    joined = separator.join(text.split("\n"))
    encoded = tokenizer(
        joined, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    total = len(encoded.input_ids) // tokens
    if not total:
        raise InputError(
            f"The text has {len(encoded.input_ids)} tokens, and one window needs {tokens}: give a "
            f"longer text, or a smaller `tokens`."
        )
    count = min(total, max_windows or total)
    windows = torch.tensor(encoded.input_ids[: count * tokens]).view(count, tokens)
    ends = np.array(encoded.offset_mapping[: count * tokens])[:, 1].reshape(count, tokens)
    protocol = Protocol(
        tokens,
        separator,
        bos=False,
        dtype=str(model.dtype).removeprefix("torch."),
        text=hashlib.sha256(text.encode()).hexdigest(),
        ids=hashlib.sha256(windows.numpy().tobytes()).hexdigest(),
        windows=None if count == total else count,
    )
    started = time.perf_counter()
    shown = None if progress else True
    with (
        evaluating(model),
        tqdm(total=count, desc="perplexity", unit="window", disable=shown) as bar,
    ):
        parts: list[Tensor] = []
        for part in torch.split(windows, batch):
            parts.append(_window_nll(model, part, len(parts) * batch))
            bar.update(len(part))
    # A window's first token is read but not scored, so its text does not count.
    scored = sum(len(joined[first:last].encode()) for first, last in ends[:, [0, -1]])
    return Perplexity(torch.cat(parts).numpy(), scored, time.perf_counter() - started, protocol)


@torch.inference_mode()
def _window_nll(model: Any, windows: Tensor, first: int) -> Tensor:
    """Mean loss of each window, float64 [n]; windows: int64 [n, T], numbered from `first`."""
    windows = windows.to(model.device)
    head = model.get_output_embeddings()
    hidden = model.base_model(windows, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = windows[:, 1:].flatten()
    rows = max(1, _LOGIT_BYTES // (4 * head.weight.shape[0]))
    nll = torch.cat(
        [
            cross_entropy(head(x).float(), y, reduction="none")
            for x, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
        ]
    ).view(len(windows), -1)
    broken = (~nll.isfinite()).any(1).nonzero()
    if len(broken):
        raise InputError(
            f"The model's logits in window {first + int(broken[0])} are NaN or infinite: its "
            f"weights are broken, or too large for {model.dtype}; try float32."
        )
    return nll.double().mean(1).cpu()


def compare(a: Perplexity, b: Perplexity, *, seed: int = 0) -> Comparison:
    """How many times a's perplexity b's is, with a paired bootstrap over windows.

    The windows' differences ln b - ln a are drawn anew 2,000 times with replacement; the interval
    holds the middle 95 % of the means. The same seed gives the same interval.

    Raises InputError if the two were measured by different protocols, or on a single window.
    """
    for field in fields(Protocol):
        one, other = (getattr(x.protocol, field.name) for x in (a, b))
        if one != other:
            raise InputError(
                f"The two perplexities do not compare: `{field.name}` of their protocols is "
                f"{one!r} and {other!r}. {_REMEDY.get(field.name, _MEASURE_ALIKE)}"
            )
    gaps = b.window_nll - a.window_nll
    if len(gaps) < 2:
        raise InputError(
            "One window shows nothing of the noise between windows: measure both on 2 or more, "
            "best on 20."
        )
    rng = np.random.default_rng(seed)
    means = [gaps[rng.integers(len(gaps), size=len(gaps))].mean() for _ in range(RESAMPLES)]
    ratio, low, high = np.exp([gaps.mean(), *np.quantile(means, (0.025, 0.975))]).tolist()
    return Comparison(ratio, low, high, len(gaps))


_MEASURE_ALIKE = "Measure both in the same way."
_REMEDY = {
    "ids": "The tokenizers differ, so compare bits_per_byte instead.",
    "text": "Measure both on the same text.",
}


def evaluate_folder(
    path: StrPath,
    texts: Mapping[str, str],
    *,
    tokens: int = 512,
    max_windows: int | None = None,
    batch: int = 4,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, Perplexity]:
    """The perplexity of a saved model on each text, by the text's name.

    path: a folder, or a hub name; weights are read from safetensors only, and no code of the
        checkpoint's is run. They are float32 on a CPU, and of their own type elsewhere.
    texts: at least one, and best a second of another kind than the calibration's, as methods
        differ in how far they overfit it.

    Raises CheckpointError if it cannot be loaded, or not to the last weight; InputError as
    `perplexity` does.
    """
    model, tokenizer = _load(path, device)
    return {
        name: perplexity(
            model,
            tokenizer,
            text,
            tokens=tokens,
            max_windows=max_windows,
            batch=batch,
            progress=progress,
        )
        for name, text in texts.items()
    }


def _load(path: StrPath, device: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import model_prune.decoders  # noqa: F401  (the Auto classes learn of pruned models)

    auto: Any = AutoModelForCausalLM  # its type does not tell of output_loading_info
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, loaded = auto.from_pretrained(
            path,
            dtype="float32" if device == "cpu" else "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:  # the last: shapes that differ
        raise CheckpointError(
            f"Cannot load a language model from '{path}' ({error}): give a folder with "
            f"config.json, a tokenizer and weights in safetensors."
        ) from error
    # transformers fills what is missing with random numbers and leaves out what has no place; a
    # perplexity of such a model says nothing.
    for kind in ("missing_keys", "unexpected_keys"):
        if keys := sorted(loaded[kind]):
            raise CheckpointError(
                f"The weights in '{path}' do not fit the model that its config.json describes: "
                f"{len(keys)} {kind.replace('_', ' ')}, the first '{keys[0]}'. Export it again."
            )
    return model.to(device), tokenizer


def lm_eval_tasks(
    path: StrPath,
    tasks: Sequence[str],
    *,
    batch: int = 8,
    limit: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores on tasks of the lm-evaluation-harness (the extra `eval`), by task.

    The harness fetches the tasks' data sets from the model hub, so this needs a network or a
    filled cache. Models of about 100 million parameters are near chance on most tasks; piqa,
    arc_easy, hellaswag, lambada_openai and sciq are above it. With 1,000 questions the standard
    error is about 1.5 points.

    path: a folder, or a hub name, of a model that transformers knows; read as in `evaluate_folder`.
    tasks: the harness' names.
    limit: questions of each task, from the first; None for all.

    Returns what the harness has under "results": {"piqa": {"acc,none": 0.68, …}, …}.
    Raises MissingExtra without lm-eval, and InputError for no tasks.
    """
    if not tasks:
        raise InputError('Name at least one task of the lm-evaluation-harness, such as "piqa".')
    import model_prune.decoders  # noqa: F401  (the Auto classes learn of pruned models)

    harness = require("lm_eval", extra="eval", purpose="Scoring a model on tasks")
    found = harness.simple_evaluate(
        model="hf",
        model_args={
            "pretrained": str(path),
            "dtype": "float32" if device == "cpu" else "auto",
            "use_safetensors": True,
            "trust_remote_code": False,
        },
        tasks=list(tasks),
        batch_size=batch,
        limit=limit,
        device=device,
    )
    results: dict[str, Any] = found["results"]
    return results
