"""The registry of strategies on the command line: listing, other packages' strategies, comparing all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.stats import spearmanr
from unit.small_sources import expert_tensors, write_gguf

from alphaq_gguf.checkpoint import open_source
from alphaq_gguf.qtypes import QType, bpw
from alphaq_gguf.routing import read_routers, simulate
from alphaq_gguf.strategies import STRATEGIES
from alphaq_gguf.strategies.router_norm import order_by_norm, promote

PLUGIN = """
import numpy as np
from alphaq_gguf.strategies import Allocation

class Smallest:
    name = "smallest"
    needs = frozenset()
    summary = "the smallest type for everybody"
    source = "a test"
    def allocate(self, problem):
        return Allocation(np.where(problem.allowed, problem.size, 2**62).argmin(axis=1), method="smallest")

class Nosy(Smallest):
    name = "nosy"
    needs = frozenset({"your mail"})

class Uniform(Smallest):
    name = "uniform"
"""
POINTS = """[alphaq_gguf.strategies]
good = plugin:Smallest
nosy = plugin:Nosy
thief = plugin:Uniform
gone = plugin:Missing
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A process that sees a package with strategies of its own, one good and three bad."""
    package = tmp_path / "site"
    (package / "plugin-1.0.dist-info").mkdir(parents=True)
    (package / "plugin.py").write_text(PLUGIN, encoding="utf-8")
    (package / "plugin-1.0.dist-info" / "entry_points.txt").write_text(POINTS, encoding="utf-8")
    (package / "plugin-1.0.dist-info" / "METADATA").write_text("Name: plugin\nVersion: 1.0\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(package)}


def run(environment: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alphaq_gguf", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_every_strategy_is_listed_with_what_it_needs(cli) -> None:
    code, out, _ = cli("strategies", "--json")
    assert code == 0
    listed = {entry["name"]: entry for entry in json.loads(out)["strategies"]}
    assert listed.keys() == STRATEGIES.keys()
    assert listed["alphaq"]["needs"] == ["alphas", "distortions"]
    assert "2606.04980" in listed["alphaq"]["source"]
    code, out, _ = cli("strategies")
    assert code == 0
    assert all(strategy.summary in out for strategy in STRATEGIES.values())


def test_other_packages_add_strategies_and_bad_ones_do_no_harm(environment, trained: Path, tmp_path: Path) -> None:
    listed = run(environment, "strategies", "--json")
    assert listed.returncode == 0, listed.stderr
    answer = json.loads(listed.stdout)
    assert {entry["name"] for entry in answer["strategies"]} == {*STRATEGIES, "smallest"}
    assert answer["broken"].keys() == {"nosy", "thief", "gone"}
    assert "your mail" in answer["broken"]["nosy"]
    assert "'uniform' is taken" in answer["broken"]["thief"]
    recipe = tmp_path / "recipe.json"
    done = run(environment, "allocate", trained, "--bpw", 5, "--strategy", "smallest", "-o", recipe)
    assert done.returncode == 0, done.stderr
    assert {unit["qtype"] for unit in json.loads(recipe.read_text())["units"]} == {"Q2_K"}
    warned = run(environment, "strategies")
    assert "'gone' of another package cannot be used" in warned.stderr


@pytest.mark.parametrize("granularity", ["stack", "expert"])
def test_all_strategies_at_one_budget(granularity: str, trained: Path, cli) -> None:
    common = ("allocate", trained, "--bpw", 3.3, "--granularity", granularity)
    code, out, err = cli(*common, "--strategy", "all", "--json")
    assert code == 0, err
    answer = json.loads(out)
    results = {result["strategy"]: result for result in answer["strategies"]}
    assert results.keys() == STRATEGIES.keys()
    bits = {}
    for name in ("mse", "alphaq", "random"):
        code, out, _ = cli(*common, "--strategy", name, "--json")
        assert code == 0
        recipe = json.loads(out)
        assert results[name]["expert_bytes"] == recipe["result"]["expert_bytes"]
        assert results[name]["expert_bpw"] <= 3.3
        bits[name] = [bpw(QType[unit["qtype"]]) for unit in recipe["units"]]
        if name == "mse":
            assert results[name]["squared_error"] == pytest.approx(recipe["result"]["cost"])
    assert results["mse"]["squared_error"] == min(r["squared_error"] for r in results.values() if r["types"])
    correlations = {tuple(entry["strategies"]): entry["spearman"] for entry in answer["rank_correlations"]}
    assert correlations["mse", "alphaq"] == pytest.approx(spearmanr(bits["mse"], bits["alphaq"]).statistic)
    assert correlations["alphaq", "alphaq"] == pytest.approx(1)
    assert correlations["uniform", "mse"] is None


def test_all_saves_no_recipe_and_converts_nothing(trained: Path, tmp_path: Path, cli) -> None:
    for arguments in (
        ("allocate", trained, "--bpw", 4, "--strategy", "all", "-o", tmp_path / "recipe.json"),
        ("convert", trained, "--bpw", 4, "--strategy", "all", "-o", tmp_path / "out.gguf"),
    ):
        code, _, err = cli(*arguments)
        assert code == 2
        assert "--strategy all compares" in err
    assert list(tmp_path.iterdir()) == []


def test_simulated_routing_weighs_errors_by_the_use_of_experts(trained: Path, cli) -> None:
    common = ("allocate", trained, "--bpw", 3.3, "--granularity", "expert", "--json")
    code, out, err = cli(*common, "--strategy", "sim-routing")
    assert code == 0, err
    assert "Simulating routing" in err
    recipe = json.loads(out)
    source = open_source(trained)
    for bid, router in read_routers(source).items():
        shares = simulate(router, seed=bid).count
        found = {u["expert"]: u["sensitivity"] for u in recipe["units"] if (u["layer"], u["proj"]) == (bid, "up")}
        assert [found[xid] for xid in range(8)] == pytest.approx(list(shares))
    # The same as plain error times the mass, and not the same as without.
    same, other = (
        json.loads(cli(*common, "--strategy", "mse", *mass)[1]) for mass in (["--routing-mass", "count"], [])
    )
    types = [[unit["qtype"] for unit in found["units"]] for found in (recipe, same, other)]
    assert types[0] == types[1] != types[2]
    code, out, _ = cli(*common, "--strategy", "alphaq", "--routing-mass", "gate2")
    assert code == 0
    assert json.loads(out)["settings"]["routing_mass"] == "gate2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "uniform", "--routing-mass", "count"], "uniform weighs no encoding errors"),
        (["--strategy", "sim-routing", "--routing-mass", "none"], "use --strategy mse"),
        (["--strategy", "mse", "--routing-mass", "often"], "--routing-mass"),
    ],
)
def test_routing_masses_that_make_no_sense(arguments: list[str], message: str, trained: Path, cli) -> None:
    code, _, err = cli("allocate", trained, "--bpw", 4, *arguments)
    assert code == 2
    assert message in err


def test_a_model_without_routers_is_named(tmp_path: Path, cli) -> None:
    tensors = {name: t for name, t in expert_tensors().items() if "gate_inp" not in name}
    path = write_gguf(tmp_path / "model.gguf", tensors)
    code, _, err = cli("allocate", path, "--bpw", 4, "--strategy", "sim-routing")
    assert code == 1
    assert "ffn_gate_inp" in err


def test_router_norms_and_row_variances_reach_their_strategy(trained: Path, tmp_path: Path, cli) -> None:
    common = (
        "allocate",
        trained,
        "--bpw",
        3.3,
        "--strategy",
        "router-norm",
        "--granularity",
        "expert-shared",
        "--json",
    )
    code, out, err = cli(*common)
    assert code == 0, err
    units = json.loads(out)["units"]
    source = open_source(trained)
    routers = read_routers(source)
    for bid in (0, 1):
        norms = [float(np.linalg.norm(row)) for row in routers[bid].weights.astype(np.float64)]
        gates = [m for s in source.stacks if (s.bid, s.proj) == (bid, "gate") for m in s.matrices]
        variances = [float(source.read_matrix(m).astype(np.float64).var(axis=1).max()) for m in gates]
        order = promote(order_by_norm(norms), variances)
        bits = {u["expert"]: bpw(QType[u["qtype"]]) for u in units if (u["layer"], u["proj"]) == (bid, "gate")}
        given = [bits[xid] for xid in order]
        assert given == sorted(given, reverse=True)
        assert len(set(given)) > 1
    # With the routers before training, only the growth of the norms counts.
    initial = tmp_path / "initial.safetensors"
    tensors = {f"blk.{bid}.ffn_gate_inp.weight": router.weights * 0.5 for bid, router in routers.items()}
    tensors["blk.0.ffn_gate_inp.weight"][order_by_norm(list(np.linalg.norm(routers[0].weights, axis=1)))[-1]] *= 1.99
    save_file(tensors, initial)
    code, out, err = cli(*common, "--initial-router", initial)
    assert code == 0, err
    assert json.loads(out)["units"] != units
    assert json.loads(out)["settings"]["initial_router"] == "initial.safetensors"


def test_router_norm_in_the_wrong_place(trained: Path, tmp_path: Path, cli) -> None:
    code, _, err = cli("allocate", trained, "--bpw", 4, "--strategy", "router-norm")
    assert code == 2
    assert "--granularity expert" in err
    lacking = tmp_path / "lacking.safetensors"
    save_file({"blk.0.ffn_gate_inp.weight": np.zeros((3, 3), np.float32)}, lacking)
    common = ("allocate", trained, "--bpw", 4, "--granularity", "expert", "--initial-router", lacking)
    code, _, err = cli(*common, "--strategy", "router-norm")
    assert code == 1
    assert "has shape [3, 3], the model's router [8, 256]" in err
    code, _, err = cli(*common, "--strategy", "mse")
    assert code == 2
    assert "mse looks at no router norms" in err
    lacking.write_bytes(b"nonsense")
    code, _, err = cli(*common, "--strategy", "router-norm")
    assert code == 1
    assert "corrupt safetensors" in err
