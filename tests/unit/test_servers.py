"""Servers that tests start."""

from __future__ import annotations

from typing import Any, Self

import pytest

from kvtier.testing import servers


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may name the same free port again until somebody listens there."""
    named = iter([70_001, 70_001, 70_002, 70_001, 70_003])

    class Listener:
        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def bind(self, place: Any) -> None:
            assert place == ("127.0.0.1", 0)

        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", next(named)

    monkeypatch.setattr("kvtier.testing.servers.socket.socket", Listener)
    assert [70_001, 70_002, 70_003] == [servers.free_port() for _ in range(3)]
