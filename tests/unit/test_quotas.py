"""Quotas: bytes by tenant are exact, who is over makes room first, what is unused is borrowed and given back."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.control.host_space import PAGE_BYTES
from kvtier.control.planner import Planner
from kvtier.control.residency import Residency
from kvtier.policies import create_policy
from kvtier.types import BlockKey, BlockMeta, StoreOrder
from tests.unit.test_planner import keys_of, make_planner

BLOCKS = 12


def make(**quotas: int) -> Planner:
    """Host memory of 12 blocks; quotas in blocks."""
    planner = make_planner(BLOCKS, has_disk=False)
    for tenant, num_blocks in quotas.items():
        planner.set_quota(0, tenant, num_blocks * PAGE_BYTES, 0.0)
    return planner


def put(planner: Planner, tenant: str, prompt: int, num_blocks: int = 2, now: float = 0.0) -> int:
    plan = planner.begin_store(StoreOrder(keys_of(prompt, num_blocks), 0, tenant), PAGE_BYTES, now)
    if plan.slots:
        planner.commit_store(plan.job_id, (), now)
    assert [] == planner.check()
    return len(plan.slots)


def blocks(planner: Planner) -> dict[str, int]:
    return {tenant: num_bytes // PAGE_BYTES for tenant, num_bytes in planner.bytes_by_tenant()["host"].items()}


def test_a_tenant_over_its_quota_makes_room_itself() -> None:
    """Host memory is full: who has more than its quota loses its own oldest block, nobody else's."""
    planner = make(a=4)
    for prompt in range(3):
        put(planner, "a", prompt)
        put(planner, "b", 10 + prompt)
    assert {"a": 6, "b": 6} == blocks(planner)
    put(planner, "a", 5)
    assert {"a": 6, "b": 6} == blocks(planner)
    assert [0, 2, 2] == [planner.match(keys_of(prompt, 2)).ready_blocks for prompt in (0, 1, 10)]


def test_what_is_unused_is_borrowed_and_given_back() -> None:
    """Without others a tenant may fill the tier; when they come they get their share, block by block, and no more."""
    planner = make(a=4, b=4)
    for prompt in range(6):
        put(planner, "a", prompt)
    assert {"a": 12} == blocks(planner)
    for prompt in range(10, 14):
        put(planner, "b", prompt)
    assert {"a": 8, "b": 4} == blocks(planner), "b has its quota and then makes room itself"
    for prompt in range(20, 26):
        put(planner, "", prompt)
    assert {"a": 4, "b": 4, "": 4} == blocks(planner), "the others have what the quotas leave"
    for prompt in range(30, 36):
        put(planner, "a", prompt)
    assert {"a": 4, "b": 4, "": 4} == blocks(planner)


def test_a_quota_that_is_taken_away() -> None:
    """The tenant's blocks are again in one order with those of the others."""
    planner = make(a=4)
    for prompt in range(2):
        put(planner, "a", prompt)
    for prompt in range(10, 14):
        put(planner, "b", prompt)
    planner.set_quota(0, "a", None, 1.0)
    assert {} == planner.quotas(0)
    put(planner, "b", 14)
    put(planner, "b", 15)
    assert 4 > blocks(planner).get("a", 0)


def test_pins_of_one_tenant_do_not_starve_another() -> None:
    """Those over their quota have pinned everything: room for a tenant within its quota comes from elsewhere."""
    planner = make(a=4, b=4)
    for prompt in range(5):
        put(planner, "a", prompt)
    put(planner, "b", 10, 1)
    put(planner, "", 20, 1)
    pins = [planner.pin(keys_of(prompt, 2), None) for prompt in range(5)]
    assert 1 == put(planner, "b", 11, 1)
    assert 0 == put(planner, "a", 6, 2)
    for pin in pins:
        planner.unpin(pin, 1.0)
    assert 2 == put(planner, "b", 12, 2)
    assert 8 == blocks(planner)["a"]


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c", ""]), st.integers(0, 30), st.integers(1, 4), st.sampled_from(["store", "store", "touch", "remove"])
    ),
    max_size=40,
)


@settings(max_examples=200)
@given(_STEPS, st.fixed_dictionaries({}, optional={"a": st.integers(0, 4), "b": st.integers(0, 4), "c": st.integers(0, 4)}))
def test_a_quota_is_kept_whatever_the_others_do(steps: list[tuple[str, int, int, str]], quotas: dict[str, int]) -> None:
    """Against a list of who has what: bytes are exact, nobody within its quota loses a block to others, and everybody gets its quota."""
    here: dict[BlockKey, str] = {}
    tier = Residency("tier", lambda: create_policy("lru"), None)
    tenants: dict[BlockKey, str] = {}
    tier.tenant_of = lambda key: tenants.get(key, "")
    for tenant, quota in quotas.items():
        tier.set_quota(tenant, quota, lambda key: BlockMeta(key, None, 1), 0.0)

    def used(tenant: str) -> int:
        return sum(owner == tenant for owner in here.values())

    for number, (tenant, prompt, count, what) in enumerate(steps):
        keys = [BlockKey(bytes([len(tenant), *tenant.encode(), prompt, position]).ljust(16, b"\0")) for position in range(count)]
        if what == "touch":
            tier.touch(keys[::-1], 1, float(number))
            continue
        if what == "remove":
            for key in keys[::-1]:
                tier.remove(key, 1)
                here.pop(key, None)
            continue
        new = [key for key in keys if key not in here]
        short = max(0, len(here) + len(new) - BLOCKS)
        before = {each: used(each) for each in quotas}
        victims = tier.victims(short, 1, float(number), tenant).keys
        for victim in victims:
            owner = here.pop(victim)
            if owner in quotas and owner != tenant:
                assert used(owner) >= quotas[owner], "a tenant lost what it may always have"
        if tenant in quotas and before[tenant] + len(new) <= quotas[tenant]:
            assert len(victims) == short, "a tenant within its quota found no room"
        for key in new[::-1] if len(victims) == short else []:
            tenants[key] = tenant
            here[key] = tenant
            tier.insert((BlockMeta(key, None, 1),), float(number))
        assert {each: used(each) for each in {*here.values()}} == tier.bytes_by_tenant()
        assert len(here) == len(tier) == tier.num_bytes


def test_who_is_over_by_most_gives_first() -> None:
    """Two have borrowed what a third may have: the one that borrowed more gives it back."""
    planner = make(a=2, b=2)
    for tenant, prompt in (("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 10), ("b", 11)):
        put(planner, tenant, prompt)
    put(planner, "", 20)
    assert {"a": 6, "b": 4, "": 2} == blocks(planner)


def test_a_prompt_of_which_a_part_is_known_to_be_nobodys() -> None:
    """A restart found its beginning, the rest is its tenant's: each part is in its own order, counted there, and used with the prompt."""
    tenants = dict.fromkeys(keys_of(1, 3)[1:], "a")
    tier = Residency("tier", lambda: create_policy("lru"), None)
    tier.tenant_of = lambda key: tenants.get(key, "")
    tier.set_quota("a", 2, lambda key: BlockMeta(key, None, 1), 0.0)
    prompt = [BlockMeta(key, None, 1) for key in keys_of(1, 3)]
    other = BlockMeta(keys_of(2, 1)[0], None, 1)
    tier.insert(prompt[::-1], 1.0)
    tier.insert([other], 2.0)
    assert {"": 2, "a": 2} == tier.bytes_by_tenant()
    tier.touch([block.key for block in prompt[::-1]], 1, 3.0)
    assert [other.key] == tier.victims(1, 1, 4.0).keys
    for block in prompt:
        tier.remove(block.key, 1)
    assert (0, 0, {}) == (len(tier), tier.num_bytes, tier.bytes_by_tenant())
