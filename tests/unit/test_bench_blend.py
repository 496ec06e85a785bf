"""The tasks are what they say, and the figures are what the rows mean."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from kvtier.bench.blend.answers import Answer, compare
from kvtier.bench.blend.overlap import f1, rouge_l
from kvtier.bench.blend.records import records
from kvtier.bench.blend.summary import ROUNDED, by_variant, estimate, of_ratio, paired, with_least_margin
from kvtier.bench.blend.tasks import make_set
from kvtier.cli import main


@pytest.mark.parametrize("number", range(8))
def test_answers_stand_in_the_documents(number: int) -> None:
    """Single: in one sentence. Hops: over two documents. Border: the answer begins the document behind its question. The same each time."""
    made = make_set(number)
    assert made == make_set(number)
    documents = made.documents
    assert 6 == len(set(documents))
    assert {"single": 6, "hops": 12, "border": 5, "prose": 5} == Counter(question.task for question in made.questions)
    for question in made.questions:
        begins = question.text.splitlines()[-1]
        where = [index for index, text in enumerate(documents) if begins in text]
        if question.task == "single":
            assert question.answer is not None
            assert f"{begins}{question.answer[0]}." in documents[where[0]]
        elif question.task == "hops":
            assert question.answer is not None
            person, does, what = question.answer
            (home,) = [index for index, text in enumerate(documents) if f"{begins}{person}." in text]
            (other,) = [index for index, text in enumerate(documents) if f"{does.removeprefix('. ')}{what}." in text]
            assert home != other
            assert does.startswith(f".{person} ")
        elif question.task == "border":
            assert question.answer is not None
            assert documents[where[0]].endswith(begins)
            assert documents[where[0] + 1].startswith(f"{question.answer[0]}. Document")
        assert question.task == "prose" or 1 == len(where), "said once"


@pytest.mark.parametrize(
    ("right", "written", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], (1.0, 1.0)),
        ([1, 2, 3], [3, 2, 1], (1.0, 1 / 3)),
        ([1, 2, 3, 4], [1, 9, 3, 4], (0.75, 0.75)),
        ([1, 1, 2], [1, 3, 3], (1 / 3, 1 / 3)),
        ([1, 2], [3], (0.0, 0.0)),
        ([1, 2, 3, 4], [2, 4], (2 / 3, 2 / 3)),
    ],
)
def test_overlaps(right: list[int], written: list[int], expected: tuple[float, float]) -> None:
    """F1 counts tokens as often as both have them; Rouge-L counts those in the same order."""
    assert expected == pytest.approx((f1(right, written), rouge_l(right, written)))


def row(number: int, variant: str, kl: float, *, question: int = 0, full: bool = True, right: bool = True) -> dict[str, object]:
    """As a run writes it."""
    shares = {"agreement": 1.0, "nll_change": 0.0, "share": 0.15, "cost": 0.2, "token_accuracy": 1.0}
    where = {"set": number, "question": question, "task": "hops", "variant": variant, "ratio": 0.15}
    return {**where, **shares, "kl": kl, "full_is_right": full, "is_right": right}


def test_only_answered_questions_count_as_retained() -> None:
    """What full prefill cannot answer cannot be lost; where it answers none there is no such figure."""
    rows = [row(0, "a", 0.1), row(1, "a", 0.3, right=False), row(2, "a", 0.5, full=False), row(0, "b", 0.1, full=False)]
    table = by_variant(rows, "hops")
    assert (3, 2) == (table["a"]["n"], table["a"]["answered"])
    assert 0.5 == table["a"]["retained"].value
    assert 0.3 == pytest.approx(table["a"]["kl"].value)
    assert 0.2 == pytest.approx(table["a"]["kl_answered"].value)
    assert "retained" not in table["b"]
    assert "retained_f1" not in table["a"]
    assert {} == by_variant(rows, "prose")


def test_f1_is_kept_of_what_full_prefill_answers() -> None:
    """A record of its own beside the whole answers; what full prefill says wrong does not count."""
    rows = [{**row(0, "a", 0.1), "f1": 1.0}, {**row(1, "a", 0.1, right=False), "f1": 0.5}, {**row(2, "a", 0.1, full=False), "f1": 0.0}]
    figures = {each.name: (each.value, each.limit) for each in records(rows, [0.15])}
    assert ((0.75, 0.93), (0.5, 0.93)) == (figures["F1 retained"], figures["answers retained"])


def test_what_rounding_changes_stands_beside_every_ratio() -> None:
    """Printed with each ratio, one record, whatever the ratios; it is no method."""
    rounded = {**row(0, ROUNDED, 0.01), "ratio": 1.0}
    rows = [row(0, "a", 0.1), {**row(0, "a", 0.2), "ratio": 0.3}, rounded]
    assert [0.1, 0.01] == [each["kl"] for each in of_ratio(rows, 0.15)]
    found = [each for each in records(rows, [0.15, 0.3]) if each.params.get("method") == ROUNDED and each.name == "mean KL"]
    assert [(1.0, 0.01)] == [(each.params["recompute"], each.value) for each in found]


def test_layers_that_are_none_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model is loaded, with what is allowed."""
    for first, last in (("0.8", "0.4"), ("0", "1.5"), ("0.3", "0.3")):
        assert 2 == main(["bench", "blend", "--model", "nowhere", "--telling-layers", first, last])
        assert "--telling-layers is [" in capsys.readouterr().err
    for number in ("0", "-1"):
        assert 2 == main(["bench", "blend", "--model", "nowhere", "--layers", number])
        assert f"--layers is {number}: a whole number from 1 is allowed" in capsys.readouterr().err


def test_variants_are_compared_over_the_questions_both_have() -> None:
    """The quotient of means; others do not count."""
    rows = [row(0, "a", 0.1), row(1, "a", 0.3), row(0, "b", 0.4), row(1, "b", 0.4), row(2, "a", 9.0)]
    quotient = paired(rows, rows, "hops", "a", "b")
    assert quotient is not None
    assert 0.5 == pytest.approx(quotient.value)
    assert 0.25 == pytest.approx(quotient.low)
    assert 0.75 == pytest.approx(quotient.high)
    assert paired(rows, rows, "hops", "a", "c") is None


def test_questions_of_one_set_are_not_independent() -> None:
    """An interval over many questions of few sets is as wide as over the sets."""
    few = estimate([row(number, "a", number % 2) for number in range(8)], "kl")
    many = estimate([row(number, "a", number % 2, question=question) for number in range(8) for question in range(50)], "kl")
    assert (few.value, few.low, few.high) == (many.value, many.low, many.high)
    assert 0.5 == few.value
    assert few.low < 0.3 < 0.7 < few.high
    with pytest.raises(ValueError, match="no rows"):
        estimate([], "kl")


def test_a_file_of_rows_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a model; rows of another ratio stay out."""
    rows = [row(0, "cacheblend, alone", 0.4), row(0, "combined, prefix", 0.1), {**row(0, "combined, prefix", 9.0), "ratio": 0.5}]
    rows += [{**row(0, "full", 0.0, question=number, full=not number, right=not number), "ratio": 1.0} for number in range(3)]
    (tmp_path / "rows").write_text("".join(json.dumps(item) + "\n" for item in rows))
    assert 0 == main(["bench", "blend", "--report-only", "--rows", str(tmp_path / "rows")])
    printed = capsys.readouterr().out
    assert "hops, 15%: 1 questions of 1 sets, of 3 that were asked full prefill answers 1" in printed
    assert "KL 0.100 [0.100, 0.100]  of cacheblend, alone's 0.250" in printed
    command = [
        "bench",
        "blend",
        "--report-only",
        "--rows",
        str(tmp_path / "rows"),
        "--ratio",
        "0.15",
        "0.5",
        "--json",
        str(tmp_path / "json"),
    ]
    assert 0 == main(command)
    figures = {
        (item["name"], item["params"].get("method"), item["params"].get("recompute")): (item["value"], item["limit"])
        for item in json.loads((tmp_path / "json").read_text())["records"]
    }
    assert (pytest.approx(1 / 3), None) == figures["answered by full prefill", None, None]
    assert (0.1, None) == figures["mean KL", "combined, prefix", 0.15]
    assert (9.0, None) == figures["mean KL", "combined, prefix", 0.5]
    assert (0.25, 0.5) == figures["KL of plain CacheBlend's", "combined, prefix", 0.15]
    assert (1.0, 0.93) == figures["answers retained", "combined, prefix", 0.15]
    assert not any(method == "full" for _, method, _ in figures)


def test_the_margin_is_that_of_the_first_token() -> None:
    """And of the method's answer, not of full prefill's."""
    tokens = torch.tensor([2, 0])
    first, second, full = ([0.1, 0.3, 0.6], [0.9, 0.1, 1e-9], [0.0125, 0.0125, 0.975])
    ours, theirs = (Answer(torch.tensor(each).log(), tokens) for each in ([first, second], [full, second]))
    assert 0.3 == pytest.approx(compare(theirs, ours)["margin"])


def test_a_least_margin_gives_the_unsure_to_full_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its answer, at its cost on top; the sure keep theirs, and so does a margin that is just reached."""
    own = [{**row(number, "a", 0.4, right=False), "margin": margin, "f1": 0.0} for number, margin in enumerate((0.1, 0.3, 0.5))]
    rows = [*own, *({**row(number, "full", 0.0), "ratio": 1.0, "margin": 0.9, "f1": 1.0, "cost": 1.0, "share": 1.0} for number in range(3))]
    rounded = {**row(0, ROUNDED, 0.01), "ratio": 1.0, "margin": 0.1}
    assert with_least_margin(rows, 0.3) == with_least_margin([*rows, rounded], 0.3), "no method"
    served = by_variant(with_least_margin(rows, 0.3), "hops")["a"]
    values = [served[name].value for name in ("kl", "retained", "f1", "unsure", "cost", "share")]
    assert [0.8 / 3, 1 / 3, 1 / 3, 1 / 3, 0.2 + 1 / 3, 0.15] == pytest.approx(values)
    assert "unsure" not in by_variant(rows, "hops")["a"]
    (tmp_path / "rows").write_text("".join(json.dumps(item) + "\n" for item in rows))
    command = ["bench", "blend", "--report-only", "--rows", str(tmp_path / "rows")]
    assert 0 == main([*command, "--min-margin", "0", "0.3", "--json", str(tmp_path / "json")])
    printed = capsys.readouterr().out
    assert "hops, 15%: 3 questions" in printed
    assert "hops, 15%, margin 0.3: 3 questions" in printed
    found = json.loads((tmp_path / "json").read_text())["records"]
    kept = {each["params"].get("min_margin"): each["value"] for each in found if each["name"] == "answers retained"}
    assert {None: 0.0, 0.3: 1 / 3} == pytest.approx(kept)
    assert [1 / 3] == pytest.approx([each["value"] for each in found if each["name"] == "computed by the engine"])
    (tmp_path / "rows").write_text(json.dumps(row(4, "a", 0.1)) + "\n")
    assert 2 == main([*command, "--min-margin", "0.3"])
    assert "question 0 of set 4, a: no margin, or no row of full prefill" in capsys.readouterr().err


def test_a_least_margin_is_compared_with_what_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain CacheBlend stays plain: its KL is not that of full prefill because a method beside it is looked at."""
    rows = [{**row(0, name, kl), "margin": 0.5} for name, kl in (("a", 0.1), ("cacheblend, alone", 0.4))]
    rows += [{**row(1, name, kl), "margin": 0.1} for name, kl in (("a", 0.3), ("cacheblend, alone", 0.4))]
    rows += [{**row(number, "full", 0.0), "ratio": 1.0, "margin": 0.9} for number in range(2)]
    found = [(each.params.get("min_margin"), each.value) for each in records(rows, [0.15], [0.0, 0.3]) if "plain" in each.name]
    assert [None, 0.3] == [margin for margin, _ in found]
    assert [0.5, 0.125] == pytest.approx([value for _, value in found])
    (tmp_path / "rows").write_text("".join(json.dumps(item) + "\n" for item in rows))
    assert 0 == main(["bench", "blend", "--report-only", "--rows", str(tmp_path / "rows"), "--min-margin", "0.3"])
    assert "of cacheblend, alone's 0.125" in capsys.readouterr().out


@pytest.mark.parametrize("margin", ["1.5", "-0.1", "nan"])
def test_margins_that_are_none_are_refused(margin: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is measured, with what is allowed."""
    assert 2 == main(["bench", "blend", "--model", str(tmp_path / "none"), "--rows", str(tmp_path / "rows"), f"--min-margin={margin}"])
    assert f"--min-margin is [{margin}]: 0 to 1 is allowed" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_without_a_model_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, and which option is missing."""
    monkeypatch.delenv("KVTIER_TEST_MODEL", raising=False)
    assert 2 == main(["bench", "blend"])
    assert "--model" in capsys.readouterr().err
