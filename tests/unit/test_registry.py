import json
import subprocess
import sys

import pytest

from prune_core.errors import InputError, UnknownName
from prune_core.registry import Method, Registry
from prune_core.testing import unregistered


def method(name="decoder", target="json.decoder:JSONDecoder", **changes):
    return Method(
        name,
        target,
        **{"family": "toy", "paper": "baseline", "needs": "nothing", "cost": "none"} | changes,
    )


TABLE = Registry(
    "json", "toy", [method(), method("encoder", "json.encoder:JSONEncoder", year=2023)]
)


def test_a_registry_is_a_collection_of_rows_in_order():
    assert TABLE.names == ("decoder", "encoder")
    assert [row.name for row in TABLE] == ["decoder", "encoder"]
    assert len(TABLE) == 2
    assert "encoder" in TABLE
    assert "wanda" not in TABLE
    assert TABLE.row("encoder").year == 2023
    assert TABLE.get("encoder") is json.JSONEncoder


@pytest.mark.parametrize("ask", [TABLE.row, TABLE.get])
def test_an_unknown_name_gets_a_suggestion(ask):
    with pytest.raises(UnknownName, match=r"Unknown toy 'decodr'. Did you mean 'decoder'\?"):
        ask("decodr")


def test_a_class_is_imported_only_when_asked_for():
    code = """if True:
        import sys
        from prune_core.registry import Method, Registry
        words = dict(family="", paper="", needs="", cost="")
        table = Registry("wave", "toy", [Method("wave", "wave:Error", **words)])
        table.row("wave"), table.names, [row.to_dict() for row in table]
        before = "wave" in sys.modules
        table.get("wave")
        print(before, "wave" in sys.modules)
    """
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "True"]


def test_a_row_as_json():
    row = method(arxiv="2306.11695").to_dict()
    assert json.loads(json.dumps(row)) == {
        "package": "json",
        "name": "decoder",
        "target": "json.decoder:JSONDecoder",
        "family": "toy",
        "paper": "baseline",
        "year": None,
        "arxiv": "2306.11695",
        "needs": "nothing",
        "cost": "none",
    }


@pytest.mark.parametrize("name", ["Wanda", "", "semdedup-2", "2ssp", "a b", "wanda\n"])
def test_names_are_lower_case(name):
    with pytest.raises(InputError, match="name must be lower-case"):
        method(name)


@pytest.mark.parametrize("target", ["json.decoder", "json:", ":A", "json/decoder:A", "a..b:C", ""])
def test_targets_are_a_module_and_a_class(target):
    with pytest.raises(InputError, match="'decoder' must be 'module:Class', got"):
        method(target=target)


def test_duplicates_and_strangers_are_refused():
    with pytest.raises(InputError, match="toy 'decoder' is in the table of json twice"):
        Registry("json", "toy", [method(), method()])
    with pytest.raises(InputError, match=r"must be in the package 'jso', got 'json.decoder"):
        Registry("jso", "toy", [method()])


@pytest.fixture
def folder_of_methods(tmp_path, monkeypatch):
    folder = tmp_path / "toy_package" / "methods"
    (folder / "big").mkdir(parents=True)
    for name in ["__init__", "alpha", "beta", "base", "_private", "big/__init__", "big/solver"]:
        (folder / f"{name}.py").write_text("" if name.endswith("__init__") else "1 / 0")
    (folder.parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy_package.methods"
    for name in [name for name in sys.modules if name.startswith("toy_package")]:
        del sys.modules[name]


def test_a_forgotten_method_file_is_found(folder_of_methods):
    rows = [
        method("a", "toy_package.methods.alpha:Alpha"),
        method("big", "toy_package.methods.big.solver:Big"),
        method("elsewhere", "toy_package.methods_old.beta:Beta"),
    ]
    assert unregistered(rows, folder_of_methods) == ["base", "beta"]
    assert unregistered(rows, folder_of_methods, ignore=["base", "beta"]) == []
    assert "big" in unregistered(rows[:1], folder_of_methods)


def test_a_stale_exception_is_refused(folder_of_methods):
    with pytest.raises(InputError, match=r"\['gone'\], which toy_package.methods does not have"):
        unregistered([], folder_of_methods, ignore=["base", "gone"])
