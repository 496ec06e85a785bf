"""Keys depend on everything that a block's KV depends on, and on nothing else."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier import _fallback
from kvtier.hashing import KeyChain, Namespace, TokenSpan, request_root

NAMESPACE = Namespace(
    model="m", revision="r", engine="vllm", kv_dtype="bfloat16", num_layers=30, num_kv_heads=3, head_dim=64, block_tokens=4, layout="NHD"
)
ROOT = request_root(NAMESPACE.digest)
TOKENS = list(range(100, 140))


def keys_of(tokens: list[int] = TOKENS, root: bytes = ROOT, spans: tuple[TokenSpan, ...] = (), block_tokens: int = 4) -> list[bytes]:
    """All keys, by a fresh chain."""
    return list(KeyChain(root, block_tokens, spans).update(tokens, len(tokens)))


def common(left: list[bytes], right: list[bytes]) -> int:
    """How many leading keys agree; behind them none may."""
    number = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
    assert set() == set(left[number:]) & set(right[number:])
    return number


def test_digests_and_roots_are_pinned() -> None:
    """What is on disk must be found by later versions: these bytes change only with KEY_FORMAT."""
    assert "3d84ec2b964a39434993b4a50f4a7447" == NAMESPACE.digest.hex()
    assert "eed39a4458152670f39ce9e97f1a6904" == request_root(NAMESPACE.digest, [b"adapter", b"salt"]).hex()
    assert "d79b5a0a2c80a97c28d6737b7b9bf23f" == keys_of(spans=(TokenSpan(2, 5, b"image"),))[1].hex()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Namespace)])
def test_every_field_of_a_namespace_counts(field: str) -> None:
    """Two namespaces share blocks only if all fields are equal."""
    value = getattr(NAMESPACE, field)
    change: dict[str, Any] = {field: value + "x" if isinstance(value, str) else value + 1}
    other = dataclasses.replace(NAMESPACE, **change)
    assert NAMESPACE.digest != other.digest
    assert 0 == common(keys_of(), keys_of(root=request_root(other.digest)))
    assert NAMESPACE.digest == dataclasses.replace(NAMESPACE).digest


def test_fields_of_a_namespace_do_not_run_into_each_other() -> None:
    """Text that moves from one field to the next, or turns into a number, makes another namespace."""
    digests = [Namespace(model="ab", revision="c").digest, Namespace(model="a", revision="bc").digest, Namespace(model="abc").digest]
    digests += [Namespace(model="x", salt="1").digest, Namespace(model="x", layout="1").digest, Namespace(model="x", salt=1).digest]  # type: ignore[arg-type]
    assert len(digests) == len(set(digests))


def test_a_namespace_of_other_things_is_refused() -> None:
    """Only text and numbers have one spelling in every process."""
    with pytest.raises(TypeError, match=r"kv_dtype of a namespace is 1\.5"):
        _ = Namespace(model="m", kv_dtype=1.5).digest  # type: ignore[arg-type]


def test_what_separates_requests_separates_roots() -> None:
    """Adapters and salts are told apart, also from their concatenation and from empty ones."""
    extras: list[list[bytes]] = [[], [b""], [b"", b""], [b"a"], [b"b"], [b"a", b"b"], [b"ab"], [b"b", b"a"], [b"a", b""], [b"", b"a"]]
    roots = [request_root(NAMESPACE.digest, extra) for extra in extras]
    assert len(extras) == len(set(roots))
    assert all(16 == len(root) for root in roots)
    assert NAMESPACE.digest not in roots


def test_a_root_is_no_key() -> None:
    """A root's message ends with a constant, a block's with a key: a salt cannot be chosen so that a root equals a block's key."""
    salt = bytes(range(64))
    message = NAMESPACE.digest + b"\x01\0\0\0" + b"\x40\0\0\0" + salt
    as_tokens = np.frombuffer(message, "<u4").tolist()
    root = request_root(NAMESPACE.digest, [salt])
    for parent in (NAMESPACE.digest, ROOT, root):
        assert root not in KeyChain(parent, len(as_tokens)).update(as_tokens, len(as_tokens))


@pytest.mark.parametrize("position", [0, 3, 4, 17, 39])
def test_a_changed_token_changes_its_block_and_all_behind(position: int) -> None:
    """Keys are chained over the prefix."""
    changed = list(TOKENS)
    changed[position] += 1
    assert position // 4 == common(keys_of(), keys_of(changed))


def test_equal_blocks_in_another_place_have_other_keys() -> None:
    """A block's KV depends on all that comes before it."""
    assert 10 == len(set(keys_of([7] * 40)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=80), st.lists(st.integers(-5, 90), max_size=8), st.integers(1, 9))
def test_a_growing_chain_equals_a_fresh_one(tokens: list[int], lengths: list[int], block_tokens: int) -> None:
    """In whatever steps a request grows or is asked for less, the answer is that of hashing it at once."""
    spans = (TokenSpan(3, 14, b"image"), TokenSpan(30, 1, b"sound"))
    chain = KeyChain(ROOT, block_tokens, spans)
    for length in lengths:
        part = tokens[: max(0, length)]
        expected = KeyChain(ROOT, block_tokens, spans).update(part, len(part))
        assert len(part) // block_tokens == len(expected)
        assert expected == chain.update(tokens, length)
        assert expected == list(chain.iter(tokens, length))
        assert expected == list(KeyChain(ROOT, block_tokens, spans).iter(tokens, length))


def test_only_new_blocks_are_hashed() -> None:
    """What was hashed is not looked at again: a change there goes unnoticed, as documented."""
    chain = KeyChain(ROOT, 4)
    before = chain.update(TOKENS, 20)
    changed = [0] * 20 + TOKENS[20:]
    assert keys_of() == chain.update(changed, 40)
    assert before == chain.update(changed, 20)
    assert [] == chain.update([], 20)


def test_iterating_hashes_no_more_than_it_must() -> None:
    """Who stops at the first key has had 8 blocks hashed: a bad id behind them is not noticed."""
    tokens = [*range(4 * 8), -1, *range(3)]
    assert keys_of(tokens[:32])[0] == next(KeyChain(ROOT, 4).iter(tokens, 36))
    with pytest.raises(ValueError, match="outside"):
        list(KeyChain(ROOT, 4).iter(tokens, 36))


def test_a_failed_update_leaves_the_chain_as_it_was() -> None:
    """A bad id is an error, and the chain goes on once it is mended."""
    chain = KeyChain(ROOT, 4)
    chain.update(TOKENS, 8)
    with pytest.raises(ValueError, match="outside"):
        chain.update([*TOKENS[:20], -1, *TOKENS[21:]], 40)
    with pytest.raises(TypeError):
        chain.update([*TOKENS[:20], "x", *TOKENS[21:]], 40)  # type: ignore[list-item]
    assert keys_of() == chain.update(TOKENS, 40)


def test_the_result_belongs_to_the_caller() -> None:
    """Changing the list does not change the chain."""
    chain = KeyChain(ROOT, 4)
    chain.update(TOKENS, 40).clear()
    assert keys_of() == chain.update(TOKENS, 40)


def test_a_span_changes_the_blocks_it_overlaps_and_all_behind() -> None:
    """Placeholders of different images are equal token ids; identifier, place and length tell them apart."""
    plain, first = keys_of(), keys_of(spans=(TokenSpan(9, 5, b"image 1"),))
    assert 2 == common(plain, first)
    for other in (TokenSpan(9, 5, b"image 2"), TokenSpan(10, 5, b"image 1"), TokenSpan(9, 6, b"image 1")):
        assert 2 == common(first, keys_of(spans=(other,)))
    assert first == keys_of(spans=(TokenSpan(9, 5, b"image 1"),))
    assert plain == keys_of(spans=(TokenSpan(40, 5, b"image 1"),))
    assert 9 == common(plain, keys_of(spans=(TokenSpan(39, 1, b"image 1"),)))


def test_a_spans_place_in_the_block_counts_for_every_block() -> None:
    """A block in the middle of an image depends on which part of the image it is."""
    chain_of = {start: KeyChain(ROOT, 4, [TokenSpan(start, 20, b"i")]).update([1] * 40, 40) for start in (8, 9, 12)}
    assert 3 == len({keys[3] for keys in chain_of.values()})


def test_spans_that_come_later_count_as_if_they_had_been_there() -> None:
    """Blocks before the first new one keep their keys, those from it on get new ones; what is there already changes nothing."""
    early, late, tokens = TokenSpan(2, 5, b"cat"), TokenSpan(17, 3, b"dog"), list(range(32))
    chain = KeyChain(request_root(NAMESPACE.digest), 4, [early])
    before = chain.update(tokens, 32)
    chain.note_spans([early])
    assert before == chain.update(tokens, 32)
    chain.note_spans([early, late])
    after = chain.update(tokens, 32)
    assert KeyChain(request_root(NAMESPACE.digest), 4, [early, late]).update(tokens, 32) == after
    assert 4 == common(list(before), list(after))


def test_the_order_in_which_spans_are_given_does_not_count() -> None:
    """The engine may list them as it likes."""
    spans = (TokenSpan(1, 2, b"a"), TokenSpan(3, 9, b"b"), TokenSpan(1, 2, b"c"))
    for order in itertools.permutations(spans):
        assert keys_of(spans=spans) == keys_of(spans=order)


def test_extra_bytes_are_where_the_format_says() -> None:
    """Per span: offset to the block, length, then the identifier after its own length."""
    begun, continued = "0200000000000000 0300000000000000 02000000", "feffffffffffffff 0300000000000000 02000000"
    extras = [b"", bytes.fromhex(begun) + b"id", bytes.fromhex(continued) + b"id"]
    expected = _fallback.chain_keys(ROOT, TOKENS, 0, 3, 4, extras)
    assert expected == keys_of(TOKENS[:12], spans=(TokenSpan(6, 3, b"id"),))


def test_bad_arguments_are_refused() -> None:
    """A root is 16 bytes, a block has tokens, a span is somewhere."""
    with pytest.raises(ValueError, match="a root has 16 bytes, not 3"):
        KeyChain(b"abc", 4)
    with pytest.raises(ValueError, match="blocks of 0 tokens"):
        KeyChain(ROOT, 0)
    with pytest.raises(ValueError, match="a namespace's digest has 16 bytes"):
        request_root(b"")
    for start, num_tokens in ((-1, 3), (0, 0)):
        with pytest.raises(ValueError, match="a span of"):
            TokenSpan(start, num_tokens, b"")
