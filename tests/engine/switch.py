"""Copies to the engine that fail when a test says so."""

from __future__ import annotations

from typing import Any

import pytest

from kvtier.copy.cpu import NativeCopier


class Switch:
    """Makes copies to the engine fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.is_broken = False
        scatter = NativeCopier.scatter

        def may_fail(copier: NativeCopier, *arguments: Any) -> Any:
            if self.is_broken:
                raise RuntimeError("injected: this copy fails")
            return scatter(copier, *arguments)

        patch.setattr(NativeCopier, "scatter", may_fail)
