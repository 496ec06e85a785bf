"""Methods choose as many tokens as the ratio says, and those that their papers say; ratios stay within their bounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.blend import prefill
from kvtier.blend.chunks import NO_ANCHOR
from kvtier.blend.entries import NO_CONTEXT, Context
from kvtier.blend.finding import ChunkSpace
from kvtier.blend.layout import Placement, PromptLayout
from kvtier.blend.mean_shift import MIN_CHOSEN_TOKENS, MIN_CHUNK_TOKENS, MeanShift
from kvtier.blend.methods import METHODS, Asks, CacheBlend, CacheCraft, Combined, Epic, Evidence, ProphetKV, methods_with
from kvtier.blend.methods.base import share_out, top
from kvtier.blend.methods.cachecraft import context_impact, prefix_overlap
from kvtier.blend.model import Projected, Rotary, TokenKV
from kvtier.blend.prefill import CausalGroups, attend, attention_mask, attention_weights, mean_attention
from kvtier.blend.ratio import FixedRatio
from kvtier.copy.rope import Pairs, TokenShift, plain_frequencies, shift_keys, shift_table
from kvtier.errors import BlendRefusedError, RefusalReason
from kvtier.hashing import Namespace, request_root

torch.set_num_threads(1)
SPACE = ChunkSpace(request_root(Namespace(model="m").digest), NO_ANCHOR, 4)


def layout_of(lengths: Sequence[int], *, first_is_exact: bool = False) -> PromptLayout:
    """Chunks of these lengths side by side, and three tokens of question."""
    placements = []
    position = 0
    for number, length in enumerate(lengths):
        chunk = SPACE.chunk([number, *range(length - 1)])
        placements.append(Placement(chunk, position, is_exact=first_is_exact and number == 0))
        position += length
    return PromptLayout(position + 3, 0, tuple(placements))


def evidence_of(
    layout: PromptLayout, *, deviation: list[float] | None = None, attention: list[float] | None = None, remembered: Sequence[Context] = ()
) -> Evidence:
    """Answers that a test wrote down; others are drawn at random."""
    drawn = torch.rand(len(layout.candidates), generator=torch.Generator().manual_seed(3))
    attention_, deviation_ = (drawn if written is None else torch.tensor(written) for written in (attention, deviation))
    return Evidence(layout, remembered or [NO_CONTEXT] * len(layout.placements), attention_, deviation_)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.floats(0, 1), st.sampled_from(sorted(METHODS)), st.booleans())
def test_a_method_chooses_what_the_ratio_allows(lengths: list[int], ratio: float, name: str, first_is_exact: bool) -> None:
    """The number of tokens, for every method and layout: none with 0, all with 1; more with more, never one less. But for ``none``."""
    evidence = evidence_of(layout_of(lengths, first_is_exact=first_is_exact))
    number = len(evidence.layout.candidates)
    if not number:
        return
    method = METHODS[name]()
    assert name == method.name
    selection = method.select(evidence, FixedRatio(ratio))
    assert (number,) == selection.chosen.shape
    wanted = int(ratio) * number if name == "none" else min(number, math.ceil(ratio * number - 1e-9))
    assert wanted == int(selection.chosen.sum())
    assert not method.select(evidence, FixedRatio(0.0)).chosen.any()
    assert method.select(evidence, FixedRatio(1.0)).chosen.all()


def chosen_by(method: CacheBlend | CacheCraft | Combined | Epic | ProphetKV, evidence: Evidence, ratio: float) -> list[int]:
    """Positions in the prompt."""
    chosen = method.select(evidence, FixedRatio(ratio)).chosen.tolist()
    return [position for position, is_chosen in zip(evidence.layout.candidates, chosen, strict=True) if is_chosen]


def test_each_method_takes_what_its_paper_says() -> None:
    """Deviation, heads, the question's attention, both; an exact chunk needs nothing."""
    layout = layout_of([10, 10], first_is_exact=True)
    scores = [0.0, 1.0, 0.0, 0.0, 5.0, 0.0, 0.0, 4.0, 3.0, 0.0]
    evidence = evidence_of(layout, deviation=scores, attention=scores[::-1])
    assert [14, 17, 18] == chosen_by(CacheBlend(), evidence, 0.3)
    assert [11, 12, 15] == chosen_by(ProphetKV(), evidence, 0.3)
    assert [10, 11, 12] == chosen_by(Epic(), evidence, 0.3)
    assert (Asks(deviation_layer=1), Asks(attention_layers=range(10)), Asks()) == tuple(
        method.asks(10) for method in (CacheBlend(), ProphetKV(), Epic())
    )
    assert Asks(attention_layers=range(4, 10)) == Combined(telling_layers=(0.4, 1.0)).asks(10)
    assert [10, 11, 12, 15] == chosen_by(Combined(context_share=0.25, telling_layers=(0.4, 1.0)), evidence, 0.4)
    looked = Context((layout.placements[0].chunk.key,), (1.0,), 9.0, torch.tensor([0.0] * 8 + [0.5, 0.5]))
    evidence = replace(evidence, contexts=[NO_CONTEXT, looked])
    assert [12, 15, 18, 19] == chosen_by(Combined(context_share=0.5, telling_layers=(0.0, 1.0)), evidence, 0.4)
    two = evidence_of(layout_of([4, 10]))
    assert [0, 1, 2, 3, *range(4, 10)] == chosen_by(Epic(), two, 10 / 14)


def test_combined_looks_where_it_is_told_to() -> None:
    """In the configuration's layers; by default from two to four fifths of the depth. Heads of chunks are chosen in any case."""
    evidence = evidence_of(layout_of([40, 40]))
    for method, layers in ((METHODS["combined"], range(4, 8)), (methods_with(0.1, 0.55)["combined"], range(1, 6))):
        selection = method().select(evidence, FixedRatio(0.25))
        assert Asks(attention_layers=layers) == method().asks(10)
        assert selection.chosen[[0, 1, 40]].all()
        assert 0.5 == selection.shift_weight
    assert METHODS["epic"] is methods_with(0.1, 0.55)["epic"]


def test_cachecraft_spends_where_the_old_surroundings_are_gone() -> None:
    """A chunk whose old neighbour stands before it again is left alone; of another one those tokens go that looked at others."""
    layout = layout_of([4, 4, 4])
    first, second, third = (placement.chunk.key for placement in layout.placements)
    looked = torch.tensor([0.1, 0.9, 0.2, 0.8])
    kept = Context((first,), (2.0,), 2.0, looked)
    lost = Context((third,), (2.0,), 2.0, looked)
    alone = Context((), (), 4.0, torch.zeros(4))
    evidence = evidence_of(layout, remembered=[alone, kept, lost])
    assert 0.5 == context_impact(alone) < context_impact(kept) < 1
    assert (0, 1, 0) == tuple(prefix_overlap(context, [first, second]) for context in (alone, kept, lost))
    assert not {4, 5, 6, 7} & set(chosen_by(CacheCraft(), evidence, 4 / 12))
    assert {9, 11} <= set(chosen_by(CacheCraft(), evidence, 4 / 12))
    both = Context((first, second), (1.0, 3.0), 1.0, looked)
    assert (1.0, 0.0, 0.25) == tuple(prefix_overlap(both, order) for order in ([first, second], [second, first], [first, third]))


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 20)), min_size=1, max_size=6), st.integers(0, 130))
def test_sharing_out_gives_all_there_is_room_for(shares: list[tuple[float, int]], number: int) -> None:
    """Nobody over its room; a heavier one with as much room gets no less."""
    weights, rooms = [weight for weight, _ in shares], [room for _, room in shares]
    parts = share_out(weights, rooms, number)
    assert min(number, sum(rooms)) == sum(parts)
    assert all(0 <= part <= room for part, room in zip(parts, rooms, strict=True))
    for left, right in ((a, b) for a in range(len(parts)) for b in range(len(parts))):
        if weights[left] >= weights[right] and rooms[left] >= rooms[right]:
            assert parts[left] >= parts[right] - 1 - (parts[right] == rooms[right])


@given(st.lists(st.floats(0, 100, width=32), min_size=1, max_size=50), st.integers(0, 60))
def test_top_takes_the_highest(scores: list[float], number: int) -> None:
    """No score that was left is above one that was taken."""
    mask = top(torch.tensor(scores), number).tolist()
    taken = [score for score, is_taken in zip(scores, mask, strict=True) if is_taken]
    left = [score for score, is_taken in zip(scores, mask, strict=True) if not is_taken]
    assert min(number, len(scores)) == len(taken)
    assert not taken or not left or min(taken) >= max(left)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_what_is_no_share_is_refused(value: float) -> None:
    """By name, with the value and what is allowed."""
    with pytest.raises(BlendRefusedError, match=r"is .*; \[0, 1\] is allowed") as caught:
        FixedRatio(value)
    assert RefusalReason.RATIO == caught.value.reason


@pytest.mark.parametrize("pairs", ["neox", "interleaved"])
@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_keys_move_by_the_bits_of_the_copiers_rotation(pairs: Pairs, storage: str) -> None:
    """One arithmetic for the reference and for the copies on a GPU; dimensions behind the pairs stay."""
    frequencies = plain_frequencies(10_000.0, 12)
    keys = torch.randn((2, 5, 16), generator=torch.Generator().manual_seed(1))
    keys = keys.to(torch.bfloat16) if storage == "bf16" else keys
    for shift in (0, 1, -7, 100_000):
        moved = Rotary(frequencies, pairs).move(keys, shift)
        plain = keys.permute(1, 0, 2)[None].contiguous()
        expected = (plain.view(torch.int16).numpy().view(np.uint16) if storage == "bf16" else plain.numpy()).copy()
        shift_keys(expected, [TokenShift(0, 0, 5, 0)], shift_table(frequencies, [shift]), pairs=pairs, storage=storage)  # type: ignore[arg-type]
        got = moved.permute(1, 0, 2)[None].contiguous()
        np.testing.assert_array_equal(expected, got.view(torch.int16).numpy().view(np.uint16) if storage == "bf16" else got.numpy())


def shifted(length: int, num_chosen: int, change: torch.Tensor) -> torch.Tensor:
    """By how much a chunk's values moved in layer 0 when its first tokens changed so: ``[tokens, head_dim]``."""
    layout = layout_of([length])
    kv = TokenKV(torch.zeros(1, 1, layout.num_tokens, 2), torch.zeros(1, 1, layout.num_tokens, 2))
    positions = torch.tensor([*range(num_chosen), *layout.question])
    chosen = torch.zeros(layout.num_tokens, dtype=torch.bool)
    chosen[:num_chosen] = True
    new = torch.zeros(1, len(positions), 2)
    new[0, :num_chosen] = change
    with kv.opened(0) as of_layer:
        MeanShift(layout, positions, chosen, 0.5)(0, Projected(new, new, new), of_layer)
    assert torch.equal(kv.keys, kv.values)
    return kv.values[0, 0]


def test_the_rest_of_a_chunk_moves_as_far_as_the_changes_agree() -> None:
    """Half of a common change; nothing where changes cancel out, in short chunks, or for tokens that are computed or not the chunk's."""
    same = shifted(MIN_CHUNK_TOKENS, 10, torch.tensor([2.0, 0.0]))
    assert [0.0, 1.0, 0.0] == [same[0, 0].item(), same[10, 0].item(), same[MIN_CHUNK_TOKENS, 0].item()]
    opposite = torch.tensor([[2.0, 0.0], [-2.0, 0.0]]).repeat(5, 1)
    assert 0 == shifted(MIN_CHUNK_TOKENS, 10, opposite).abs().sum()
    assert 0 == shifted(MIN_CHUNK_TOKENS - 1, 10, torch.tensor([2.0, 0.0])).abs().sum()
    assert 0 == shifted(MIN_CHUNK_TOKENS, MIN_CHOSEN_TOKENS - 1, torch.tensor([2.0, 0.0])).abs().sum()


@settings(max_examples=30)
@given(st.lists(st.tuples(st.sampled_from([40, 100, 130]), st.integers(0, 130), st.booleans()), min_size=1, max_size=5), st.integers(0, 99))
def test_every_chunk_moves_by_its_own_mean(chunks: list[tuple[int, int, bool]], seed: int) -> None:
    """As in a loop over chunks, heads and nothing else, whatever is chosen of each."""
    lengths = [length for length, _, _ in chunks]
    layout = layout_of(lengths)
    layout = replace(
        layout, placements=tuple(replace(at, is_exact=exact) for at, (_, _, exact) in zip(layout.placements, chunks, strict=True))
    )
    chance = torch.Generator().manual_seed(seed)
    old = torch.randn(1, 2, layout.num_tokens, 4, generator=chance)
    kv = TokenKV(old.clone(), old.clone())
    chosen = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for at, (_, number, _) in zip(layout.placements, chunks, strict=True):
        chosen[at.start + torch.randperm(at.num_tokens, generator=chance)[:number]] = True
    computed = chosen.clone()
    computed[layout.question] = True
    positions = computed.nonzero()[:, 0]
    new = torch.randn(2, len(positions), 4, generator=chance)
    with kv.opened(0) as of_layer:
        MeanShift(layout, positions, chosen, 0.5)(0, Projected(new, new, new), of_layer)
    expected = old[0].clone()
    for at in layout.placements:
        rows = [row for row, position in enumerate(positions.tolist()) if at.start <= position < at.end and chosen[position]]
        others = [position for position in range(at.start, at.end) if not chosen[position]]
        if at.is_exact or at.num_tokens < MIN_CHUNK_TOKENS or len(rows) < MIN_CHOSEN_TOKENS or not others:
            continue
        for head in range(2):
            change = new[head, rows] - old[0, head, positions[rows]]
            mean = change.mean(0)
            agreement = mean.square().sum() / change.square().sum(1).mean()
            expected[head, others] += 0.5 * agreement * mean
    torch.testing.assert_close(kv.keys[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(kv.keys, kv.values)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=30, unique=True), st.sampled_from([(4, 2), (6, 6), (3, 1)]), st.integers(1, 40))
def test_attention_is_the_same_however_heads_share_keys(positions: list[int], heads: tuple[int, int], group_rows: int) -> None:
    """Folded into rows or not, and in groups of any size, it is plain attention over what lies before each row."""
    num_heads, num_kv_heads = heads
    at = torch.tensor(sorted(positions))
    chance = torch.Generator().manual_seed(len(positions))
    queries = torch.randn(num_heads, len(at), 8, generator=chance)
    keys, values = torch.randn(2, num_kv_heads, 61, 8, generator=chance)
    wide_keys, wide_values = (part.repeat_interleave(num_heads // num_kv_heads, 0) for part in (keys, values))
    scores = (queries @ wide_keys.transpose(1, 2) * 0.3).masked_fill(torch.arange(61)[None, :] > at[:, None], -torch.inf)
    expected = (scores.softmax(-1) @ wide_values).transpose(0, 1).flatten(1)
    groups = CausalGroups(at, torch.float32, group_rows)
    for folds in (True, False):
        torch.testing.assert_close(attend(queries, keys, values, groups, 0.3, folds=folds), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("was_enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("folds", [False, True])
def test_attention_in_groups_is_kept_from_cudnn(monkeypatch: pytest.MonkeyPatch, folds: bool, fails: bool, was_enabled: bool) -> None:
    """It makes a plan for every new shape. Whoever computes attention next finds torch as it was, also behind an error."""
    seen: list[bool] = []
    compute = torch.nn.functional.scaled_dot_product_attention

    def computed(*args: Any, **more: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        if fails:
            raise RuntimeError("no kernel")
        return compute(*args, **more)

    queries, keys = torch.ones(4, 6, 8), torch.ones(2, 6, 8)
    groups = CausalGroups(torch.arange(6), torch.float32, 3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", computed)
        before = torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)
        try:
            with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
                attend(queries, keys, keys, groups, 0.3, folds=folds)
            assert was_enabled is torch.backends.cuda.cudnn_sdp_enabled()
        finally:
            torch.backends.cuda.enable_cudnn_sdp(before)
    assert [False] * (1 if fails else 2) == seen


def test_attention_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many weights at once as memory is given, and one row at least; the mean is that of all of them."""
    chance = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(4, 7, 8, generator=chance), torch.randn(2, 20, 8, generator=chance)
    mask = attention_mask(torch.arange(13, 20), 20)
    expected = attention_weights(queries, keys, mask, 0.3).mean(0)
    sizes: list[int] = []

    def counted(part: torch.Tensor, *more: Any) -> torch.Tensor:
        sizes.append(part.shape[1])
        return attention_weights(part, *more)

    monkeypatch.setattr(prefill, "attention_weights", counted)
    assert torch.equal(expected, mean_attention(queries, keys, mask, 0.3))
    monkeypatch.setattr(prefill, "MOST_WEIGHTS", 4 * 20 * 3)
    torch.testing.assert_close(mean_attention(queries, keys, mask, 0.3), expected)
    monkeypatch.setattr(prefill, "MOST_WEIGHTS", 1)
    torch.testing.assert_close(mean_attention(queries, keys, mask, 0.3), expected)
    assert [7, 3, 3, 1, *[1] * 7] == sizes


def test_masks_of_many_rows_are_made_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time the same; those of few are kept."""
    positions = torch.tensor([2, 3, 17, 19, 20])
    absent = torch.arange(21) % 5 == 0
    num_masked = 2 * 4 + 2 * 20 + 21
    monkeypatch.setattr(prefill, "MOST_MASKED", num_masked)
    kept = CausalGroups(positions, torch.float32, 2, absent)
    assert all(one is other for one, other in zip(kept, kept, strict=True))
    monkeypatch.setattr(prefill, "MOST_MASKED", num_masked - 1)
    made = CausalGroups(positions, torch.float32, 2, absent)
    for _ in range(2):
        assert all(torch.equal(one, other) for one, other in zip(kept, made, strict=True))
    assert next(iter(made)) is not next(iter(made))


def test_nobody_looks_at_what_is_absent() -> None:
    """In every group of rows; the rest is as without."""
    absent = torch.zeros(20, dtype=torch.bool)
    absent[[3, 14]] = True
    positions = torch.tensor([5, 6, 15, 19])
    for plain, masked in zip(CausalGroups(positions, torch.float32, 3), CausalGroups(positions, torch.float32, 3, absent), strict=True):
        there = ~absent[: plain.shape[1]]
        assert torch.equal(plain[:, there], masked[:, there])
        assert bool(masked[:, ~there].isneginf().all())
