"""Routing of text that the model writes itself: an expert's error counts as much as tokens are routed to it."""

from __future__ import annotations

from .sim_routing import SimRouting


class SelfUsage(SimRouting):
    """Simulated routing's cost table; the masses of the problem come from text instead of random vectors."""

    name = "self"
    needs = frozenset({"self_usage", "distortions"})
    summary = "encoding error weighted by how often text that the model writes reaches the expert"
