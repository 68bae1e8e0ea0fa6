"""What the metrics that read text find in real text, with real models.

Prose and code that are installed with Python, so that nothing has to be fetched besides the model.
With $PRUNEKIT_DATA, a folder of gsm8k_train.jsonl.gz and instructions_t0.jsonl.gz, also a part of
the mixture of benchmarks/data/targets.py, which has the figures. Margins lie about halfway from
what was measured to chance.
"""

import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data_prune.causal import Losses, Representations
from data_prune.choose import choose
from data_prune.engine import Local
from data_prune.metric import Given
from data_prune.metrics.dsir import DSIR
from data_prune.metrics.ifd import IFD
from data_prune.metrics.rds import RDS
from data_prune.rows import Columns, read, rows_of
from data_prune.vectors import SentenceEncoder, Vectors, embed
from pipelines.small_model import small_model
from reference_text import prose

pytestmark = pytest.mark.slow

DATA = Path(os.environ.get("PRUNEKIT_DATA", "."))
FILES = [DATA / f"{name}.jsonl.gz" for name in ("instructions_t0", "gsm8k_train")]
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "data" / "targets.py"
TOKENS = 48


def code():
    for path in sorted(Path(re.__file__).parents[1].glob("[a-d]*.py")):
        lines = [line for line in path.read_text("utf-8", "replace").splitlines() if line.strip()]
        for start in range(0, len(lines) - 10, 10):
            yield "\n".join(lines[start : start + 6]), "\n".join(lines[start + 6 : start + 10])


def drawn(pairs, n):
    pairs = list(dict.fromkeys(pairs))
    return [pairs[i] for i in np.random.default_rng(0).choice(len(pairs), n, replace=False)]


def rows_from(pairs):
    source = read([{"prompt": prompt, "completion": response} for prompt, response in pairs])
    return rows_of(source, Columns().found(source.names))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(small_model(progress=False), dtype=torch.float32)


@pytest.fixture(scope="module")
def encoders(model, tokenizer):
    representations = Representations(model, tokenizer, max_tokens=TOKENS)
    return {"MiniLM": SentenceEncoder(), "SmolLM2": representations}


# ------------------------------------------------------------------ IFD
@pytest.fixture(scope="module")
def matched():
    """Prose whose responses belong to their prompts, and the same with the responses moved on."""
    pairs = drawn(prose(), 40)
    moved = [(pairs[i][0], pairs[i - 1][1]) for i in range(len(pairs))]
    return rows_from(pairs), rows_from(moved)


def test_a_response_that_belongs_to_another_prompt_has_a_higher_ifd(model, tokenizer, matched):
    losses = Losses(model, tokenizer, max_tokens=128)
    found = [Given(rows=rows, keep=10, losses=losses) for rows in matched]
    right, wrong = (IFD().score(given) for given in found)
    gap = wrong["ifd"].mean() - right["ifd"].mean()
    barred = [len(IFD().rank(columns, 10).barred) for columns in (right, wrong)]
    print(f"IFD {right['ifd'].mean():.3f} right, {wrong['ifd'].mean():.3f} wrong; barred {barred}")
    assert gap > 0.1
    assert barred[1] > barred[0]
    # The same responses, so the same losses alone.
    np.testing.assert_allclose(sorted(right["alone"]), sorted(wrong["alone"]), rtol=1e-4)


# ------------------------------------------------------------------ a target in a mixture
KINDS = ["code in prose", "maths among tasks"]


def mixture(kind, others, wanted, targets):
    """Pool, which of its rows are of the target's kind, and the target."""
    if kind == "code in prose":
        alike = drawn(code(), wanted + targets)
        pool, target = drawn(prose(), others) + alike[:wanted], alike[wanted:]
    else:
        if not all(path.exists() for path in FILES):
            pytest.skip("needs $PRUNEKIT_DATA, a folder of gsm8k_train and instructions_t0")
        pool, target = runpy.run_path(str(SCRIPT))["mixture"](*map(str, FILES))
        pool, target = ([(r["prompt"], r["completion"]) for r in part] for part in (pool, target))
        pool, target = pool[:others] + pool[2000 : 2000 + wanted], target[:targets]
    rows = rows_from(pool)
    return rows, rows.positions >= others, rows_from(target)


def kept_of(metric, given):
    ranking = metric.rank(metric.score(given), given.keep)
    kept = choose(ranking, given.keep, given.draws("ties"))
    assert kept.sum() == given.keep
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_dsir_finds_the_targets_kind(kind):
    rows, wanted, target = mixture(kind, 320, 80, 100)
    kept = kept_of(DSIR(), Given(rows=rows, keep=80, target=target))
    print(f"dsir, {kind}: {wanted[kept].mean():.3f}, by chance .2")
    assert wanted[kept].mean() > 0.6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["MiniLM", "SmolLM2"])
def test_rds_finds_the_targets_kind(kind, name, encoders):
    rows, wanted, target = mixture(kind, 80, 20, 20)
    vectors, targets = (
        Vectors(embed(of.texts, encoders[name], Local(1), None), np.arange(len(of)))
        for of in (rows, target)
    )
    given = Given(rows=rows, keep=20, target=target, vectors=vectors, target_vectors=targets)
    kept = kept_of(RDS(), given)
    print(f"rds, {name}, {kind}: {wanted[kept].mean():.3f}, by chance .2")
    assert wanted[kept].mean() > 0.4
