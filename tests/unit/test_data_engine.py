"""Engines: order, sums, groups, errors; and that Ray gives the bits that threads give."""

import threading

import numpy as np
import pytest

from data_prune import Local, Ray, select
from data_prune.clusters import kmeans
from data_prune.engine import shards
from data_prune.metrics.dsir import DSIR
from data_prune.metrics.ifd import IFD
from data_prune.metrics.rds import RDS
from data_prune.vectors import Vectors
from prune_core.errors import InputError


class Square:
    def __call__(self, part):
        return np.arange(part.start, part.stop) ** 2


class Sums:
    def __init__(self, values):
        self.values = values

    def __call__(self, part):
        return {"sum": self.values[part].sum(axis=0), "count": np.array(part.stop - part.start)}


class Lengths:
    def __call__(self, prompts, responses):
        return [[len(r), len(p) + len(r)] for p, r in zip(prompts, responses, strict=True)]


class Members:
    def __call__(self, rows):
        return rows.tolist()


def test_shards_tile_the_rows():
    parts = shards(10, 4)
    assert [(p.start, p.stop) for p in parts] == [(0, 4), (4, 8), (8, 10)]
    assert shards(0) == []


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order(workers):
    got = list(Local(workers).map(Square(), shards(100, 7)))
    np.testing.assert_array_equal(np.concatenate(got), np.arange(100) ** 2)


def test_sums_are_the_same_to_the_last_bit():
    values = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    first = Local(1).reduce(Sums(values), shards(5000, 64))
    other = Local(4).reduce(Sums(values), shards(5000, 64))
    np.testing.assert_array_equal(first["sum"], other["sum"])
    assert first["count"] == 5000
    assert first["sum"].dtype == np.float64


def test_groups_come_with_their_rows():
    groups = np.array([2, 0, 2, 5, 0])
    got = [(rows.tolist(), result) for rows, result in Local(2).by_group(Members(), groups)]
    assert got == [([1, 4], [1, 4]), ([0, 2], [0, 2]), ([3], [3])]


def test_only_a_few_shards_are_computed_ahead():
    started = []
    lock = threading.Lock()

    def work(i):
        with lock:
            started.append(i)
        return i

    results = Local(2).map(work, range(100))
    assert next(results) == 0
    assert len(started) <= 8
    results.close()
    assert len(started) <= 8


def test_an_error_comes_out_and_stops_the_rest():
    done = []

    def work(i):
        if i == 3:
            raise ValueError("three")
        done.append(i)

    with pytest.raises(ValueError, match="three"):
        list(Local(1).map(work, range(1000)))
    assert len(done) < 20


@pytest.mark.parametrize("workers", [0, -1, True, 1.5])
@pytest.mark.parametrize("engine", [Local, Ray])
def test_workers_are_whole_numbers(engine, workers):
    with pytest.raises(InputError, match="workers must be a whole number >= 1"):
        engine(workers)


def test_k_means_finds_what_is_there_and_the_same_by_any_number_of_workers():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 16))
    truth = rng.integers(5, size=9000)
    array = (centres[truth] + 0.1 * rng.normal(size=(9000, 16))).astype(np.float32)
    vectors = Vectors(array, np.arange(9000))
    draws = rng.random(9000)
    found = [kmeans(vectors, 5, draws, Local(workers)) for workers in (1, 4)]
    np.testing.assert_array_equal(found[0].labels, found[1].labels)
    np.testing.assert_array_equal(found[0].distances, found[1].distances)
    for cluster in range(5):  # each is one of the true ones
        assert len(set(truth[found[0].labels == cluster])) == 1
    unit = vectors[slice(0, 9000)]
    nearest = unit @ found[0].centroids.T / np.linalg.norm(found[0].centroids, axis=1)
    np.testing.assert_allclose(
        found[0].distances, 1 - nearest[np.arange(9000), found[0].labels], atol=1e-6
    )


@pytest.fixture(scope="module")
def ray():
    """A Ray of two cores without its dashboard, small enough for this machine."""
    library = pytest.importorskip("ray")
    import os
    import warnings

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library.init(
            num_cpus=2,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            object_store_memory=200 * 2**20,
            # The workers find the test's own classes as the driver does.
            runtime_env={"env_vars": {"PYTHONPATH": os.path.dirname(__file__)}},
        )
        library.data.DataContext.get_current().enable_progress_bars = False
    yield library
    library.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_what_threads_give(ray):
    values = np.random.default_rng(0).normal(size=(5000, 3)).astype(np.float32)
    parts = shards(5000, 640)
    by_threads, by_ray = Local(2), Ray(2)
    np.testing.assert_array_equal(
        by_threads.reduce(Sums(values), parts)["sum"], by_ray.reduce(Sums(values), parts)["sum"]
    )
    rng = np.random.default_rng(1)
    rows = [{"prompt": f"row {i}", "completion": "x" * (1 + i % 9)} for i in range(6000)]
    array = rng.normal(size=(6000, 32)).astype(np.float32)
    for metric, more in (
        ("prototypes", {}),
        (RDS(), {"target": array[:40]}),
        (DSIR(), {"target": rows[:40]}),
        (IFD(), {"losses": Lengths()}),
    ):
        chosen = [
            select(rows, metric=metric, embeddings=array, budget="10%", engine=engine, **more)
            for engine in (by_threads, by_ray)
        ]
        np.testing.assert_array_equal(chosen[0].indices, chosen[1].indices)
        np.testing.assert_array_equal(chosen[0].scores, chosen[1].scores)
