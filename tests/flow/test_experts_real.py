"""A real model becomes a mixture, its experts specialise, and a task keeps what it loses least by.

Three families of text that are installed with Python, so that nothing has to be fetched besides the
model. benchmarks/model/experts.py asks the same of tasks with answers; margins here are about half
of what was measured first.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from model_prune import Calibration, prune_model
from model_prune.checkpoint import open_checkpoint
from model_prune.methods.premoe import PreMoe
from model_prune.patterns import Patterns
from pipelines.small_model import small_model
from pipelines.upcycle import Upcycling, encode, upcycle
from reference_text import prose

pytestmark = pytest.mark.slow

RECIPE = Upcycling(layers=3, experts=6, tokens=96)
TRAINED, HELD, SEED = 60, 12, 0


def code():
    for path in sorted(Path(re.__file__).parents[1].glob("[a-d]*.py")):
        lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
        for i in range(60, len(lines) - 6, 120):
            yield "\n".join(lines[i : i + 4]), "\n".join(lines[i + 4 : i + 6])


def sums():
    draw = np.random.default_rng(SEED)
    while True:
        a, b = (int(n) for n in draw.integers(10, 90, 2))
        yield f"A box holds {a} apples, and {b} more are put in. How many are in it?", str(a + b)


@pytest.fixture(scope="module")
def families(tokenizer):
    """Pairs by family: to train on, and held out."""
    found = {}
    for name, source in (("prose", prose), ("code", code), ("sums", sums)):
        pairs = (pair for pair in source() if len(encode(tokenizer, *pair).ids) <= RECIPE.tokens)
        several = [pair for pair, _ in zip(pairs, range(TRAINED + HELD), strict=False)]
        assert len(several) == TRAINED + HELD
        shuffled = [several[i] for i in np.random.default_rng(SEED).permutation(len(several))]
        found[name] = shuffled[:TRAINED], shuffled[TRAINED:]
    return found


@pytest.fixture(scope="module")
def folder(families, tmp_path_factory):
    out = tmp_path_factory.mktemp("upcycled") / "mixture"
    trained = {name: pairs for name, (pairs, _) in families.items()}
    return upcycle(small_model(progress=False), out, trained, RECIPE, progress=False)


@pytest.fixture(scope="module")
def library(folder, families, tokenizer, tmp_path_factory):
    patterns = Patterns(tmp_path_factory.mktemp("patterns"))
    for name, (trained, _) in families.items():
        ids = torch.cat([encode(tokenizer, *pair).ids for pair in trained])
        read = Calibration(ids[: len(ids) // 64 * 64].view(-1, 64))
        patterns.add(name, folder, read, progress=False)
    return patterns


def load(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()


@torch.no_grad()
def losses(model, tokenizer, pairs):
    """Of each row's completion."""
    found = []
    for row in (encode(tokenizer, *pair) for pair in pairs):
        logits = model(row.ids[None], logits_to_keep=len(row.ids) - row.start + 1).logits[0, :-1]
        found.append(torch.nn.functional.cross_entropy(logits, row.ids[row.start :]).item())
    return np.array(found)


def test_a_family_keeps_what_it_can_do(folder, library, families, tokenizer):
    """With half of the experts, its own; not with another family's. Random ones may tie."""
    held = {name: pairs for name, (_, pairs) in families.items()}
    whole = {name: losses(load(folder), tokenizer, pairs) for name, pairs in held.items()}
    plans = {name: library.plan(name, folder) for name in held}
    for seed in range(3):
        plans[f"random {seed}"] = library.plan("prose", folder, PreMoe(score="random", seed=seed))
    found = {}
    for name, plan in plans.items():
        model = plan.apply(load(folder))
        found[name] = {task: losses(model, tokenizer, pairs) for task, pairs in held.items()}
    for task in held:
        own = found[task][task]
        lost = (own - whole[task]).mean()
        other = np.mean([found[name][task] - own for name in held if name != task])
        drawn = np.mean([found[f"random {seed}"][task] - own for seed in range(3)])
        print(
            f"{task}: loss {whole[task].mean():.3f} with all experts, {lost:+.3f} with its half; "
            f"another's half costs {other:+.3f} more, a random one {drawn:+.3f} (seeds 0-2)"
        )
        assert lost < 0.05
        assert other > 0.025


def test_queries_find_their_family(folder, library, families, tokenizer):
    model = load(folder)
    right = []
    for name, (_, held) in families.items():
        for row in (encode(tokenizer, *pair) for pair in held[:8]):
            found = library.nearest(model, row.ids[: row.start])
            print(name, [(one.task, round(one.distance, 3)) for one in found])
            right.append(found[0].task == name)
    print(f"seed {SEED}: {sum(right)} of {len(right)} held-out prompts find their family")
    assert sum(right) >= 18  # 8 by chance


def test_the_folder_has_half_of_the_experts_bytes(folder, families, tokenizer, tmp_path):
    text = tmp_path / "sums.txt"
    text.write_text("\n".join(" ".join(pair) for pair in families["sums"][0]))
    report = prune_model(
        folder, method="premoe", calibration=text, tokens=64, out=tmp_path / "half", progress=False
    )
    before, after = (open_checkpoint(path).nbytes for path in (folder, tmp_path / "half"))
    expert = 3 * 576 * 1536 * 4
    assert before - after == pytest.approx(3 * RECIPE.layers * expert, rel=1e-3)
    print(f"{before:,} bytes become {after:,}; {report.answers['Smaller?']}")
    assert load(tmp_path / "half").config.num_experts == 3
