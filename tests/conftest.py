"""Hypothesis profiles, and what holds in all tests.

``KVTIER_HYPOTHESIS_PROFILE`` chooses: ``ci`` (default; the same examples each time) or ``nightly``.
"""

from __future__ import annotations

import os

from hypothesis import settings

from kvtier.stats import Stats

settings.register_profile("ci", derandomize=True, max_examples=60, deadline=None, print_blob=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("KVTIER_HYPOTHESIS_PROFILE", "ci"))

_add = Stats.add


def _add_what_came(self: Stats, name: str, amount: int = 1) -> None:
    assert amount >= 0, f"{name} would shrink by {-amount}: what exports counters refuses that, in the engine's step"
    _add(self, name, amount)


Stats.add = _add_what_came  # type: ignore[method-assign]
