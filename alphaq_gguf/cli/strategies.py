"""`alphaq-gguf strategies`: the ways to spend a budget, and what each needs."""

from __future__ import annotations

from typing import Annotated

import typer

from ..console import Console
from ..strategies import BROKEN, STRATEGIES
from ..strategies.base import NEEDS

NAME = "strategies"


def command(
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """List the allocation strategies, what each needs of a model, and where it comes from."""
    console = Console(as_json=json)
    console.table(
        "Strategies",
        ["name", "needs", "source"],
        [[s.name, ", ".join(sorted(s.needs)) or "nothing", s.source] for s in STRATEGIES.values()],
    )
    for strategy in STRATEGIES.values():
        console.result(f"{strategy.name}: {strategy.summary}")
    for need, meaning in NEEDS.items():
        console.result(f"{need}: from {meaning}")
    for name, reason in BROKEN.items():
        console.warn(f"the strategy {name!r} of another package cannot be used: {reason}")
    console.json(
        {
            "strategies": [
                {"name": s.name, "needs": sorted(s.needs), "source": s.source, "summary": s.summary}
                for s in STRATEGIES.values()
            ],
            "broken": BROKEN,
        }
    )
