"""The requests and steps of the fake engine, and what can be wrong with a run."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from kvtier.connectors.messages import RequestOptions, WorkerReport
from kvtier.testing.fake_kv import next_token, token_states

VOCABULARY = 97


class WrongKVError(AssertionError):
    """A forward pass has read KV that is not that of its tokens, and nobody has reported a failed load."""


class HangError(AssertionError):
    """Requests did not finish within the allowed number of steps."""


class Status(enum.Enum):
    """Where a request is in its life, by vLLM's names."""

    WAITING = "waiting"
    WAITING_FOR_REMOTE_KVS = "waiting for remote KVs"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class FakeRequest:
    """A request. ``tokens`` is the live list that the connector reads."""

    request_id: str
    tokens: list[int]
    num_prompt_tokens: int
    max_new_tokens: int
    adapter: bytes
    options: RequestOptions
    weights: int | None
    """of the model that generated its tokens; None where they changed meanwhile"""
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    block_ids: list[int] = field(default_factory=list)
    is_received: bool = False
    num_loaded_tokens: int = 0
    """tokens that the connector was trusted with, in all"""
    num_forward_tokens: int = 0
    """tokens that were computed, in all"""

    def seed(self, weights: int) -> int:
        """Where the states of its tokens start."""
        return weights * 1009 + int.from_bytes(self.adapter, "little")

    def computed(self, num_tokens: int) -> None:
        """The engine computed its next tokens."""
        self.num_computed_tokens += num_tokens
        self.num_forward_tokens += num_tokens

    @property
    def output(self) -> list[int]:
        """What it has generated."""
        return self.tokens[self.num_prompt_tokens :]

    def expected_output(self) -> list[int]:
        """What it must generate, from nothing but its prompt."""
        seed = self.seed(self.weights or 0)
        tokens = self.tokens[: self.num_prompt_tokens]
        states = token_states(tokens, seed)
        while len(tokens) < self.num_prompt_tokens + self.max_new_tokens:
            tokens.append(next_token(states[-1], VOCABULARY))
            states = token_states(tokens, seed, states)
        return tokens[self.num_prompt_tokens :]


@dataclass(slots=True)
class FakeStep:
    """What the fake scheduler wants of one step."""

    scheduled: dict[str, int] = field(default_factory=dict)
    preempted: list[str] = field(default_factory=list)
    has_sync_loads: bool = False


@dataclass(slots=True)
class FakeOutput:
    """What the workers say after one step, merged over the ranks."""

    contaminated: set[str] = field(default_factory=set)
    failed_block_ids: set[int] = field(default_factory=set)
    report: WorkerReport = field(default_factory=WorkerReport)
    sent: list[str] = field(default_factory=list)
    received: list[str] = field(default_factory=list)
