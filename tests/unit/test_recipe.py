"""Recipes: what survives the file, what is refused, and what llama-quantize would read."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_sources import expert_tensors, stack_name, write_source

from alphaq_gguf.checkpoint import Source
from alphaq_gguf.errors import AlphaQError
from alphaq_gguf.qtypes import QType
from alphaq_gguf.recipe import (
    Recipe,
    RecipeUnit,
    check_recipe,
    embedded_json,
    from_json,
    load_recipe,
    matrix_types,
    save_recipe,
    tensor_type_lines,
    to_json,
)

ROUTER = "blk.0.ffn_gate_inp.weight"
CHOICES = {"gate": QType.Q2_K, "up": QType.Q4_K, "down": QType.Q8_0}
# 2 experts of 256 x 256 weights: 512 rows of one K-quant block, or of eight Q8_0 blocks.
N_BYTES = {QType.Q2_K: 512 * 84, QType.Q4_K: 512 * 144, QType.Q8_0: 512 * 8 * 34}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return write_source(tmp_path_factory.mktemp("recipe") / "m.gguf", expert_tensors())


@pytest.fixture
def recipe(source: Source) -> Recipe:
    units = tuple(
        RecipeUnit(stack_name(proj), 0, proj, 2 * 256 * 256, qtype, N_BYTES[qtype], alpha_median=3.25, cost=0.1)
        for proj, qtype in CHOICES.items()
    )
    result = {"gamma": 11.5, "gap": 0.0}
    return Recipe("alphaq-gguf 9", source.fingerprint, "testmoe", {"bpw": 3.5}, result, units, {ROUTER: QType.F32})


def test_a_saved_recipe_loads_equal(recipe, tmp_path):
    save_recipe(recipe, tmp_path / "r.json")
    assert load_recipe(tmp_path / "r.json") == recipe


@pytest.mark.parametrize("lacking", ["tensors", "units"])
def test_a_recipe_without_units_or_other_tensors_loads_equal(recipe, tmp_path, lacking):
    lean = replace(recipe, tensors={}) if lacking == "tensors" else replace(recipe, units=())
    save_recipe(lean, tmp_path / "r.json")
    assert load_recipe(tmp_path / "r.json") == lean


def test_a_recipe_file_is_plain_json_with_one_unit_a_line(recipe, tmp_path):
    save_recipe(recipe, tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(to_json(recipe)))
    for unit in recipe.units:
        (line,) = [line for line in text.splitlines() if unit.tensor in line]
        assert json.loads(line.strip().rstrip(","))["qtype"] == unit.qtype.name


@pytest.mark.parametrize("qtype", [QType.I32, QType.Q4_1, QType.IQ2_XXS, QType.F64], ids=lambda q: q.name)
def test_types_carried_over_from_the_source_survive_the_file(recipe, tmp_path, qtype):
    # Tensors that are not ours to choose keep their source type, whatever it is.
    carried = replace(recipe, tensors={**recipe.tensors, "some.table": qtype})
    save_recipe(carried, tmp_path / "r.json")
    assert load_recipe(tmp_path / "r.json") == carried


def test_bits_and_bytes_count_all_expert_weights(recipe):
    assert recipe.expert_bytes == sum(N_BYTES[q] for q in CHOICES.values())
    assert recipe.expert_bpw == pytest.approx((2.625 + 4.5 + 8.5) / 3)
    assert recipe.histogram() == {"Q2_K": 131072, "Q4_K": 131072, "Q8_0": 131072}
    assert recipe.types == {ROUTER: QType.F32, **{stack_name(proj): q for proj, q in CHOICES.items()}}


def test_a_fitting_recipe_is_accepted(recipe, source):
    check_recipe(recipe, source, "here")


def changed(recipe: Recipe, index: int, **changes) -> Recipe:
    units = list(recipe.units)
    units[index] = replace(units[index], **changes)
    return replace(recipe, units=tuple(units))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        pytest.param(lambda r: replace(r, source="0" * 64), "another model", id="other-source"),
        pytest.param(lambda r: replace(r, tensors={}), ROUTER, id="tensor-missing"),
        pytest.param(lambda r: replace(r, units=r.units[:2]), stack_name("down"), id="stack-missing"),
        pytest.param(lambda r: replace(r, tensors={**r.tensors, "zz": QType.F32}), "zz", id="tensor-unknown"),
        pytest.param(lambda r: replace(r, units=(*r.units, r.units[0])), stack_name("gate"), id="stack-twice"),
        pytest.param(lambda r: changed(r, 0, n_weights=1), "131072", id="weights"),
        pytest.param(lambda r: changed(r, 0, n_bytes=1), f"takes {512 * 84} bytes", id="bytes"),
        pytest.param(lambda r: changed(r, 0, qtype=QType.Q3_K), f"takes {512 * 110} bytes", id="qtype-edited"),
    ],
)
def test_a_recipe_that_does_not_fit_the_source_is_refused(recipe, source, change, cause):
    with pytest.raises(AlphaQError, match=f"^here: .*{re.escape(cause)}"):
        check_recipe(change(recipe), source, "here")


def test_a_type_whose_blocks_do_not_divide_the_rows_is_refused(tmp_path):
    narrow = write_source(tmp_path / "narrow.gguf", expert_tensors(n_ff=96, n_embd=64))
    units = tuple(RecipeUnit(s.name, s.bid, s.proj, s.n_weights, QType.Q4_K, 0) for s in narrow.stacks)
    recipe = Recipe("t", narrow.fingerprint, "testmoe", {}, {}, units, {ROUTER: QType.F32})
    with pytest.raises(AlphaQError, match=r"rows of (64|96), which Q4_K"):
        check_recipe(recipe, narrow, "here")


@pytest.fixture
def mixed(recipe: Recipe) -> Recipe:
    """As `recipe`, but with a type for each expert of the gate and of the up projection."""
    choices = {"gate": [QType.Q2_K, QType.Q4_K], "up": [QType.Q4_K, QType.Q4_K]}
    units = [
        RecipeUnit(stack_name(proj), 0, proj, 256 * 256, qtype, N_BYTES[qtype] // 2, xid, cost=0.1)
        for proj, qtypes in choices.items()
        for xid, qtype in enumerate(qtypes)
    ]
    return replace(recipe, units=(*units, recipe.units[2]), granularity="expert")


def test_types_are_told_by_expert_and_in_the_order_of_the_source(recipe, mixed, source):
    assert list(matrix_types(mixed, source)) == list(source.tensors)
    assert matrix_types(mixed, source) == {
        stack_name("gate"): [QType.Q2_K, QType.Q4_K],
        stack_name("up"): [QType.Q4_K] * 2,
        stack_name("down"): [QType.Q8_0] * 2,
        ROUTER: [QType.F32],
    }
    assert matrix_types(recipe, source) == {
        **{stack_name(proj): [qtype] * 2 for proj, qtype in CHOICES.items()},
        ROUTER: [QType.F32],
    }
    check_recipe(mixed, source, "here")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        pytest.param(lambda r: replace(r, units=r.units[1:]), f"{stack_name('gate')} expert 0", id="missing"),
        pytest.param(lambda r: replace(r, units=(*r.units, r.units[1])), f"{stack_name('gate')} expert 1", id="twice"),
        pytest.param(lambda r: changed(r, 1, expert=2), f"{stack_name('gate')} expert 1", id="too-far"),
        pytest.param(lambda r: changed(r, 1, expert=None), f"{stack_name('gate')} expert 0", id="expert-and-stack"),
        pytest.param(lambda r: changed(r, 4, expert=0), f"{stack_name('down')} expert 1", id="half-a-stack"),
        pytest.param(lambda r: changed(r, 0, tensor=ROUTER), "exactly, each once", id="expert-of-the-router"),
        pytest.param(lambda r: changed(r, 0, n_weights=2 * 256 * 256), "expert 0 has 65536 weights", id="weights"),
        pytest.param(lambda r: changed(r, 1, n_bytes=1), f"expert 1 as Q4_K takes {256 * 144} bytes", id="bytes"),
    ],
)
def test_experts_that_do_not_fit_the_source_are_refused(mixed, source, change, cause):
    with pytest.raises(AlphaQError, match=f"^here: .*{re.escape(cause)}"):
        check_recipe(change(mixed), source, "here")


def test_experts_survive_the_file_and_are_told_by_type_in_a_gguf(mixed, tmp_path):
    save_recipe(mixed, tmp_path / "r.json")
    assert load_recipe(tmp_path / "r.json") == mixed
    units = {unit["tensor"]: unit for unit in embedded_json(mixed)["units"]}
    assert {name: unit.get("experts") for name, unit in units.items()} == {
        stack_name("gate"): {"Q2_K": [0], "Q4_K": [1]},
        stack_name("up"): {"Q4_K": [0, 1]},
        stack_name("down"): None,
    }
    assert units[stack_name("gate")]["n_bytes"] == 256 * (84 + 144)
    assert units[stack_name("down")]["qtype"] == "Q8_0"


def edit(recipe: Recipe, **changes) -> dict:
    return {**json.loads(json.dumps(to_json(recipe))), **changes}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"format": "other"}, "not a recipe"),
        ({"schema": 2}, "schema 2"),
        ({"granularity": "matrix"}, "granularity 'matrix'"),
        ({"units": [{"tensor": "a"}]}, "damaged recipe"),
        ({"units": [{"qtype": "Q4_K", "surprise": 1}]}, "damaged recipe"),
        ({"units": 5}, "damaged recipe"),
        (
            {
                "units": [
                    {
                        "tensor": "a",
                        "layer": 0,
                        "proj": "up",
                        "n_weights": 1,
                        "qtype": "Q4_K",
                        "n_bytes": 1,
                        "expert": "1",
                    }
                ]
            },
            "expert that is no number",
        ),
        ({"tensors": {ROUTER: "Q9_X"}}, "Q9_X"),
        ({"tensors": [ROUTER]}, "damaged recipe"),
    ],
)
def test_a_damaged_recipe_is_refused_with_its_cause(recipe, change, cause):
    with pytest.raises(AlphaQError, match=f"^where: .*{re.escape(cause)}"):
        from_json(edit(recipe, **change), "where")


@pytest.mark.parametrize("key", ["tool", "source", "architecture", "settings", "result", "units", "tensors"])
def test_a_recipe_lacking_a_key_is_refused(recipe, key):
    data = edit(recipe)
    del data[key]
    with pytest.raises(AlphaQError, match=f"damaged recipe: '{key}'"):
        from_json(data, "where")


@pytest.mark.parametrize("data", [None, [], "text", 3, {}])
def test_json_that_is_no_recipe_is_refused(data):
    with pytest.raises(AlphaQError, match="where: not a recipe"):
        from_json(data, "where")


def leaves(data, at=()):
    """Paths to every value of a JSON document."""
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in pairs:
        yield (*at, key)
        yield from leaves(value, (*at, key))


@given(data=st.data())
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_edit_gives_a_recipe_or_a_named_error(recipe, source, data):
    document = copy.deepcopy(edit(recipe))
    path = data.draw(st.sampled_from(sorted(leaves(document), key=str)))
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = data.draw(st.sampled_from([None, -1, 2.5, True, "x", [], ["x"], {}, {"x": 1}]))
    try:
        found = from_json(document, "where")
        check_recipe(found, source, "where")
    except AlphaQError as error:
        assert error.message.startswith("where")
        return
    assert found.expert_bpw == pytest.approx(recipe.expert_bpw)
    assert isinstance(found.settings, dict)
    assert isinstance(found.result, dict)


@pytest.mark.parametrize(
    ("content", "cause"), [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[]", "not a recipe")]
)
def test_an_unreadable_recipe_file_is_refused_by_name(tmp_path, content, cause):
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(AlphaQError, match=rf"r\.json: {cause}"):
        load_recipe(tmp_path / "r.json")


def test_a_missing_recipe_file_is_refused_by_name(tmp_path: Path):
    with pytest.raises(AlphaQError, match=r"none\.json: cannot be read"):
        load_recipe(tmp_path / "none.json")


def test_tensor_type_lines_name_each_quantised_tensor_exactly_once(recipe):
    lines = [line.rpartition("=") for line in tensor_type_lines(recipe).splitlines()]
    names = [*recipe.types, "xblk.0.ffn_gate_exps.weight", "blk.0.ffn_gate_expsXweight"]
    found = {name: [kind for pattern, _, kind in lines if re.search(pattern, name)] for name in names}
    assert found == {
        stack_name("gate"): ["q2_k"],
        stack_name("up"): ["q4_k"],
        stack_name("down"): ["q8_0"],
        ROUTER: [],
        "xblk.0.ffn_gate_exps.weight": [],
        "blk.0.ffn_gate_expsXweight": [],
    }
