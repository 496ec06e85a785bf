"""What the test of random requests lets an engine do: requests, aborts, verbs and faults in any order, all from one number."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.scenarios import counters

MAX_TOKENS = 8
NUM_SEGMENTS, DEPTH = 2, 4
"""prompts are paths in a tree: as many ways to go on, as many times at most"""
SALTS = ("", "", "", "one", "other")
MAX_STEPS = 20_000
"""of the engine, at the end; a request that is not done by then never will be"""


def random_requests(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Each request that was answered, with its prompt; what the books say at the end."""
    player = _Player(llm, random.Random(settings["seed"]), Path(settings["disk"]) if "disk" in settings else None)
    for _ in range(settings["num_actions"]):
        player.act()
    return player.finish()


def answered_alone(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """The greedy answer to each prompt by itself."""
    from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt in settings["prompts"]]
    outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for prompt in prompts]
    return {"answers": [_answer(output) for output in outputs]}


def segment(name: tuple[int, ...]) -> list[int]:
    """Tokens that follow one another on a path: 20 to 110 of them, the same for the same name."""
    source = random.Random(repr(name))
    return [source.randrange(100, 40_000) for _ in range(source.randrange(20, 110))]


class _Player:
    def __init__(self, llm: Any, source: random.Random, disk: Path | None) -> None:
        from kvtier import Controller  # noqa: PLC0415 - after the environment is set

        self._llm, self._engine, self._random, self._disk = llm, llm.llm_engine, source, disk
        self._controller = Controller.of()
        self._names = map(str, itertools.count())
        self._open: dict[str, list[int]] = {}
        self._aborted: set[str] = set()
        self._answers: dict[str, dict[str, Any]] = {}
        self._jobs: list[tuple[str, Any]] = []
        self._faults = _Faults(source)

    def act(self) -> None:
        """One of everything that can happen, some of it more often."""
        kinds: dict[Callable[[], None], int] = {
            self._request: 16,
            self._step: 32,
            self._abort: 1,
            self._verb: 4,
            self._faults.turn: 3,
            self._damage: 1,
            self._pause: 2,
        }
        (kind,) = self._random.choices(list(kinds), list(kinds.values()))
        kind()

    def finish(self) -> dict[str, Any]:
        """All that is open is answered without faults; the books are right."""
        self._faults.end()
        self._answer_all()
        verbs = [(verb, _ending(job)) for verb, job in self._jobs]
        health = self._controller.health(check_books=True).result(60.0)
        return {
            "stuck": sorted(self._open),
            "answers": list(self._answers.values()),
            "num_aborted": len(self._aborted),
            "verbs": verbs,
            "problems": list(health.problems),
            "counters": counters(),
        }

    def _prompt(self) -> list[int]:
        path = tuple(self._random.randrange(NUM_SEGMENTS) for _ in range(self._random.randrange(1, DEPTH + 1)))
        return [token for end in range(1, len(path) + 1) for token in segment(path[:end])]

    def _request(self) -> None:
        from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

        if len(self._open) >= 12:
            return self._step()
        name, prompt, salt = next(self._names), self._prompt(), self._random.choice(SALTS)
        wishes = self._random.choice([{}, {}, {}, {}, {"store": False}, {"load": False}, {"tenant": "one"}, {"session": "talk"}])
        sampling = SamplingParams(
            temperature=0,
            max_tokens=self._random.randrange(1, MAX_TOKENS + 1),
            logprobs=0,
            ignore_eos=True,
            extra_args={"kv_transfer_params": {"kvtier": wishes}} if wishes else None,
        )
        self._engine.add_request(name, {"prompt_token_ids": prompt, **({"cache_salt": salt} if salt else {})}, sampling)
        self._open[name] = prompt
        return None

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                prompt = self._open.pop(output.request_id, None)
                if prompt is not None:
                    self._answers[output.request_id] = {"prompt": prompt, **_answer(output)}

    def _answer_all(self) -> None:
        for _ in range(MAX_STEPS):
            if not self._open:
                break
            self._step()

    def _abort(self) -> None:
        if self._open:
            name = self._random.choice(sorted(self._open))
            self._engine.abort_request([name])
            self._aborted.add(name)
            del self._open[name]

    def _pause(self) -> None:
        """All is answered; then the engine forgets what it has itself, and sometimes kvtier all that it has."""
        self._answer_all()
        self._engine.reset_prefix_cache(reset_connector=self._random.random() < 0.1)

    def _verb(self) -> None:
        control, prompt, tier = self._controller, self._prompt(), self._random.choice(["host", "all"])
        salt = self._random.choice(SALTS)
        tiers = ["host", "disk"] if self._disk is not None else ["host"]
        verbs: dict[str, Callable[[], Any]] = {
            "pin": lambda: control.pin(prompt, salt=salt, ttl_s=self._random.choice([0.05, 1.0])),
            "evict": lambda: control.evict(prompt, salt=salt, tier=tier),
            "clear": lambda: control.clear(tenant=self._random.choice(["one", "other"])),
            "clear a tier": lambda: control.clear(tier=tier),
            "set_policy": lambda: control.set_policy("host", self._random.choice(["lru", "hazard", "s3fifo", "arc", "default"])),
            "quota": lambda: control.quota("one", tier="host", num_bytes=self._random.choice([None, 0, 400_000])),
            "prefetch": lambda: control.prefetch(prompt, salt=salt, deadline_s=0.5),
            "move": lambda: control.move(prompt, salt=salt, from_tier=tiers[0], to_tier=tiers[-1]),
            "move up": lambda: control.move(prompt, salt=salt, from_tier=tiers[-1], to_tier=tiers[0]),
        }
        name = self._random.choice(sorted(verbs) if self._disk is not None else sorted(verbs.keys() - {"move", "move up"}))
        self._jobs.append((name, verbs[name]()))

    def _damage(self) -> None:
        """Bytes on the disk change."""
        files = [path for path in sorted(self._disk.rglob("*")) if path.stat().st_size > 1 << 20] if self._disk is not None else []
        for path in files[:1]:
            with path.open("r+b") as file:
                for _ in range(self._random.randrange(1, 60)):
                    file.seek(self._random.randrange(path.stat().st_size))
                    file.write(b"?")


class _Faults:
    """Copies to the engine, from it and within its memory that fail, some or all, until they do not."""

    def __init__(self, source: random.Random) -> None:
        from kvtier.copy.cpu import NativeCopier  # noqa: PLC0415 - after the environment is set
        from kvtier.copy.layered import ThreadedLayerLoader  # noqa: PLC0415 - as above
        from kvtier.copy.torch_copier import TorchCopier  # noqa: PLC0415 - as above

        self._random, self._source = source, random.Random(source.random())
        self._rates: dict[tuple[type, str], float] = {}
        for kind in (NativeCopier, TorchCopier):
            self._may_fail(kind, "gather")
            self._may_fail(kind, "scatter")
        self._may_fail(ThreadedLayerLoader, "copy_layer")

    def turn(self) -> None:
        """One kind of copies is better or worse from now on."""
        self._rates[self._random.choice(list(self._rates))] = self._random.choice([0.0, 0.0, 0.0, 0.2, 1.0])

    def end(self) -> None:
        """No more of them."""
        self._rates = dict.fromkeys(self._rates, 0.0)

    def _may_fail(self, kind: type, name: str) -> None:
        original = getattr(kind, name)
        self._rates[kind, name] = 0.0

        def copy(*arguments: Any) -> Any:
            if self._source.random() < self._rates[kind, name]:
                raise RuntimeError("injected: this copy fails")
            return original(*arguments)

        setattr(kind, name, copy)


def _answer(output: Any) -> dict[str, Any]:
    (completion,) = output.outputs
    return {
        "tokens": list(completion.token_ids),
        "logprobs": [next(iter(step.values())).logprob for step in completion.logprobs],
        "loaded": (output.kv_transfer_params or {}).get("kvtier"),
    }


def _ending(job: Any) -> str:
    from kvtier.errors import KVTierError  # noqa: PLC0415 - after the environment is set

    try:
        job.result(60.0)
    except KVTierError as error:
        return type(error).__name__
    return ""
