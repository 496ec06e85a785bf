"""How long the policies take: measured on a sample of the requests, because a clock costs as much as a policy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey

STRIDE = 17
"""one request in so many is timed; prime, so that it does not beat with what a policy does every 2^n requests"""
_METHODS = ("insert", "put_back", "touch", "expect", "remove", "pin", "unpin", "victims", "index_of", "expired")


class PolicyTimes:
    """Sums the time spent in the policies that it has wrapped."""

    def __init__(self) -> None:
        self._sampled_s = 0.0
        self._num_requests = 0
        self._num_sampled = 0
        self._wrapped: list[_TimedPolicy] = []

    def wrap(self, policy: EvictionPolicy) -> EvictionPolicy:
        """The same policy, with a clock."""
        wrapped = _TimedPolicy(policy, self)
        self._wrapped.append(wrapped)
        return wrapped

    def next_request(self) -> None:
        """What follows belongs to the next request."""
        is_on, was_on = self._num_requests % STRIDE == STRIDE - 1, self._num_requests % STRIDE == 0 and self._num_requests > 0
        self._num_requests += 1
        self._num_sampled += is_on
        if is_on or was_on:
            for wrapped in self._wrapped:
                wrapped.switch(is_on=is_on)

    def add(self, seconds: float) -> None:
        """Time spent in a policy."""
        self._sampled_s += seconds

    @property
    def total_s(self) -> float:
        """The estimate for all requests."""
        return self._sampled_s / self._num_sampled * self._num_requests if self._num_sampled else 0.0


class _TimedPolicy:
    """Forwards to a policy. With the clock off its methods are the policy's own, so that forwarding costs nothing."""

    insert: Callable[..., None]
    put_back: Callable[..., None]
    touch: Callable[..., None]
    expect: Callable[..., None]
    remove: Callable[..., None]
    pin: Callable[..., None]
    unpin: Callable[..., None]
    victims: Callable[..., list[BlockKey]]
    index_of: Callable[..., float | None]
    expired: Callable[..., list[BlockKey]]

    def __init__(self, policy: EvictionPolicy, times: PolicyTimes) -> None:
        self._policy = policy
        self._times = times
        self.switch(is_on=False)

    def switch(self, *, is_on: bool) -> None:
        for name in _METHODS:
            method = getattr(self._policy, name)
            setattr(self, name, self._timed(method) if is_on else method)

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        add, clock = self._times.add, time.perf_counter

        def timed(*arguments: Any) -> Any:
            start = clock()
            result = method(*arguments)
            add(clock() - start)
            return result

        return timed

    @property
    def num_declined(self) -> int:
        return self._policy.num_declined

    def __len__(self) -> int:
        return len(self._policy)

    def __contains__(self, key: object) -> bool:
        return key in self._policy
