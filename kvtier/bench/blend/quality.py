"""One set of documents, its questions, the methods: how far each is from full prefill.

What does not depend on the question is computed once for the set: the documents by full prefill, their entries, and what a method that
does not look at the question makes of them. Of a question, all versions are answered together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from kvtier.bench.blend.answers import Answer, Begun, Gold, answer_all, compare, gold_of, with_room, write_all, write_anew
from kvtier.bench.blend.overlap import f1, rouge_l
from kvtier.bench.blend.summary import FULL, ROUNDED
from kvtier.bench.blend.tasks import BEHIND_DOCUMENTS, SYSTEM, DocumentSet, Question, make_set, neutral_document
from kvtier.bench.blend.variants import Variant
from kvtier.blend.blender import blend
from kvtier.blend.chunks import Anchor, anchor_of, served_anchor
from kvtier.blend.entries import ChunkEntry, capture_entries, compute_entry, full_prefill
from kvtier.blend.finding import ChunkSpace, Span
from kvtier.blend.layout import PromptLayout, lay_out
from kvtier.blend.model import BlendModel, TokenKV
from kvtier.blend.placing import EntrySource
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import finish
from kvtier.hashing import Namespace, request_root

ROOT = request_root(Namespace(model="bench").digest)
BLOCK_TOKENS = 32
PROSE_TOKENS = 16
OTHERS = 1_000_000
"""from this number on sets lend their documents to the mixed prompts of others"""

Encode = Callable[[str], list[int]]


class Case(NamedTuple):
    """A variant that computes a share of the tokens."""

    variant: Variant
    ratio: float


@dataclass(frozen=True)
class Joined:
    """A prompt that a variant made of chunks."""

    kv: TokenKV
    """with room behind it"""
    num_tokens: int
    last: torch.Tensor | None
    share: float
    """of the candidates that were computed"""
    num_token_layers: int


class Primer:
    """The document that primed entries are computed behind, after the system prompt; for all sets."""

    def __init__(self, model: BlendModel, encode: Encode) -> None:
        self.token_ids = [*encode(SYSTEM), *encode(neutral_document())]
        self.kv, _ = full_prefill(model, torch.tensor(self.token_ids, device=model.device))


class SetRun:
    """The documents of one set as chunks, and their KV full and in entries."""

    def __init__(
        self, model: BlendModel, encode: Encode, documents: DocumentSet, primer: Primer, in_float32: BlendModel | None = None
    ) -> None:
        """``in_float32``: the same model, to see what rounding alone changes."""
        self._model = model
        self._in_float32 = in_float32
        self._encode = encode
        self._documents = documents
        self._primer = primer
        self._prefix_ids = encode(SYSTEM)
        self._chunks = [encode(text) for text in documents.documents]
        self._behind = encode(BEHIND_DOCUMENTS)
        self._context_ids = [*self._prefix_ids, *itertools.chain(*self._chunks), *self._behind]
        self._room = max(self._num_tokens(question) for question in documents.questions)
        full, _ = full_prefill(model, torch.tensor(self._context_ids, device=model.device))
        self._prefix = full.part(0, len(self._prefix_ids)).clone()
        self._full = with_room(model, full, self._room)
        self._full_float32: TokenKV | None = None
        self._entries: dict[str, tuple[PromptLayout, list[ChunkEntry]]] = {}
        self._joined: dict[tuple[str, float], Joined] = {}
        """what serves all questions"""

    def rows(self, wanted: Mapping[int, Sequence[Case]], *, only_answered: bool) -> Iterator[dict[str, Any]]:
        """One row for full prefill and one for each case, of each question. ``only_answered``: no cases where full prefill is wrong."""
        for number, cases in wanted.items():
            question = self._documents.questions[number]
            ids = self._encode(question.text)
            gold = self._gold(question, ids)
            full = Begun(self._full, len(self._context_ids), ids)
            (reference,) = answer_all(self._model, [full], gold)
            where = {"set": self._documents.number, "question": number, "task": question.task}
            whole = {"ratio": 1.0, "share": 1.0, "cost": 1.0}
            figures = compare(reference, reference)
            overlap = self._overlaps(question, gold, write_all(self._model, [full], gold, [reference]))[0]
            yield {**where, "variant": FULL, **whole, **figures, **overlap}
            if only_answered and question.answer is not None and not figures["is_right"]:
                continue
            if self._in_float32 is not None:
                yield {**where, "variant": ROUNDED, **whole, **self._rounded(self._in_float32, question, ids, gold, reference)}
            if not cases:
                continue
            joined = [self._join(case, ids) for case in cases]
            begun = [Begun(at.kv, at.num_tokens, () if at.last is not None else ids, at.last) for at in joined]
            answers = answer_all(self._model, begun, gold)
            overlaps = self._overlaps(question, gold, write_all(self._model, begun, gold, answers))
            num_tokens = len(self._context_ids) - len(self._prefix_ids) + len(ids)
            for case, at, answer, more in zip(cases, joined, answers, overlaps, strict=True):
                num_later = 0 if at.last is not None else len(ids)
                cost = (at.num_token_layers / self._model.num_layers + num_later) / num_tokens
                row = {**where, "variant": case.variant.label, "ratio": case.ratio, "share": at.share, "cost": cost}
                yield {**row, **compare(reference, answer), **more}

    # ---- answers ------------------------------------------------------------------------------------------------

    def _gold(self, question: Question, ids: list[int]) -> Gold:
        """The right answer; what full prefill writes, where there is none."""
        if question.answer is not None:
            return gold_of(self._encode(part) for part in question.answer)
        written = write_anew(self._model, Begun(self._full, len(self._context_ids), ids), PROSE_TOKENS)
        return Gold(written, [True] * PROSE_TOKENS)

    def _rounded(self, model: BlendModel, question: Question, ids: list[int], gold: Gold, reference: Answer) -> dict[str, Any]:
        """Full prefill by the model in float32."""
        if self._full_float32 is None:
            full, _ = full_prefill(model, torch.tensor(self._context_ids, device=model.device))
            self._full_float32 = with_room(model, full, self._room)
        begun = [Begun(self._full_float32, len(self._context_ids), ids)]
        answers = answer_all(model, begun, gold)
        return {**compare(reference, answers[0]), **self._overlaps(question, gold, write_all(model, begun, gold, answers))[0]}

    def _num_tokens(self, question: Question) -> int:
        parts = question.answer or ()
        num_answer = sum(len(self._encode(part)) for part in parts) if parts else PROSE_TOKENS
        return len(self._encode(question.text)) + num_answer

    def _overlaps(self, question: Question, gold: Gold, written: Sequence[list[int]]) -> list[dict[str, float]]:
        """F1 of what is written with the right answer, or Rouge-L with what full prefill writes."""
        if question.task == "prose":
            return [{"rouge_l": rouge_l(gold.scored, text)} for text in written]
        return [{"f1": f1(gold.scored, text)} for text in written]

    # ---- prompts ------------------------------------------------------------------------------------------------

    def _join(self, case: Case, question: Sequence[int]) -> Joined:
        key = (case.variant.label, case.ratio)
        if case.variant.needs_question:
            return self._blend(case, question)
        if key not in self._joined:
            self._joined[key] = self._blend(case, ())
        return self._joined[key]

    def _blend(self, case: Case, question: Sequence[int]) -> Joined:
        layout, entries = self._laid_out(case.variant.entries, question)
        ids = [*self._context_ids, *question]
        size = FixedRatio(0.0 if case.variant.is_reuse else case.ratio)
        blended = finish(blend(self._model, ids, layout, EntrySource(entries), case.variant.method, size, prefix=self._prefix))
        kv = with_room(self._model, blended.kv, self._room - len(question))
        if case.variant.kept_layers is not None:
            for layer in set(range(self._model.num_layers)) - set(case.variant.kept_layers):
                kv.keys[layer][:, : len(ids)] = self._full.keys[layer][:, : len(ids)]
                kv.values[layer][:, : len(ids)] = self._full.values[layer][:, : len(ids)]
        last = blended.logits if question else None
        return Joined(kv, len(ids), last, blended.num_chosen / max(1, len(layout.candidates)), blended.num_token_layers)

    def _laid_out(self, kind: str, more: Sequence[int]) -> tuple[PromptLayout, list[ChunkEntry]]:
        """The layout of the documents, and ``more`` behind them, with entries of this kind."""
        if kind not in self._entries:
            self._entries[kind] = self._make_entries(kind)
        layout, entries = self._entries[kind]
        return PromptLayout(layout.num_tokens + len(more), layout.num_prefix_tokens, layout.placements), entries

    # ---- entries ------------------------------------------------------------------------------------------------

    def _make_entries(self, kind: str) -> tuple[PromptLayout, list[ChunkEntry]]:
        anchor_ids = {"alone": [], "primed": self._primer.token_ids}.get(kind, self._prefix_ids)
        is_copied = kind in ("again", "elsewhere")
        anchor = (served_anchor if is_copied else anchor_of)(ROOT, anchor_ids, BLOCK_TOKENS)
        layout = self._lay_out(self._chunks, anchor, len(self._prefix_ids))
        if is_copied or kind in ("reordered", "mixed"):
            captured = [self._capture(served, anchor, with_context=not is_copied) for served in self._served(kind)]
            by_key = {entry.chunk.key: entry for entries in captured for entry in entries}
            return layout, [by_key[placement.chunk.key] for placement in layout.placements]
        anchor_kv = {"alone": None, "primed": self._primer.kv}.get(kind, self._prefix)
        tokens = [torch.tensor(ids, device=self._model.device) for ids in self._chunks]
        return layout, [compute_entry(self._model, at.chunk, ids, anchor_kv) for at, ids in zip(layout.placements, tokens, strict=True)]

    def _served(self, kind: str) -> list[list[list[int]]]:
        """The documents of earlier prompts, in their order."""
        even, odd = self._chunks[::2], self._chunks[1::2]
        if kind in ("reordered", "again"):
            return [[*odd, *even]]
        others = [self._encode(text) for text in make_set(self._documents.number + OTHERS + 1, num_documents=len(self._chunks)).documents]
        pairs = zip(others, [*odd, *even], strict=True)
        mixed = [chunk for pair in pairs for chunk in pair]
        return [mixed[: len(mixed) // 2], mixed[len(mixed) // 2 :]]

    def _capture(self, chunks: Sequence[Sequence[int]], anchor: Anchor, *, with_context: bool) -> list[ChunkEntry]:
        ids = [*self._prefix_ids, *itertools.chain(*chunks), *self._behind]
        return capture_entries(self._model, ids, self._lay_out(chunks, anchor, 0), with_context=with_context)

    def _lay_out(self, chunks: Sequence[Sequence[int]], anchor: Anchor, num_prefix_tokens: int) -> PromptLayout:
        ids = [*self._prefix_ids, *itertools.chain(*chunks), *self._behind]
        ends = list(itertools.accumulate((len(chunk) for chunk in chunks), initial=len(self._prefix_ids)))
        spans = [Span(start, end) for start, end in itertools.pairwise(ends)]
        return lay_out(len(ids), num_prefix_tokens, ChunkSpace(ROOT, anchor, BLOCK_TOKENS).place(ids, spans))
