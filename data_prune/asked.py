"""What a callable of prompts and responses says of rows; each pair is asked about once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prune.cache import Cache, keys_of
from data_prune.metric import Array, Given

_SHARD = 128  # pairs: what a run that is stopped has to ask again


def asked(
    call: Callable[[list[str], list[str]], Any],
    kind: str,
    check: Callable[[Any, int], Array],
    given: Given,
    metric: str,
    rows: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """The answers about these rows, or all; kept in the cache where the callable is known again.

    call: prompts and responses in, an answer for each out; kept if it has a `fingerprint`.
    kind: of answers, a word.   check: of the answers about so many pairs; gives them as an array.
    metric: that wants to know.
    Raises InputError for rows of one text, and what `check` raises.
    """
    pairs = given.pairs(metric)
    if rows is not None:
        pairs = [pairs[i] for i in rows]
    # The length says where the prompt ends, whatever stands in the two.
    keys = keys_of([f"{len(prompt)} {prompt}{response}" for prompt, response in pairs])
    ask = _Ask(call, check, pairs)
    store = Cache.of(call, kind, given.cache)
    return store.fill(keys, ask, given.engine, size=_SHARD, desc=kind)


class _Ask:
    """The answers about the pairs at these places, checked before they are kept."""

    def __init__(
        self,
        call: Callable[[list[str], list[str]], Any],
        check: Callable[[Any, int], Array],
        pairs: list[tuple[str, str]],
    ) -> None:
        self.call, self.check, self.pairs = call, check, pairs

    def __call__(self, rows: list[int]) -> Array:
        prompts, responses = ([self.pairs[i][side] for i in rows] for side in (0, 1))
        return self.check(self.call(prompts, responses), len(rows))
