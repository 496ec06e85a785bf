"""What a running matrix product loses while copies go on beside it."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from kvtier.bench.report import Record
from kvtier.copy.cuda_runtime import DeviceEvent

TARGET_RATIO = 1.02
LOADS_AHEAD = 2
"""under way at any time, so that the bus is never idle while the product runs"""


class Loads(Protocol):
    """What keeps the bus busy."""

    @property
    def bytes_of_a_load(self) -> int:
        """That ``load_once`` copies."""

    def load_once(self) -> DeviceEvent:
        """Starts one load."""


def beside_a_matrix_product(bench: Loads, device: int, *, size: int = 8192, products: int = 40, rounds: int = 7) -> Iterator[Record]:
    """The product's time beside loads, of that alone, and the loads' rate meanwhile. Only where torch is installed with CUDA."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch  # noqa: PLC0415 - only here, and only where it is

    if not torch.cuda.is_available():
        return
    with torch.cuda.device(device):
        left, right = (torch.randn((size, size), device="cuda", dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(left)

        def multiply() -> tuple[Any, Any]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(products):
                torch.mm(left, right, out=out)
            end.record()
            return start, end

        yield from figures(bench, multiply, {"size": size, "dtype": "bf16", "products": products}, rounds=rounds)


def figures(bench: Loads, multiply: Callable[[], tuple[Any, Any]], params: dict[str, object], *, rounds: int) -> Iterator[Record]:
    """Runs the product alone and beside loads by turns, the first round not counted.

    Args:
        multiply: submits the product; returns the events of its start and end
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    rates = []
    for number in range(rounds + 1):
        for is_loading in (False, True):
            elapsed_s, num_loads = _once(bench, multiply, is_loading=is_loading)
            if number:
                seconds[is_loading].append(elapsed_s)
                if is_loading:
                    rates.append(num_loads * bench.bytes_of_a_load / elapsed_s / 1e9)
    ratios = [beside / alone for beside, alone in zip(seconds[True], seconds[False], strict=True)]
    value = statistics.median(ratios)
    more = {**params, "target_ratio": TARGET_RATIO}
    yield Record("matrix product beside a load", more, value, "ratio", max(ratios) - min(ratios), TARGET_RATIO, value / TARGET_RATIO)
    yield Record("load beside a matrix product", params, statistics.median(rates), "GB/s", max(rates) - min(rates))


def _once(bench: Loads, multiply: Callable[[], tuple[Any, Any]], *, is_loading: bool) -> tuple[float, int]:
    """Seconds of the product, and how many loads ended while it ran."""
    running = [bench.load_once() for _ in range(LOADS_AHEAD)] if is_loading else []
    start, end = multiply()
    num_loads = 0
    while is_loading and not end.query():
        if running[0].done():
            num_loads += 1
            running = [*running[1:], bench.load_once()]
    end.synchronize()
    for event in running:
        event.wait()
    return float(start.elapsed_time(end)) / 1e3, num_loads
