"""The table of pins against a dict, however many of them end early."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtier.control.pins import Pin, PinTable

steps = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.none() | st.integers(0, 50)),
        st.tuples(st.just("pop"), st.integers(0, 200)),
        st.tuples(st.just("expire"), st.integers(0, 50)),
    ),
    max_size=400,
)


@given(steps=steps)
def test_pins_end_once(steps: list[tuple[str, int | None]]) -> None:
    """By ``pop`` or by their deadline, whichever comes first."""
    table, alive = PinTable(), dict[int, Pin]()
    for what, number in steps:
        if what == "add":
            pin = Pin((), None if number is None else float(number), 1)
            alive[table.add(pin)] = pin
        elif what == "pop":
            assert number is not None
            assert table.pop(number) is alive.pop(number, None)
        else:
            assert number is not None
            over = {name for name, pin in alive.items() if pin.deadline is not None and pin.deadline <= number}
            assert sorted(id(alive.pop(name)) for name in over) == sorted(map(id, table.expired(number)))
        assert len(alive) == len(table) == table.num_reserved


def test_deadlines_of_pins_that_have_ended_are_forgotten() -> None:
    """A program that pins for a year and unpins a moment later, again and again, takes no memory."""
    table = PinTable()
    kept = [table.add(Pin((), 10.0)) for _ in range(100)]
    for _ in range(10_000):
        table.pop(table.add(Pin((), 1e8)))
    assert len(table._deadlines) < 400
    assert 100 == len(table.expired(10.0))
    assert all(table.pop(pin_id) is None for pin_id in kept)
