"""A small paged engine without a model, which drives both halves of a connector by vLLM's rules.

Waiting and running queues, chunked prefill under a token budget, decoding, preemption when blocks run out, synchronous and
asynchronous loads, holds for asynchronous stores, recomputation of failed loads, aborts, a prefix cache of its own: in the call
order seen in vLLM 0.32.  Every forward pass checks every byte of KV that it reads.

It is stricter than vLLM in one point: blocks that failed to load leave its prefix cache at once.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Sequence

from kvtier.connectors.messages import RequestOptions, ScheduledRequest, StepMessage
from kvtier.connectors.requests import RequestIdentity
from kvtier.connectors.scheduler import SchedulerHalf
from kvtier.connectors.worker import WorkerHalf
from kvtier.testing.fake_blocks import BlockPool
from kvtier.testing.fake_kv import ALL_LAYERS, FakeKVMemory, next_token, token_states
from kvtier.testing.fake_requests import VOCABULARY, FakeOutput, FakeRequest, FakeStep, HangError, Status, WrongKVError

__all__ = ["FakeEngine", "FakeRequest", "HangError", "Status", "WrongKVError"]


class FakeEngine:
    """The engine. ``step`` until ``requests`` is empty, or ``run``.

    Args:
        half: the scheduler half of the connector
        workers: the worker halves, one a rank, each with a copier on ``memory``
        memory: the KV memory of all ranks
        token_budget: tokens computed in one step at most
        max_running: requests that run at the same time at most
        prefix_caching: the engine keeps and finds blocks by itself
        recompute: what becomes of requests whose load failed: computed anew, or ended
    """

    def __init__(
        self,
        half: SchedulerHalf,
        workers: Sequence[WorkerHalf],
        memory: FakeKVMemory,
        *,
        token_budget: int = 64,
        max_running: int = 8,
        prefix_caching: bool = False,
        recompute: bool = True,
    ) -> None:
        self.half = half
        self.workers = workers
        self.memory = memory
        self.pool = BlockPool(memory.num_blocks)
        self.requests: dict[str, FakeRequest] = {}
        self.finished: dict[str, FakeRequest] = {}
        self.num_steps = 0
        self.num_preemptions = 0
        self.num_asked_again = 0
        self.weights = 1
        self.by_layer = False
        """waits for sync loads layer by layer"""
        self.tamper: Callable[[StepMessage], None] = lambda _message: None
        """called between the decisions and the copies of a step, for tests that pull away slots"""
        self._token_budget = token_budget
        self._max_running = max_running
        self._prefix_caching = prefix_caching
        self._recompute = recompute
        self._block_tokens = memory.block_tokens
        self._waiting: deque[FakeRequest] = deque()
        self._running: list[FakeRequest] = []
        self._preempted: list[str] = []
        self._num_reports: dict[tuple[str, str], int] = {}
        self._states: dict[str, list[int]] = {}

    # ---- from outside -------------------------------------------------------------------------------------------

    def submit(
        self,
        request_id: str,
        prompt: Sequence[int],
        max_new_tokens: int = 1,
        *,
        adapter: bytes = b"",
        options: RequestOptions | None = None,
    ) -> FakeRequest:
        """Queues a request. Raises ValueError where it could never run."""
        if self._num_blocks(len(prompt) + max_new_tokens) > self.pool.num_free + self._num_used() or not prompt:
            raise ValueError(f"{len(prompt)} + {max_new_tokens} tokens do not fit the engine")
        request = FakeRequest(request_id, list(prompt), len(prompt), max_new_tokens, adapter, options or RequestOptions(), self.weights)
        self.requests[request_id] = request
        self._waiting.append(request)
        return request

    def abort(self, request_id: str) -> None:
        """Ends a request between two steps. Unknown and finished ones are fine."""
        request = self.requests.get(request_id)
        if request is not None and request.status is not Status.FINISHED:
            self._finish(request)

    def reset(self, *, new_weights: bool = False) -> bool:
        """vLLM's reset_prefix_cache with the connector's; ``new_weights`` takes all running requests back first.

        Returns False, and changes no weights, where requests are loading.
        """
        if new_weights:
            if any(request.status is Status.WAITING_FOR_REMOTE_KVS or request.block_ids for request in self._waiting) or self._held():
                return False
            while self._running:
                self._preempt(self._running.pop())
            self.weights += 1
            self._states.clear()
            for request in self.requests.values():
                request.weights = None
        self.pool.forget_names()
        return self.half.reset()

    def run(self, max_steps: int = 1000) -> None:
        """Steps until no request is left. Raises HangError after ``max_steps``."""
        last = self.num_steps + max_steps
        while self.requests:
            if self.num_steps >= last:
                raise HangError(f"after {max_steps} steps: {[(r.request_id, r.status) for r in self.requests.values()]}")
            self.step()

    def step(self) -> None:
        """One engine step."""
        self.num_steps += 1
        step = self._schedule()
        scheduled = [
            ScheduledRequest(request_id, self.requests[request_id].block_ids, self.requests[request_id].num_computed_tokens + num_new)
            for request_id, num_new in step.scheduled.items()
        ]
        message = self.half.build_step(scheduled, step.preempted)
        self.tamper(message)
        output = self._execute(step, message)
        self._update(step, output)

    # ---- schedule -----------------------------------------------------------------------------------------------

    def _schedule(self) -> FakeStep:
        step = FakeStep()
        num_preempted = len(self._preempted)
        budget = self._schedule_running(step)
        if len(self._preempted) == num_preempted:
            self._schedule_waiting(step, budget)
        step.preempted, self._preempted = self._preempted, []
        return step

    def _schedule_running(self, step: FakeStep) -> int:
        budget = self._token_budget
        position = 0
        while position < len(self._running) and budget:
            request = self._running[position]
            num_new = min(budget, len(request.tokens) - request.num_computed_tokens)
            needed = self._num_blocks(request.num_computed_tokens + num_new) - len(request.block_ids)
            while needed > self.pool.num_free:
                victim = self._running.pop()
                self._preempt(victim)
                if victim is request:
                    return 0
            if needed > 0:
                request.block_ids += self.pool.allocate(needed)
            self._schedule_tokens(step, request, num_new)
            budget -= num_new
            position += 1
        return budget

    def _schedule_waiting(self, step: FakeStep, budget: int) -> None:
        # Requests that hold blocks (asynchronous loads) come first, as in vLLM.
        queue = sorted(self._waiting, key=lambda request: not request.block_ids)
        for request in queue:
            if not budget or len(self._running) >= self._max_running:
                return
            if request.status is Status.WAITING_FOR_REMOTE_KVS:
                if not request.is_received:
                    continue
                self._remote_kvs_arrived(request)
            num_new = self._admit(step, request, budget)
            if num_new is None:
                return
            if num_new:
                self._waiting.remove(request)
                self._running.append(request)
                request.status = Status.RUNNING
                self._schedule_tokens(step, request, num_new)
                budget -= num_new

    def _admit(self, step: FakeStep, request: FakeRequest, budget: int) -> int | None:
        """Gives a waiting request blocks. Returns its tokens in this step, 0 where it goes on waiting, None where nobody gets more."""
        local: list[int] = []
        num_external, is_async = 0, False
        if not request.num_computed_tokens:
            local = self.pool.find(self._names(request, (len(request.tokens) - 1) // self._block_tokens)) if self._prefix_caching else []
            self._introduce(request)
            matched = self.half.match(request.request_id, len(request.tokens), len(local) * self._block_tokens)
            if matched.num_tokens is None:
                self.num_asked_again += 1
                return 0
            num_external, is_async = matched.num_tokens, matched.is_async
            assert num_external >= 0, matched
            assert num_external % self._block_tokens == 0, matched
            assert num_external > 0 or not is_async, matched
        num_computed = request.num_computed_tokens or len(local) * self._block_tokens + num_external
        assert num_computed < len(request.tokens), "nothing would be left to compute"
        num_new = 0 if is_async else min(budget, len(request.tokens) - num_computed)
        needed = max(0, self._num_blocks(num_computed + num_new) - len(local) - len(request.block_ids))
        reserve = self._num_blocks(len(request.tokens) + 1) - len(local) - needed + self._reserved() if is_async else 0
        if needed + self.pool.num_unused(local) + reserve > self.pool.num_free:
            return None
        self.pool.share(local)
        request.block_ids += local + self.pool.allocate(needed)
        self.half.allocated(request.request_id, list(request.block_ids), num_external)
        request.num_computed_tokens = num_computed
        request.num_loaded_tokens += num_external
        if is_async:
            request.status = Status.WAITING_FOR_REMOTE_KVS
            request.is_received = False
            return 0
        step.has_sync_loads |= num_external > 0
        return num_new

    def _introduce(self, request: FakeRequest) -> None:
        if not self.half.knows(request.request_id):
            self.half.add_request(
                request.request_id,
                request.tokens,
                num_prompt_tokens=request.num_prompt_tokens,
                identity=RequestIdentity((request.adapter,) if request.adapter else ()),
                options=request.options,
            )

    def _schedule_tokens(self, step: FakeStep, request: FakeRequest, num_new: int) -> None:
        step.scheduled[request.request_id] = num_new
        self._name_blocks(request, request.num_computed_tokens + num_new)

    def _remote_kvs_arrived(self, request: FakeRequest) -> None:
        request.is_received = False
        request.status = Status.WAITING
        if not request.num_computed_tokens:
            self.pool.free(request.block_ids)
            request.block_ids = []
        self._name_blocks(request, request.num_computed_tokens)

    def _preempt(self, request: FakeRequest) -> None:
        self.num_preemptions += 1
        self.pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.status = Status.WAITING
        self._waiting.appendleft(request)
        self._preempted.append(request.request_id)

    # ---- execute ------------------------------------------------------------------------------------------------

    def _execute(self, step: FakeStep, message: StepMessage) -> FakeOutput:
        output = FakeOutput()
        sent: list[str] = []
        received: list[str] = []
        for worker in self.workers:
            worker.before_overwrite(message)
        self.memory.scribble(self.pool.handed_out)
        self.pool.handed_out.clear()
        for worker in self.workers:
            worker.begin_step(pickle.loads(pickle.dumps(message)))
            if step.has_sync_loads:
                worker.start_loads(by_layer=self.by_layer)
                if not self.by_layer:
                    worker.wait_for_loads()
        self._forward(step, output)
        for worker in self.workers:
            worker.forward_ended()
            worker.start_loads()
            worker.start_stores()
            transferred = worker.finish()
            output.failed_block_ids |= worker.failed_block_ids()
            output.report.merge(pickle.loads(pickle.dumps(worker.report())))
            sent += transferred.sent
            received += transferred.received
        output.sent = self._reported_by_all("sent", sent)
        output.received = self._reported_by_all("received", received)
        return output

    def _forward(self, step: FakeStep, output: FakeOutput) -> None:
        """Layer after layer, as a model does; each waits for its loads."""
        parts = [slice(layer, layer + 1) for layer in range(self.memory.num_layers)] if self.by_layer else [ALL_LAYERS]
        for layer, part in enumerate(parts):
            for worker in self.workers:
                worker.wait_for_layer(layer)
            for request_id, num_new in step.scheduled.items():
                request = self.requests[request_id]
                end = request.num_computed_tokens + num_new
                if not self.memory.forward(request.block_ids, self._states_of(request)[:end], request.num_computed_tokens, part):
                    output.contaminated.add(request_id)
            for worker in self.workers:
                worker.layer_computed(layer)
        for request_id, num_new in step.scheduled.items():
            self.requests[request_id].computed(num_new)

    def _reported_by_all(self, what: str, request_ids: Sequence[str]) -> list[str]:
        """vLLM waits until every rank has named a request."""
        complete = []
        for request_id in request_ids:
            count = self._num_reports.pop((what, request_id), 0) + 1
            if count == len(self.workers):
                complete.append(request_id)
            else:
                self._num_reports[what, request_id] = count
        return complete

    # ---- update -------------------------------------------------------------------------------------------------

    def _update(self, step: FakeStep, output: FakeOutput) -> None:
        affected = self._handle_invalid_blocks(step, output.failed_block_ids)
        if output.contaminated - affected:
            raise WrongKVError(f"step {self.num_steps}: {sorted(output.contaminated - affected)} have read wrong KV")
        for request_id in step.scheduled:
            request = self.requests.get(request_id)
            if request is None or request_id in affected or request.num_computed_tokens < len(request.tokens):
                continue
            request.tokens.append(next_token(self._states_of(request)[-1], VOCABULARY))
            if len(request.output) >= request.max_new_tokens:
                self._finish(request)
        if not self._recompute:
            for request_id in affected:
                self._finish(self.requests[request_id])
        self.half.finish_step(output.report, output.failed_block_ids)
        for request_id in output.received:
            request = self.requests[request_id]
            if request.status is Status.WAITING_FOR_REMOTE_KVS:
                request.is_received = True
            else:
                assert request.status is Status.FINISHED, f"{request_id} received KV while {request.status.value}"
                self._drop(request)
        for request_id in output.sent:
            self._drop(self.requests[request_id])

    def _handle_invalid_blocks(self, step: FakeStep, failed_block_ids: set[int]) -> set[str]:
        """Takes every request back to its first block that was not loaded."""
        affected = set()
        loading = [request for request in self._waiting if request.status is Status.WAITING_FOR_REMOTE_KVS]
        for request in [*loading, *self._running] if failed_block_ids else ():
            num_before = request.num_computed_tokens - step.scheduled.get(request.request_id, 0)
            for position, block_id in enumerate(request.block_ids[: self._num_blocks(num_before)]):
                if block_id in failed_block_ids:
                    request.num_computed_tokens = position * self._block_tokens
                    affected.add(request.request_id)
                    for later in request.block_ids[position:]:
                        self.pool.forget_name(later)
                    break
        return affected

    def _finish(self, request: FakeRequest) -> None:
        is_loading = request.status is Status.WAITING_FOR_REMOTE_KVS and not request.is_received
        if request in self._running:
            self._running.remove(request)
        else:
            self._waiting.remove(request)
        request.status = Status.FINISHED
        is_held = self.half.request_finished(request.request_id)
        assert not (is_held and is_loading), "vLLM would free the blocks twice"
        if not is_held and not is_loading:
            self._drop(request)

    def _drop(self, request: FakeRequest) -> None:
        assert request.status is Status.FINISHED
        self.pool.free(request.block_ids)
        request.block_ids = []
        self.finished[request.request_id] = self.requests.pop(request.request_id)
        self._states.pop(request.request_id, None)

    # ---- small things -------------------------------------------------------------------------------------------

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def _num_used(self) -> int:
        return self.pool.num_blocks - 1 - self.pool.num_free

    def _held(self) -> bool:
        return any(request.status is Status.FINISHED for request in self.requests.values())

    def _reserved(self) -> int:
        """Blocks that requests with asynchronous loads still need to get anywhere."""
        return sum(self._num_blocks(len(r.tokens) + 1) - len(r.block_ids) for r in self._waiting if r.block_ids)

    def _states_of(self, request: FakeRequest) -> list[int]:
        states = token_states(request.tokens, request.seed(self.weights), self._states.get(request.request_id, ()))
        self._states[request.request_id] = states
        return states

    def _names(self, request: FakeRequest, num_blocks: int) -> list[int]:
        states = self._states_of(request)
        return [states[(position + 1) * self._block_tokens - 1] for position in range(num_blocks)]

    def _name_blocks(self, request: FakeRequest, num_tokens: int) -> None:
        if self._prefix_caching:
            num_blocks = min(num_tokens, len(request.tokens)) // self._block_tokens
            for block_id, name in zip(request.block_ids, self._names(request, num_blocks), strict=False):
                self.pool.name(block_id, name)
