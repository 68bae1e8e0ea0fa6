"""Rows with embeddings, as a metric is given them."""

import numpy as np

from data_prune.choose import choose
from data_prune.metric import Given
from data_prune.rows import Columns, read, rows_of
from data_prune.vectors import Vectors


def given(array, keep, order=None, **more):
    """Rows "row 0", "row 1", … with these vectors; order: the input's."""
    order = np.arange(len(array)) if order is None else order
    source = read([f"row {i}" for i in order])
    rows = rows_of(source, Columns().found(source.names))
    vectors = Vectors(np.asarray(array, dtype=np.float32)[order], rows.positions)
    return Given(rows=rows, keep=keep, vectors=vectors, **more)


def kept(metric, columns, keep):
    """(n,) which rows stay; the last of equals first."""
    ranking = metric.rank(columns, keep)
    return choose(ranking, keep, lots=-np.arange(len(ranking.scores), dtype=float))


def unit(array):
    """Rows of length 1, float64."""
    array = np.asarray(array, dtype=np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def on_circle(*degrees):
    """(n, 2) unit vectors at these angles."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)
