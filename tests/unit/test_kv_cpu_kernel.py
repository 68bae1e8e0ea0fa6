"""The compiled CPU kernels against the plain-torch pages, and what happens where there is none."""

import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rag_prune.kv import pages
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.kernels import cpu
from rag_prune.kv.spec import PageSpec
from rag_prune.kv.think import best_channels

BUILDS = cpu.available()
needs_compiler = pytest.mark.skipif(
    not BUILDS or not cpu._compilers(), reason="no C++ compiler, or a processor without AVX2"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WAYS = [
    {"method": "none"},
    {"key_ratio": 0.5},
    {"method": "mustafar", "key_ratio": 0.7, "value_ratio": 0.5},
    {"key_ratio": 0.4, "value_ratio": 0.7},
    {"method": "mustafar", "key_ratio": 0.5},
    {"method": "mustafar", "key_ratio": 0.0, "value_ratio": 0.5},
    {"key_ratio": 0.9},
]
# Every way with some of the sizes: lists of lengths without a common factor, walked together.
CASES = list(
    zip(
        WAYS * 2,
        itertools.cycle((64, 32, 128, 80)),  # head size
        itertools.cycle((32, 16, 128, 48, 32)),  # block size
        itertools.cycle((1, 3, 4, 2, 7, 10)),  # heads that share a KV head
        strict=False,
    )
)


@pytest.fixture
def kernels(monkeypatch):
    """Let `cpu` use one build, whatever the processor prefers; from the user's own cache."""

    def use(build):
        monkeypatch.setattr(cpu, "_kernels", lambda dtype: libraries(dtype, build))

    return use


def libraries(dtype, build, made={}):  # noqa: B006 - kept between tests
    if (dtype, build) not in made:
        made[dtype, build] = cpu.load(dtype, build)
    return made[dtype, build]


class Sequences:
    """Three sequences in a pool of padded pages, written in chunks by `pages` or by `cpu`."""

    def __init__(self, options, size, block, dtype, lengths=(150, 17, 1), kv_heads=2):
        self.lengths, self.kv_heads, self.size = lengths, kv_heads, size
        self.spec = PageSpec.of(
            KVPruneConfig(recent=20, sinks=3, **options),
            head_size=size,
            block_size=block,
            itemsize=dtype.itemsize,
            slack=2,
        )
        per_row = -(-max(lengths) // block) + 1
        self.table = torch.randperm(len(lengths) * per_row).int().view(len(lengths), per_row)
        per_block = 7  # slots; not a divisor of the ring's
        rows = -(-self.spec.ring_slots // per_block) if self.spec.prunes else 0
        self.rings = torch.randperm(rows * len(lengths)).view(len(lengths), rows)
        ring = torch.zeros(
            rows * len(lengths), kv_heads, per_block * self.spec.slot_bytes, dtype=torch.uint8
        )
        # Blocks and heads lie further apart than their bytes, as where a server pads its pages.
        room = torch.zeros(
            self.table.numel(), kv_heads + 1, self.spec.page_bytes + 80, dtype=torch.uint8
        )
        self.store = pages.Storage(
            self.spec, dtype, room[:, :kv_heads], ring if self.spec.prunes else None
        )
        if self.spec.thin_keys:
            for blocks in self.table:
                channels = best_channels(torch.rand(kv_heads, size), self.spec.kept_keys)
                pages.set_ids(self.store, blocks.long(), channels)
        # Keys and values as slices of one projection, in the model's own type.
        self.qkv = torch.randn(sum(lengths), 3, kv_heads, size)
        self.qkv[::5] = self.qkv[::5].round()  # entries of equal magnitude

    def copy(self):
        other = object.__new__(Sequences)
        other.__dict__.update(self.__dict__)
        room = torch.empty_strided(
            self.store.pages.shape, self.store.pages.stride(), dtype=torch.uint8
        )
        ring = None if self.store.ring is None else self.store.ring.clone()
        other.store = replace(self.store, pages=room.copy_(self.store.pages), ring=ring)
        return other

    def written(self, write):
        begin = 0
        for row, length in enumerate(self.lengths):
            ends = [end for end in (length * 2 // 3, length - 1, length) if end]
            for low, high in itertools.pairwise([0, *ends]):
                positions = torch.arange(low, high)
                write(
                    self.store,
                    self.table[row][positions // self.spec.block_size],
                    positions,
                    torch.full_like(positions, high),
                    self.rings[row].expand(high - low, -1) if self.spec.prunes else None,
                    *self.qkv[begin + low : begin + high, 1:].unbind(1),
                )
            begin += length
        return self

    def decoded(self, decode, queries):
        rings = self.rings if self.spec.prunes else None
        lengths = torch.tensor(self.lengths)
        return decode(self.store, queries, self.table, lengths, rings, self.size**-0.5)


def agree(a, b):
    torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@needs_compiler
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_pages(build, dtype, kernels):
    kernels(build)
    torch.manual_seed(0)
    for options, size, block, group in CASES:
        ours = Sequences(options, size, block, dtype)
        theirs = ours.copy()
        ours.written(cpu.write)
        theirs.written(pages.write)
        assert torch.equal(ours.store.pages, theirs.store.pages)
        queries = torch.randn(3, 3, 2 * group, size)[:, 1]
        if ours.spec.prunes:
            assert torch.equal(ours.store.ring, theirs.store.ring)
            ours.store.ring[::3] = theirs.store.ring[::3] = 0  # as after a prefix of others'
        agree(ours.decoded(cpu.decode, queries), theirs.decoded(pages.decode, queries))
        asked = torch.randn(4, 2 * group, 16, size), ours.table[0], torch.tensor([0, 16, 37, 144])
        ring = ours.rings[0] if ours.spec.prunes else None
        for found, wanted in zip(
            cpu.afar(ours.store, *asked, ring, 0.2),
            pages.afar(theirs.store, *asked, ring, 0.2),
            strict=True,
        ):
            agree(found, wanted)


@needs_compiler
@pytest.mark.parametrize("build", BUILDS)
def test_long_sequences_in_parts(build, kernels):
    kernels(build)
    torch.manual_seed(0)
    lengths = 2100, 3  # the short one has parts without tokens
    held = Sequences({"key_ratio": 0.5}, 64, 32, torch.float32, lengths, kv_heads=1)
    held.written(cpu.write)
    assert cpu._parts(torch.tensor(lengths), 2) > 1
    queries = 3 * torch.randn(2, 2, 64)
    agree(held.decoded(cpu.decode, queries), held.decoded(pages.decode, queries))


@needs_compiler
def test_types_and_no_sequences(kernels):
    kernels(BUILDS[0])
    held = Sequences({"key_ratio": 0.5}, 64, 32, torch.bfloat16).written(cpu.write)
    queries = torch.randn(3, 4, 64).bfloat16()
    out = held.decoded(cpu.decode, queries)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, held.decoded(pages.decode, queries))
    none = torch.empty(0, dtype=torch.int64)
    out = cpu.decode(held.store, queries[:0], held.table[:0], none, held.rings[:0], 1.0)
    assert out.shape == (0, 4, 64)
    keys = torch.empty(0, 2, 64)
    cpu.write(held.store, none, none, none, held.rings[:0], keys, keys)


@needs_compiler
def test_threads_are_torchs(kernels):
    kernels(BUILDS[0])
    libraries(torch.float32, BUILDS[0])
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "omp.so" in line}) == 1


# ------------------------------------------------------------------------------ building
@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, a source that compiles at once, and nothing remembered."""
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path))
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" { void prunekit_decode() {} void prunekit_write() {} }')
    monkeypatch.setattr(cpu, "_SOURCE", source)
    cpu._kernels.cache_clear()
    cpu._warn.cache_clear()
    yield tmp_path / "kernels"
    cpu._kernels.cache_clear()
    cpu._warn.cache_clear()


@needs_compiler
def test_compiled_once(fresh, monkeypatch):
    cpu.load(torch.float32, "avx2")
    (kept,) = fresh.iterdir()
    made = kept.stat().st_mtime_ns
    cpu.load(torch.float32, "avx2")
    assert [file.stat().st_mtime_ns for file in fresh.iterdir()] == [made]
    cpu.load(torch.bfloat16, "avx2")
    cpu._SOURCE.write_text(cpu._SOURCE.read_text() + "\n")
    cpu.load(torch.float32, "avx2")
    assert len(list(fresh.iterdir())) == 3


@needs_compiler
def test_compiled_at_the_same_time(fresh):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: cpu.load(torch.float32, "avx2"), range(4)))
    assert [file.suffix for file in fresh.iterdir()] == [".so"]


@needs_compiler
def test_named_compiler_first(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false --quietly")  # there, but useless: the others are tried
    assert cpu._compilers()[0] == ["false", "--quietly"]
    cpu.load(torch.float32, "avx2")
    assert len(list(fresh.iterdir())) == 1


def without_compiler(monkeypatch, folder):
    monkeypatch.setattr(shutil, "which", lambda name: None)


def with_a_bad_compiler(monkeypatch, folder):
    monkeypatch.setattr(cpu, "_compilers", lambda: [["false"]])


def on_another_processor(monkeypatch, folder):
    monkeypatch.setattr(cpu, "available", lambda: [])


def without_a_cache(monkeypatch, folder):
    monkeypatch.setenv("PRUNEKIT_CACHE", str(folder.parent / "small.cpp"))


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (without_compiler, "install one, such as g\\+\\+"),
        (with_a_bad_compiler, "could not compile"),
        (on_another_processor, "x86 processors with AVX2"),
        (without_a_cache, "set PRUNEKIT_CACHE"),
    ],
)
def test_torch_where_there_is_no_kernel(happens, said, fresh, monkeypatch):
    if happens is not on_another_processor and not BUILDS:
        pytest.skip("a processor without AVX2")
    if happens is without_a_cache and not cpu._compilers():
        pytest.skip("no C++ compiler")
    happens(monkeypatch, fresh)
    held = Sequences({"key_ratio": 0.5}, 32, 16, torch.float32)
    plain = held.copy().written(pages.write)
    queries = torch.randn(3, 4, 32)

    def use():
        Sequences({"key_ratio": 0.5}, 32, 16, torch.bfloat16).written(cpu.write)
        return held.written(cpu.write).decoded(cpu.decode, queries)

    with pytest.warns(UserWarning, match=f"in plain torch, many times slower: .*{said}") as warned:
        out = use()
    assert len(warned) == 1
    assert torch.equal(out, plain.decoded(pages.decode, queries))
