"""PASER against its published steps; budgets, sampling, conflicts."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from data_prune import select
from data_prune.choose import choose
from data_prune.conflicts import (
    Conflicts,
    concepts,
    contradictions,
    disagreement,
    inconsistent,
    settle,
)
from data_prune.engine import Local
from data_prune.metric import Given
from data_prune.metrics.paser import PASER, means
from data_prune.rows import Columns, read, rows_of
from data_prune.vectors import Vectors
from prune_core.errors import InputError

N = 300
RNG = np.random.default_rng(0)
TOPIC = RNG.integers(4, size=N)
VECTORS = np.eye(4, 8)[TOPIC] * 5 + RNG.normal(size=(N, 8))
ROWS = [
    {"prompt": f"Question {i} on topic {t}?", "completion": "word " * (1 + i % 23)}
    for i, t in enumerate(TOPIC)
]
DAMAGE = (TOPIC + 1) * RNG.uniform(0.5, 1.5, N)


def task(keep=60, damage=DAMAGE, rows=ROWS, vectors=VECTORS, **more):
    source = read(rows)
    read_rows = rows_of(source, Columns().found(source.names))
    aligned = damage if callable(damage) else np.asarray(damage)[read_rows.positions]
    return Given(
        rows=read_rows,
        keep=keep,
        vectors=Vectors(np.asarray(vectors, dtype=np.float32), read_rows.positions),
        degradation=aligned,
        engine=Local(1),
        **more,
    )


def kept(metric, columns, keep):
    return choose(metric.rank(columns, keep), keep, np.arange(len(columns["damage"])) / 1e6)


def test_the_published_steps():
    """int() budgets by mean damage, the best of each by damage / log(cost): we keep those too."""
    metric = PASER(clusters=4, conflict="none")
    given = task()
    columns = metric.score(given)
    clusters, positions = columns["cluster"], given.rows.positions
    sizes = np.array([len(text) / 4 for text in given.rows.texts])
    cds = {c: DAMAGE[positions][clusters == c].mean() for c in range(4)}
    published, budgets = [], {}
    for c in range(4):
        budgets[c] = int(60 * cds[c] / sum(cds.values()))
        members = np.flatnonzero(clusters == c)
        ies = [DAMAGE[positions[i]] / math.log(sizes[i] ** 2) for i in members]
        published += members[np.argsort(-np.array(ies))][: budgets[c]].tolist()
    ours = kept(metric, columns, 60)
    assert ours.sum() == 60 >= len(published) >= 57
    assert ours[published].all()
    got = np.bincount(clusters[ours], minlength=4)
    assert all(0 <= got[c] - budgets[c] <= 1 for c in range(4))


def test_more_goes_to_what_was_damaged_more():
    selection = select(
        ROWS,
        metric=PASER(clusters=4, conflict="none"),
        budget=60,
        embeddings=VECTORS,
        degradation=DAMAGE,
    )
    topics = np.bincount(TOPIC[selection.indices], minlength=4)
    assert (np.diff(topics) > 0).all()
    assert topics[3] == pytest.approx(60 * 4 / 10, abs=3)


def test_a_small_cluster_is_emptied_and_the_rest_goes_on():
    damage = np.where(TOPIC == 0, 100.0, 1.0)
    few = [i for i in range(N) if TOPIC[i] != 0 or i < 40]
    metric = PASER(clusters=4, conflict="none")
    selection = select(
        [ROWS[i] for i in few],
        metric=metric,
        budget=100,
        embeddings=VECTORS[few],
        degradation=damage[few],
    )
    topics = TOPIC[np.array(few)]
    got = np.bincount(topics[selection.indices], minlength=4)
    assert got.sum() == 100
    assert got[0] == (topics == 0).sum()


def test_a_longer_row_needs_more_damage():
    rows = [{"prompt": "a?", "completion": "b " * 10}, {"prompt": "c?", "completion": "d " * 500}]
    given = task(1, [1.0, 1.2], rows, np.ones((2, 3)))
    columns = PASER(clusters=1, conflict="none").score(given)
    first = given.rows.positions[kept(PASER(clusters=1), columns, 1)]
    assert first.tolist() == [0]
    sizes = np.array([10, 1000])[given.rows.positions]
    columns = PASER(clusters=1, conflict="none").score(
        task(1, [1.0, 1.2], rows, np.ones((2, 3)), sizes=sizes)
    )
    by_input = np.argsort(given.rows.positions)
    expected = [1 / math.log(100), 1.2 / math.log(1_000_000)]
    np.testing.assert_allclose(columns["efficiency"][by_input], expected)


def test_identical_models_share_evenly():
    columns = PASER(clusters=4, conflict="none").score(task(damage=np.zeros(N)))
    ours = kept(PASER(), columns, 60)
    assert np.ptp(np.bincount(columns["cluster"][ours].astype(int), minlength=4)) <= 1


def test_rows_without_an_answer_are_not_kept():
    damage = DAMAGE.copy()
    damage[::3] = np.nan
    given = task(damage=damage)
    metric = PASER(conflict="none")
    columns = metric.score(given)
    ours = kept(metric, columns, 200)
    assert ours.sum() == 200
    assert np.isfinite(columns["damage"][ours]).all()
    assert "not scored" in metric.describe(columns, int(np.isnan(columns["damage"]).argmax()))


@pytest.mark.parametrize("cluster", ["kmeans", "landmark", "dense"])
def test_every_clustering_finds_the_topics(cluster):
    given = task()
    columns = PASER(cluster=cluster, clusters=4, conflict="none").score(given)
    for c in range(4):
        topics = np.bincount(TOPIC[given.rows.positions][columns["cluster"] == c], minlength=4)
        assert topics.max() >= 0.95 * topics.sum()


# ------------------------------------------------------------------------------------- sampling


class Asked:
    """Damage by prompt, and how many were asked about."""

    def __init__(self, fingerprint=None):
        self.pairs = []
        self.damage = {row["prompt"]: d for row, d in zip(ROWS, DAMAGE, strict=True)}
        if fingerprint:
            self.fingerprint = fingerprint

    def __call__(self, prompts, responses):
        self.pairs += zip(prompts, responses, strict=True)
        return [self.damage[prompt] for prompt in prompts]


def test_a_callable_is_asked_about_every_pair_once():
    ask = Asked()
    columns = PASER(conflict="none").score(task(damage=ask))
    assert sorted(p for p, _ in ask.pairs) == sorted(row["prompt"] for row in ROWS)
    np.testing.assert_allclose(columns["damage"], DAMAGE[task().rows.positions], rtol=1e-6)


def test_with_a_cache_new_rows_alone_are_asked_about(tmp_path):
    first, more = Asked({"models": "a b"}), Asked({"models": "a b"})
    PASER(conflict="none").score(task(60, first, ROWS[:250], VECTORS[:250], cache=tmp_path))
    PASER(conflict="none").score(task(60, more, cache=tmp_path))
    assert len(first.pairs) == 250
    assert len(more.pairs) == 50


def test_sampled_clusters_score_few_rows_and_choose_much_the_same():
    metric = PASER(clusters=4, samples=15, conflict="none")
    assert not metric.nested
    ask = Asked()
    given = task(20, ask)
    columns = metric.score(given)
    assert len(ask.pairs) == np.isfinite(columns["damage"]).sum() <= 4 * 15 + 3 * 20 + 4
    assert columns["sampled"].sum() == 60
    ours = kept(metric, columns, 20)
    assert ours.sum() == 20
    whole = means(DAMAGE[given.rows.positions], np.ones(N, bool), columns["cluster"])
    sampled = means(columns["damage"], columns["sampled"], columns["cluster"])
    np.testing.assert_allclose(sampled, whole, rtol=0.25)
    lot = np.isfinite(columns["damage"])
    assert columns["damage"][ours].mean() > columns["damage"][lot].mean()


@settings(deadline=None, max_examples=25)
@drawn(st.integers(1, N), st.integers(1, 40), st.integers(1, 12))
def test_sampling_spends_the_budget_exactly(keep, samples, clusters):
    metric = PASER(clusters=clusters, samples=samples, conflict="none")
    columns = metric.score(task(keep, Asked()))
    assert kept(metric, columns, keep).sum() == keep


# ------------------------------------------------------------------------------------ conflicts

SAME = [
    ("How many legs has a spider?", "It has eight legs.\n#### 8"),
    ("How many legs has a spider?", "Six.\n#### 6"),
    ("How many legs has the spider?", "Legs of a spider: eight.\n#### 8"),
    ("How many legs have 2 spiders?", "#### 16"),
    ("Is the earth flat?", "No"),
    ("Is the earth flat?", "Yes"),
    ("Tell me of spiders.", "They spin webs, and there are many kinds of them in the world."),
    ("Tell me of spiders.", "Eight legs, no wings; a spider is no insect at all, as one reads."),
]


def test_answers_that_cannot_both_be_right():
    assert disagreement("#### 8", "so it is #### 6")
    assert not disagreement("#### 8", "The answer is 8.")
    assert disagreement("No", "Yes, it is.")
    assert disagreement("Paris", "Rome")
    assert not disagreement("Paris", "It is Paris, of course.")
    assert not disagreement(SAME[6][1], SAME[7][1])


def test_contradictions_are_found_among_the_same_questions_alone():
    prompts, responses = zip(*SAME, strict=True)
    vectors = np.array([[1, 0], [1, 0], [1, 0.1], [1, 0.2], [0, 1], [0, 1], [-1, 0], [-1, 0]])
    found = contradictions(
        prompts, responses, Vectors(vectors, np.arange(8)), np.arange(8) / 8, Local(1)
    )
    assert found.pairs.tolist() == [[0, 1], [1, 2], [4, 5]]
    assert all(found.why)


def test_the_worse_gives_way_but_not_to_one_that_gives_way():
    found = Conflicts(np.array([[0, 1], [1, 2]]), ["a", "b"])
    assert settle(found, np.array([0, 1, 2]))[0] == {1: 0}
    assert settle(found, np.array([1, 0, 2]))[0] == {0: 1, 2: 1}
    assert settle(found, np.array([2, 1, 0]))[0] == {1: 2}
    assert settle(Conflicts(np.zeros((0, 2), int), []), np.arange(3))[0] == {}


def test_a_row_that_gives_way_is_dropped_and_names_the_other():
    rows = [{"prompt": p, "completion": r} for p, r in SAME]
    vectors = np.array([[1, 0], [1, 0], [1, 0.1], [1, 0.2], [0, 1], [0, 1], [-1, 0], [-1, 0.0]])
    damage = np.array([3.0, 2, 1, 1, 1, 2, 1, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer than the budget
        selection = select(
            rows, metric=PASER(clusters=3), budget=8, embeddings=vectors, degradation=damage
        )
    assert selection.dropped.tolist() == [1, 4]
    assert "asks the same as row 0 and answers otherwise" in selection.reasons[1]
    assert "asks the same as row 5" in selection.reasons[4]
    assert selection.reselect(3).indices.tolist() == [
        i for i in selection.reselect(3).indices.tolist() if i not in (1, 4)
    ]


def test_concepts_are_phrases_between_stop_words():
    assert concepts("Name the largest planets of the Milky Way, and why.") == {
        "largest planets",
        "milky way",
    }
    assert concepts("") == frozenset()


def published_graph(sets):
    """The authors' rule, on a set of ordered edges."""
    nodes, edges, refused = set(), set(), []
    for i, named in enumerate(sets):
        pairs = list(itertools.permutations(named, 2))
        if any(a in nodes and b in nodes and (a, b) not in edges for a, b in pairs):
            refused.append(i)
            continue
        edges |= set(pairs)
        nodes |= {a for pair in pairs for a in pair}
    return set(refused)


@settings(max_examples=100)
@drawn(st.lists(st.lists(st.sampled_from("tuvwxyz"), max_size=4), max_size=12))
def test_the_graph_of_concepts_is_the_published_one(rows):
    texts = [". ".join(f"{letter}{letter}q" for letter in row) for row in rows]
    assert inconsistent(texts, np.arange(len(texts))) == published_graph(
        [{f"{letter}{letter}q" for letter in row} for row in rows]
    )


def test_the_graph_bars_rows():
    named = ["cold tea. hot soup", "hot soup. sweet cake", "cold tea. sweet cake", "green pear"]
    rows = [{"prompt": text, "completion": "."} for text in named]
    metric = PASER(clusters=1, conflict="ccg")
    for damage, refused in (([4, 3, 2, 1], 2), ([2, 3, 4, 1], 0)):
        given = task(4, np.array(damage, float), rows, np.ones((4, 2)))
        columns = metric.score(given)
        barred = metric.rank(columns, 4).barred
        assert [given.rows.positions[i] for i in barred] == [refused]
        assert kept(metric, columns, 4).sum() == 3


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cluster": "spectral"}, "cluster must be 'kmeans', 'landmark' or 'dense'"),
        ({"conflict": "nli"}, "conflict must be 'answers', 'ccg' or 'none'"),
        ({"clusters": 0}, "clusters must be a whole number >= 1, got 0"),
        ({"samples": 0}, "samples must be a whole number >= 1, got 0"),
        ({"samples": True}, "samples must be a whole number >= 1, got True"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(InputError, match=message):
        PASER(**settings)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (-DAMAGE, "degradation must be >= 0 and finite"),
        (np.full(N, np.inf), "degradation must be >= 0 and finite"),
        (np.ones((N, 2)), "a number for each of 300 rows"),
        (lambda prompts, responses: [1.0], "a number for each of 128 rows"),
    ],
)
def test_damage_that_is_none(damage, message):
    with pytest.raises(InputError, match=message):
        PASER().score(task(damage=damage))


def test_rows_of_one_text_have_no_response():
    with pytest.raises(InputError, match="paser' needs rows of prompt and response"):
        select(["a", "b"], metric="paser", budget=1, embeddings=np.eye(2), degradation=[1.0, 2])


def test_damage_is_needed():
    with pytest.raises(InputError, match="needs degradation="):
        select(ROWS, metric="paser", budget=1, embeddings=VECTORS)
