"""Questions over documents of real text, with facts put in whose answers are known. Deterministic: a set's number makes all of it.

The text is Python's own language reference, which comes with the interpreter. A set has six documents and questions of four kinds:

* single: the answer stands in one document
* hops: one document names a person, another one what is asked about that person; the answer names both, the person first
* border: a document ends in the middle of a sentence, and the next one begins with the answer
* prose: no gold answer; what full prefill writes is the measure

Each fact begins in its own words, so that a small model can find it. The question ends as the fact begins, so that what comes next is
the answer and nothing else.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

TASKS = ("single", "hops", "border", "prose")
NUM_WORDS = 160
NUM_SINGLE = 6
NUM_HOPS = 12

NAMES = ("Robert", "Martha", "Felix", "Oscar", "Helen", "Victor")
HOURS = ("six", "seven", "eight", "nine", "ten", "eleven")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Sunday")
MONTHS = ("January", "March", "April", "June", "October", "December")
COLOURS = ("red", "blue", "green", "yellow", "white", "black")
FRUITS = ("apple", "banana", "cherry", "lemon", "orange", "peach")
ANIMALS = ("lion", "horse", "bear", "wolf", "rabbit", "eagle")
MATERIALS = ("glass", "silver", "copper", "iron", "wood", "stone")
CITIES = ("Lisbon", "Oslo", "Vienna", "Prague", "Dublin", "Madrid")
COUNTRIES = ("Brazil", "Canada", "Egypt", "India", "Japan", "Mexico")
GOODS = ("bicycles", "carpets", "lamps", "shoes", "clocks", "mirrors")
INSTRUMENTS = ("piano", "violin", "guitar", "trumpet", "flute", "drums")
PEOPLE = ("Maria", "Peter", "Anna", "John", "Laura", "David", "Emma", "Paul", "Nina", "Thomas", "Julia", "Simon")

Fact = tuple[str, str, Sequence[str]]
"""how it begins, how it is asked for, how it may end"""
FACTS: tuple[Fact, ...] = (
    ("The captain of the ship is called", "What is the captain of the ship called?", NAMES),
    ("The museum opens at", "When does the museum open?", HOURS),
    ("The favourite fruit of the king is the", "What is the favourite fruit of the king?", FRUITS),
    ("In the garden of the hotel stands a statue of a", "What does the statue in the garden of the hotel show?", ANIMALS),
    ("The train to the mountains leaves on", "When does the train to the mountains leave?", DAYS),
    ("The walls of the school are painted", "How are the walls of the school painted?", COLOURS),
    ("The best cake of the bakery is made with", "What is the best cake of the bakery made with?", FRUITS),
    ("The bicycle race ends in", "Where does the bicycle race end?", CITIES),
    ("The new roof of the library is made of", "What is the new roof of the library made of?", MATERIALS),
    ("The parcel for the doctor came from", "Where did the parcel for the doctor come from?", COUNTRIES),
    ("The winner of the chess match was", "Who was the winner of the chess match?", NAMES),
    ("The choir sings every", "When does the choir sing?", DAYS),
    ("The shop at the corner sells", "What does the shop at the corner sell?", GOODS),
    ("The farmer is looking for his", "What is the farmer looking for?", ANIMALS),
    ("The old castle was sold in", "When was the old castle sold?", MONTHS),
    ("The key to the cellar is made of", "What is the key to the cellar made of?", MATERIALS),
    ("The ambassador was born in", "Where was the ambassador born?", COUNTRIES),
    ("The lesson in the evening is about the", "What is the lesson in the evening about?", INSTRUMENTS),
)
DEEDS = (
    ("The first prize in the lottery went to", "the winner of the lottery"),
    ("The house on the hill belongs to", "the owner of the house on the hill"),
    ("The long letter from Spain was written by", "the writer of the letter from Spain"),
    ("The broken window was repaired by", "the one who repaired the window"),
    ("The missing dog was found by", "the one who found the dog"),
    ("The mayor of the town is", "the mayor of the town"),
    ("Last year's marathon was won by", "the winner of the marathon"),
    ("The portrait in the hall shows", "the one in the portrait"),
    ("Dinner for the guests was cooked by", "the one who cooked dinner"),
    ("The stolen bag was returned to", "the one who got the bag back"),
    ("The lecture on birds was given by", "the one who talked about birds"),
    ("The new bridge is named after", "the one whom the bridge is named after"),
)
"""how a fact about a person begins, and the person in a question"""
HABITS: tuple[Fact, ...] = (
    ("collects old", "What does the {who} collect?", GOODS),
    ("plays the", "What does the {who} play?", INSTRUMENTS),
    ("has a house in", "Where does the {who} have a house?", CITIES),
    ("wants to travel to", "Where does the {who} want to travel?", COUNTRIES),
    ("goes swimming every", "When does the {who} go swimming?", DAYS),
    ("drives a car that is", "What colour is the car of the {who}?", COLOURS),
)
SYSTEM = (
    "<|im_start|>system\nYou are a careful assistant. You are given several documents. Read all of them and answer the question at the end"
    " with what the documents say.<|im_end|>\n<|im_start|>user\nHere are the documents.\n\n"
)
PROSE = (
    ("Summarize what the documents say.", "The documents describe"),
    ("What are the documents about?", "All of the documents are about"),
    ("Summarize the first document.", "The first document says that"),
    ("Summarize the last document.", "The last document says that"),
    ("What can be learned from the documents?", "From the documents one can learn that"),
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


def make_set(number: int, *, num_documents: int = 6, words_per_document: int = NUM_WORDS) -> DocumentSet:
    """The set of this number."""
    chance = random.Random(f"kvtier {number}")
    passages = list(_passages(words_per_document))
    bodies = [passages[index] for index in chance.sample(range(len(passages)), num_documents)]
    facts = [(begins, asked, chance.choice(ends)) for begins, asked, ends in chance.sample(FACTS, NUM_SINGLE + num_documents - 1)]
    singles, borders = facts[:NUM_SINGLE], facts[NUM_SINGLE:]
    said: list[list[str]] = [[] for _ in bodies]
    for index, (begins, _, end) in enumerate(singles):
        said[index % num_documents].append(f"{begins} {end}.")
    questions = [Question("single", _turn(asked, begins), (f" {end}",)) for begins, asked, end in singles]
    questions += _hops(chance, said)
    questions += [Question("border", _turn(asked, begins), (f" {end}",)) for begins, asked, end in borders]
    questions += [Question("prose", _turn(request, begins), None) for request, begins in PROSE]
    documents = []
    for index, (body, sentences) in enumerate(zip(bodies, said, strict=True)):
        opening = f" {borders[index - 1][2]}." if index else ""
        ending = f" {borders[index][0]}" if index + 1 < num_documents else ""
        documents.append(f"{opening} Document {chance.randrange(100, 999)}. {_insert(body, sentences, chance)}{ending}")
    return DocumentSet(number, tuple(documents), tuple(questions))


def _hops(chance: random.Random, said: Sequence[list[str]]) -> list[Question]:
    """Questions from what a person did to what that person does, and both sentences into two documents. Two people share each habit."""
    people, deeds = chance.sample(PEOPLE, NUM_HOPS), chance.sample(DEEDS, NUM_HOPS)
    questions = []
    for index, (person, (begins, who)) in enumerate(zip(people, deeds, strict=True)):
        does, asked, ends = HABITS[index % len(HABITS)]
        end = chance.choice(ends)
        first, second = chance.sample(range(len(said)), 2)
        said[first].append(f"{begins} {person}.")
        said[second].append(f"{person} {does} {end}.")
        answer = (f" {person}", f". {person} {does}", f" {end}")
        questions.append(Question("hops", _turn(asked.format(who=who), begins), answer))
    return questions


def _turn(request: str, beginning: str) -> str:
    return f"\n{request}<|im_end|>\n<|im_start|>assistant\n{beginning}"


def _insert(body: str, facts: Sequence[str], chance: random.Random) -> str:
    sentences = re.split(r"(?<=\.) ", body)
    for fact in facts:
        sentences.insert(chance.randrange(1, len(sentences) + 1), fact)
    return " ".join(sentences)


def neutral_document() -> str:
    """Text of the same kind that is in no set, with no facts in it."""
    left = [words for passages, words in _topics(NUM_WORDS) if not passages]
    return " Document 100. " + " ".join([word for words in left for word in words][: NUM_WORDS + 40])


def _passages(num_words: int) -> Iterator[str]:
    """Runs of prose from the reference, each of about so many words."""
    for passages, _ in _topics(num_words):
        yield from passages


def _topics(num_words: int) -> Iterator[tuple[list[str], list[str]]]:
    """Of each topic of the reference: runs of its prose of about so many words, and the words that are left."""
    for name in sorted(topics):
        paragraphs = [" ".join(part.split()) for part in topics[name].split("\n\n")]
        prose = [part for part in paragraphs if len(part) > 80 and part[0].isupper() and part.endswith(".") and "::" not in part]
        passages: list[str] = []
        words: list[str] = []
        for part in prose:
            words += part.split()
            if len(words) >= num_words:
                passages.append(" ".join(words[: num_words + 40]))
                words = []
        yield passages, words
