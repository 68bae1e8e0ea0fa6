"""The Triton kernels give what plain torch gives: on a GPU if there is one, else interpreted."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from prune_core.errors import MissingExtra
from rag_prune.kv import pages
from rag_prune.kv.config import KVPruneConfig
from rag_prune.kv.spec import PageSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
CONFIGS = {
    "think": {"method": "think", "key_ratio": 0.5},
    "think, values": {"method": "think", "key_ratio": 0.4, "value_ratio": 0.4},
    "mustafar": {"method": "mustafar", "key_ratio": 0.5, "value_ratio": 0.5},
    "mustafar, keys": {"method": "mustafar", "key_ratio": 0.7},
    "mustafar, values": {"method": "mustafar", "key_ratio": 0.0, "value_ratio": 0.7},
    "none": {"method": "none"},
}
PRUNING = [name for name in CONFIGS if name != "none"]
KV_HEADS = 2


@pytest.fixture(scope="module")
def gpu():
    """The module. The interpreter has to be asked for from the first import of triton on."""
    with patch.dict(os.environ, TRITON_INTERPRET=str(int(DEVICE == "cpu"))):
        pytest.importorskip("triton", reason="triton is not installed; `make test-vllm` has it")
        yield importlib.import_module("rag_prune.kv.kernels.gpu")


@pytest.fixture(autouse=True)
def on_the_device():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


class Sequences:
    """Stored sequences of random tokens, and queries for their newest ones.

    Pages and ring blocks lie apart and in no order, and what was not written is NaN.
    """

    def __init__(self, name, lengths, *, size=64, block=16, group=2, dtype=torch.float32):
        config = KVPruneConfig(recent=20, sinks=4, **CONFIGS[name])
        spec = PageSpec.of(config, head_size=size, block_size=block, itemsize=dtype.itemsize)
        rows, width = len(lengths), max(lengths) // block + 2
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.queries = torch.randn(rows, KV_HEADS * group, size).to(dtype)
        self.table = torch.randperm(rows * width).view(rows, width).int()
        self.rings = ring = None
        if spec.prunes:  # each ring in three blocks, with bytes to spare
            ring = _apart(rows * 3, -(-spec.ring_slots // 3) * spec.slot_bytes + 8).zero_()
            self.rings = torch.randperm(rows * 3).view(rows, 3).int()
        memory = _apart(rows * width, spec.page_bytes).fill_(255)
        self.store = pages.Storage(spec, dtype, memory, ring)
        if spec.thin_keys:
            order = torch.rand(rows * width, KV_HEADS, size).argsort(-1)
            channels = order[..., : spec.kept_keys].sort(-1).values
            pages.set_ids(self.store, torch.arange(rows * width), channels)
        for row, length in enumerate(lengths):
            positions = torch.arange(length)
            pages.write(
                self.store,
                self.table[row][positions // block],
                positions,
                torch.full_like(positions, length),
                None if self.rings is None else self.rings[row].expand(length, -1),
                torch.randn(length, KV_HEADS, size),
                torch.randn(length, KV_HEADS, size),
            )

    def decode(self, module, valid=None):
        return module.decode(
            self.store, self.queries, self.table, self.lengths, self.rings, 0.2, valid
        )

    def check(self, gpu, valid=None):
        """Both ways agree; returns the reference."""
        expected = self.decode(pages, valid)
        found = self.decode(gpu, valid)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        tolerance = TOLERANCE[self.queries.dtype]
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
        return expected


def _apart(blocks, size):
    """Memory of blocks for each head, with a head and some bytes of others' between them."""
    return torch.zeros(blocks, KV_HEADS + 1, size + 16, dtype=torch.uint8)[:, :KV_HEADS]


@pytest.mark.parametrize(
    ("size", "block", "group", "dtype"),
    [
        (32, 16, 1, torch.float32),
        (64, 32, 3, torch.bfloat16),
        (80, 16, 4, torch.float16),
        (128, 32, 3, torch.float32),
        (128, 16, 4, torch.bfloat16),
        (32, 32, 4, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_result_is_that_of_plain_torch(gpu, monkeypatch, name, size, block, group, dtype):
    monkeypatch.setattr(gpu, "_shares", lambda *_: 2)
    lengths = [1, block, block + 1, 3 * block + 7]
    Sequences(name, lengths, size=size, block=block, group=group, dtype=dtype).check(gpu)


@pytest.mark.parametrize("name", CONFIGS)
def test_pages_of_other_sizes(gpu, name):
    Sequences(name, [100], block=48, size=16).check(gpu)
    Sequences(name, [60], block=128, size=256, group=17).check(gpu)


@pytest.mark.parametrize("name", ["think", "mustafar"])
def test_a_long_sequence_beside_a_short_one(gpu, name):
    Sequences(name, [1000, 3], block=32, size=32, group=1).check(gpu)


@pytest.mark.parametrize("shares", [1, 4, 16])
def test_any_number_of_shares_gives_the_same(gpu, monkeypatch, shares):
    monkeypatch.setattr(gpu, "_shares", lambda *_: shares)
    for name in ("think", "mustafar"):
        Sequences(name, [1, 150], size=32).check(gpu)


@pytest.mark.parametrize("name", PRUNING)
def test_tokens_that_the_ring_lacks_stay_pruned(gpu, name):
    sequences = Sequences(name, [70, 90])
    whole = sequences.check(gpu)
    ring = sequences.store.ring
    slots = sequences.store.slots_per_block
    per_slot = sequences.store.spec.slot_bytes
    # Every third slot of all ring blocks is empty, every third is of another position.
    for slot in range(0, slots, 3):
        ring[..., slot * per_slot : slot * per_slot + 4] = 0
    for slot in range(1, slots, 3):
        ring[..., slot * per_slot] += 1
    some = sequences.check(gpu)
    ring.zero_()
    none = sequences.check(gpu)
    sequences.rings = None
    assert torch.equal(sequences.check(gpu), none)
    assert not torch.allclose(whole, some)
    assert not torch.allclose(some, none)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_is_not_read(gpu, monkeypatch, name):
    monkeypatch.setattr(gpu, "_shares", lambda *_: 2)
    sequences = Sequences(name, [60, 60, 60])
    valid = torch.ones(3, 64, dtype=torch.bool)
    valid[0, :37] = False
    valid[1, 5:50:2] = False
    valid[2] = False
    out = sequences.check(gpu, valid)
    assert not out[2].any()


def test_a_row_of_no_sequence_gets_zeros(gpu):
    sequences = Sequences("think", [40, 40])
    sequences.lengths[1] = 0
    out = sequences.decode(gpu)
    assert out[0].any()
    assert not out[1].any()


@pytest.mark.parametrize("name", ["think", "mustafar"])
def test_strides_of_arguments_are_minded(gpu, name):
    sequences = Sequences(name, [30, 100], group=3)
    expected = sequences.check(gpu)
    sequences.queries = sequences.queries.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    sequences.table = torch.cat([sequences.table] * 2, 1)[:, : sequences.table.shape[1]]
    sequences.rings = torch.cat([sequences.rings] * 2, 1)[:, :3].long()
    sequences.lengths = sequences.lengths.long()
    by_head = sequences.store.pages.transpose(0, 1).contiguous().transpose(0, 1)
    spec, ring = sequences.store.spec, sequences.store.ring
    sequences.store = pages.Storage(spec, sequences.store.dtype, by_head, ring)
    torch.testing.assert_close(sequences.check(gpu), expected)


def test_wider_queries_than_entries_lose_nothing(gpu):
    sequences = Sequences("think", [70], dtype=torch.bfloat16)
    sequences.queries = sequences.queries.float() + 1e-3
    sequences.check(gpu)


def test_shares_follow_from_shapes(gpu):
    def shares(programs, tiles, processors):
        properties = type("Properties", (), {"multi_processor_count": processors})
        with patch.object(torch.cuda, "get_device_properties", lambda _: properties):
            return gpu._shares(programs, tiles, torch.device("cuda"))

    assert shares(8, 10_000, 128) == 32
    assert shares(1, 10_000, 128) == 64
    assert shares(8, 3, 128) == 4
    assert shares(1024, 10_000, 128) == 1


COMPILE = """
import sys
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rag_prune.kv.kernels import gpu
from test_kv_triton import Sequences, torch

target = GPUTarget("cuda", 90, 32)
driver.set_active(
    SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        get_current_target=lambda: target,
    )
)
compiled = []
for kernel in (gpu._attend, gpu._merge):
    def run(*args, warmup, run=kernel.run, **options):
        compiled.append(run(*args, warmup=True, **options))
    kernel.run = run
for name in ("think", "mustafar", "think, values"):
    sequences = Sequences(name, [40], size=128, group=4, dtype=torch.bfloat16)
    if name == "think, values":
        sequences.rings = None
    sequences.decode(gpu, torch.ones(1, 40, dtype=torch.bool) if name == "think" else None)
for kernel in compiled:
    print(kernel.metadata.name, len(kernel.asm["cubin"]), "mma" in kernel.asm["ptx"])
"""


def test_the_kernels_compile_for_a_gpu_without_one(gpu, tmp_path):
    """What the interpreter lets pass, the compiler may not."""
    here = Path(__file__)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parents[2]), str(here.parent)]),
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    built = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, _, _ in built] == ["_attend", "_merge"] * 3
    assert all(int(size) > 0 for _, size, _ in built)
    assert [matrices for _, _, matrices in built] == ["True", "False"] * 3


def test_without_triton_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "rag_prune.kv.kernels.gpu", raising=False)
    with pytest.raises(MissingExtra, match=r"on a GPU needs the package 'triton': pip install"):
        importlib.import_module("rag_prune.kv.kernels.gpu")
