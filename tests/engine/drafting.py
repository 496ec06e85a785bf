"""What a worker of the rig knows beyond the scheduler: tokens that were sampled and not heard of, and drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm.config import SpeculativeConfig, VllmConfig
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

ANSWER = 7
"""the token that is sampled"""
WRONG_ANSWER = 9
"""the one that is sampled from wrong KV"""
REJECTED = 8
"""a draft that the model does not sample"""
DRAFT_LAYERS = ("draft_model.model.layers.0.self_attn.attn", "draft_model.model.layers.1.self_attn.attn")


@dataclass(frozen=True)
class Drafter:
    """Speculative decoding: how many tokens are drafted, and which, one after the other.

    ``method``: one of vLLM's names; those that keep KV of their own have ``DRAFT_LAYERS``.
    """

    num_tokens: int
    accepts: Callable[[], bool]
    method: str = "ngram"

    @property
    def layers(self) -> tuple[str, ...]:
        """Those with KV of its own."""
        return () if self.method == "ngram" else DRAFT_LAYERS

    @property
    def num_heads(self) -> int:
        """Of such a layer; the model's have three."""
        return 2 if self.method == "draft_model" else 3

    def configure(self, config: VllmConfig) -> None:
        """As the engine would have it with this drafter."""
        config.speculative_config = SpeculativeConfig(
            method="ngram",
            num_speculative_tokens=self.num_tokens,
            prompt_lookup_max=2,
            target_model_config=config.model_config,
            target_parallel_config=config.parallel_config,
        )
        config.speculative_config.method = self.method

    def drafts(self) -> list[int]:
        """The next ones, for one request."""
        return [ANSWER if self.accepts() else REJECTED for _ in range(self.num_tokens)]


@dataclass(frozen=True)
class Part:
    """What a step computes of one request: ``tokens`` from ``first`` on. Behind the first ``num_known`` of them they are drafts."""

    first: int
    tokens: list[int]
    num_known: int

    def sampled(self, *, is_wrong: bool) -> list[int]:
        """The accepted drafts and one token more, where the step reaches the end of what is known."""
        if len(self.tokens) < self.num_known:
            return []
        if is_wrong:
            return [WRONG_ANSWER]
        drafts = self.tokens[self.num_known :]
        num_accepted = next((place for place, token in enumerate(drafts) if token != ANSWER), len(drafts))
        return [ANSWER] * (num_accepted + 1)


class Sequences:
    """The tokens of all requests as a model runner has them. ``unheard``: steps that were run, and that the scheduler has not heard of."""

    def __init__(self, unheard: Sequence[tuple[SchedulerOutput, ModelRunnerOutput]], drafter: Drafter | None) -> None:
        self._unheard = unheard
        self._drafter = drafter
        self._drafts: dict[str, list[int]] = {}

    def part_of(self, request: Any, output: SchedulerOutput) -> Part:
        """What a step that was just scheduled computes of a request.

        With asynchronous scheduling the scheduler takes drafts for accepted that are not, and names no drafts: the runner knows better.
        """
        name = request.request_id
        num_tokens = output.num_scheduled_tokens[name]
        known = list(request.all_token_ids)
        first = request.num_computed_tokens - num_tokens
        for before, made in self._unheard:
            if name not in before.num_scheduled_tokens or request.num_stale_output_tokens:
                continue
            sampled = made.sampled_token_ids[made.req_id_to_index[name]]
            known += sampled
            if sampled:
                first -= len(before.scheduled_spec_decode_tokens.get(name, ())) - (len(sampled) - 1)
        asked = output.scheduled_spec_decode_tokens.get(name, [])
        drafted = self._drafts.get(name, []) if any(token == -1 for token in asked) else asked
        drafts = [*drafted, *[-1] * len(asked)][: len(asked)]
        return Part(first, [*known, *drafts][: first + num_tokens], len(known))

    def draft(self, names: Sequence[str]) -> DraftTokenIds | None:
        """What the drafter says of the requests of a step, each of which has one more token."""
        if self._drafter is None:
            return None
        self._drafts = {name: self._drafter.drafts() for name in names}
        return DraftTokenIds(list(names), [list(self._drafts[name]) for name in names])
