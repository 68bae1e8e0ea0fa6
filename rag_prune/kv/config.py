"""What is pruned from a KV cache, and how: one configuration for transformers and vLLM."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from prune_core.errors import InputError, check_count, unknown_name

METHODS = ("think", "mustafar", "none")
POLICIES = ("prompt", "static", "causal")


@dataclass(frozen=True, kw_only=True)
class KVPruneConfig:
    """Which entries of the keys and values are dropped from the cache.

    method: "think" keeps the same channels for all keys of a page and head, "mustafar" the largest
        entries of each token; "none" drops nothing.
    key_ratio, value_ratio: share of the head's size dropped from each key and value, in [0, 1).
        ThinK's values, which the paper leaves whole, are pruned token by token as Mustafar's.
    obs_window: newest queries that score the channels (ThinK; the paper's 32).
    recent: newest tokens that stay whole, at least; up to 15 more do, since tokens leave the
        window 16 at a time.
    sinks: first tokens that stay whole.
    policy: who chooses ThinK's channels. "prompt": the newest queries of each call, as the paper
        does; "static": the file `masks`, made by `calibrate_masks`; "causal": for each page of
        tokens the queries up to its end.
    masks: path of the file of static masks.

    Raises InputError for a value outside these, or a policy "static" of ThinK without masks.
    """

    method: str = "think"
    key_ratio: float = 0.5
    value_ratio: float = 0.0
    obs_window: int = 32
    recent: int = 64
    sinks: int = 4
    policy: str = "prompt"
    masks: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("method of KV pruning", self.method, METHODS)
        if self.policy not in POLICIES:
            raise unknown_name("policy of KV pruning", self.policy, POLICIES)
        for name in ("key_ratio", "value_ratio"):
            ratio = getattr(self, name)
            if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
                raise InputError(
                    f"{name} must be in [0, 1), the share of each head that is dropped, got "
                    f"{ratio!r}."
                )
        for name, least in (("obs_window", 1), ("recent", 1), ("sinks", 0)):
            check_count(name, getattr(self, name), least)
        if self.method == "think" and self.policy == "static" and self.key_ratio:
            if self.masks is None:
                raise InputError(
                    "policy='static' needs masks: pass the path of a file that calibrate_masks or "
                    "`prunekit kv calibrate` wrote for this model."
                )
        elif self.masks is not None:
            raise InputError(
                f"masks={str(self.masks)!r} is only read by method 'think' with policy 'static' "
                f"and a key_ratio above 0: leave it out, or set policy='static'."
            )

    @classmethod
    def parse(cls, options: Any) -> KVPruneConfig:
        """Read a mapping of the fields, as the command line and vLLM's configuration hold it.

        Raises InputError for anything else and for a name that is not a field.
        """
        if not isinstance(options, dict):
            raise InputError(
                f"The options of KV pruning must be an object like "
                f'{{"method": "think", "key_ratio": 0.5}}, got {options!r}.'
            )
        known = list(cls.__dataclass_fields__)
        for name in options:
            if name not in known:
                raise unknown_name("option of KV pruning", name, known)
        return cls(**options)

    def kept(self, head_size: int) -> tuple[int, int]:
        """How many of the `head_size` entries of each key and each value stay.

        That is head_size − int(head_size · ratio), as in ThinK's published code, and never none.
        """
        if self.method == "none":
            return head_size, head_size
        keys = head_size - int(head_size * self.key_ratio)
        return keys, head_size - int(head_size * self.value_ratio)
