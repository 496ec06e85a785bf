"""What a tenant learns of another one: nothing of what it has asked, whatever the policy. How much it has may show, as eviction.

Evicting below a quota is ruled out in `test_quotas.py`; what encryption adds is in `test_encryption.py` and `test_disk_encryption.py`.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.connectors.messages import RequestOptions
from kvtier.connectors.requests import Geometry, RequestIdentity, make_request
from kvtier.control.commands import Demote, Promote
from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.planner import Planner
from kvtier.hashing import Namespace, salt_extra, tenant_extra
from kvtier.policies import POLICIES
from kvtier.types import BlockKey, Outcome, StoreOrder
from tests.unit.test_planner import make_planner

BLOCK_TOKENS = 4
NUM_BLOCKS = 4
HOST_BLOCKS = 10
DISK_BLOCKS = 16
STRANGER = 1_000_000
"""tokens that only one tenant uses"""

names = st.text("abc \0", min_size=1, max_size=3)


def keys_for(tokens: list[int], *, salt: str = "", tenant: str = "", cache_salt: str = "", num_blocks: int = NUM_BLOCKS) -> list[BlockKey]:
    """The keys that a connector gives to the blocks of a request."""
    digest = Namespace(model="model", salt=salt).digest
    geometry = Geometry(digest, BLOCK_TOKENS, BLOCK_TOKENS, num_workers=1, host_blocks=HOST_BLOCKS)
    extras = tuple([salt_extra(cache_salt)] * bool(cache_salt) + [tenant_extra(tenant)] * bool(tenant))
    request = make_request("request", tokens, RequestIdentity(extras, tenant=tenant), RequestOptions(), geometry=geometry)
    return request.keys(num_blocks, BLOCK_TOKENS)


@given(st.tuples(names, names, names), st.tuples(names, names, names))
def test_tenants_have_no_key_in_common(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    """The same tokens under another salt of the engine, tenant or cache salt: no block of one is named by the other, so none can be got."""
    tokens = list(range(BLOCK_TOKENS * NUM_BLOCKS))
    first, second = (keys_for(tokens, salt=salt, tenant=tenant, cache_salt=cache_salt) for salt, tenant, cache_salt in (one, other))
    assert (one == other) == (first == second) == bool(set(first) & set(second))


class Observed:
    """A planner whose commands are carried out at once, and all that one tenant gets to see of it."""

    def __init__(self, policy: str, *, has_disk: bool, has_quota: bool) -> None:
        self.planner: Planner = make_planner(HOST_BLOCKS, policy=policy, disk_blocks=DISK_BLOCKS, has_disk=has_disk)
        if has_quota:
            self.planner.set_quota(0, "a", 4 * PAGE_BYTES, 0.0)
        self.seen: list[object] = []
        self.now = 0.0

    def do(self, what: str, tenant: str, keys: list[BlockKey]) -> object:
        """One request's step; its answer."""
        self.now += 1.0
        planner, now = self.planner, self.now
        answer: object
        if what == "match":
            answer = planner.match(keys)
        elif what == "store":
            plan = planner.begin_store(StoreOrder(keys, 0, tenant), PAGE_BYTES, now)
            if plan.slots:
                planner.commit_store(plan.job_id, (), now)
            answer = (plan.positions, plan.num_refused, plan.num_declined, plan.broken)
        elif what == "load":
            promised = planner.promote(keys, now)
            self._carry_out()
            load = planner.begin_load(keys, now)
            planner.touch(keys, now)
            planner.end_load(load.job_id, (), now)
            answer = (promised, len(load.slots))
        else:
            planner.evict(keys, (0,))
            answer = None
        planner.tick(now)
        self._carry_out()
        return answer

    def _carry_out(self) -> None:
        while commands := self.planner.take_commands():
            for command in commands:
                outcomes = [Outcome.OK] * len(command.blocks) if isinstance(command, (Demote, Promote)) else []
                if isinstance(command, Demote):
                    self.planner.demoted(command.job_id, outcomes, (), self.now)
                elif isinstance(command, Promote):
                    self.planner.promoted(command.job_id, outcomes, self.now)


steps = st.lists(
    st.tuples(
        st.sampled_from(["match", "store", "store", "load", "evict"]), st.sampled_from("ab"), st.integers(0, 5), st.integers(1, NUM_BLOCKS)
    ),
    max_size=40,
)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(max_examples=40, deadline=None)
@given(steps=steps, has_disk=st.booleans(), has_quota=st.booleans())
def test_what_a_tenant_has_asked_does_not_show(
    policy: str, steps: list[tuple[str, str, int, int]], has_disk: bool, has_quota: bool
) -> None:
    """Two runs that differ in one thing: tenant ``b`` asks what ``a`` asks too, or something else of the same shape. Everything that ``a``
    is answered is the same, so no time that it measures can depend on it.
    """
    seen: list[list[object]] = []
    for offset in (0, STRANGER):
        observed = Observed(policy, has_disk=has_disk, has_quota=has_quota)
        for what, tenant, prompt, num_blocks in steps:
            start = 100 * prompt + (offset if tenant == "b" else 0)
            keys = keys_for(list(range(start, start + BLOCK_TOKENS * NUM_BLOCKS)), tenant=tenant, num_blocks=num_blocks)
            answer = observed.do(what, tenant, keys)
            if tenant == "a":
                observed.seen.append(answer)
        assert [] == observed.planner.check()
        seen.append(observed.seen)
    assert seen[0] == seen[1]
