"""One set of documents, every question, every method: how far each is from full prefill."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvtier.bench.blend.overlap import f1, rouge_l
from kvtier.bench.blend.tasks import BEHIND_DOCUMENTS, SYSTEM, DocumentSet, Question, make_set
from kvtier.blend.blender import blend, extend
from kvtier.blend.chunks import NO_ANCHOR, Anchor, anchor_of
from kvtier.blend.entries import ChunkEntry, capture_entries, compute_entry, full_prefill
from kvtier.blend.finding import ChunkSpace, Span
from kvtier.blend.layout import PromptLayout, lay_out
from kvtier.blend.methods import CacheBlend, CacheCraft, Combined, Epic, Evidence, FullReuse, ProphetKV, Selection, SelectionMethod
from kvtier.blend.methods.base import top
from kvtier.blend.model import BlendModel, TokenKV
from kvtier.blend.ratio import FixedRatio, Ratio
from kvtier.hashing import Namespace, request_root

ROOT = request_root(Namespace(model="bench").digest)
BLOCK_TOKENS = 32
PROSE_TOKENS = 24
OTHERS = 1_000_000
"""from this number on sets lend their documents to the mixed prompts of others"""

Encode = Callable[[str], list[int]]


class Random:
    """Tokens drawn at random: what a method must beat to be worth its name."""

    name = "random"

    def select(self, evidence: Evidence, ratio: Ratio) -> Selection:
        """Any."""
        scores = torch.rand(len(evidence.layout.candidates), generator=torch.Generator().manual_seed(evidence.layout.num_tokens))
        return Selection(top(scores, ratio.num_tokens(None, len(scores))))


@dataclass(frozen=True)
class Variant:
    """A method, with entries computed one way."""

    label: str
    method: SelectionMethod
    entries: str
    """alone; prefix: behind the system prompt; primed: behind the system prompt and one document that is always the same and never
    in the prompt; or from prompts that were served: reordered, the same documents in another order; mixed, each behind other documents"""
    needs_question: bool = False
    is_reuse: bool = False
    """nothing is computed, whatever the ratio"""


VARIANTS = (
    Variant("none, alone", FullReuse(), "alone", is_reuse=True),
    Variant("cacheblend, alone", CacheBlend(), "alone"),
    Variant("epic, alone", Epic(), "alone"),
    Variant("prophetkv, alone", ProphetKV(), "alone", needs_question=True),
    Variant("none, prefix", FullReuse(), "prefix", is_reuse=True),
    Variant("random, prefix", Random(), "prefix"),
    Variant("cacheblend, prefix", CacheBlend(), "prefix"),
    Variant("epic, prefix", Epic(), "prefix"),
    Variant("prophetkv, prefix", ProphetKV(), "prefix", needs_question=True),
    Variant("cachecraft, reordered", CacheCraft(), "reordered"),
    Variant("none, mixed", FullReuse(), "mixed", is_reuse=True),
    Variant("cachecraft, mixed", CacheCraft(), "mixed"),
    Variant("combined, mixed", Combined(), "mixed", needs_question=True),
    Variant("none, primed", FullReuse(), "primed", is_reuse=True),
    Variant("cacheblend, primed", CacheBlend(), "primed"),
    Variant("epic, primed", Epic(), "primed"),
    Variant("prophetkv, primed", ProphetKV(), "primed", needs_question=True),
    Variant("combined, primed", Combined(), "primed", needs_question=True),
    Variant("combined, prefix", Combined(), "prefix", needs_question=True),
)


@dataclass(frozen=True)
class Gold:
    """The right answer, token by token."""

    tokens: list[int]
    is_scored: list[bool]
    """False: the token is given, nobody has to find it"""


@dataclass(frozen=True)
class Answer:
    """What a model says where the right answer's tokens were to be found, each behind the right ones before it."""

    logits: torch.Tensor
    """``[scored tokens, vocabulary]``, as log probabilities"""
    tokens: torch.Tensor
    """the right ones"""


class Begun(NamedTuple):
    """A prompt whose answer begins: its KV, what of the question is not in it yet, and the logits behind it where all is."""

    kv: TokenKV
    rest: Sequence[int]
    last: torch.Tensor | None


class SetRun:
    """The documents of one set as chunks, and their KV full and in entries."""

    def __init__(self, model: BlendModel, encode: Encode, documents: DocumentSet) -> None:
        self._model = model
        self._encode = encode
        self._documents = documents
        self._prefix_ids = encode(SYSTEM)
        self._chunks = [encode(text) for text in documents.documents]
        self._behind = encode(BEHIND_DOCUMENTS)
        self.context_ids = [*self._prefix_ids, *itertools.chain(*self._chunks), *self._behind]
        self.full, _ = full_prefill(model, torch.tensor(self.context_ids, device=model.device))
        self.prefix = self.full.part(0, len(self._prefix_ids))
        self._entries: dict[str, tuple[PromptLayout, list[ChunkEntry]]] = {}

    def entries(self, kind: str, more: Sequence[int] = ()) -> tuple[PromptLayout, list[ChunkEntry]]:
        """The layout of the documents, and ``more`` behind them, with entries of this kind."""
        if kind not in self._entries:
            self._entries[kind] = self._make_entries(kind)
        layout, entries = self._entries[kind]
        return PromptLayout(layout.num_tokens + len(more), layout.num_prefix_tokens, layout.placements), entries

    def _make_entries(self, kind: str) -> tuple[PromptLayout, list[ChunkEntry]]:
        anchor: Anchor = NO_ANCHOR if kind == "alone" else anchor_of(ROOT, self._prefix_ids, BLOCK_TOKENS)
        layout = self._lay_out(self._chunks, anchor, len(self._prefix_ids))
        if kind == "primed":
            anchor_ids = [*self._prefix_ids, *self._encode(make_set(OTHERS).documents[0])]
            anchor = anchor_of(ROOT, anchor_ids, BLOCK_TOKENS)
            layout = self._lay_out(self._chunks, anchor, len(self._prefix_ids))
            return layout, self._compute(layout, full_prefill(self._model, torch.tensor(anchor_ids, device=self._model.device))[0])
        if kind in ("reordered", "mixed"):
            by_key = {entry.chunk.key: entry for served in self._served(kind) for entry in self._capture(served, anchor)}
            return layout, [by_key[placement.chunk.key] for placement in layout.placements]
        return layout, self._compute(layout, None if anchor == NO_ANCHOR else self.prefix)

    def _compute(self, layout: PromptLayout, anchor_kv: TokenKV | None) -> list[ChunkEntry]:
        tokens = [torch.tensor(ids, device=self._model.device) for ids in self._chunks]
        return [compute_entry(self._model, at.chunk, ids, anchor_kv) for at, ids in zip(layout.placements, tokens, strict=True)]

    def _served(self, kind: str) -> list[list[list[int]]]:
        """The documents of earlier prompts, in their order."""
        even, odd = self._chunks[::2], self._chunks[1::2]
        if kind == "reordered":
            return [[*odd, *even]]
        others = [self._encode(text) for text in make_set(self._documents.number + OTHERS + 1).documents]
        pairs = zip(others, [*odd, *even], strict=True)
        mixed = [chunk for pair in pairs for chunk in pair]
        return [mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]]

    def _capture(self, chunks: Sequence[Sequence[int]], anchor: Anchor) -> list[ChunkEntry]:
        ids = [*self._prefix_ids, *itertools.chain(*chunks), *self._behind]
        return capture_entries(self._model, ids, self._lay_out(chunks, anchor, 0))

    def _lay_out(self, chunks: Sequence[Sequence[int]], anchor: Anchor, num_prefix_tokens: int) -> PromptLayout:
        ids = [*self._prefix_ids, *itertools.chain(*chunks), *self._behind]
        ends = list(itertools.accumulate((len(chunk) for chunk in chunks), initial=len(self._prefix_ids)))
        spans = [Span(start, end) for start, end in itertools.pairwise(ends)]
        return lay_out(len(ids), num_prefix_tokens, ChunkSpace(ROOT, anchor, BLOCK_TOKENS).place(ids, spans))

    def rows(self, wanted: Mapping[int, Sequence[Variant]], ratio: float) -> Iterator[dict[str, Any]]:
        """One row for each variant that is wanted for each question."""
        joined: dict[str, tuple[TokenKV, float, int]] = {}
        """what serves all questions"""
        for number, variants in wanted.items():
            question = self._documents.questions[number]
            ids = self._encode(question.text)
            reference, gold = self._reference(question, ids)
            for variant in variants:
                if not variant.needs_question and variant.label not in joined:
                    joined[variant.label] = self._blend(variant, [], ratio)
                kv, share, cost = joined[variant.label] if variant.label in joined else self._blend(variant, ids, ratio)
                begun = Begun(kv, [], self._last_logits) if variant.needs_question else Begun(kv, ids, None)
                figures = compare(reference, self._answer(begun, gold))
                figures |= self._overlap(question, begun, gold, is_same=figures["is_right"])
                row = {"set": self._documents.number, "question": number, "task": question.task, "variant": variant.label}
                full_layers = (kv.num_tokens - len(self._prefix_ids)) * self._model.num_layers
                yield {**row, "ratio": ratio, "share": share, "cost": cost / full_layers, **figures}

    def _blend(self, variant: Variant, question: Sequence[int], ratio: float) -> tuple[TokenKV, float, int]:
        layout, entries = self.entries(variant.entries, question)
        size = FixedRatio(0.0 if variant.is_reuse else ratio)
        blended = blend(self._model, [*self.context_ids, *question], layout, entries, variant.method, size, prefix=self.prefix)
        self._last_logits = blended.logits
        return blended.kv, blended.num_chosen / max(1, len(layout.candidates)), blended.num_token_layers

    def _reference(self, question: Question, ids: list[int]) -> tuple[Answer, Gold]:
        """What full prefill says, and the right answer."""
        begun = Begun(self.full, ids, None)
        if question.answer is not None:
            parts = [self._encode(part) for part in question.answer]
            scored = [index % 2 == 0 for index, part in enumerate(parts) for _ in part]
            gold = Gold(list(itertools.chain(*parts)), scored)
        else:
            written = self._write(begun, Gold([0] * PROSE_TOKENS, [True] * PROSE_TOKENS))
            gold = Gold(written, [True] * PROSE_TOKENS)
        return self._answer(begun, gold), gold

    def _answer(self, begun: Begun, gold: Gold) -> Answer:
        ids = [*begun.rest, *gold.tokens[:-1]]
        logits = extend(self._model, begun.kv, ids)[1] if ids else begun.kv.keys.new_zeros((0, 0))
        if begun.last is not None:
            logits = torch.cat((begun.last[None], logits)) if ids else begun.last[None]
        scored = torch.tensor(gold.is_scored, device=logits.device)
        return Answer(logits[-len(gold.tokens) :][scored].log_softmax(-1), torch.tensor(gold.tokens, device=logits.device)[scored])

    def _write(self, begun: Begun, gold: Gold) -> list[int]:
        """The most likely tokens, one after the other, at the places that are scored; the others are given."""
        kv, last = begun.kv, begun.last
        ahead: list[int] = list(begun.rest)
        written = []
        for token, is_scored in zip(gold.tokens, gold.is_scored, strict=True):
            if ahead and is_scored:
                kv, logits = extend(self._model, kv, ahead)
                last, ahead = logits[-1], []
            if is_scored:
                assert last is not None
                written.append(int(last.argmax()))
            ahead.append(written[-1] if is_scored else token)
        return written

    def _overlap(self, question: Question, begun: Begun, gold: Gold, *, is_same: bool) -> dict[str, float]:
        """F1 of what is written with the right answer, or Rouge-L with what full prefill writes."""
        name = "rouge_l" if question.task == "prose" else "f1"
        right = [token for token, is_scored in zip(gold.tokens, gold.is_scored, strict=True) if is_scored]
        written = right if is_same else self._write(begun, gold)
        return {name: rouge_l(right, written) if name == "rouge_l" else f1(right, written)}


def compare(reference: Answer, answer: Answer) -> dict[str, Any]:
    """Over the answer's tokens, each behind the right ones before it: nats, shares, and whether greedy decoding gives the answer."""
    gold = reference.tokens
    picks = torch.arange(len(gold), device=gold.device)
    best, wanted = answer.logits.argmax(-1), reference.logits.argmax(-1)
    return {
        "kl": float((reference.logits.exp() * (reference.logits - answer.logits)).sum(-1).mean()),
        "agreement": float((best == wanted).float().mean()),
        "nll_change": float((reference.logits[picks, gold] - answer.logits[picks, gold]).mean()),
        "is_right": bool((best == gold).all()),
        "token_accuracy": float((best == gold).float().mean()),
        "full_is_right": bool((wanted == gold).all()),
    }
