"""The arithmetic of pruned pages: what a token costs, what fits into memory. Numbers only.

A page holds the tokens of one block for one KV head, the same in transformers and in vLLM:

    keys     thin    [kept][block]  channel-major, so that a channel that is dropped is not there
             packed  bitmaps [block][head_size / 8], then values [block][kept]
    values   whole   [block][head_size], or packed as keys are
    ids      [kept]  uint8: which channels thin keys hold; absent if they hold all

Beside the pages each sequence has a ring: slots that hold what the pages dropped from its sinks and
its newest tokens, so that these can be read whole.

    slot     position + 1 (int32, 0 if empty) | rest of the key | rest of the value

A rest holds the entries that the page has not, in ascending order of channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from prune_core.errors import InputError
from rag_prune.kv.config import KVPruneConfig

STEP = 16  # tokens leave the window this many at a time, so that a step's queries share its start


@dataclass(frozen=True, kw_only=True)
class PageSpec:
    """The layout of a page and of a slot of the ring; all offsets and sizes are in bytes.

    head_size: entries of a whole key or value.   itemsize: bytes of an entry, 2 or 4.
    block_size: tokens of a page, a multiple of 16.
    kept_keys, kept_values: entries that pages hold of each.
    packed_keys: each token has entries of its own (Mustafar), else channels of a page (ThinK).
    recent, sinks: tokens read whole, see KVPruneConfig.
    slack: newest tokens that may be taken back: slots beside those that the window needs.

    Raises InputError for a block or head size that pages cannot have.
    """

    head_size: int
    block_size: int
    itemsize: int
    kept_keys: int
    kept_values: int
    packed_keys: bool
    recent: int
    sinks: int
    slack: int = 0

    def __post_init__(self) -> None:
        if self.block_size < STEP or self.block_size % STEP:
            raise InputError(
                f"The block size must be a multiple of {STEP} tokens, got {self.block_size}: "
                f"choose 16, 32, 64 or 128."
            )
        if self.head_size % 16 or not 16 <= self.head_size <= 256:
            raise InputError(
                f"The head size must be a multiple of 16 up to 256, got {self.head_size}: the "
                f"kernels know no other, so this model's cache cannot be pruned."
            )

    @classmethod
    def of(
        cls,
        config: KVPruneConfig,
        *,
        head_size: int,
        block_size: int,
        itemsize: int,
        slack: int = 0,
    ) -> PageSpec:
        """The pages that `config` asks for."""
        keys, values = config.kept(head_size)
        return cls(
            head_size=head_size,
            block_size=block_size,
            itemsize=itemsize,
            kept_keys=keys,
            kept_values=values,
            packed_keys=config.method == "mustafar" and keys < head_size,
            recent=config.recent,
            sinks=config.sinks,
            slack=slack,
        )

    @property
    def thin_keys(self) -> bool:
        """Pages hold some of the channels, the same for all of their tokens."""
        return not self.packed_keys and self.kept_keys < self.head_size

    @property
    def packed_values(self) -> bool:
        return self.kept_values < self.head_size

    @property
    def prunes(self) -> bool:
        """Pages drop something, so there is a ring."""
        return self.kept_keys < self.head_size or self.packed_values

    @property
    def values_offset(self) -> int:
        return self._tensor_bytes(self.kept_keys, self.packed_keys)

    @property
    def ids_offset(self) -> int:
        return self.values_offset + self._tensor_bytes(self.kept_values, self.packed_values)

    @property
    def token_bytes(self) -> int:
        """Of one token in a page: its share of everything, rounded up."""
        return -(-(self.ids_offset + self.kept_keys * self.thin_keys) // self.block_size)

    @property
    def page_bytes(self) -> int:
        """Of one block and KV head."""
        return self.block_size * self.token_bytes

    @property
    def served_token_bytes(self) -> int:
        """Of one token in a page of vLLM, which counts in whole entries."""
        return -(-self.token_bytes // self.itemsize) * self.itemsize

    @property
    def dense_token_bytes(self) -> int:
        return 2 * self.head_size * self.itemsize

    @property
    def slot_bytes(self) -> int:
        """Of one token in the ring, for one KV head; a multiple of 4."""
        rest = 2 * self.head_size - self.kept_keys - self.kept_values
        return 4 + -(-rest * self.itemsize // 4) * 4

    @property
    def window_slots(self) -> int:
        return self.recent + STEP + self.slack

    @property
    def ring_slots(self) -> int:
        """Slots of a sequence's ring: one a sink, then those of the window, by position."""
        return self.sinks + self.window_slots if self.prunes else 0

    @property
    def ring_blocks(self) -> int:
        """Blocks of a sequence's ring in vLLM, where they are as large as pages; 0 without a ring.

        Raises InputError if not even one slot lies in a block.
        """
        if not self.prunes:
            return 0
        page = self.block_size * self.served_token_bytes
        slots = page // self.slot_bytes
        if not slots:
            raise InputError(
                f"A page of {page} bytes cannot hold a slot of the ring, {self.slot_bytes} bytes: "
                f"choose a larger block size than {self.block_size}, or smaller ratios."
            )
        return -(-self.ring_slots // slots)

    def cut(self, position: int) -> int:
        """The first token that the query at `position` reads whole; sinks apart."""
        return max(0, position + 1 - self.recent) // STEP * STEP

    def slot(self, position: int) -> int:
        """The slot of the ring that holds the token at `position`."""
        if position < self.sinks:
            return position
        return self.sinks + (position - self.sinks) % self.window_slots

    def _tensor_bytes(self, kept: int, packed: bool) -> int:
        bitmap = self.head_size // 8 if packed else 0
        return self.block_size * (bitmap + kept * self.itemsize)
