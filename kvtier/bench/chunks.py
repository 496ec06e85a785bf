"""``kvtier bench chunks``: prompts of reused chunks in the real vLLM, in the environment where vLLM is installed.

Time to first token of six cached chunks (3,000 tokens in all) in ever new orders and a new question of 60 tokens, beside full prefill
of the same prompts in the same engine. How long other requests take that generate while two such prompts come, beside two that are
computed. How long a prompt of new documents takes whose chunks are stored, by either way to come by them (``blend.entries``). And the
longest step that others have to wait for in an engine that computes few tokens in one, with blends over several steps and at once.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from kvtier.bench.engine import ARGUMENTS, ENVIRONMENT, open_engine
from kvtier.bench.options import add_json, add_rounds
from kvtier.bench.report import Record, publish, record
from kvtier.bench.scratch import scratch_directory

NUM_SYSTEM_TOKENS = 64
NUM_CHUNKS = 6
CHUNK_TOKENS = 489
QUESTION_TOKENS = 60
RATIO = 0.15
LIMIT = 0.35
METHODS = ("epic", "cacheblend", "prophetkv", "combined")
OTHERS_METHOD = "combined"
OTHER_RATIOS = (0.0, 0.05, 0.3, 0.5)
"""with that method, for the curve"""
UNSURE = "unsure"
MARGINS = {"sure": 1e-9, UNSURE: 1.0}
"""what every model reaches, and none: with that method, what it takes to look"""
ENTRIES = ("computed", "served")
STEP_TOKENS = 256
"""that an engine computes in a step, where it is to keep nobody waiting for long"""
SPREADS = {"over steps": None, "at once": 1_000_000}
"""``blend.max_step_tokens``"""
NUM_OTHERS = 4
OTHERS_TOKENS = 48
TIERS = [{"type": "host", "capacity": "1GiB"}]
COMPUTED = {"load": False, "store": False}
Prompt = tuple[list[int], list[list[int]]]


class Case(NamedTuple):
    """A way to get the first token."""

    label: str
    method: str
    """empty: the prompt is computed"""
    ratio: float
    min_margin: float = 0.0

    @property
    def is_blended(self) -> bool:
        """Whether the prompt is put together from chunks in the end."""
        return bool(self.method) and self.min_margin < 1

    @property
    def refusal(self) -> str:
        """What the answer has to say of it."""
        return UNSURE if self.method and not self.is_blended else ""

    def options(self, spans: list[list[int]]) -> dict[str, Any]:
        """Of a request."""
        return _options(spans, self.method, self.ratio, self.min_margin) if self.method else COMPUTED


COMPUTING = Case("computed", "", 1.0)
CASES = (
    COMPUTING,
    *(Case(name, name, RATIO) for name in METHODS),
    *(Case(OTHERS_METHOD, OTHERS_METHOD, ratio) for ratio in OTHER_RATIOS),
    *(Case(f"{OTHERS_METHOD}, {label}", OTHERS_METHOD, RATIO, margin) for label, margin in MARGINS.items()),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", required=True, help="directory of a checkpoint that vLLM can load")
    add_json(parser)
    add_rounds(parser, 5)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    os.environ.update(ENVIRONMENT)
    with scratch_directory() as directory:
        with open_engine(args.model, directory, TIERS, blend={"enabled": True}) as ask:
            _store(ask)
            records = [*first_tokens(ask, args.rounds), *others(ask, args.rounds)]
        for entries in ENTRIES:
            with open_engine(args.model, directory, TIERS, blend={"enabled": True, "entries": entries}) as ask:
                records += storing(ask, entries, args.rounds)
        for label, max_step_tokens in SPREADS.items():
            arguments = {**ARGUMENTS, "max_num_batched_tokens": STEP_TOKENS}
            blend = {"enabled": True, "max_step_tokens": max_step_tokens}
            with open_engine(args.model, directory, TIERS, arguments=arguments, blend=blend) as ask:
                _store(ask)
                records += longest_steps(ask, label, args.rounds)
    publish("kvtier bench chunks", records, args.json)
    return 0


def first_tokens(ask: Any, rounds: int) -> Iterator[Record]:
    """Every method, and one with every ratio and with both margins, by turns with full prefill on the same prompts."""
    times: dict[Case, list[float]] = {case: [] for case in CASES}
    for number in range(rounds):
        for case, seconds in times.items():
            ids, spans = _prompt(number)
            answer = ask([ids], [case.options(spans)])
            if case.is_blended and case.min_margin and answer["refused"] == [UNSURE]:
                continue  # behind random tokens two may be equally likely
            _check(answer, int(case.is_blended))
            if answer["refused"] != [case.refusal]:
                raise RuntimeError(f"{case.label}: the chunks were refused as {answer['refused']}, not as {case.refusal!r}")
            seconds.append(answer["ttft_s"])
    params = {"tokens": NUM_CHUNKS * CHUNK_TOKENS + NUM_SYSTEM_TOKENS + QUESTION_TOKENS}
    computed = times.pop(COMPUTING)
    yield record("time to first token, computed", params, computed, "ms")
    for case, seconds in ((case, seconds) for case, seconds in times.items() if seconds):
        more = {**params, "ratio": case.ratio}
        yield record(f"time to first token, {case.label}", more, seconds, "ms")
        share = statistics.median(seconds) / statistics.median(computed)
        limit = LIMIT if case.ratio == RATIO and case.is_blended else None
        yield Record(f"of computing, {case.label}", more, share, "ratio", 0.0, limit, None if limit is None else share / limit)


def others(ask: Any, rounds: int) -> Iterator[Record]:
    """Short prompts with long answers alone, beside two prompts that are computed, and beside two of chunks."""
    times: dict[str, list[float]] = {"alone": [], "computed": [], OTHERS_METHOD: []}
    short = [_tokens(("other", index), 40) for index in range(NUM_OTHERS)]
    for number in range(rounds):
        for name, seconds in times.items():
            beside = [] if name == "alone" else [_prompt(1000 + 2 * number), _prompt(1001 + 2 * number)]
            options = [COMPUTED if name == "computed" else _options(spans, name) for _, spans in beside]
            prompts = [*short, *(ids for ids, _ in beside)]
            answer = ask(prompts, [COMPUTED] * NUM_OTHERS + options, OTHERS_TOKENS)
            _check(answer, 0 if name in ("alone", "computed") else len(beside))
            seconds.append(max(answer["last_s"][:NUM_OTHERS]))
    params = {"others": NUM_OTHERS, "tokens": OTHERS_TOKENS}
    alone = statistics.median(times["alone"])
    for name, seconds in times.items():
        what = "alone" if name == "alone" else f"beside two prompts, {name}"
        yield record(f"other requests {what}", params, seconds, "ms")
    loss = (statistics.median(times[OTHERS_METHOD]) - alone) / (statistics.median(times["computed"]) - alone)
    yield Record("what others lose, of computing", params, loss, "ratio", 0.0, 1.0, loss)


def longest_steps(ask: Any, label: str, rounds: int) -> Iterator[Record]:
    """The longest step of requests that generate while a prompt comes, computed and of chunks."""
    times: dict[bool, list[float]] = {False: [], True: []}
    firsts: dict[bool, list[float]] = {False: [], True: []}
    short = [_tokens(("other", index), 40) for index in range(NUM_OTHERS)]
    for number in range(rounds):
        for is_blended, seconds in times.items():
            ids, spans = _prompt(2000 + number)
            options = _options(spans, OTHERS_METHOD) if is_blended else COMPUTED
            answer = ask([ids, *short], [options] + [COMPUTED] * NUM_OTHERS, OTHERS_TOKENS)
            _check(answer, int(is_blended))
            seconds.append(answer["longest_step_s"])
            firsts[is_blended].append(answer["ttft_s"])
    params = {"others": NUM_OTHERS, "tokens": len(ids), "step tokens": STEP_TOKENS}
    for is_blended, what in ((False, f"computed, blends {label}"), (True, f"{OTHERS_METHOD}, {label}")):
        more = {**params, "ratio": RATIO} if is_blended else params
        yield record(f"longest step beside a prompt, {what}", more, times[is_blended], "ms")
        yield record(f"its time to first token, {what}", more, firsts[is_blended], "ms")


def storing(ask: Any, entries: str, rounds: int) -> Iterator[Record]:
    """Prompts of new documents, with an answer that is long enough for their chunks to be stored beside it, and the same without that.

    Raises RuntimeError where the chunks of the last one were not stored.
    """
    times: dict[bool, list[float]] = {False: [], True: []}
    ask([_tokens("warm", CHUNK_TOKENS)], [COMPUTED])
    for number in range(rounds):
        for is_stored, seconds in times.items():
            documents = f"{entries} {number} {is_stored}"
            ids, spans = _prompt(0, documents=documents)
            options = {"store_only_prefix": 0, "blend": {"spans": spans}} if is_stored else COMPUTED
            answer = ask([ids], [options], 4 * NUM_CHUNKS)
            _check(answer, 0)
            seconds.append(answer["last_s"][0])
    ids, spans = _prompt(1, documents=documents)
    _check(ask([ids], [_options(spans, OTHERS_METHOD)]), 1)
    params = {"tokens": len(ids), "answer": 4 * NUM_CHUNKS, "entries": entries}
    yield record("prompt of new documents, nothing stored", params, times[False], "ms")
    yield record("prompt of new documents, chunks stored", params, times[True], "ms")
    share = statistics.median(times[True]) / statistics.median(times[False]) - 1
    yield Record("storing chunks, of computing the prompt", params, share, "ratio")


def _store(ask: Any) -> None:
    """Serves the documents once, so that their chunks are stored, and goes on until all are."""
    ids, spans = _prompt(-1)
    ask([ids], [{"blend": {"spans": spans}}], 10 * NUM_CHUNKS)


def _prompt(number: int, *, documents: str = "document") -> Prompt:
    """The documents of this name in the order of this number, and its question."""
    order = list(range(NUM_CHUNKS))
    if number >= 0:
        random.Random(number).shuffle(order)
        order = order[1:] + order[:1] if order[0] == 0 else order  # or the prompt would begin as the one that was stored
    ids = _tokens("system", NUM_SYSTEM_TOKENS)
    spans = []
    for document in order:
        spans.append([len(ids), len(ids) + CHUNK_TOKENS])
        ids += _tokens((documents, document), CHUNK_TOKENS)
    return ids + _tokens(("question", number), QUESTION_TOKENS), spans


def _tokens(seed: object, number: int) -> list[int]:
    chance = random.Random(repr(seed))
    return [chance.randrange(1000, 40_000) for _ in range(number)]


def _options(spans: list[list[int]], method: str, ratio: float = RATIO, min_margin: float = 0.0) -> dict[str, Any]:
    return {"store": False, "blend": {"spans": spans, "method": method, "ratio": ratio, "min_margin": min_margin}}


def _check(answer: dict[str, Any], num_blended: int) -> None:
    found = sum(tokens >= 0.9 * NUM_CHUNKS * CHUNK_TOKENS for tokens in answer["blended"])
    if found != num_blended:
        raise RuntimeError(f"{found} of {num_blended} prompts were put together from chunks")
