"""One engine in one process: what the tests of the real engine let it do. Prints nothing that counts; writes a JSON file."""

from __future__ import annotations

import atexit
import gc
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.engine.faulty_store import StoreWithFaults

MAX_TOKENS = 12
SENTENCES = (
    "Charles Babbage designed the Analytical Engine in 1837, and Ada Lovelace wrote the first program for it. ",
    "The tide rises twice a day because the Moon pulls at the sea, and the Sun helps or hinders it. ",
    "Bread needs flour, water, salt and time; of these the last is the one that most bakers are short of. ",
    "A letter from Lisbon to Goa took eight months by sea, and the answer came a year and a half later. ",
)


def prompts() -> list[str]:
    """Eight prompts of 130 to 380 tokens over four documents: pairs share a document and differ in the question."""
    documents = [sentence * (5 + 3 * number) for number, sentence in enumerate(SENTENCES)]
    return [document + f"Question {number}: what happened then? Answer:" for document in documents for number in (1, 2)]


def make_engine(settings: dict[str, Any]) -> Any:
    """vLLM, with the kvtier connector where ``settings["kvtier"]`` holds its settings."""
    from vllm import LLM  # noqa: PLC0415 - after the environment is set
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    arguments = {
        "model": os.environ["KVTIER_TEST_MODEL"],
        "dtype": "float32",
        "max_model_len": 1024,
        "enforce_eager": True,
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": False,
        "disable_log_stats": False,
        **settings.get("engine", {}),
    }
    if "kvtier" in settings:
        arguments["kv_transfer_config"] = KVTransferConfig(
            kv_connector="KVTierConnector",
            kv_connector_module_path="kvtier.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy=settings.get("failure_policy", "recompute"),
            kv_connector_extra_config=settings["kvtier"],
        )
    return LLM(**arguments)


def generate(llm: Any, texts: list[str], params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Greedy tokens, their log-probabilities and what was loaded, in the order of the prompts."""
    from vllm import SamplingParams  # noqa: PLC0415

    extra = {"kv_transfer_params": params} if params else None
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0, ignore_eos=True, extra_args=extra)
    outputs = llm.generate(texts, sampling, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
            "cached": output.num_cached_tokens,
            "prompt_tokens": len(output.prompt_token_ids),
            "loaded": (output.kv_transfer_params or {}).get("kvtier"),
        }
        for output in outputs
    ]


def metrics(llm: Any) -> dict[str, float]:
    """vLLM's own counters that say what was skipped and what happened."""
    names = ("vllm:external_prefix_cache_hits", "vllm:num_preemptions")
    return {metric.name: metric.value for metric in llm.get_metrics() if metric.name in names}


def counters() -> dict[str, int]:
    """kvtier's, those that are not zero; none where the engine is in a process of its own."""
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
        return {}
    from kvtier import Controller  # noqa: PLC0415

    return {name: count for name, count in Controller.of().stats().result(60.0).counters.items() if count}


def repeat(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Every prompt alone, then again, then all at once; with the engine's own prefix cache forgotten in between."""
    rounds = []
    for together in settings.get("rounds", [False, False, True]):
        llm.reset_prefix_cache()
        texts = prompts()[: settings.get("num_prompts", 8)]
        rounds.append(generate(llm, texts) if together else [generate(llm, [text])[0] for text in texts])
    return {"rounds": rounds, "metrics": metrics(llm), "counters": counters() if "kvtier" in settings else {}}


def interrupted(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Every prompt alone, round after round; between two rounds it says so and waits until it may go on."""
    folder = Path(settings["folder"])
    rounds = []
    for number in range(settings["num_rounds"]):
        rounds.append([generate(llm, [text])[0] for text in prompts()])
        (folder / f"done-{number}").touch()
        while not (folder / f"go-{number}").exists():
            time.sleep(0.01)
    return {"rounds": rounds}


def numbered(number: int) -> list[str]:
    """Prompts that no other number shares a block with."""
    return [f"{number} of those. " + text for text in prompts()[:4]]


def in_turns(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Sets of prompts by number, each prompt alone. With a folder it waits for its turn before each set, and says when the set is done."""
    folder = settings.get("folder")
    rounds = []
    for turn, number in enumerate(settings["sets"]):
        while folder is not None and not (Path(folder) / f"go-{turn}").exists():
            time.sleep(0.01)
        rounds.append([generate(llm, [text])[0] for text in numbered(number)])
        if folder is not None:
            (Path(folder) / f"done-{turn}").touch()
    return {"rounds": rounds, "counters": counters() if "kvtier" in settings else {}}


def endless(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A set of prompts; then it says so, and goes on with others, several at once, until it is killed."""
    number = settings["set"]
    generate(llm, numbered(number))
    for count in itertools.count():
        generate(llm, [f"{count} more. " + text for text in numbered(number)])
        Path(settings["ready"]).touch()
    return {}


def separated(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Requests that must not use each other's KV, or not use kvtier at all; aborts in flight; a reset."""
    text = prompts()[0]
    out: dict[str, Any] = {}
    out["unstored"] = generate(llm, [text], {"kvtier": {"store": False}})[0]
    out["first"] = generate(llm, [text])[0]
    out["unloaded"] = generate(llm, [text], {"kvtier": {"load": False}})[0]
    out["salted"] = llm_salted(llm, text)
    out["salted_again"] = llm_salted(llm, text)
    abort_in_flight(llm)
    out["after_abort"] = [generate(llm, [other])[0] for other in prompts()]
    llm.llm_engine.reset_prefix_cache(reset_connector=True)
    out["after_reset"] = generate(llm, [text])[0]
    return out


def llm_salted(llm: Any, text: str) -> dict[str, Any]:
    """A request with a cache salt."""
    return generate(llm, [{"prompt": text, "cache_salt": "tenant"}])[0]  # type: ignore[list-item]


def abort_in_flight(llm: Any) -> None:
    """Six requests are aborted at different points of their lives."""
    from vllm import SamplingParams  # noqa: PLC0415

    engine = llm.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    for number, text in enumerate(prompts()[:6]):
        engine.add_request(f"abort-{number}", text, sampling)
    for number in range(6):
        engine.abort_request([f"abort-{number}"])
        engine.step()
    while engine.has_unfinished_requests():
        engine.step()


def failing(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Copies to the engine fail: all of them, then every second one, then none."""
    from kvtier.copy.cpu import NativeCopier  # noqa: PLC0415
    from kvtier.copy.layered import ThreadedLayerLoader  # noqa: PLC0415

    originals = NativeCopier.scatter, ThreadedLayerLoader.copy_layer
    calls = 0

    def never(*arguments: Any) -> Any:
        raise RuntimeError("injected: this copy fails")

    def sometimes(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2:
            raise RuntimeError("injected: this copy fails")
        return originals[0](*arguments)

    def behind_layer_10(self: Any, layer: int, *arguments: Any) -> Any:
        if layer > 10:
            raise RuntimeError("injected: this layer fails")
        return originals[1](self, layer, *arguments)

    texts = prompts()[: settings.get("num_prompts", 8)]
    rounds = [generate(llm, texts)]
    for whole, by_layer in ((never, never), (sometimes, behind_layer_10), originals):
        NativeCopier.scatter, ThreadedLayerLoader.copy_layer = whole, by_layer  # type: ignore[assignment,method-assign]
        rounds.append([generate(llm, [text])[0] for text in texts])
    rounds.append(generate(llm, texts))
    return {"rounds": rounds}


def failing_beside(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """A load fails, and some steps later another request comes that begins alike; for each number of steps in between."""
    from vllm import SamplingParams  # noqa: PLC0415

    from kvtier.copy.cpu import NativeCopier  # noqa: PLC0415
    from kvtier.copy.layered import ThreadedLayerLoader  # noqa: PLC0415

    def never(*arguments: Any) -> Any:
        raise RuntimeError("injected: this copy fails")

    texts = prompts()[-2:]
    out: dict[str, Any] = {"first": [generate(llm, [text])[0]["tokens"] for text in texts], "rounds": []}
    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    NativeCopier.scatter = ThreadedLayerLoader.copy_layer = never  # type: ignore[assignment,method-assign]
    for num_steps in range(settings["num_rounds"]):
        llm.reset_prefix_cache()
        engine = llm.llm_engine
        engine.add_request(f"first-{num_steps}", texts[0], sampling)
        done = [output for _ in range(num_steps) for output in engine.step()]
        engine.add_request(f"second-{num_steps}", texts[1], sampling)
        while engine.has_unfinished_requests():
            done += engine.step()
        tokens = {output.request_id: list(output.outputs[0].token_ids) for output in done if output.finished}
        out["rounds"].append([tokens[name] for name in sorted(tokens)])
    out["counters"] = counters()
    return out


def controlled(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Every verb of the control API on this engine, and what the next request then gets from where."""
    from kvtier import Controller  # noqa: PLC0415

    controller = Controller.of()
    texts = [prompts()[number] for number in (0, 2, 4)]
    tokenizer = llm.get_tokenizer()
    kept, moved, other = (tokenizer(text)["input_ids"] for text in texts)
    out: dict[str, Any] = {"first": [generate(llm, [text])[0] for text in texts]}
    out["pinned"] = controller.pin(kept, ttl_s=600.0).result(60.0).num_tokens
    pressure(llm, 1)
    out["after_pressure"] = [generate(llm, [text])[0] for text in texts]
    pressure(llm, 2)
    out["prefetched"] = controller.prefetch(moved, deadline_s=60.0).result(60.0).ready_tokens
    out["after_prefetch"] = generate(llm, texts[1:2])
    out["moved"] = controller.move(moved, from_tier="host", to_tier="disk").result(60.0).num_blocks
    out["after_move"] = generate(llm, texts[1:2])
    out["evicted"] = controller.evict(moved, tier="all").result(60.0).num_blocks
    out["after_evict"] = generate(llm, texts[1:2])
    controller.set_policy("host", "fifo").result(60.0)
    salted = [llm_salted(llm, texts[2]), llm_salted(llm, texts[2])]
    out["cleared"] = controller.clear(tenant="tenant").result(60.0).num_blocks
    out["salted"] = [*salted, llm_salted(llm, texts[2])]
    controller.clear(tier="all").result(60.0)
    out["after_clear"] = generate(llm, texts)
    out["found"] = controller.lookup(other).result(60.0).hit_tokens
    out["estimates"] = dict(controller.stats().result(60.0).estimates)
    out["health"] = controller.health(check_books=True).result(60.0).ok
    return out


def pressure(llm: Any, number: int) -> None:
    """Prompts that nobody asks for again, more than host memory holds."""
    for text in prompts():
        generate(llm, [f"{number} of those. " + text])


def faulty_store(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Two prompts, from the store again and again, with every fault of it in turn, and after each fault."""
    from kvtier import Controller  # noqa: PLC0415

    controller = Controller.of()
    texts = prompts()[2:4]

    def ask() -> dict[str, Any]:
        """With nothing but the store to take blocks from."""
        controller.clear(tier="all").result(60.0)
        before, start = counters(), time.perf_counter()
        answers = [generate(llm, [text])[0] for text in texts]
        seconds = time.perf_counter() - start
        counted = {name: count - before.get(name, 0) for name, count in counters().items() if count != before.get(name, 0)}
        return {"answers": answers, "seconds": seconds, "counters": counted}

    with StoreWithFaults(Path(settings["store"])) as store:
        out: dict[str, Any] = {"computed": ask()}
        out["loaded"] = until_loaded(ask)
        for fault in settings["faults"]:
            store.begin(fault)
            during = [ask() for _ in range(3)]
            store.end(fault)
            out[fault] = {"during": during, "after": until_loaded(ask)}
    return out


def until_loaded(ask: Callable[[], dict[str, Any]], timeout_s: float = 90.0) -> dict[str, Any]:
    """Asks until the document of both prompts comes from the store, or the last answer once the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        time.sleep(0.5)
        found = ask()
        if any((answer["loaded"] or {}).get("disk_tokens") for answer in found["answers"]) or time.monotonic() > deadline:
            return found


def timing(llm: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of rounds of fresh prompts, for the cost of storing what is never used again."""
    seconds = []
    for number in range(settings["num_rounds"]):
        texts = [f"{number} {index} " + text for index, text in enumerate(prompts())]
        start = time.perf_counter()
        generate(llm, texts)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds}


def refusals(settings: dict[str, Any]) -> dict[str, Any]:
    """Engines that must not start, and what they say."""
    messages = []
    for case in settings["cases"]:
        try:
            make_engine(case)
        except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
            messages.append(f"{type(error).__name__}: {error}")
        else:
            messages.append("started")
    return {"messages": messages}


SCENARIOS = {
    "faulty_store": faulty_store,
    "repeat": repeat,
    "interrupted": interrupted,
    "in_turns": in_turns,
    "endless": endless,
    "separated": separated,
    "failing": failing,
    "failing_beside": failing_beside,
    "controlled": controlled,
    "timing": timing,
}


def _run(settings: dict[str, Any]) -> dict[str, Any]:
    """The result of a scenario; its engine is gone by then."""
    if settings["scenario"] == "refusals":
        return refusals(settings)
    from tests.engine.blend_scenarios import BLEND_SCENARIOS  # noqa: PLC0415 - it uses this module
    from tests.engine.draft_scenarios import drafted  # noqa: PLC0415 - as above
    from tests.engine.random_scenarios import answered_alone, random_requests  # noqa: PLC0415 - as above

    llm = make_engine(settings)
    more = {"drafted": drafted, "random_requests": random_requests, "answered_alone": answered_alone}
    result: dict[str, Any] = {**SCENARIOS, **BLEND_SCENARIOS, **more}[settings["scenario"]](llm, settings)
    del llm
    gc.collect()
    return result


def main(out: Path, log: Path, settings: dict[str, Any], environment: dict[str, str]) -> None:
    """Runs a scenario in this process, which does nothing else: all that it says goes to ``log``."""
    os.setsid()
    os.environ.update(environment)
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        result = _run(settings)
    except BaseException:  # the boundary of this process: it would wait for the engine's processes, which wait for it
        traceback.print_exc()
        sys.stderr.flush()
        os.killpg(os.getpgrp(), signal.SIGKILL)
        raise
    out.write_text(json.dumps(result))
    atexit._run_exitfuncs()  # a forked process ends without them
