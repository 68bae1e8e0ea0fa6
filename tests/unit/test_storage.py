import gzip
import io
import json
import os

import pytest
import torch
from safetensors.torch import load_file

from prune_core.errors import InputError
from prune_core.storage import (
    Shards,
    atomic_folder,
    atomic_write,
    read_jsonl,
    save_tensors,
    write_json,
    write_jsonl,
)


def names(folder):
    """Everything in a folder, hidden or not."""
    return sorted(os.listdir(folder))


# ------------------------------------------------------------------ one file
def test_a_file_appears_whole_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with atomic_write(path) as file:
        file.write("é\r\nb\n")
        assert not path.exists()
    assert path.read_bytes() == "é\r\nb\n".encode()
    assert names(path.parent) == ["a.txt"]
    with atomic_write(path, "wb") as file:
        file.write(b"\x00")
    assert path.read_bytes() == b"\x00"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_crash_in_the_middle_leaves_what_was_there(tmp_path, error, before):
    path = tmp_path / "a.txt"
    if before:
        path.write_text(before)

    def crash():
        with atomic_write(path) as file:
            file.write("half")
            file.flush()
            raise error

    with pytest.raises(error):
        crash()
    assert names(tmp_path) == (["a.txt"] if before else [])
    assert before is None or path.read_text() == before


def test_a_rename_that_fails_leaves_no_temporary_file(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(OSError, match=r"a.txt"), atomic_write(tmp_path / "a.txt") as file:
        file.write("x")
    assert names(tmp_path) == ["a.txt"]


def test_the_file_has_the_usual_permissions_and_a_link_stays_one(tmp_path):
    (tmp_path / "plain").touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    write_json(link, {})
    assert link.is_symlink()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_tensors_can_be_read_by_whom_the_umask_lets(tmp_path):
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "weights.safetensors", {"a": torch.arange(3)})
    assert load_file(tmp_path / "weights.safetensors")["a"].tolist() == [0, 1, 2]
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("mode", ["a", "r+", "x"])
def test_only_whole_writes(tmp_path, mode):
    with pytest.raises(InputError, match="mode must be 'w' or 'wb', got"):
        atomic_write(tmp_path / "a", mode).__enter__()


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"é": [1, None]}
    assert "é" in text
    assert text.endswith("}\n")
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"a": object()})
    assert names(tmp_path) == ["a.json"]


# ------------------------------------------------------------------ one folder
def make(path, text="new", **options):
    with atomic_folder(path, **options) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "a.txt").write_text(text)
        assert not (path / "part").exists() or (path / "part" / "a.txt").read_text() == "old"


@pytest.mark.parametrize("there", [False, True])
def test_a_folder_appears_whole_at_the_end(tmp_path, there):
    path = tmp_path / "deep" / "out"
    if there:
        path.mkdir(parents=True)
    make(path)
    assert (path / "part" / "a.txt").read_text() == "new"
    assert names(path.parent) == ["out"]


def test_a_folder_with_files_is_replaced_only_on_request(tmp_path):
    make(tmp_path / "out", "old")
    with pytest.raises(InputError, match=r"must be new or empty.*overwrite=True"):
        make(tmp_path / "out")
    assert (tmp_path / "out" / "part" / "a.txt").read_text() == "old"
    make(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "part" / "a.txt").read_text() == "new"
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_never_replaced_by_a_folder(tmp_path, overwrite):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(InputError, match="must be a folder, but is a file"):
        make(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("before", [False, True])
def test_a_crash_in_the_middle_leaves_the_folder_as_it_was(tmp_path, before):
    if before:
        make(tmp_path / "out", "old")

    def crash():
        with atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / "half.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    assert names(tmp_path) == (["out"] if before else [])
    assert not before or names(tmp_path / "out") == ["part"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    make(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk trouble")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(OSError, match="disk trouble"):
        make(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "part" / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["out"]


# ------------------------------------------------------------------ JSON lines
LINES = '{"a": 1}\n\n  \n{"a": "é\u2028x"}\r\n{"a": null}'
ROWS = [{"a": 1}, {"a": "é\u2028x"}, {"a": None}]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_files_and_streams_read_alike(tmp_path, start):
    (tmp_path / "a.jsonl").write_bytes(start + LINES.encode())
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(start + LINES.encode())
    assert list(read_jsonl(tmp_path / "a.jsonl")) == ROWS
    assert list(read_jsonl(str(tmp_path / "a.jsonl.gz"))) == ROWS
    assert list(read_jsonl(io.BytesIO(start + LINES.encode()))) == ROWS
    assert list(read_jsonl(io.StringIO(LINES))) == ROWS


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{a: 1}", "line 3 is not valid JSON .*each line must hold one JSON object"),
        (b'{"a": 1', "line 3 is not valid JSON"),
        (b'{"a": "\xff"}', "line 3 is not valid JSON"),
        (b"[1]", "line 3 must hold a JSON object, got list"),
        (b'"text"', "line 3 must hold a JSON object, got str"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    rows = read_jsonl(path)
    assert next(rows) == {"a": 1}
    with pytest.raises(InputError, match=f"bad.jsonl, {words}"):
        next(rows)
    with pytest.raises(InputError, match=f"<stream>, {words}"):
        list(read_jsonl(io.BytesIO(path.read_bytes())))


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match=r"Cannot read '.*no.jsonl'"):
        next(read_jsonl(tmp_path / "no.jsonl"))
    whole = gzip.compress(LINES.encode() * 100)
    for content in (whole[: len(whole) // 2], whole[:10] + b"\xff" * 20, b"not gzip"):
        (tmp_path / "cut.jsonl.gz").write_bytes(content)
        with pytest.raises(InputError, match=r"Cannot read '.*cut.jsonl.gz'"):
            list(read_jsonl(tmp_path / "cut.jsonl.gz"))


# ------------------------------------------------------------------ shards
def test_stopped_work_goes_on_where_it_stopped(tmp_path):
    shards = Shards(tmp_path / "work", {"model": "m", "shape": (1, 2)})
    assert shards.missing(3) == [0, 1, 2]
    shards.write(2, [{"i": 20}])
    shards.write(0, iter([{"i": 1}, {"i": "é"}]))
    assert 0 in shards
    assert 1 not in shards

    again = Shards(tmp_path / "work", {"shape": [1, 2], "model": "m"})
    assert again.missing(4) == [1, 3]
    again.write(1, [])
    assert again.missing(3) == []
    assert list(again.rows()) == [{"i": 1}, {"i": "é"}, {"i": 20}]
    again.write(0, [{"i": 5}])
    assert list(again.rows()) == [{"i": 5}, {"i": 20}]


def test_rows_come_in_order_of_shards(tmp_path):
    shards = Shards(tmp_path, {})
    for i in range(0, 210, 13):
        shards.write(i * 37 % 210, [{"i": i * 37 % 210}])
    found = [row["i"] for row in shards.rows()]
    assert len(found) == 17
    assert found == sorted(found)


def test_a_crash_in_a_shard_leaves_it_missing(tmp_path):
    def rows():
        yield {"i": 1}
        raise RuntimeError("out of memory")

    shards = Shards(tmp_path, {})
    with pytest.raises(RuntimeError, match="out of memory"):
        shards.write(0, rows())
    assert shards.missing(1) == [0]
    assert names(tmp_path) == ["fingerprint.json"]


@pytest.mark.parametrize(
    ("fingerprint", "words"),
    [
        ({"model": "n", "seed": 1}, '\'model\' was "m" and is now "n"'),
        ({"model": "m", "seed": 2}, "'seed' was 1 and is now 2"),
        ({"model": "m"}, "'seed' was 1 and is now absent"),
        ({"model": "m", "seed": 1, "lr": None}, "'lr' was absent and is now null"),
    ],
)
def test_another_fingerprint_is_refused(tmp_path, fingerprint, words):
    Shards(tmp_path, {"model": "m", "seed": 1}).write(0, [{"i": 1}])
    with pytest.raises(InputError, match=f"was made by other work: {words}.*another folder"):
        Shards(tmp_path, fingerprint)
    assert names(tmp_path) == ["fingerprint.json", "shard-000000.jsonl"]


def test_shards_of_unknown_origin_are_refused(tmp_path):
    Shards(tmp_path, {}).write(0, [])
    (tmp_path / "fingerprint.json").unlink()
    with pytest.raises(InputError, match=r"has shards but no fingerprint.json"):
        Shards(tmp_path, {})


@pytest.mark.parametrize("i", [-1, 1_000_000])
def test_shard_numbers_have_a_range(tmp_path, i):
    with pytest.raises(InputError, match=rf"must be in \[0, 999999\], got {i}"):
        Shards(tmp_path, {}).write(i, [])


def test_rows_as_lines_of_json(tmp_path):
    rows = [{"a": "é\u2028"}, "text", {"b": "\ud800", "c": None}]
    write_jsonl(tmp_path / "r.jsonl", rows)
    raw = (tmp_path / "r.jsonl").read_bytes()
    assert [json.loads(line) for line in raw.split(b"\n")[:-1]] == rows
    assert "é".encode() in raw
    with pytest.raises(TypeError):
        write_jsonl(tmp_path / "r.jsonl", [{"a": object()}])
    assert (tmp_path / "r.jsonl").read_bytes() == raw
