"""How far does iCBS take Wanda's and magnitude's masks of a small vision transformer?

    python benchmarks/model/flips.py

A ViT of 55 thousand weights in its layers is trained on scikit-learn's digits, 1,297 of them, and
accuracy and loss are those on the 500 others. Masks of every layer's matrices take a share of each
row; 20 steps of iCBS change none of the counts. Two controls take the same steps: `alone` finds
flips as if no weight knew of another, and `cleaned` by the published code's objective, in which
couplings below zero are deleted.
"""

import argparse
import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from model_prune.methods import icbs
from model_prune.methods.icbs import Block, Descent, Floats
from prune_core.provenance import provenance
from prune_core.storage import write_json

OUT = Path(__file__).parent / "results" / "flips.json"
STARTS, SHARES, SEEDS = ("wanda", "magnitude"), (0.5, 0.6, 0.7, 0.8), (0, 1, 2)
EPOCHS, BATCH = 25, 128
HOW = Descent(steps=20, block=256, damping=1.0)


class Alone(Block):
    """A block whose weights know nothing of each other."""

    def products(self) -> Floats:
        return np.diag(np.square(self.pulls).sum(0))


class Cleaned(Block):
    """A block as the published code cleans it up."""

    def products(self) -> Floats:
        found = super().products()
        return np.where(found > 1e-12, found, 0.0)


BLOCKS = {"icbs": Block, "alone": Alone, "cleaned": Cleaned}


class Digits:
    """A trained network and its data."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        found = load_digits()
        x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
        y, order = torch.tensor(found.target), torch.randperm(len(x))
        self.x, self.y = x[order[500:]], y[order[500:]]
        self.test = x[order[:500]], y[order[:500]]
        self.model: Any = ViTForImageClassification(
            ViTConfig(
                image_size=8,
                patch_size=2,
                num_channels=1,
                hidden_size=48,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=96,
                num_labels=10,
            )
        )
        steps = len(self.x) // BATCH * EPOCHS
        optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(self.x))[: steps // EPOCHS * BATCH].split(BATCH):
                optimizer.zero_grad()
                losses(self.model, (self.x[part], self.y[part])).mean().backward()
                optimizer.step()
                schedule.step()
        self.model.eval()
        for parameter in self.model.parameters():
            parameter.grad = None

    def masks(self, start: str, share: float) -> dict[str, Tensor]:
        """Of all layers' matrices, a share of every row."""
        norms: dict[str, Tensor] = {}
        modules = {
            name: module
            for name, module in self.model.vit.named_modules(prefix="vit")
            if isinstance(module, nn.Linear)
        }
        handles = [
            module.register_forward_hook(
                lambda _, x, __, name=name: norms.update({name: x[0].flatten(0, -2).norm(dim=0)})
            )
            for name, module in modules.items()
        ]
        with torch.no_grad():
            self.model(self.x)
        for handle in handles:
            handle.remove()
        masks = {}
        for name, module in modules.items():
            score = module.weight.detach().abs() * (norms[name] if start == "wanda" else 1)
            lowest = score.argsort(1)[:, : round(share * score.shape[1])]
            masks[f"{name}.weight"] = torch.ones_like(score, dtype=torch.bool).scatter(
                1, lowest, False
            )
        return masks

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Half of them to propose and judge by, half to decide."""
        drawn = np.random.default_rng(step).permutation(len(self.x))[: 4 * BATCH]
        return [(self.x[i], self.y[i]) for i in torch.from_numpy(drawn).split(BATCH)]

    @torch.no_grad()
    def measure(self, masks: Mapping[str, Tensor]) -> dict[str, float]:
        """On the digits that were held back, with these masks."""
        model = copy.deepcopy(self.model)
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
        right = model(self.test[0]).logits.argmax(-1) == self.test[1]
        return {
            "accuracy": float(right.float().mean()),
            "loss": float(losses(model, self.test).mean()),
        }

    def improved(self, masks: dict[str, Tensor], kind: type[Block] = Block) -> dict[str, Tensor]:
        """After the steps."""
        with mock.patch.object(icbs, "Block", kind):
            return HOW.improve(self.model, masks, self.batches, losses, progress=False)


def losses(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Of every image."""
    return cross_entropy(model(batch[0]).logits, batch[1], reduction="none")


def flipped(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """The share of the weights."""
    changed = sum(int((before[name] ^ after[name]).sum()) for name in before)
    return changed / sum(mask.numel() for mask in before.values())


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    rows = []
    for seed in SEEDS:
        digits = Digits(seed)
        rows.append({"seed": seed, "row": "dense", **digits.measure({})})
        cases = [(start, share) for start in STARTS for share in SHARES]
        for start, share in tqdm(cases, desc=f"seed {seed}"):
            masks = digits.masks(start, share)
            case = {"seed": seed, "start": start, "share": share}
            rows.append({**case, "row": "start", **digits.measure(masks)})
            for row, kind in BLOCKS.items():
                started = time.perf_counter()
                found = digits.improved(masks, kind)
                seconds = time.perf_counter() - started
                more = {"flipped": flipped(masks, found), "seconds": seconds}
                rows.append({**case, "row": row, **digits.measure(found), **more})
    report = {"rows": rows, "provenance": provenance(seed=0)}
    write_json(OUT, report)
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
