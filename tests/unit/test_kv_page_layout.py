"""Pages and rings byte by byte as `spec` lays them out, and decode's own cases.

What interleaved requests do to them is in tests/property/test_kv_pages.py.
"""

import struct

import pytest
import torch

from rag_prune.kv import pages
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.pages import Storage
from rag_prune.kv.spec import PageSpec

HEADS, SIZE, BLOCK = 2, 32, 16
THIN = KVPruneConfig(recent=20, sinks=2)
PACKED = KVPruneConfig(method="mustafar", key_ratio=0.7, value_ratio=0.5, recent=20, sinks=2)
MIXED = KVPruneConfig(key_ratio=0.4, value_ratio=0.5, recent=20, sinks=2)
DENSE = KVPruneConfig(method="none")
CONFIGS = {"thin": THIN, "packed": PACKED, "thin keys, packed values": MIXED, "dense": DENSE}
CHANNELS = torch.tensor([[0, 2, 3, 7, *range(10, 26)], [*range(16), 28, 29, 30, 31]])


class Sequence:
    """One sequence in pages of noise, in no order, with a ring of two blocks."""

    def __init__(self, config, tokens, dtype=torch.float32):
        noise = torch.Generator().manual_seed(tokens)
        self.spec = PageSpec.of(config, head_size=SIZE, block_size=BLOCK, itemsize=dtype.itemsize)
        self.keys, self.values = torch.randn(2, tokens, HEADS, SIZE, generator=noise).to(dtype)
        used = -(-tokens // BLOCK)
        self.table = torch.randperm(used + 3, generator=noise)[:used].int()
        shape = used + 3, HEADS, self.spec.page_bytes + 32
        memory = torch.randint(256, shape, dtype=torch.uint8, generator=noise)
        ring = torch.zeros(4, HEADS, 20 * self.spec.slot_bytes + 8, dtype=torch.uint8)
        self.store = Storage(self.spec, dtype, memory, ring if self.spec.prunes else None)
        self.ring = torch.tensor([3, 1], dtype=torch.int32) if self.spec.prunes else None
        self.channels = CHANNELS[:, : self.spec.kept_keys]
        if self.spec.thin_keys:
            pages.set_ids(self.store, self.table, self.channels)

    def write(self, first, last):
        positions = torch.arange(first, last)
        pages.write(
            self.store,
            self.table[positions // BLOCK],
            positions,
            torch.full((last - first,), last),
            None if self.ring is None else self.ring.expand(last - first, -1),
            self.keys[first:last],
            self.values[first:last],
        )

    def kept(self, what, token, head):
        """The channels that pages hold of a key or value."""
        vector = (self.keys if what == "keys" else self.values)[token, head].tolist()
        if what == "keys" and self.spec.thin_keys:
            return self.channels[head].tolist()
        count = self.spec.kept_keys if what == "keys" else self.spec.kept_values
        return sorted(sorted(range(SIZE), key=lambda c: (-abs(vector[c]), c))[:count])

    def decode(self, queries, length, valid=None):
        rings = None if self.ring is None else self.ring[None]
        lengths = torch.tensor([length])
        return pages.decode(self.store, queries, self.table[None], lengths, rings, 0.2, valid)

    def attention(self, queries, length, valid=None, start=None):
        """[1, heads, D], a token at a time; whole ones are the sinks and those from `start` on."""
        if start is None:
            start = max(0, length - self.spec.recent) // 16 * 16
        out = []
        group = queries.shape[1] // HEADS
        for at, query in enumerate(queries[0].double()):
            weights, read = [], []
            for token in range(length):
                if valid is not None and not valid[0, token]:
                    continue
                pair = []
                for what in ("keys", "values"):
                    vector = getattr(self, what)[token, at // group].double()
                    if self.spec.sinks <= token < start:
                        mask = torch.zeros(SIZE)
                        mask[self.kept(what, token, at // group)] = 1
                        vector = vector * mask
                    pair.append(vector)
                weights.append(query @ pair[0] * 0.2)
                read.append(pair[1])
            out.append(torch.stack(weights).softmax(0) @ torch.stack(read))
        return torch.stack(out)[None].float()


def floats(memory, count):
    return list(struct.unpack(f"<{count}f", bytes(memory[: 4 * count].tolist())))


def test_thin_pages_byte_by_byte():
    made = Sequence(THIN, 21)
    made.write(0, 21)
    for token in range(21):
        for head in range(HEADS):
            memory = made.store.pages[made.table[token // BLOCK], head]
            at = token % BLOCK
            for row, channel in enumerate(made.channels[head].tolist()):
                entry = floats(memory[(row * BLOCK + at) * 4 :], 1)
                assert entry == [made.keys[token, head, channel]]
            values = 16 * BLOCK * 4
            entry = floats(memory[values + at * SIZE * 4 :], SIZE)
            assert entry == made.values[token, head].tolist()
            ids = values + BLOCK * SIZE * 4
            assert memory[ids : ids + 16].tolist() == made.channels[head].tolist()


def test_packed_pages_byte_by_byte():
    made = Sequence(PACKED, 21)
    made.write(0, 21)
    begins = {"keys": (0, 10), "values": (BLOCK * (4 + 10 * 4), 16)}
    for token in range(21):
        for head in range(HEADS):
            memory = made.store.pages[made.table[token // BLOCK], head]
            at = token % BLOCK
            for what, (start, count) in begins.items():
                kept = made.kept(what, token, head)
                assert len(kept) == count
                bitmap = memory[start + at * 4 : start + at * 4 + 4].tolist()
                assert int.from_bytes(bitmap, "little") == sum(1 << channel for channel in kept)
                entry = floats(memory[start + BLOCK * 4 + at * count * 4 :], count)
                assert entry == getattr(made, what)[token, head, kept].tolist()


@pytest.mark.parametrize("name", ["thin", "packed", "thin keys, packed values"])
def test_rings_byte_by_byte(name):
    made = Sequence(CONFIGS[name], 70)
    made.write(0, 50)
    made.write(50, 70)
    spec = made.spec
    rest = 2 * SIZE - spec.kept_keys - spec.kept_values
    assert spec.slot_bytes == 4 + 4 * rest
    assert spec.ring_slots == 2 + 36
    held = {}
    for slot in range(spec.ring_slots):
        block, offset = made.ring[slot // 20], slot % 20 * spec.slot_bytes
        for head in range(HEADS):
            memory = made.store.ring[block, head, offset : offset + spec.slot_bytes]
            token = int.from_bytes(memory[:4].tolist(), "little") - 1
            held.setdefault(token, []).append(slot)
            want = []
            for what in ("keys", "values"):
                kept = made.kept(what, token, head)
                others = [channel for channel in range(SIZE) if channel not in kept]
                want += getattr(made, what)[token, head, others].tolist()
            assert floats(memory[4:], rest) == want
    assert held == {token: [spec.slot(token)] * 2 for token in (0, 1, *range(34, 70))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_decode_reads_the_window_whole_and_all_else_pruned(name, dtype):
    made = Sequence(CONFIGS[name], 70, dtype)
    queries = 4 * torch.randn(1, 3 * HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    first = 0
    for last in (1, 40, 41, 42, 70):
        made.write(first, last)
        got, want = made.decode(queries, last), made.attention(queries, last)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        first = last


@pytest.mark.parametrize("padding", [0, 5, 33, 49])
@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_read(monkeypatch, name, padding):
    monkeypatch.setattr(pages, "_AT_ONCE", 1)
    made = Sequence(CONFIGS[name], 50)
    made.write(0, 50)
    queries = torch.randn(1, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    valid = (torch.arange(50) >= padding)[None]
    got, want = made.decode(queries, 50, valid), made.attention(queries, 50, valid)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["thin", "packed", "thin keys, packed values"])
def test_tokens_whose_slots_were_taken_stay_pruned(name):
    """Twenty tokens are taken back, with no slack: of the window, 16 to 33 lost their rest."""
    made = Sequence(CONFIGS[name], 70)
    made.write(0, 50)
    made.write(50, 70)
    queries = 4 * torch.randn(1, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    got, want = made.decode(queries, 50), made.attention(queries, 50, start=34)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_any_number_of_pages_at_once_gives_the_same(monkeypatch, at_once):
    made = Sequence(MIXED, 70 * BLOCK + 3)
    made.write(0, 70 * BLOCK + 3)
    queries = 4 * torch.randn(1, HEADS, SIZE, generator=torch.Generator().manual_seed(1))
    want = made.attention(queries, 70 * BLOCK + 3)
    monkeypatch.setattr(pages, "_AT_ONCE", at_once)
    got = made.decode(queries, 70 * BLOCK + 3)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_decode_asks_for_no_page_behind_the_last():
    made = Sequence(THIN, 20)
    made.write(0, 20)
    queries = torch.randn(1, HEADS, SIZE)
    want = made.decode(queries, 20)
    made.table = torch.cat([made.table, torch.tensor([10**6], dtype=torch.int32)])
    assert torch.equal(made.decode(queries, 20), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_queries_keep_their_type(dtype):
    made = Sequence(PACKED, 50, dtype)
    made.write(0, 50)
    queries = torch.randn(1, HEADS, SIZE).to(dtype)
    got = made.decode(queries, 50)
    assert got.dtype == dtype
    want = made.attention(queries.float(), 50)
    torch.testing.assert_close(got.float(), want, atol=0.01, rtol=0.01)
