"""The quality benchmark computes what does not depend on the question once, and its figures are those of computing everything each time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from kvtier.bench.blend.answers import Begun, Gold, answer_all, with_room, write_all, write_anew
from kvtier.bench.blend.overlap import f1, rouge_l
from kvtier.bench.blend.quality import PROSE_TOKENS, Case, Primer, SetRun
from kvtier.bench.blend.summary import FULL, ROUNDED
from kvtier.bench.blend.tasks import BEHIND_DOCUMENTS, SYSTEM, DocumentSet, Question
from kvtier.bench.blend.variants import VARIANTS, layer_variants, with_telling_layers
from kvtier.blend.blender import blend, extend
from kvtier.blend.entries import NO_CONTEXT, full_prefill
from kvtier.blend.finding import Span
from kvtier.blend.layout import lay_out
from kvtier.blend.methods import Combined
from kvtier.blend.model import TokenKV
from kvtier.blend.placing import EntrySource
from kvtier.blend.ratio import FixedRatio
from kvtier.blend.steps import finish
from tests.engine.blend_models import SIZES, Store, tiny

DOCUMENTS = DocumentSet(
    1,
    tuple(" ".join(f"word{number * 7 + index}" for index in range(12 + number)) for number in range(3)),
    (
        Question("single", "what is it", (" this one",)),
        Question("hops", "who and what", (" some body", " does", " something here")),
        Question("border", "what next", (" one",)),
        Question("prose", "summarize all", None),
    ),
)
LABELS = ("none, alone", "cacheblend, alone", "epic, prefix", "combined, prefix")


def encode(text: str) -> list[int]:
    """A token for each word."""
    return [sum(map(ord, word)) * 31 % SIZES["vocab_size"] for word in text.split()]


class Plainly:
    """The same figures, with everything computed for each question and case, and one token at a time."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.prefix = encode(SYSTEM)
        self.context = list(self.prefix)
        self.spans = []
        for text in DOCUMENTS.documents:
            self.spans.append(Span(len(self.context), len(self.context) + len(encode(text))))
            self.context += encode(text)
        self.context += encode(BEHIND_DOCUMENTS)

    def full(self, ids: Sequence[int]) -> TokenKV:
        """By full prefill."""
        return full_prefill(self.model, torch.tensor(ids))[0]

    def joined(self, case: Case, question: list[int]) -> TokenKV:
        """All but the prompt's last token, from chunks."""
        ids = [*self.context, *question]
        store = Store(self.model, [] if case.variant.entries == "alone" else self.prefix)
        layout = lay_out(len(ids), len(self.prefix), store.space.place(ids, self.spans))
        ratio = FixedRatio(0.0 if case.variant.is_reuse else case.ratio)
        prefix = self.full(self.prefix)
        return finish(
            blend(self.model, ids, layout, EntrySource(store.entries(ids, layout)), case.variant.method, ratio, prefix=prefix)
        ).kv.part(0, len(ids) - 1)

    def behind(self, kv: TokenKV, ids: Sequence[int]) -> Iterator[tuple[TokenKV, torch.Tensor]]:
        """KV and log probabilities behind each of these tokens, computed one by one."""
        for token in ids:
            kv, logits = extend(self.model, kv, [token])
            yield kv, logits[-1].log_softmax(-1)

    def written(self, kv: TokenKV, last: int, gold: list[int], given: Sequence[bool]) -> list[int]:
        """Greedily, but for what is given."""
        ids = [last]
        for token, is_given in zip(gold, given, strict=True):
            ((kv, logits),) = self.behind(kv, ids[-1:])
            ids.append(token if is_given else int(logits.argmax()))
        return [token for token, is_given in zip(ids[1:], given, strict=True) if not is_given]

    def figures(self, question: Question, kv: TokenKV) -> dict[str, Any]:
        """KL, whether the answer is right, and what is written."""
        ids = encode(question.text)
        full = self.full([*self.context, *ids]).part(0, len(self.context) + len(ids) - 1)
        parts = [encode(part) for part in question.answer or ()]
        gold = [token for part in parts for token in part]
        given = [index % 2 == 1 for index, part in enumerate(parts) for _ in part]
        if question.answer is None:
            given = [False] * PROSE_TOKENS
            gold = self.written(full, ids[-1], [0] * PROSE_TOKENS, given)
        theirs, ours = (
            [logits for (_, logits), is_given in zip(self.behind(begun, [ids[-1], *gold[:-1]]), given, strict=True) if not is_given]
            for begun in (full, kv)
        )
        kl = sum(float((right.exp() * (right - mine)).sum()) for right, mine in zip(theirs, ours, strict=True)) / len(ours)
        right = [token for token, is_given in zip(gold, given, strict=True) if not is_given]
        text = self.written(kv, ids[-1], gold, given)
        overlap = {"rouge_l": rouge_l(right, text)} if question.answer is None else {"f1": f1(right, text)}
        return {"kl": kl, "is_right": [int(mine.argmax()) for mine in ours] == right, **overlap}


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny model, of the family whose random one does not say the same again and again."""
    torch.set_num_threads(1)
    return tiny("qwen3")[1]


def test_shared_work_changes_no_figure(model: Any) -> None:
    """KL, right answers, F1 and Rouge-L of every method and question, and of two ratios side by side, are those of the plain way."""
    cases = [Case(variant, ratio) for variant in VARIANTS if variant.label in LABELS for ratio in (0.2, 0.6)]
    primer = Primer(model, encode)
    rows = list(SetRun(model, encode, DOCUMENTS, primer).rows(dict.fromkeys(range(4), cases), only_answered=False))
    assert 4 * (1 + len(cases)) == len(rows)
    plain = Plainly(model)
    by_label = {case.variant.label: case.variant for case in cases}
    for row in rows:
        question = DOCUMENTS.questions[row["question"]]
        ids = encode(question.text)
        if row["variant"] == FULL:
            kv = plain.full([*plain.context, *ids]).part(0, len(plain.context) + len(ids) - 1)
        else:
            kv = plain.joined(Case(by_label[row["variant"]], row["ratio"]), ids)
        expected = plain.figures(question, kv)
        found = {name: row[name] for name in expected}
        assert pytest.approx(expected, abs=2e-4) == found, row
    assert any(row["kl"] > 0.01 for row in rows), "some differ from full prefill"
    assert 0 < sum(row.get("rouge_l", 1.0) < 1 for row in rows), "some write something else"


def test_entries_of_served_prompts_are_what_full_prefill_had_there(model: Any) -> None:
    """Their keys moved back; of nothing is known where it stood, and none is taken for exact. Each stands behind others than here."""
    run = SetRun(model, encode, DOCUMENTS, Primer(model, encode))
    prefix, first, others = encode(SYSTEM), encode(DOCUMENTS.documents[1]), [encode(text) for text in DOCUMENTS.documents[::2]]
    layout, entries = run._make_entries("again")
    assert [False] * 3 == [at.is_exact for at in layout.placements]
    assert [NO_CONTEXT] * 3 == [entry.context for entry in entries]
    whole = full_prefill(model, torch.tensor([*prefix, *first, *others[0], *others[1]]))[0]
    start = len(prefix) + len(first)
    expected = whole.part(start, start + len(others[0]))
    torch.testing.assert_close(expected.values, entries[0].kv.values)
    torch.testing.assert_close(model.rotary.move(expected.keys, -len(first)), entries[0].kv.keys)
    _, elsewhere = run._make_entries("elsewhere")
    _, mixed = run._make_entries("mixed")
    for entry, copied, before in zip(mixed, elsewhere, entries, strict=True):
        torch.testing.assert_close(entry.kv.values, copied.kv.values)
        assert (NO_CONTEXT, False) == (copied.context, torch.equal(copied.kv.values, before.kv.values))


def test_layers_are_left_as_they_were_one_group_at_a_time(model: Any) -> None:
    """Nothing is lost where all layers are full prefill's; one that is reused changes something; all of them together is full reuse."""
    run = SetRun(model, encode, DOCUMENTS, Primer(model, encode))
    groups = layer_variants(model.num_layers, 2)
    assert [range(2), range(2, 3)] == [variant.kept_layers for variant in groups]
    none = replace(groups[0], label="none", kept_layers=range(0))
    (every,) = layer_variants(model.num_layers, 9)
    (reuse,) = [variant for variant in VARIANTS if variant.label == "none, primed"]
    cases = [Case(variant, 0.0) for variant in (none, *groups, every, reuse)]
    rows = list(run.rows({0: cases, 3: cases}, only_answered=False))
    kls = {(row["question"], row["variant"]): row["kl"] for row in rows}
    for question in (0, 3):
        assert 0 == pytest.approx(kls[question, "none"], abs=1e-5)
        assert all(kls[question, group.label] > 1e-5 for group in groups)
        assert kls[question, "none, primed"] == kls[question, every.label]


def test_layers_of_combined_can_be_given() -> None:
    """Other methods stay what they are."""
    changed = {variant.label: with_telling_layers(variant, 0.1, 0.9).method for variant in VARIANTS}
    for variant in VARIANTS:
        if isinstance(variant.method, Combined):
            assert Combined(telling_layers=(0.1, 0.9)) == changed[variant.label]
        else:
            assert variant.method is changed[variant.label]


def test_questions_that_full_prefill_does_not_answer_can_be_left_out(model: Any) -> None:
    """They have one row, that says so. Not those without a right answer."""
    case = Case(VARIANTS[0], 0.0)
    run = SetRun(model, encode, DOCUMENTS, Primer(model, encode))
    rows = list(run.rows({number: [case] for number in range(4)}, only_answered=True))
    answered = {row["question"] for row in rows if row["variant"] == FULL and row["is_right"]}
    assert answered - {3} < {0, 1, 2}, "some are not answered"
    assert answered | {3} == {row["question"] for row in rows if row["variant"] != FULL}


def test_rounding_has_rows_of_its_own(model: Any) -> None:
    """Full prefill by another model beside each question: nothing changes where it is the same, something where it is not."""
    wanted: dict[int, list[Case]] = {number: [] for number in range(4)}
    primer = Primer(model, encode)
    changes = []
    for other in (model, tiny("llama")[1]):
        rows = list(SetRun(model, encode, DOCUMENTS, primer, other).rows(wanted, only_answered=False))
        assert [(number, label) for number in range(4) for label in (FULL, ROUNDED)] == [(row["question"], row["variant"]) for row in rows]
        changes.append(sum(row["kl"] for row in rows))
    assert 0 == changes[0] < changes[1]
    rows = list(SetRun(model, encode, DOCUMENTS, primer, model).rows(wanted, only_answered=True))
    answered = [row["question"] for row in rows if row["variant"] == FULL and (row["is_right"] or row["task"] == "prose")]
    assert answered == [row["question"] for row in rows if row["variant"] == ROUNDED]


def test_texts_go_on_from_where_they_leave_the_right_answer(model: Any) -> None:
    """What is written behind the first wrong token is what would be written one token at a time, given tokens in between or not."""
    prompt = [(7 * index * index + 3 * index) % SIZES["vocab_size"] for index in range(40)]
    kv = with_room(model, full_prefill(model, torch.tensor(prompt[:-6]))[0], 40)

    def begun() -> Begun:
        return Begun(kv, len(prompt) - 6, prompt[-6:])

    text = write_anew(model, begun(), 16)
    assert len(set(text)) > 6, "a model that says always the same would show nothing"
    for place in range(16):
        wrong = [*text[:place], (text[place] + 1) % SIZES["vocab_size"], *text[place + 1 :]]
        for given in (set(), {place + 1, place + 4}):
            gold = Gold(wrong, [index not in given for index in range(16)])
            at = begun()
            written = write_all(model, [at], gold, answer_all(model, [at], gold))
            if not given:
                assert [text] == written
            else:
                assert [token for index, token in enumerate(text) if index not in given] == written[0], place
