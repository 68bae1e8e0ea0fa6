"""What a callable of prompts and responses says of rows; each pair is asked about once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prune.cache import Cache, keys_of
from data_prune.metric import Array, Given
from prune_core.errors import InputError

_SHARD = 128  # pairs: what a run that is stopped has to ask again


def asked(
    call: Callable[[list[str], list[str]], Any],
    kind: str,
    check: Callable[[Any, int], Array],
    given: Given,
    rows: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """The answers about these rows, or all; kept in the cache where the callable is known again.

    call: prompts and responses in, an answer for each out; kept if it has a `fingerprint`.
    kind: of answers, a word.   check: of the answers about so many pairs; gives them as an array.
    Raises InputError for rows of one text, and what `check` raises.
    """
    every = given.rows
    if not every.prompts:
        raise InputError(
            "This metric needs rows of prompt and response, but these are of one text: name the "
            "columns with prompt= and response=."
        )
    chosen = range(len(every)) if rows is None else rows
    prompts = [every.prompts[i] for i in chosen]
    responses = [every.responses[i] for i in chosen]
    # The length says where the prompt ends, whatever stands in the two.
    keys = keys_of([f"{len(p)} {p}{r}" for p, r in zip(prompts, responses, strict=True)])
    ask = _Ask(call, check, prompts, responses)
    store = Cache.of(call, kind, given.cache)
    return store.fill(keys, ask, given.engine, size=_SHARD, desc=kind)


class _Ask:
    """The answers about the pairs at these places, checked before they are kept."""

    def __init__(
        self,
        call: Callable[[list[str], list[str]], Any],
        check: Callable[[Any, int], Array],
        prompts: list[str],
        responses: list[str],
    ) -> None:
        self.call, self.check = call, check
        self.prompts, self.responses = prompts, responses

    def __call__(self, rows: list[int]) -> Array:
        answers = self.call([self.prompts[i] for i in rows], [self.responses[i] for i in rows])
        return self.check(answers, len(rows))
