from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from prune_core.errors import RecipeError
from prune_core.recipe import load_recipe, parse_recipe


@dataclass(frozen=True)
class Prune:
    method: Literal["wanda", "flap", 2]
    sparsity: float = 0.5

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")


@dataclass(frozen=True)
class Recover:
    lr: float
    steps: int | None = None


@dataclass(frozen=True)
class Recipe:
    out: Path
    prune: Prune
    seed: int = 0
    dry: bool = False
    name: str = ""
    stages: list[Recover] = field(default_factory=list)
    betas: tuple[float, float] = (0.9, 0.999)
    layers: tuple[int, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)
    budget: float | int | str = 0
    repair: Recover | None = None
    either: Prune | Recover | None = None
    free: Any = None
    derived: int = field(init=False, default=7)


@dataclass(frozen=True)
class Unsupported:
    bare: dict


NEEDED: dict[str, Any] = {"out": "DIR", "prune": {"method": "wanda"}}

FULL = """
out: results/run1
prune: {method: flap, sparsity: 0.25}
seed: 3
dry: true
name: "yes"
stages:
  - lr: 1e-4
  - {lr: 1, steps: 20}
betas: [0.9, 1]
layers: [1, 2, 3]
sizes: {a: 1, b: 2}
budget: 20%
repair: {lr: -2.5E+3}
either: {lr: 1.e2}
free: [1, {x: null}]
"""


@pytest.fixture
def load(tmp_path):
    def load(text, cls=Recipe):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, cls)

    return load


def test_every_type_is_read(load):
    recipe = load(FULL)
    assert recipe == Recipe(
        out=Path("results/run1"),
        prune=Prune("flap", 0.25),
        seed=3,
        dry=True,
        name="yes",
        stages=[Recover(1e-4), Recover(1.0, 20)],
        betas=(0.9, 1.0),
        layers=(1, 2, 3),
        sizes={"a": 1, "b": 2},
        budget="20%",
        repair=Recover(-2500.0),
        either=Recover(100.0),
        free=[1, {"x": None}],
    )
    assert [type(x) for x in (recipe.out, recipe.stages[1].lr, recipe.betas[1])] == [
        type(Path()),
        float,
        float,
    ]


@pytest.mark.parametrize(("value", "kind"), [(3, int), (0.2, float), ("20%", str)])
def test_a_union_keeps_the_type_given(value, kind):
    assert type(parse_recipe(NEEDED | {"budget": value}, Recipe).budget) is kind


def test_defaults_stay():
    recipe = parse_recipe(NEEDED, Recipe)
    assert recipe == Recipe(Path("DIR"), Prune("wanda"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sede": 1}, r"Unknown key 'sede'. Did you mean 'seed'\? Known: betas, budget,"),
        ({"derived": 1}, "Unknown key 'derived'"),
        ({3: 1}, "Unknown key '3'"),
        ({"prune": {"metod": "wanda"}}, r"'prune.metod'. Did you mean 'method'\?"),
        ({"stages": [{"lr": 1}, {"l": 1}]}, r"Unknown key 'stages\[1\].l'. Did you mean 'lr'"),
        ({"prune": {}}, "required key 'prune.method' is missing: add it, as one of 'wanda'"),
        ({"prune": None}, "prune must be a mapping with the keys method, sparsity, got None"),
        ({"prune": {"method": "wandaa"}}, "prune.method must be one of 'wanda', 'flap', 2, got"),
        ({"prune": {"method": 2.0}}, "prune.method must be one of"),
        ({"prune": {"method": "flap", "sparsity": 1}}, r"prune: sparsity must be in \[0, 1\)"),
        ({"prune": {"method": "flap", "sparsity": True}}, "prune.sparsity must be a number"),
        ({"prune": {"method": "flap", "sparsity": "0.5"}}, r"a number, got '0.5' \(str\)"),
        ({"seed": "3"}, "seed must be a whole number, got '3'"),
        ({"seed": True}, r"seed must be a whole number, got True \(bool\)"),
        ({"seed": 3.0}, "seed must be a whole number, got 3.0"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"dry": 1}, "dry must be true or false, got 1"),
        ({"dry": "yes"}, "dry must be true or false, got 'yes'"),
        ({"name": 3}, "name must be text, got 3"),
        ({"name": True}, "name must be text, got True"),
        ({"out": 3}, "out must be a path, got 3"),
        ({"stages": {"lr": 1}}, "stages must be a list, each a mapping with the keys lr, steps"),
        ({"stages": "lr"}, "stages must be a list"),
        ({"betas": [0.9]}, "betas must be a list of 2: a number, a number, got"),
        ({"betas": [0.9, "x"]}, r"betas\[1\] must be a number, got 'x'"),
        ({"layers": [1, 2.5]}, r"layers\[1\] must be a whole number, got 2.5"),
        ({"layers": 1}, "layers must be a list, each a whole number, got 1"),
        ({"sizes": {"a": "x"}}, "sizes.a must be a whole number, got 'x'"),
        ({"sizes": {1: 1}}, "a key of sizes must be text, got 1"),
        ({"sizes": [1]}, "sizes must be a mapping of names, each a whole number"),
        ({"budget": [1]}, "budget must be a number or a whole number or text, got"),
        ({"budget": True}, "budget must be a number or a whole number or text, got True"),
        ({"repair": {"lr": "x"}}, "repair.lr must be a number, got 'x'"),
        ({"repair": {"lr": 1, "steps": "x"}}, "repair.steps must be a whole number or null, got"),
        ({"repair": 3}, "repair must be a mapping with the keys lr, steps or null, got 3"),
        ({"either": {"lr": "x"}}, "Unknown key 'either.lr'.* Or: either.lr must be a number"),
    ],
)
def test_what_is_refused_names_the_place_and_what_is_allowed(change, words):
    with pytest.raises(RecipeError, match=words):
        parse_recipe(NEEDED | change, Recipe)


def test_the_root_has_words_too():
    with pytest.raises(RecipeError, match="The required key 'method' is missing"):
        parse_recipe({}, Prune)
    with pytest.raises(RecipeError, match="The recipe: sparsity must be in"):
        parse_recipe({"method": "flap", "sparsity": -1}, Prune)


def test_the_error_of_the_dataclass_is_the_cause():
    with pytest.raises(RecipeError) as caught:
        parse_recipe({"method": "flap", "sparsity": -1}, Prune)
    assert type(caught.value.__cause__) is ValueError


def test_a_type_that_recipes_cannot_hold_is_the_programmers_error():
    with pytest.raises(TypeError, match="do not support the type of 'bare'"):
        parse_recipe({"bare": {}}, Unsupported)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "The file is empty: it must hold a mapping with the keys out, prune"),
        ("# only a comment\n", "The file is empty"),
        ("- a\n- b\n", r"The recipe must be a mapping .* got \['a', 'b'\] \(list\)"),
        ("just words", "The recipe must be a mapping"),
        ("seed: 1\nout: D\nseed: 2\n", "key 'seed' is given twice, in lines 1 and 3: remove one"),
        ("prune: {method: flap, 'method': flap}", "key 'method' is given twice, in lines 1 and 1"),
        ("free:\n  - {? [1] : 1, x: 1, x: 2}", "key 'x' is given twice"),
        ("out: [1", "not plain YAML"),
        ("out: a\n---\nout: b\n", "not plain YAML"),
        ("out: 2024-13-45\n", "not plain YAML"),
        (b"out: \xff\xfe\xff", "not plain YAML"),
        ("free: !!python/object/apply:os.system ['exit 1']", "not plain YAML"),
    ],
)
def test_bad_files_are_named(load, text, words):
    with pytest.raises(RecipeError, match=words) as caught:
        load(text)
    assert "recipe.yaml" in str(caught.value)


def test_merged_keys_are_no_duplicates(load):
    recipe = load(
        "out: D\nprune: {method: flap}\n"
        "free: {deep: {inner: &inner {<<: &base {lr: 1, steps: 5}, lr: 2}}}\n"
        "repair: {<<: *inner, lr: 3}\n"
    )
    assert recipe.repair == Recover(3.0, 5)
    assert recipe.free == {"deep": {"inner": {"lr": 2, "steps": 5}}}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(RecipeError, match=r"Cannot read the recipe '.*no.yaml': No such file"):
        load_recipe(tmp_path / "no.yaml", Recipe)
    with pytest.raises(RecipeError, match=r"Cannot read the recipe '.*directory"):
        load_recipe(tmp_path, Recipe)
