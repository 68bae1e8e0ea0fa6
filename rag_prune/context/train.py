"""Train a context pruner on rows of question, passage and evidence; both engines share one encoder.

    prunekit context train train.jsonl --base ENCODER --out DIR

A row is a JSON object: `question`, `passage`, optional `title`, `evidence` ([[start, end], …]
character spans; [] when the passage does not answer), optional `answers` (other sentences that
hold an answer are neither rewarded nor punished) and `weight` (how often the row is drawn, 1 by
default).

The first share of the steps teaches the `late` engine alone (passages read without the question:
softmax over all sentences of the batch, and over its passages); it leaves an encoder whose token
states already carry similarity, and which is kept as `late-model`. Then, with the learning rate
raised and lowered once more, joint reading is trained as well: per token and per sentence for the
keep head, and for the relevance head a choice between the question's passage and a BM25-hard one.
On the steps that train both engines each of them also learns from the mean of the two.

Steps are drawn from the seed and their number alone, so a run that was stopped goes on from its
last checkpoint to the same weights. A run's folder holds

    model/                  the finished pruner, for `ContextPruner.from_pretrained`
    late-model/             the pruner after the first share of the steps
    training.safetensors    weights and optimiser of the last checkpoint, to go on from
    log.jsonl               the mean losses of every 50 steps
    run.json                settings, versions, machine, time, and figures on the dev rows
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

from prune_core.errors import CheckpointError, InputError, unknown_name
from prune_core.provenance import provenance
from prune_core.storage import atomic_write, read_jsonl, write_json
from rag_prune.context.both import Both
from rag_prune.context.calibrate import calibrate
from rag_prune.context.checkpoints import (
    ENGINES,
    Checkpoint,
    Settings,
    is_pruner,
    load,
    save,
)
from rag_prune.context.cross import Cross
from rag_prune.context.evaluate import Task, build_tasks, measure, score_tasks
from rag_prune.context.late import Late
from rag_prune.context.model import PrunerModel
from rag_prune.context.pruner import DEFAULT_THRESHOLD, ContextPruner
from rag_prune.context.train_losses import agreement_loss, joint_loss, late_loss
from rag_prune.context.train_rows import (
    Piece,
    Row,
    hard_negatives,
    labelled_rows,
    piece,
    read_rows,
)

LOG_EVERY = 50


@dataclass(frozen=True)
class TrainConfig:
    """What one run does; docs/context-training.md has the two runs of the bundled pruner."""

    steps: int = 1250
    questions: int = 16  # per step; each brings its own passage and a hard one
    late_share: float = 0.29  # of the steps, trained on the late engine alone
    late_every: int = 2  # afterwards the late losses are taken on every n-th step
    agreement: float = 0.5  # weight, on those steps, of what the engines learn from their mean
    # Its peak; the linear heads learn 5 times, the late weights 100 times as fast.
    learning_rate: float = 7e-5
    warmup: float = 0.06  # of each stage; after it the rate falls linearly to nothing
    weight_decay: float = 0.01
    max_tokens: int = 256
    hard_rate: float = 0.8  # share of the negatives that are hard; the others are any passage
    title_rate: float = 0.5  # share of the rows with a title that show it
    save_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.questions < 2 or self.late_every < 1 or self.save_every < 1:
            raise InputError(
                "steps, late_every and save_every must be at least 1 and questions at least 2, got "
                f"{self.steps}, {self.late_every}, {self.save_every} and {self.questions}."
            )
        shares = {
            "late_share": self.late_share,
            "warmup": self.warmup,
            "hard_rate": self.hard_rate,
            "title_rate": self.title_rate,
        }
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise InputError(f"{name} is a share between 0 and 1, got {share}.")
        if self.agreement < 0:
            raise InputError(f"agreement is a weight of at least 0, got {self.agreement}.")
        if self.max_tokens < 128:
            raise InputError(
                f"max_tokens must be at least 128, got {self.max_tokens}: question and title may "
                "take 100 of them, and the passage needs the rest."
            )


def draw(
    rows: Sequence[Row], negatives: Sequence[Sequence[int]], config: TrainConfig, step: int
) -> tuple[list[Piece], list[Piece]]:
    """The questions of one step: their own pieces and one hard piece each."""
    rng = np.random.default_rng((config.seed, step))
    weights = np.array([row.weight for row in rows])
    chosen = rng.choice(len(rows), size=config.questions, replace=False, p=weights / weights.sum())
    own, hard = [], []
    for i in chosen:
        row = rows[i]
        room = config.max_tokens - len(row.question_ids) - 3
        candidates = negatives[i] if rng.random() < config.hard_rate else []
        other = rows[int(rng.choice(candidates)) if candidates else int(rng.integers(len(rows)))]
        own.append(piece(row, room, rng, config.title_rate, as_negative=False))
        hard.append(piece(other, room, rng, config.title_rate, as_negative=True))
    return own, hard


def rate_share(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at a step: up and down once in each stage."""
    late = int(config.late_share * config.steps)
    first, length = (0, late) if step < late else (late, config.steps - late)
    warm = max(1, int(config.warmup * length))
    return min((step - first + 1) / warm, (first + length - step) / max(1, length - warm))


def train(
    config: TrainConfig,
    train_file: Path,
    base: str,
    out: Path,
    *,
    dev_file: Path | None = None,
    method: Literal["provence", "late", "both"] = "both",
    int8: bool = False,
) -> Path:
    """Train and save a checkpoint folder; goes on where an earlier run into `out` stopped.

    Args:
        config: The recipe.
        train_file: JSONL rows to learn from.
        base: What to start from, a folder or a hub name with safetensors: an encoder, or a folder
            with a pruner (as `rag_prune/context/default`) to go on training it.
        out: Folder of the run.
        dev_file: JSONL rows of other titles; the probabilities are calibrated on them, so that a
            threshold of 0.1 keeps 95 % of their evidence sentences. They are read before the
            training begins, so that a bad row costs no hours.
        method: The engine that the checkpoint uses by default.
        int8: Store matrices as rows of int8.

    Returns:
        The folder of the finished pruner, ready for `ContextPruner.from_pretrained`.

    Raises:
        InputError: Rows that are not training rows or too few of them, or a run with other
            settings in `out`.
        UnknownName: Another engine than those three.
        CheckpointError: `base` cannot be loaded, or the state of the run in `out`.
    """
    if method not in ENGINES:
        raise unknown_name("engine", method, ENGINES)
    torch.manual_seed(config.seed)
    tokenizer, model = _start(base, config.max_tokens)
    optimiser = _optimiser(model, config)
    tasks = None if dev_file is None else _tasks(dev_file)
    out.mkdir(parents=True, exist_ok=True)
    state_file = out / "training.safetensors"
    first = _resume(state_file, model, optimiser, config) if state_file.exists() else 0
    if first < config.steps:
        rows = read_rows(train_file, tokenizer)
        _steps(config, first, rows, model, tokenizer, optimiser, out)
    settings = Settings(config.max_tokens, method)
    if tasks is not None:
        settings = _calibrated(model, tokenizer, settings, tasks)
    final = out / "model"
    save(final, model, tokenizer, settings, int8=int8, overwrite=True)
    dev = {} if tasks is None else _figures(final, tasks)
    write_json(out / "run.json", provenance(seed=config.seed, config=asdict(config), dev=dev))
    return final


def report(run: Path) -> str:
    """What a finished run says of its dev rows, one line an engine; empty when it had none."""
    dev = json.loads((run / "run.json").read_text(encoding="utf-8"))["extra"]["dev"]
    return "\n".join(
        f"{name:10} at threshold 0.1: evidence kept {of['recall']:.3f}, "
        f"text dropped {of['compression']:.3f}; at recall .95: dropped "
        f"{of['compression_at_0.95']:.3f}; MRR {of['mrr']:.3f}; calibration error {of['ece']:.3f}"
        for name, of in dev.items()
    )


def _start(base: str, max_tokens: int) -> tuple[Any, PrunerModel]:
    """Tokenizer and model to start from: a pruner as it is, or an encoder with two new rows."""
    folder = Path(base)
    if folder.is_dir() and is_pruner(folder):
        checkpoint = load(folder)
        tokenizer, model = checkpoint.tokenizer, checkpoint.model
    else:
        tokenizer, network = _encoder(base)
        model = PrunerModel(network)
    # Half of a small encoder's weights are word vectors; frozen, they cost Adam nothing.
    model.classifier.get_input_embeddings().requires_grad_(False)
    _probe(model, tokenizer, max_tokens)
    return tokenizer, model


def _probe(model: PrunerModel, tokenizer: Any, max_tokens: int) -> None:
    """Read one row of the longest size, before the training meets one somewhere in the middle."""
    ids = torch.full((1, max_tokens), tokenizer.cls_token_id)
    try:
        with torch.inference_mode():
            model.states(ids, torch.ones_like(ids))
    except (IndexError, RuntimeError) as error:
        raise InputError(
            f"The encoder cannot read {max_tokens} tokens at once ({error}): set max_tokens lower."
        ) from error


def _encoder(base: str) -> tuple[Any, Any]:
    """The tokenizer and the network of an encoder, its two linear rows new."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        encoder = AutoConfig.from_pretrained(
            base,
            num_labels=2,
            id2label={0: "keep", 1: "relevance"},
            trust_remote_code=False,
        )
        for name in encoder.to_dict():  # each family has its own names for it
            if name.endswith(("dropout", "dropout_prob")):
                setattr(encoder, name, 0.0)
        network = AutoModelForTokenClassification.from_pretrained(
            base, config=encoder, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot start from '{base}': name a folder or a hub name with an encoder, its "
            f"tokenizer and safetensors weights. {error}"
        ) from error
    if not tokenizer.is_fast or None in (
        tokenizer.cls_token_id,
        tokenizer.sep_token_id,
        tokenizer.pad_token_id,
    ):
        raise CheckpointError(
            f"Cannot start from '{base}': its tokenizer must be a fast one with a token for the "
            "beginning (cls), between two texts (sep) and for padding (pad)."
        )
    return tokenizer, network


def _optimiser(model: PrunerModel, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over encoder, heads and late weights, in this order, each at its peak rate."""
    heads = list(model.classifier.classifier.parameters())
    apart = {id(model.late), *map(id, heads)}
    encoder = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    rate, decay = config.learning_rate, config.weight_decay
    return torch.optim.AdamW(
        [
            {"params": encoder, "lr": rate, "weight_decay": decay},
            {"params": heads, "lr": 5 * rate, "weight_decay": decay},
            {"params": [model.late], "lr": 100 * rate, "weight_decay": 0.0},
        ]
    )


def _steps(
    config: TrainConfig,
    first: int,
    rows: Sequence[Row],
    model: PrunerModel,
    tokenizer: Any,
    optimiser: torch.optim.Optimizer,
    out: Path,
) -> None:
    """Take the steps from `first` on, with a log and checkpoints in `out`."""
    drawable = sum(row.weight > 0 for row in rows)
    if drawable < config.questions:
        raise InputError(
            f"A step draws {config.questions} questions, and only {drawable} rows have a weight "
            "above 0: give more rows, or set questions lower."
        )
    negatives = hard_negatives(rows)
    late_only = int(config.late_share * config.steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    peaks = [group["lr"] for group in optimiser.param_groups]
    log = _Log(out / "log.jsonl", first)
    progress = tqdm(range(first, config.steps), initial=first, total=config.steps, desc="training")
    model.train()
    for step in progress:
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_share(config, step)
        own, hard = draw(rows, negatives, config, step)
        losses: dict[str, Tensor] = {}
        late = joint = None
        if step < late_only or step % config.late_every == 0:
            losses["late"], late = late_loss(model, tokenizer, own, hard)
        if step >= late_only:
            losses["joint"], joint = joint_loss(model, tokenizer, own, hard)
        if late and joint and config.agreement:
            losses["agreement"] = config.agreement * agreement_loss(joint, late, own, hard)
        loss = sum(losses.values(), start=torch.zeros(()))
        if not math.isfinite(loss.item()):
            raise InputError(
                f"The loss is {loss.item()} at step {step + 1}: try a lower learning_rate."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        log.add({name: value.item() for name, value in losses.items()})
        if (step + 1) % LOG_EVERY == 0:
            progress.set_postfix(log.write(step + 1))
        if step + 1 == late_only:
            # Over one that is there: a run stopped after it goes on from before it.
            settings = Settings(config.max_tokens, "late")
            save(out / "late-model", model, tokenizer, settings, overwrite=True)
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            _save_state(out / "training.safetensors", model, optimiser, config, step + 1)


class _Log:
    """Mean losses in a JSONL file, written whole each time; a resumed run goes on in it."""

    def __init__(self, file: Path, first: int) -> None:
        self.file = file
        self.records = [r for r in read_jsonl(file) if r["step"] <= first] if file.exists() else []
        before = self.records[-1]["seconds"] if self.records else 0.0
        self.started = time.monotonic() - before
        self.losses: defaultdict[str, list[float]] = defaultdict(list)

    def add(self, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self.losses[name].append(value)

    def write(self, step: int) -> dict[str, float]:
        """Write the means since the last call, and return them."""
        means = {name: round(float(np.mean(values)), 4) for name, values in self.losses.items()}
        self.losses.clear()
        seconds = round(time.monotonic() - self.started, 1)
        self.records.append({"step": step, "seconds": seconds, **means})
        with atomic_write(self.file) as file:
            file.writelines(json.dumps(record) + "\n" for record in self.records)
        return means


def _tasks(dev_file: Path) -> list[Task]:
    """Tasks of the dev rows, with random and with hard distractors."""
    rows = labelled_rows(dev_file)
    return [*build_tasks(rows, distractors="random"), *build_tasks(rows, distractors="bm25")]


def _calibrated(
    model: PrunerModel, tokenizer: Any, settings: Settings, tasks: Sequence[Task]
) -> Settings:
    """The settings with every engine's calibration fitted on the tasks."""
    checkpoint = Checkpoint(model.eval(), tokenizer, settings, fingerprint="")
    engines = {"provence": Cross(checkpoint), "late": Late(checkpoint), "both": Both(checkpoint)}
    return replace(
        settings, calibration={name: calibrate(engine, tasks) for name, engine in engines.items()}
    )


def _figures(folder: Path, tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """Each engine's figures on the tasks, as the finished folder gives them."""
    out = {}
    for engine in ENGINES:
        scored = score_tasks(ContextPruner.from_pretrained(folder, method=engine), tasks)
        figures = measure(scored, DEFAULT_THRESHOLD)
        out[engine] = {name: figure["value"] for name, figure in figures.items()}
    return out


def _save_state(
    file: Path, model: PrunerModel, optimiser: torch.optim.Optimizer, config: TrainConfig, step: int
) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for i, moments in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": value for name, value in moments.items()}
    with atomic_write(file, "wb") as out:
        out.write(to_bytes(tensors, {"step": str(step), "config": json.dumps(asdict(config))}))


def _resume(
    file: Path, model: PrunerModel, optimiser: torch.optim.Optimizer, config: TrainConfig
) -> int:
    """Load weights and optimiser moments; returns the number of steps already taken."""
    try:
        with safe_open(file, "pt") as stored:
            meta = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"'{file}' is damaged ({error}): delete it to start the run again."
        ) from error
    if json.loads(meta["config"]) != asdict(config):
        raise InputError(
            f"'{file.parent}' holds a run with other settings ({meta['config']}): go on with "
            "those, or name another folder."
        )
    try:
        model.load_state_dict(
            {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        )
    except RuntimeError as error:
        raise CheckpointError(
            f"'{file.parent}' holds a run that began from another encoder: name another folder."
        ) from error
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, i, name = key.split(".")
            moments[int(i)][name] = value
    optimiser.load_state_dict(
        {"state": dict(moments), "param_groups": optimiser.state_dict()["param_groups"]}
    )
    return int(meta["step"])
