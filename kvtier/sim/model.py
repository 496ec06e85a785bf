"""The machine that a simulation assumes: a model with a handful of numbers, not a measurement.

The defaults stand for Llama-3.1-8B in bf16 on one GPU of the H100 class: 128 KiB of KV a token; 16 GFLOP a token at 40 % of 989 TFLOP/s
make 25,000 tokens/s of prefill; attention doubles the cost of a token at a context of 30,000; a PCIe 5.0 x16 link; one NVMe drive.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """Speeds and sizes. Rates are in units per second. Raises ValueError where one is not above 0."""

    kv_bytes_per_token: int = 131_072
    prefill_tokens_per_s: float = 25_000.0
    """at the beginning of a prompt"""
    double_cost_context: float = 30_000.0
    """tokens of context at which another token costs twice as much to prefill as the first"""
    overhead_s: float = 0.02
    """what every request takes before its first token besides: tokenizing, scheduling, sampling, answering"""
    host_bytes_per_s: float = 50e9
    """host memory to the GPU"""
    disk_read_bytes_per_s: float = 6e9
    disk_write_bytes_per_s: float = 3e9
    disk_latency_s: float = 0.0005
    """of one transfer"""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not (value > 0 or (value == 0 and name in ("overhead_s", "disk_latency_s"))):
                raise ValueError(f"{name} is {value}; allowed: more than 0")

    def prefill_s(self, start: int, end: int) -> float:
        """Seconds to compute the tokens from ``start`` to before ``end`` of a prompt."""
        return (end - start) / self.prefill_tokens_per_s * (1 + (start + end) / (2 * self.double_cost_context))

    def load_s(self, num_tokens: int) -> float:
        """Seconds to copy the KV of tokens from host memory to the GPU."""
        return num_tokens * self.kv_bytes_per_token / self.host_bytes_per_s
