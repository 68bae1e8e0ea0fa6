"""What does cutting channels cost networks of every kind, by each criterion at the same FLOPs?

    python benchmarks/model/anything.py [--model FOLDER --text wikitext2_valid.txt.gz \\
        --test wikitext2_test.txt.gz]

Small networks, trained here on real data: scikit-learn's digits (8 x 8, 1,797 of them), as images,
patches, or a sequence of their rows; and for the encoder Python's own library, of which a window of
32 words is to be told which of six modules it is from. Accuracy is on what was held back: 540
digits, or the last third of each module. `--model` adds a decoder, by perplexity.

    after      trained, cut, not trained again; "settled" also estimates the statistics of the batch
               norms again, on the training data, which is no part of a criterion but often helps
               more: so every row has it beside it
    tuned      the same, then trained for a third of the epochs
    before     cut as it is made, then trained as the dense network is
    cost       a ResNet-50 of random weights, 224 x 224, on 32 images: seconds, and memory in a
               process of its own
    decoder    a fifth of the weights of a decoder's layers cut; docs/model-pruning.md has more

Every row is at the same share of the FLOPs of products. `error` is the largest difference between
the masked and the cut network, by the largest output. A row is written when it is there, and a run
goes on after the last: to measure again, delete the file.
"""

import argparse
import copy
import importlib
import inspect
import json
import multiprocessing
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from model_prune.graph.importance import by_chance, by_channel, grasp, lowest, magnitude, snip
from model_prune.graph.network import Kept, Network
from model_prune.graph.readers import noise, obspa, settle
from prune_core.provenance import provenance
from prune_core.storage import read_text, write_json

OUT = Path(__file__).parent / "results" / "anything.json"
MODULES = ("argparse", "tarfile", "typing", "unittest.mock", "_pydecimal", "optparse")
WORDS, VOCABULARY = 32, 1500
SHARES, SEEDS = {"after": (0.3, 0.5, 0.7), "tuned": (0.7,), "before": (0.7,)}, (0, 1, 2)


# ------------------------------------------------------------------------------ data
@dataclass(frozen=True, eq=False)
class Data:
    """Inputs and classes, to train on and held back."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def digits(seed: int, shape: tuple[int, ...] = (1, 8, 8)) -> Data:
    found = load_digits()
    x = torch.tensor((found.data - found.data.mean()) / found.data.std(), dtype=torch.float32)
    x, y = x.view(-1, *shape), torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[540:], order[:540]
    return Data(x[train], y[train], x[test], y[test])


def modules() -> Data:
    """Windows of words, as numbers by how often they are."""
    texts = [inspect.getsource(importlib.import_module(name)) for name in MODULES]
    words = [re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]", text) for text in texts]
    split = [2 * len(one) // 3 for one in words]
    counts = Counter(w for one, at in zip(words, split, strict=True) for w in one[:at])
    number = {word: i + 1 for i, (word, _) in enumerate(counts.most_common(VOCABULARY - 1))}
    parts: tuple[list[Any], ...] = ([], [], [], [])
    for label, (one, at) in enumerate(zip(words, split, strict=True)):
        ids = torch.tensor([number.get(word, 0) for word in one])
        for half, (inputs, labels) in zip(
            (ids[:at], ids[at:]), (parts[:2], parts[2:]), strict=True
        ):
            rows = half[: len(half) // WORDS * WORDS].view(-1, WORDS)
            inputs.append(rows)
            labels.append(torch.full((len(rows),), label))
    return Data(*(torch.cat(part) for part in parts))


# ------------------------------------------------------------------------------ networks
class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, read: int, written: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(read, written, 3, stride, 1, bias=False)
        self.b1 = nn.BatchNorm2d(written)
        self.c2 = nn.Conv2d(written, written, 3, 1, 1, bias=False)
        self.b2 = nn.BatchNorm2d(written)
        self.short = nn.Sequential()
        if stride > 1:
            norm = nn.BatchNorm2d(written)
            self.short = nn.Sequential(nn.Conv2d(read, written, 1, stride, bias=False), norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b2(self.c2(F.relu(self.b1(self.c1(x)))))
        return F.relu(y + self.short(x))


class Inverted(nn.Module):
    """Wide between narrow ends, and depthwise where it is wide."""

    def __init__(self, read: int, written: int, stride: int) -> None:
        super().__init__()
        wide = 4 * read
        self.body = nn.Sequential(
            nn.Conv2d(read, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(),
            nn.Conv2d(wide, written, 1, bias=False),
            nn.BatchNorm2d(written),
        )
        self.shortcut = stride == 1 and read == written

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.shortcut else y


class Pooled(nn.Module):
    """Blocks, the mean over positions, a linear layer."""

    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(*blocks), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Rows(nn.Module):
    """A cell that reads a digit's rows one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(8, width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for row in x.unbind(1):
            state = self.cell(row, state)
        return self.head(state)


class Logits(nn.Module):
    """The one tensor of what a model of transformers gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def _stem(width: int, activation: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), activation]


def resnet() -> nn.Module:
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return Pooled(*_stem(16, nn.ReLU()), *blocks, width=64)


def mobilenet() -> nn.Module:
    sizes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 48, 2)]
    return Pooled(*_stem(16, nn.ReLU6()), *(Inverted(*size) for size in sizes), width=48)


def vit() -> nn.Module:
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    return Logits(ViTForImageClassification(config))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=WORDS,
        num_labels=len(MODULES),
    )
    return Logits(BertForSequenceClassification(config))


@dataclass(frozen=True)
class Kind:
    """A network, its data, and how it is trained."""

    build: Callable[[], nn.Module]
    data: Callable[[int], Data]
    epochs: int
    rate: float

    def made(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.build()

    def noise(self, data: Data, seed: int) -> Iterator[Any]:
        """Instead of data: from N(0, 1), and for words any of them."""
        if data.x.is_floating_point():
            return noise((data.x[:1],), 1024, 256, seed)
        draw = torch.Generator().manual_seed(seed)
        return (torch.randint(VOCABULARY, (256, WORDS), generator=draw) for _ in range(4))


KINDS = {
    "ResNet": Kind(resnet, digits, 12, 3e-3),
    "MobileNet": Kind(mobilenet, digits, 20, 3e-3),
    "ViT": Kind(vit, digits, 30, 2e-3),
    "BERT": Kind(bert, lambda seed: modules(), 9, 2e-3),
    "GRU cell": Kind(lambda: Rows(64), lambda seed: digits(seed, (8, 8)), 30, 3e-3),
}


def train(model: nn.Module, data: Data, epochs: int, rate: float, seed: int) -> nn.Module:
    """AdamW in batches of 64, the rate falling to zero."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    total = epochs * -(-len(data.x) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=total)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    found = torch.cat([model.eval()(x) for x in data.test_x.split(256)])
    return float((found.argmax(1) == data.test_y).float().mean())


# ------------------------------------------------------------------------------ rows
@dataclass(eq=False)
class Subject:
    """A network at one seed: as it is made, and as it is trained."""

    kind: Kind
    seed: int

    def __post_init__(self) -> None:
        self.data = self.kind.data(self.seed)
        self.fresh = self.kind.made(self.seed)
        self.trained = train(
            copy.deepcopy(self.fresh), self.data, self.kind.epochs, self.kind.rate, self.seed
        )
        self.has_norms = any(isinstance(m, nn.BatchNorm2d) for m in self.trained.modules())
        self.network = Network(self.trained, self.data.x[:2])
        draw = torch.Generator().manual_seed(self.seed)
        self.sample = torch.randperm(len(self.data.x), generator=draw)[:1024]

    def inputs(self) -> Iterator[Tensor]:
        """1,024 rows of the training data, as all methods read them."""
        yield from self.data.x[self.sample].split(256)

    def loss(self, model: nn.Module) -> Tensor:
        rows = self.sample[:256]
        return F.cross_entropy(model(self.data.x[rows]), self.data.y[rows])

    def scores(self, name: str, network: Network) -> dict[str, Tensor]:
        name, _, reduce = name.partition(", ")
        made: dict[str, Callable[[], Any]] = {
            "magnitude": lambda: magnitude(network.model),
            "random": lambda: by_chance(network.model, self.seed),
            "snip": lambda: snip(network.model, self.loss),
            "grasp": lambda: grasp(network.model, self.loss),
        }
        return by_channel(network, made[name](), reduce or "sum")  # type: ignore[arg-type]

    def cut(self, name: str, share: float, network: Network | None = None) -> tuple[Kept, Any]:
        """By a row's name."""
        network = network or self.network
        if name.startswith("obspa"):
            free = "no data" in name
            read = self.kind.noise(self.data, self.seed) if free else self.inputs()
            return obspa(network, read, share, "flops")
        kept = lowest(network, self.scores(name, network), share, "flops")
        return kept, network.cut(kept)

    def settled(self, model: nn.Module) -> nn.Module:
        return settle(copy.deepcopy(model), self.inputs())

    def error(self, kept: Kept) -> float:
        """Between masked and cut, by the largest output."""
        x = self.data.test_x[:64]
        with torch.no_grad():
            masked, cut = (
                model.eval()(x) for model in (self.network.masked(kept), self.network.cut(kept))
            )
        return float((masked - cut).abs().max() / masked.abs().max())

    def after(self, name: str, share: float) -> dict[str, float]:
        started = time.perf_counter()
        kept, model = self.cut(name, share)
        row = {"seconds": time.perf_counter() - started, "accuracy": accuracy(model, self.data)}
        if self.has_norms:
            row["settled"] = accuracy(self.settled(model), self.data)
        return row | self.sizes(kept) | {"error": self.error(kept)}

    def tuned(self, name: str, share: float) -> dict[str, float]:
        kept, model = self.cut(name, share)
        train(model, self.data, -(-self.kind.epochs // 3), self.kind.rate / 3, self.seed)
        return {"accuracy": accuracy(model, self.data)} | self.sizes(kept)

    def before(self, name: str, share: float) -> dict[str, float]:
        network = Network(self.fresh, self.data.x[:2])
        kept, model = self.cut(name, share, network)
        train(model, self.data, self.kind.epochs, self.kind.rate, self.seed)
        return {"accuracy": accuracy(model, self.data)} | self.sizes(kept)

    def sizes(self, kept: Kept) -> dict[str, float]:
        size = self.network.size
        return {of: size(kept, of) / size({}, of) for of in ("flops", "parameters")}


AFTER = ("random", "magnitude", "magnitude, max", "magnitude, l2")
AFTER += ("snip", "grasp", "obspa", "obspa, no data")
TUNED = ("random", "magnitude", "snip", "obspa")
BEFORE = ("random", "magnitude", "snip", "grasp")
TABLES = {"after": AFTER, "tuned": TUNED, "before": BEFORE}


def small(done: dict[str, Any], write: Callable[[], None]) -> None:
    """All tables of all small networks, row by row."""
    jobs = [(kind, seed) for seed in SEEDS for kind in KINDS]
    for kind, seed in tqdm(jobs, desc="networks"):
        own = done.setdefault("networks", {}).setdefault(kind, {}).setdefault(str(seed), {})
        keys = [
            (table, f"{share}: {row}", row, share)
            for table, rows in TABLES.items()
            for share in SHARES[table]
            for row in rows
        ]
        left = [job for job in keys if job[1] not in own.get(job[0], {})]
        if not left:
            continue
        subject = Subject(KINDS[kind], seed)
        own["dense"] = accuracy(subject.trained, subject.data)
        for table, key, row, share in left:
            own.setdefault(table, {})[key] = getattr(subject, table)(row, share)
            write()


def decoder(
    rows: dict[str, Any], write: Callable[[], None], folder: Path, text: Path, test: Path
) -> None:
    """Perplexity of a decoder after a fifth of its layers' weights went."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model_prune import Calibration, load_method
    from model_prune.evaluate import perplexity

    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"obspa": (8, 512), "spa": (10, 64)}
    read = {
        name: Calibration.read([text], tokenizer, windows=count, tokens=tokens)
        for name, (count, tokens) in sizes.items()
    }

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def measured(model: Any) -> float:
        found = perplexity(model, tokenizer, read_text(test), max_windows=4, progress=False)
        return float(found.value)

    if "dense" not in rows:
        rows["dense"] = {"perplexity": measured(load())}
    jobs: dict[str, Any] = {name: (name, {}) for name in ("obspa", "magnitude", "random")}
    jobs |= {f"spa, {one}": ("spa", {"criterion": one}) for one in ("magnitude", "snip", "grasp")}
    for name, (method, own) in tqdm(jobs.items(), desc="decoder"):
        if name in rows:
            continue
        started = time.perf_counter()
        chosen = load_method(method, remove=0.2, **own)
        plan = chosen.plan(folder, read.get(method), device="cpu", progress=False)
        seconds = time.perf_counter() - started
        rows[name] = {"perplexity": measured(plan.apply(load())), "seconds": seconds}
        write()


def cost() -> dict[str, Any]:
    """In a process of its own: a ResNet-50, a third of whose FLOPs go."""
    torch.manual_seed(0)
    model = Logits(ResNetForImageClassification(ResNetConfig(num_labels=1000))).eval()
    x = torch.randn(32, 3, 224, 224)
    times, started = {}, time.perf_counter()
    network = Network(model, x[:1])
    times["trace"] = time.perf_counter() - started
    begun = status("VmHWM")
    for name, made in {
        "magnitude": lambda: lowest(network, by_channel(network, magnitude(model)), 0.3, "flops"),
        "obspa": lambda: obspa(network, x.split(8), 0.3, "flops"),
    }.items():
        started = time.perf_counter()
        made()
        times[name] = time.perf_counter() - started
    weights = sum(p.numel() for p in model.parameters())
    return {
        "seconds": times,
        "weights": weights,
        "families": len(network.families),
        "memory": {"before": begun, "peak": status("VmHWM")},
        "images": len(x),
    }


def status(field: str) -> int:
    """Bytes, by a field of the kernel's about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (found,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(found.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "text", "test"):
        parser.add_argument(f"--{name}", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # more wait for each other on networks of this size
    torch.set_flush_denormal(True)
    done: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}

    def write() -> None:
        write_json(OUT, done | {"provenance": provenance(seed=0)})

    small(done, write)
    if "cost" not in done:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn) as process:
            done["cost"] = process.submit(cost).result()
        write()
    if arguments.model:
        torch.set_num_threads(2)
        rows = done.setdefault("decoder", {})
        decoder(rows, write, arguments.model, arguments.text, arguments.test)


if __name__ == "__main__":
    main()
