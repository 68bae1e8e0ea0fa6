import pickle
import sys

import pytest

from prune_core import errors
from prune_core.errors import MissingExtra, UnknownName, did_you_mean, require, unknown_name


def test_the_tree_drawn_at_the_top_is_the_real_one():
    assert issubclass(errors.InputError, errors.PruneError | ValueError)
    assert issubclass(errors.UnknownName, errors.InputError)
    assert issubclass(errors.RecipeError, errors.InputError)
    assert issubclass(errors.MissingExtra, ImportError)
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and cls.__module__ == errors.__name__:
            assert issubclass(cls, errors.PruneError)
            assert name in errors.__doc__
    assert not issubclass(errors.CheckpointError, ValueError)


def test_a_misspelt_name_gets_a_suggestion():
    error = unknown_name("context pruner", "provnce", ["provence", "bm25"])
    assert isinstance(error, UnknownName)
    assert str(error) == (
        "Unknown context pruner 'provnce'. Did you mean 'provence'? Known: bm25, provence."
    )


@pytest.mark.parametrize(
    ("name", "known", "sentence"),
    [
        ("zzz", ["provence"], "Known: provence."),
        ("WANDA", ["wanda", "flap"], "Did you mean 'wanda'? Known: flap, wanda."),
        ("x", [], "Known: (none)."),
        (3, ["three"], "Known: three."),
    ],
)
def test_the_suggestion(name, known, sentence):
    assert did_you_mean(name, known) == sentence


def test_a_missing_extra_says_what_to_install():
    with pytest.raises(MissingExtra) as caught:
        require("no_such_package.part", extra="demo", purpose="Reading GGUF files")
    assert str(caught.value) == (
        "Reading GGUF files needs the package 'no_such_package': pip install 'prunekit[demo]'."
    )
    assert caught.value.name == "no_such_package"
    copy = pickle.loads(pickle.dumps(caught.value))  # as a worker process hands it back
    assert str(copy) == str(caught.value)


def test_require_gives_the_module():
    assert require("json.decoder", extra="demo", purpose="Nothing") is sys.modules["json.decoder"]


@pytest.mark.parametrize("missing", ["another_missing_package", "half"])
def test_an_import_that_fails_inside_an_installed_package_keeps_its_own_error(
    tmp_path, monkeypatch, missing
):
    (tmp_path / "half_installed.py").write_text(f"import {missing}")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=missing):
        require("half_installed", extra="demo", purpose="Half of it")
