"""Questions over documents of real text, with facts put in whose answers are known. Deterministic: a set's number makes all of it.

The text is Python's own language reference, which comes with the interpreter. A set has six documents and questions of four kinds:

* single: the answer stands in one document
* hops: one document names the place, another one what is asked about it; the answer names both, the place first
* border: a document ends in the middle of a sentence, and the next one begins with the answer
* prose: no gold answer; what full prefill writes is the measure
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

TASKS = ("single", "hops", "border", "prose")
CITIES = ("Lisbon", "Oslo", "Vienna", "Prague", "Dublin", "Madrid", "Warsaw", "Athens", "Berlin", "Rome", "Zurich", "Paris")
PEOPLE = ("Maria Lopez", "Peter Novak", "Anna Berg", "John Carter", "Laura Rossi", "David Klein", "Emma Stone", "Paul Weber")
BOXES = ("red", "blue", "green", "yellow", "black", "white", "brown", "purple")
WORDS = ("apple", "river", "candle", "garden", "window", "silver", "tiger", "bridge", "orange", "mountain", "pencil", "forest")
SYSTEM = (
    "<|im_start|>system\nYou are a careful assistant. You are given several documents. Read all of them and answer the question at the end"
    " with what the documents say.<|im_end|>\n<|im_start|>user\nHere are the documents.\n\n"
)
PROSE = (
    ("Summarize what the documents say.", "The documents describe"),
    ("What are the documents about?", "All of the documents are about"),
)
BEHIND_DOCUMENTS = "\nThat was the last document.\n"


@dataclass(frozen=True)
class Question:
    """What is asked behind the documents."""

    task: str
    text: str
    """up to where the answer begins"""
    answer: tuple[str, ...] | None
    """what is to be found and what is given, in turn, the former first; ``None``: whatever full prefill writes"""


@dataclass(frozen=True)
class DocumentSet:
    """Documents in the order of the prompt, and questions about them."""

    number: int
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def make_set(number: int, *, num_documents: int = 6, words_per_document: int = 170) -> DocumentSet:
    """The set of this number."""
    chance = random.Random(f"kvtier {number}")
    passages = list(_passages(words_per_document))
    bodies = [passages[index] for index in chance.sample(range(len(passages)), num_documents)]
    cities = chance.sample(CITIES, num_documents)
    people = chance.sample(PEOPLE, num_documents)
    boxes = chance.sample(BOXES, num_documents)
    words = chance.sample(WORDS, num_documents)
    budgets = [str(chance.randrange(10_000, 99_999)) for _ in range(num_documents)]
    offices = chance.sample(range(num_documents), num_documents)
    """whose person works where: the city of document ``offices[i]`` for the person of document i"""
    documents = []
    for index, body in enumerate(bodies):
        facts = [
            f"The budget of the {cities[index]} office is {budgets[index]} dollars.",
            f"{people[index]} works in the {cities[offices[index]]} office.",
        ]
        text = _insert(body, facts, chance)
        opening = f"{words[index - 1]}. " if index else ""
        ending = f" The secret word of the {boxes[index]} box is" if index + 1 < num_documents else ""
        documents.append(f"{opening}Document {chance.randrange(100, 999)}. {text}{ending}")
    questions = [_single(cities[index], budgets[index]) for index in chance.sample(range(num_documents), 4)]
    hops = [index for index in range(num_documents) if offices[index] != index]
    questions += [_hops(people[index], cities[offices[index]], budgets[offices[index]]) for index in chance.sample(hops, min(4, len(hops)))]
    questions += [_border(boxes[index], words[index]) for index in chance.sample(range(num_documents - 1), 4)]
    questions += [Question("prose", _turn(request, beginning), None) for request, beginning in PROSE]
    return DocumentSet(number, tuple(documents), tuple(questions))


def _turn(request: str, beginning: str) -> str:
    return f"\n{request}<|im_end|>\n<|im_start|>assistant\n{beginning}"


def _single(city: str, budget: str) -> Question:
    beginning = f"The budget of the {city} office is"
    return Question("single", _turn(f"What is the budget of the {city} office?", beginning), (f" {budget}",))


def _hops(person: str, city: str, budget: str) -> Question:
    request = f"What is the budget of the office where {person} works?"
    given = f" office. The budget of the {city} office is"
    return Question("hops", _turn(request, f"{person} works in the"), (f" {city}", given, f" {budget}"))


def _border(box: str, word: str) -> Question:
    return Question("border", _turn(f"What is the secret word of the {box} box?", f"The secret word of the {box} box is"), (f" {word}",))


def _insert(body: str, facts: Sequence[str], chance: random.Random) -> str:
    sentences = re.split(r"(?<=\.) ", body)
    for fact in facts:
        sentences.insert(chance.randrange(1, len(sentences) + 1), fact)
    return " ".join(sentences)


def _passages(num_words: int) -> Iterator[str]:
    """Runs of prose from the reference, each of about so many words."""
    for name in sorted(topics):
        paragraphs = [" ".join(part.split()) for part in topics[name].split("\n\n")]
        prose = [part for part in paragraphs if len(part) > 80 and part[0].isupper() and part.endswith(".") and "::" not in part]
        words: list[str] = []
        for part in prose:
            words += part.split()
            if len(words) >= num_words:
                yield " ".join(words[: num_words + 40])
                words = []
