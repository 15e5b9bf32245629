"""Recipe files: what is read, what is refused, and rules for layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.compress.job import checked, layer_names, matches, needs_text, notes, spelled_out
from hasten.compress.recipe_file import parse_recipe, read_recipe, recipe_from, write_recipe
from hasten.core import Format, ModelSpec, Recipe
from hasten.errors import UsageError
from hasten.recipe import METHODS, PRUNINGS, Distillation, DistilLoss, Pruning
from hasten.weights import FORMATS, TABLE_NAMES
from specs import spec


def shape(**changes: Any) -> ModelSpec:
    parts = {
        "architecture": "llama",
        "vocab_size": 263,
        "hidden_size": 256,
        "intermediate_size": 320,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "context_length": 128,
    }
    return spec(**{**parts, **changes})


EVERYTHING = """
name: all of it
default: {bits: 4, group: 64, symmetric: false}
head: w8
method: awq-gptq
kv: int8
rotate: true
smooth: 0.5
layers:
  layers.*.down: w6
  layers.0-1.q,k,v: {bits: 8, group: 64}
prune:
  - {kind: wanda, pattern: 2:4, repair: false}
  - {kind: sparsegpt, pattern: [4, 8]}
  - heads
distil: {loss: skewed, learning_rate: 5e-5, lora: 8, tokens: 2000}
"""


def test_every_key_is_read() -> None:
    recipe = parse_recipe(EVERYTHING)
    assert recipe == Recipe(
        "all of it",
        Format.of(4, 64, False),
        Format.of(8),
        {"layers.*.down": Format.of(6), "layers.0-1.q,k,v": Format.of(8, 64)},
        "int8",
        "awq-gptq",
        True,
        0.5,
        (
            Pruning("wanda", pattern=(2, 4), repair=False),
            Pruning("sparsegpt", pattern=(4, 8)),
            Pruning("heads"),
        ),
        Distillation("skewed", learning_rate=5e-5, lora=8, tokens=2000),
    )
    defaults = Recipe("none")
    for item in dataclasses.fields(Recipe):  # a key that is added to Recipe must be read here, too
        assert getattr(recipe, item.name) != getattr(defaults, item.name), item.name


def test_a_file_is_called_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "small.yaml"
    file.write_text("default: w4\n", encoding="utf-8")
    assert read_recipe(file) == Recipe("small", Format.of(4))
    assert recipe_from(str(file)) == recipe_from(file) == Recipe("small", Format.of(4))
    assert recipe_from("w4-best") == Recipe.parse("w4-best")
    plain = tmp_path / "noending"
    plain.write_text("{default: w5}", encoding="utf-8")
    assert recipe_from(str(plain)).default == Format.of(5)


LAYOUTS = st.sampled_from(sorted(FORMATS.values(), key=str))
PATTERNS = st.tuples(st.integers(1, 4), st.integers(5, 8))
PRUNINGS = st.builds(
    Pruning,
    st.sampled_from([kind for kind, entry in PRUNINGS.items() if entry.takes == "weights"]),
    st.floats(0.01, 0.99),
    st.none() | PATTERNS,
    st.booleans(),
) | st.builds(Pruning, st.sampled_from(sorted(PRUNINGS)), st.floats(1e-9, 0.99))
DISTILLATIONS = st.builds(
    Distillation,
    loss=st.sampled_from(get_args(DistilLoss)),
    temperature=st.floats(1e-6, 1e6),
    lora=st.none() | st.integers(1, 64),
    learning_rate=st.floats(1e-12, 1.0),
)
NAMES = st.text(min_size=1, max_size=12).filter(lambda text: text.isprintable()) | st.sampled_from(
    ["mix:1%", "5e-5", "true", "2:4", "null", "0x10", "1_000", "~", "- a", "#", "a: b", "no"]
)


@settings(max_examples=150, deadline=None)
@given(
    st.builds(
        Recipe,
        NAMES,
        st.none() | LAYOUTS,
        st.none() | LAYOUTS,
        st.dictionaries(NAMES, LAYOUTS, max_size=3),
        st.sampled_from(("bf16", "int8")),
        st.sampled_from(sorted(METHODS)),
        st.booleans(),
        st.none() | st.floats(0.01, 0.99),
        st.lists(PRUNINGS, max_size=3).map(tuple),
        st.none() | DISTILLATIONS,
    )
)
def test_what_is_written_is_read_back(recipe: Recipe) -> None:
    assert parse_recipe(write_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("deflt: w4", "unknown key 'deflt'", "did you mean default"),
        ("zzz: 1", "unknown key 'zzz'", "keys are name, default"),
        ("default: w3.5", "default: unknown recipe 'w3.5'", "w4-g64"),
        ("default: w4-kv8", "says more than how weights are stored", "keys of their own"),
        ("default: w4-gptq", "says more than how weights are stored", "keys of their own"),
        ("default: 4", "default must be a name", "recipe file"),
        ("default: {group: 64}", "bits is missing", "bits: 4"),
        ("default: {bits: 7}", "7 bits does not exist", "8, 6, 5 or 4"),
        ("default: {bits: 4, group: 48}", "group size 48", "32, 64 or 128"),
        ("default: {bits: '4'}", "bits must be a whole number, got '4'", "recipe file"),
        ("default: {bits: true}", "bits must be a whole number, got True", "recipe file"),
        ("default: {bits: 4, grp: 64}", "unknown key 'grp'", "did you mean group"),
        ("head: source", "only for default", "bf16"),
        ("default: w4\ndefault: w8", "line 2: 'default' is there twice", "example"),
        ("layers: {a.b: w4, a.b: w8}", "'a.b' is there twice", "example"),
        ("default: [", "line 1", "example"),
        ("layers: {3: w4}", "3 is no layer name", "layers.3.down"),
        ("layers: [w4]", "layers must be rules", "recipe file"),
        ("layers: {layers.0.q: source}", "layers.0.q: source is only for default", "leave the key out"),
        ("kv: int7", "kv cannot be 'int7'", "did you mean int8"),
        ("method: gtpq", "method cannot be 'gtpq'", "did you mean gptq"),
        ("prune: wanda", "prune must be a list", "kind: ffn"),
        ("prune: [{amount: 0.2}]", "prune 1: kind is missing", "kind: ffn"),
        ("prune: [{kind: wanda, pattern: 124}]", "pattern must be N:M, got 124", "2:4"),
        ("prune: [heads, {kind: ffn, amount: 25}]", "prune 2: prune ffn: amount is a fraction", "0.25"),
        ("prune: [{kind: ffn, pattern: 2:4}]", "takes whole parts out", "drop pattern"),
        ("prune: [{kind: fnn}]", "kind cannot be 'fnn'", "did you mean ffn"),
        ("distil: {tokens: 1.5}", "tokens must be a whole number", "recipe file"),
        ("distil: {loss: backward}", "loss cannot be 'backward'", "forward, reverse, skewed"),
        ("distil: {temperature: 0}", "temperature cannot be 0.0", "temperature: 1.0"),
        ("distil: yes", "distil must be settings", "recipe file"),
        ("smooth: 2", "smooth lies between 0 and 1", "0.5"),
        ("smooth: .nan", "smooth must be a number, got nan", "recipe file"),
        ("rotate: yes", "rotate must be true or false, got 'yes'", "recipe file"),
        ("name: 3", "name must be a text, got 3", "recipe file"),
        ("", "is empty", "default: w4"),
        ("- 1", "must be keys and values, got [1]", "recipe file"),
        ("? [1]\n: 2", "a key must be a word", "example"),
        ("default: !!python/object:os.system {}", "could not determine a constructor", "example"),
        ("[" * 3000, "line 1", "example"),
    ],
)
def test_refusals(text: str, what: str, hint: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_recipe(text)
    if text.startswith("[["):
        assert "nested too deeply" in error.value.message or what in error.value.message
    else:
        assert what in error.value.message
    assert hint in str(error.value.hint)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_recipe(tmp_path / "nothing.yaml")
    with pytest.raises(UsageError, match=r"recipe file .*folder"):
        (tmp_path / "folder").mkdir()
        read_recipe(tmp_path / "folder")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(UsageError, match=r"latin\.yaml is not UTF-8: byte 9"):
        read_recipe(tmp_path / "latin.yaml")
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    with pytest.raises(UsageError, match="more than 1 MB"):
        read_recipe(tmp_path / "large.yaml")
    with pytest.raises(UsageError, match="unknown recipe 'w4best'") as error:
        recipe_from("w4best")
    assert "w4best.yaml" in str(error.value.hint)


def test_rules_take_what_they_name() -> None:
    names = layer_names(shape(num_layers=12))
    assert matches("layers.3.down", names) == {"layers.3.down"}
    assert matches("layers.*.down", names) == {f"layers.{i}.down" for i in range(12)}
    assert matches("layers.0-2,11.q,k", names) == {f"layers.{i}.{n}" for i in (0, 1, 2, 11) for n in "qk"}
    assert matches("layers.*.*", names) == set(names) - {"head", "embed"}
    assert matches("*", names) == {"head", "embed"}
    assert matches("layers.1*.q", names) == {"layers.1.q", "layers.10.q", "layers.11.q"}
    assert matches("layers.1", names) == matches("layers", names) == matches("layers.1.q.x", names) == set()


def test_the_narrower_rule_wins_wherever_it_stands() -> None:
    rules = {"layers.0-1.down": Format.of(8), "layers.*.*": Format.of(4), "layers.1.down": Format.of(6)}
    for order in (list(rules), list(reversed(rules))):
        found = spelled_out({rule: rules[rule] for rule in order}, shape(), "r")
        assert found["layers.0.down"] == Format.of(8) and found["layers.1.down"] == Format.of(6)
        assert found["layers.2.down"] == found["layers.0.q"] == Format.of(4)
        assert "head" not in found and len(found) == 28


def test_contradictory_rules() -> None:
    rules = {"layers.0.*": Format.of(8), "layers.*.q": Format.of(4)}
    with pytest.raises(UsageError, match=r"contradictory rules for layers\.0\.q") as error:
        spelled_out(rules, shape(), "r")
    assert "'layers.0.*' says w8" in error.value.message and "'layers.*.q' says w4" in error.value.message
    assert error.value.hint == "add a rule for what both name, such as layers.0.q: w8"
    assert spelled_out({**rules, "layers.0.q": Format.of(8)}, shape(), "r")["layers.0.q"] == Format.of(8)
    same = {"layers.0.*": Format.of(4), "layers.*.q": Format.of(4)}  # both say one thing
    assert spelled_out(same, shape(), "r")["layers.0.q"] == Format.of(4)
    with pytest.raises(UsageError, match="contradictory rules"):  # the same layers, written twice
        spelled_out({"layers.0-3.q": Format.of(8), "layers.*.q": Format.of(4)}, shape(), "r")


@pytest.mark.parametrize(
    ("rule", "near"),
    [
        ("layers.9.down", "layers.3.down"),
        ("layers.0.dwn", "layers.0.down"),
        ("layers.7-9.q", "layers.3.q"),
        ("model.layers.1.mlp.down_proj", "layers.1.down"),
        ("layer.*.down", "layers.0.down"),
        ("lm_head", "head"),
        ("", "layers.0.q"),
    ],
)
def test_rules_that_name_nothing(rule: str, near: str) -> None:
    with pytest.raises(UsageError, match=r"names no layer of this model, which has 4") as error:
        spelled_out({rule: Format.of(8)}, shape(), "r")
    assert near in str(error.value.hint)


def test_a_tied_head_is_the_embedding() -> None:
    tied = checked(Recipe("r", Format.of(4), layers={"head": Format.of(8)}), shape(tied_head=True))
    assert tied.layers == {"embed": Format.of(8)} and tied.layout_for("embed") == Format.of(8)
    untied = checked(Recipe("r", Format.of(4), layers={"head": Format.of(8)}), shape())
    assert untied.layers == {"head": Format.of(8)} and untied.layout_for("embed") == Format.of(4)


def test_groups_are_checked_before_any_work() -> None:
    with pytest.raises(UsageError, match=r"layers\.0\.down has 320 inputs, which groups of 128") as error:
        checked(Recipe("r", Format.of(4, 128)), shape())
    assert "and 3 other layers likewise" in error.value.message
    assert error.value.hint == "groups of 64 or 32 do"
    fine = Recipe("r", Format.of(4, 128), layers={"layers.*.down": Format.of(4, 64)})
    assert checked(fine, shape()).layout_for("layers.2.down") == Format.of(4, 64)
    with pytest.raises(UsageError, match=r"layers\.0\.q has 200 inputs") as error:
        checked(Recipe("r", Format.of(4)), shape(hidden_size=200))
    rule = str(error.value.hint).partition("layers: ")[2]
    checked(parse_recipe(f"{{default: w4, layers: {rule}}}"), shape(hidden_size=200))
    checked(Recipe("r", Format.of(4)), shape(hidden_size=20, head_dim=32))  # one group holds a whole row


def test_what_excludes_each_other() -> None:
    for recipe in (Recipe("r", method="gptq"), Recipe("r", Format.of(16), smooth=0.5)):
        with pytest.raises(UsageError, match="is for integer weights"):
            checked(recipe, shape())
    checked(Recipe("r", method="gptq", layers={"layers.*.down": Format.of(8)}), shape())
    with pytest.raises(UsageError, match="olmo2"):
        checked(Recipe("r", Format.of(4), rotate=True), shape(architecture="olmo2", norm_placement="post"))
    checked(Recipe("r", Format.of(4), rotate=True), shape())


@pytest.mark.parametrize("name", TABLE_NAMES)
def test_small_floats_need_no_groups_and_take_no_method(name: str) -> None:
    small = FORMATS[name]
    plain = Recipe("r", small, head=Format.of(8))
    assert checked(plain, shape()).default == small  # groups of 0 are the whole row
    asked: dict[str, dict[str, Any]] = {
        "method gptq": {"method": "gptq"},
        "method best": {"method": "best"},
        "smooth 0.5": {"smooth": 0.5},
        "distil": {"distil": Distillation()},
    }
    for what, change in asked.items():
        one_layer = Recipe("r", Format.of(4), layers={"layers.1.down": small})
        for recipe, where in ((plain, "layers.0.q"), (one_layer, "layers.1.down")):
            with pytest.raises(UsageError, match=f"{what} is for integer weights") as error:
                checked(dataclasses.replace(recipe, **change), shape())
            assert f"{where} is stored as {name}, whose values are floats" in error.value.message
            assert f"leave {what.split()[0]} out" in str(error.value.hint)


def test_unequal_widths_in_one_projection_are_a_note() -> None:
    recipe = checked(Recipe("r", Format.of(4), layers={"layers.*.q": Format.of(8)}), shape())
    (said,) = notes(recipe, shape())
    assert said.startswith("layers.0 q k v, layers.1 q k v, layers.2 q k v and 1 more: different widths")
    assert (
        notes(checked(Recipe("r", Format.of(4), layers={"layers.*.*": Format.of(8)}), shape()), shape()) == ()
    )


def test_zeros_that_do_not_stay_are_a_note() -> None:
    zeros = (Pruning("wanda"), Pruning("ffn"))
    (said,) = notes(Recipe("r", Format.of(4), method="gptq", prune=zeros), shape())
    assert said == "prune wanda: not all zeros stay zero through method gptq"
    (said,) = notes(Recipe("r", Format.of(4, symmetric=False), prune=zeros), shape())
    assert "a layout with minimums" in said
    for recipe in (
        Recipe("r", Format.of(4), prune=zeros),
        Recipe("r", Format.of(4), method="gptq", prune=zeros[1:]),
    ):
        assert notes(recipe, shape()) == ()


def test_who_needs_text() -> None:
    assert not needs_text(Recipe.parse("w4")) and not needs_text(Recipe.parse("w4-hqq"))
    assert not needs_text(Recipe("r", prune=(Pruning("magnitude", repair=False),)))
    for recipe in (
        Recipe.parse("w4-gptq"),
        Recipe("r", Format.of(8), smooth=0.5),
        Recipe("r", prune=(Pruning("magnitude"),)),
        Recipe("r", prune=(Pruning("layers", repair=False),)),
        Recipe("r", distil=Distillation()),
    ):
        assert needs_text(recipe), recipe
