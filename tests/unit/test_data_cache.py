"""What a model said is asked once: over runs, over data sets, over kills."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from data_prune import Local, select
from data_prune.cache import Cache, cache_folder, keys_of
from prune_core.errors import InputError

TEXTS = [f"text {i}" for i in range(50)]
KEYS = keys_of(TEXTS)
ABOUT = {"kind": "lengths", "model": "m"}


class Lengths:
    """Asked about places, remembers which."""

    def __init__(self, texts=TEXTS):
        self.texts, self.asked = texts, []

    def __call__(self, places):
        self.asked += [self.texts[i] for i in places]
        return np.array([[len(self.texts[i]), int(self.texts[i][5:])] for i in places])


def fill(folder, compute, keys=KEYS, about=ABOUT, size=8):
    return Cache(folder, about).fill(keys, compute, Local(2), size=size, desc="")


def test_values_come_in_the_order_of_the_keys(tmp_path):
    compute = Lengths()
    values = fill(tmp_path, compute)
    assert values[:, 1].tolist() == list(range(50))
    assert sorted(compute.asked) == sorted(TEXTS)


def test_nothing_is_asked_twice(tmp_path):
    fill(tmp_path, Lengths())
    again = Lengths()
    np.testing.assert_array_equal(fill(tmp_path, again), fill(None, Lengths()))
    assert again.asked == []


def test_equal_texts_are_asked_once():
    texts = ["text 1", "text 2", "text 1"]
    compute = Lengths(texts)
    assert fill(None, compute, keys_of(texts))[:, 1].tolist() == [1, 2, 1]
    assert sorted(compute.asked) == ["text 1", "text 2"]


def test_new_rows_alone_are_asked_about(tmp_path):
    fill(tmp_path, Lengths(), KEYS[:40])
    more = Lengths()
    fill(tmp_path, more)
    assert sorted(more.asked) == sorted(TEXTS[40:])
    assert Cache(tmp_path, ABOUT).missing(KEYS).tolist() == []
    assert Cache(tmp_path, {**ABOUT, "model": "n"}).missing(KEYS).tolist() == list(range(50))


def test_another_model_is_asked_anew(tmp_path):
    fill(tmp_path, Lengths())
    other = Lengths()
    fill(tmp_path, other, about={**ABOUT, "model": "other"})
    assert len(other.asked) == 50


@pytest.mark.parametrize("what", ["keys", "values"])
def test_a_damaged_piece_is_computed_again(tmp_path, what):
    fill(tmp_path, Lengths())
    piece = sorted(tmp_path.glob(f"*/*.{what}.npy"))[0]
    piece.write_bytes(piece.read_bytes()[:60])
    again = Lengths()
    np.testing.assert_array_equal(fill(tmp_path, again), fill(None, Lengths()))
    assert 0 < len(again.asked) <= 8


def test_a_stopped_run_goes_on_in_the_same_company(tmp_path):
    parts = []

    class Stops(Lengths):
        def __call__(self, places):
            if len(parts) == 3:
                raise KeyboardInterrupt
            parts.append(places)
            return super().__call__(places)

    with pytest.raises(KeyboardInterrupt):
        Cache(tmp_path, ABOUT).fill(KEYS, Stops(), Local(1), size=8, desc="")
    rest = Lengths()
    fill(tmp_path, rest)
    order = [TEXTS[i] for i in np.argsort(KEYS)]
    shards = [set(order[i : i + 8]) for i in range(0, 50, 8)]
    done = [shard for shard in shards if not shard & set(rest.asked)]
    assert 1 <= len(done) <= 3
    assert set().union(*done) | set(rest.asked) == set(TEXTS)


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path))
    assert cache_folder(True) == tmp_path / "data"
    assert cache_folder("here").name == "here"


def test_an_encoder_that_gives_another_number_of_vectors():
    with pytest.raises(InputError, match="gave 1 vectors for"):
        select(TEXTS, embeddings=lambda texts: np.ones((1, 3)), budget=5, cache=False)


RUN = """
import sys, time, numpy as np
from data_prune import select
class Encoder:
    fingerprint = {"weights": "w"}
    def __call__(self, texts):
        time.sleep(0.03)
        return np.array([[len(t), hash_of(t), 1.0] for t in texts])
def hash_of(text):
    return int.from_bytes(text.encode()[-6:], "big") % 997 / 997
texts = [f"text number {i}" for i in range(6000)]
kept = select(texts, embeddings=Encoder(), budget="10%", cache=sys.argv[1])
np.save(sys.argv[2], kept.indices)
"""


def run(cache, out):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(cache), str(out)],
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_as_if_never_stopped(tmp_path):
    whole = run(tmp_path / "whole", tmp_path / "whole.npy")
    started = time.perf_counter()
    assert whole.wait(300) == 0, whole.stderr.read()
    seconds = time.perf_counter() - started
    rng = random.Random(0)
    for _ in range(10):
        stopped = run(tmp_path / "cut", tmp_path / "cut.npy")
        time.sleep(seconds * rng.uniform(0.2, 1.0))
        os.killpg(stopped.pid, signal.SIGKILL)
        stopped.wait()
        stopped.stderr.close()
    last = run(tmp_path / "cut", tmp_path / "cut.npy")
    assert last.wait(300) == 0, last.stderr.read()
    for process in (whole, last):
        process.stderr.close()
    np.testing.assert_array_equal(np.load(tmp_path / "cut.npy"), np.load(tmp_path / "whole.npy"))
