"""What the tests of chunk reuse let the real engine do."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from tests.engine.scenarios import SENTENCES, metrics

SYSTEM = "You answer questions about the texts below, shortly and truthfully. Here are the texts. "
QUESTION = "\nQuestion {number}: what happened then? Answer:"
SEPARATOR = "\n-----\n"
MAX_TOKENS = 10
METHODS = ("combined", "epic", "cacheblend", "prophetkv", "cachecraft", "none")
ORDERS = ([0, 1, 2], [2, 0, 1], [1, 2, 0], [0, 1, 0], [3, 1], [2, 3, 0, 1])
"""documents of a prompt; the fourth has one twice"""
REFUSED = {
    "spans_overlap": {"spans": [[10, 60], [50, 90]]},
    "span_outside_prompt": {"spans": [[10, 100_000]]},
    "ratio": {"ratio": 1.5, "spans": [[10, 60]]},
    "margin": {"min_margin": -0.5, "spans": [[10, 60]]},
    "method": {"method": "guess", "spans": [[10, 60]]},
    "format": {"spans": "all of it"},
    "tokens_differ": {"spans": [[10, 60]], "tokens": [[1, 2, 3]]},
}
MARGINS = {"sure": 1e-9, "unsure": 1.0}
"""what every model reaches, and none"""
Piece = list[int]
Result = dict[str, Any]


class Asker:
    """One engine, asked with token ids."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.tokenizer = llm.get_tokenizer()
        self.documents = [self.encode(sentence * (4 + number)) for number, sentence in enumerate(SENTENCES)]

    def encode(self, text: str) -> Piece:
        """Its tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, order: Sequence[int], number: int, *, system: str = SYSTEM, between: str = "") -> tuple[Piece, list[list[int]]]:
        """Token ids, and where the documents lie."""
        ids = self.encode(system)
        spans: list[list[int]] = []
        for document in order:
            ids = ids + (self.encode(between) if spans else [])
            spans.append([len(ids), len(ids) + len(self.documents[document])])
            ids = ids + self.documents[document]
        return ids + self.encode(QUESTION.format(number=number)), spans

    def chat(self, order: Sequence[int], number: int) -> Piece:
        """The documents as messages of a chat."""
        tools = "".join(f"<|im_start|>tool\n{SENTENCES[document] * 4}<|im_end|>\n" for document in order)
        turns = f"{tools}<|im_start|>user{QUESTION.format(number=number)}<|im_end|>\n<|im_start|>assistant\n"
        return self.encode(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{turns}")

    def separated(self, order: Sequence[int], number: int) -> Piece:
        """The documents as parts of one text, which is divided into tokens as a whole."""
        return self.encode(SEPARATOR.join([SYSTEM, *(SENTENCES[document] * 4 for document in order), QUESTION.format(number=number)]))

    def sampling(self, options: Result | None, max_tokens: int = MAX_TOKENS) -> Any:
        """Greedy, with kvtier's options."""
        from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

        extra = {"kv_transfer_params": {"kvtier": options}} if options is not None else None
        return SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0, ignore_eos=True, extra_args=extra)

    def ask(self, asked: Sequence[tuple[Piece, Result | None]], max_tokens: int = MAX_TOKENS) -> list[Result]:
        """The answers to prompts that run together."""
        prompts = [{"prompt_token_ids": ids} for ids, _ in asked]
        outputs = self.llm.generate(prompts, [self.sampling(options, max_tokens) for _, options in asked], use_tqdm=False)
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "logprobs": [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
                "cached": output.num_cached_tokens,
                "loaded": (output.kv_transfer_params or {}).get("kvtier"),
            }
            for output in outputs
        ]

    def one(self, ids: Piece, options: Result | None = None) -> Result:
        """The answer to one prompt."""
        return self.ask([(ids, options)])[0]

    def counters(self) -> dict[str, int]:
        """kvtier's, of chunk reuse; empty without kvtier or where it runs in another process."""
        from kvtier import ControlError, Controller  # noqa: PLC0415

        try:
            job = Controller.of().stats()
        except ControlError:
            return {}
        self.one(self.documents[0][:8], {"store": False, "load": False})
        counters = job.result(60.0).counters
        return {name: value for name, value in counters.items() if value and name.startswith(("blend.", "connector.", "gpu."))}

    def store(self, systems: Sequence[str] = (SYSTEM,)) -> None:
        """Serves each document once, with the other ones, so that its entry is stored, and steps until all are."""
        for system in systems:
            for order in ([0, 2], [1, 3]):
                ids, spans = self.prompt(order, 0, system=system)
                self.stored(ids, {"spans": spans})

    def stored(self, ids: Piece, blend: Result) -> None:
        """Serves a prompt of two chunks, and steps until they are stored."""
        self.one(ids, {"blend": blend})
        for _ in range(2):
            self.one(self.documents[0][:8], {"store": False, "load": False})


def blended(llm: Any, settings: Result) -> Result:
    """All kinds of layouts at one ratio, alone and together, bad requests, aborts, and ordinary requests in between.

    ``num_cases``: of the layouts only so many. vLLM alone is not asked twice.
    """
    asker = Asker(llm)
    with_kvtier = "kvtier" in settings
    ratio = settings.get("ratio", 1.0)
    out: Result = {}
    if with_kvtier:
        asker.store((SYSTEM, ""))
    cases = [asker.prompt(order, 1 + number) for number, order in enumerate(ORDERS)]
    cases += [asker.prompt([3, 0], 7, system=""), asker.prompt([1, 2], 8, between="And another one: ")]
    for order, number in (([2], 9), ([3, 2], 10)):
        ids, spans = asker.prompt(order, number, system=SYSTEM)
        cases.append((ids[: spans[-1][1]], spans))
    documents = asker.documents
    cases.append((documents[3], [[0, len(documents[3])]]))
    cases = cases[: settings.get("num_cases")]
    options = [{"blend": {"spans": spans, "ratio": ratio, "method": METHODS[index % 6]}} for index, (_, spans) in enumerate(cases)]
    asked = [(ids, {**option, "store": False} if with_kvtier else None) for (ids, _), option in zip(cases, options, strict=True)]
    out["alone"] = [asker.one(*item) for item in asked]
    if with_kvtier:
        out["again"] = [asker.one(*item) for item in asked]
    out["unnamed"] = unnamed(asker, cases[1][0], ratio if with_kvtier else None)
    plain = [(asker.prompt([number, 1], 20 + number)[0], None) for number in range(4)]
    llm.reset_prefix_cache()
    mixed = asker.ask([item for pair in zip(asked[:4], plain, strict=True) for item in pair])
    out["mixed"], out["others"] = mixed[::2], mixed[1::2]
    if with_kvtier:
        for name, margin in MARGINS.items():
            checked = [(ids, {"blend": {"spans": spans, "ratio": ratio, "min_margin": margin}, "store": False}) for ids, spans in cases[:3]]
            out[name] = asker.ask(checked)
        ids, spans = cases[2]
        out["kept"] = [asker.one(ids, {"blend": {"spans": spans, "min_margin": MARGINS["unsure"]}}) for _ in range(2)]
        out["num_kept_tokens"] = len(ids)
    if with_kvtier:
        out["afterwards"] = [asker.one(ids) for ids, _ in asked]
        out["refused"] = {name: asker.one(cases[0][0], {"blend": bad, "load": True, "store": False}) for name, bad in REFUSED.items()}
        abort_blended(asker, asked)
        out["after_abort"] = [asker.one(ids) for ids, _ in asked[:2]]
        out["counters"] = asker.counters()
    out["model"] = model_module(llm)
    return out


def unnamed(asker: Asker, prompt: Piece, ratio: float | None) -> list[Result]:
    """A prompt of chunks that others named, a chat whose messages are chunks, and a text whose parts are."""
    by_text: Result = {"separator": SEPARATOR}
    asked: list[tuple[Piece, Result]] = [
        (prompt, {"boundaries": "auto"}),
        (asker.chat([1, 0], 51), {"boundaries": "messages"}),
        (asker.separated([1, 0], 53), by_text),
    ]
    if ratio is None:
        return [asker.one(ids) for ids, _ in asked]
    asker.stored(asker.chat([0, 1], 50), {"boundaries": "messages"})
    asker.stored(asker.separated([0, 1], 52), by_text)
    return [asker.one(ids, {"blend": {**blend, "ratio": ratio}, "store": False}) for ids, blend in asked]


def abort_blended(asker: Asker, asked: Sequence[tuple[Piece, Result | None]]) -> None:
    """Aborts before, in and after the step that puts the prompt together."""
    engine = asker.llm.llm_engine
    for number, (ids, options) in enumerate(asked[:4]):
        engine.add_request(f"abort-{number}", {"prompt_token_ids": ids}, asker.sampling(options, 30))
    for number in range(4):
        engine.abort_request([f"abort-{number}"])
        engine.step()
    while engine.has_unfinished_requests():
        engine.step()


def blended_under_pressure(llm: Any, settings: Result) -> Result:
    """More blended requests at once than the engine has blocks for, then with a blender that fails."""
    asker = Asker(llm)
    out: Result = {}
    if "kvtier" in settings:
        asker.store()
    asked = []
    for number, order in enumerate(ORDERS):
        ids, spans = asker.prompt(order, 30 + number)
        asked.append((ids, {"blend": {"spans": spans, "ratio": 1.0}, "store": False} if "kvtier" in settings else None))
    out["answers"] = asker.ask(asked, 60)
    out["metrics"] = metrics(llm)
    if "kvtier" in settings:
        from kvtier.connectors.blend_worker import ChunkBlender  # noqa: PLC0415

        original = ChunkBlender.blend

        def fail(*arguments: Any) -> Any:
            raise RuntimeError("injected: this blend fails")

        ChunkBlender.blend = fail  # type: ignore[method-assign,assignment]
        out["failing"] = asker.ask(asked, 60)
        ChunkBlender.blend = original  # type: ignore[method-assign]
        out["counters"] = asker.counters()
    return out


def blended_beside(llm: Any, settings: Result) -> Result:
    """A prompt is put together while another request generates: both answers, and how many tokens the other one got before its first.

    Its KV is in the engine's blocks from step to step, as that of a long prompt is.
    """
    from kvtier.connectors.blend_worker import ChunkBlender  # noqa: PLC0415 - after the environment is set

    ChunkBlender.kept_bytes = 0
    asker = Asker(llm)
    with_kvtier = "kvtier" in settings
    if with_kvtier:
        asker.store()
    ids, spans = asker.prompt([2, 0, 1, 3, 0], 80)
    options = {"blend": {"spans": spans, "ratio": 1.0}, "store": False} if with_kvtier else None
    engine = llm.llm_engine
    got: dict[str, list[int]] = {"beside": [], "blended": []}
    engine.add_request(
        "beside", {"prompt_token_ids": asker.prompt([1], 81)[0]}, asker.sampling({"store": False} if with_kvtier else None, 60)
    )
    num_between = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            got[output.request_id] = list(output.outputs[0].token_ids)
        if len(got["beside"]) == 4 and not num_between:
            num_between = -1
            engine.add_request("blended", {"prompt_token_ids": ids}, asker.sampling(options, 10))
        if num_between < 0 and got["blended"]:
            num_between = len(got["beside"]) - 4
    return {**got, "num_between": num_between, "num_tokens": len(ids), "counters": asker.counters()}


def blended_briefly(llm: Any, settings: Result) -> Result:
    """Two blended prompts, with chunks that are stored by this engine or were by an earlier one."""
    asker = Asker(llm)
    if settings.get("stores", True) and "kvtier" in settings:
        asker.store()
    asked = []
    for number, order in enumerate(ORDERS[1:3]):
        ids, spans = asker.prompt(order, 40 + number)
        asked.append((ids, {"blend": {"spans": spans, "ratio": 1.0}, "store": False} if "kvtier" in settings else None))
    asker.one(asker.documents[0][:8], {"store": False, "load": False})
    return {"answers": [asker.one(*item) for item in asked], "model": model_module(llm)}


def model_module(llm: Any) -> str:
    """Where the class of the loaded model comes from; empty where the model is in another process."""
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "1":
        return ""
    (module,) = llm.apply_model(lambda model: type(model).__module__)
    return str(module)


def blended_as_served(llm: Any, settings: Result) -> Result:
    """Prompts of documents in the order in which they were served before, with other questions: nothing computed anew, and nothing lost.

    The prompts themselves are not stored, and chunks cannot be computed.
    """
    asker = Asker(llm)
    with_kvtier = "kvtier" in settings
    if with_kvtier:
        for order in ([0, 2, 1], [3, 1]):
            ids, spans = asker.prompt(order, 0)
            asker.one(ids, {"blend": {"spans": spans}, "store_only_prefix": 0})
    out: Result = {"answers": []}
    for number, order in enumerate(([0, 2, 1], [0, 2], [3])):
        ids, spans = asker.prompt(order, 70 + number)
        options = {"blend": {"spans": spans, "ratio": 0.0, "method": "none"}, "store": False}
        out["answers"].append(asker.one(ids, options if with_kvtier else None))
    ids, spans = asker.prompt([1, 3, 0], 73)
    asked = (
        [{"blend": {"spans": spans, "ratio": ratio, "method": "epic"}, "store": False} for ratio in (1.0, 0.0)] if with_kvtier else [None]
    )
    out["reordered"] = [asker.one(ids, options) for options in asked]
    out["counters"] = asker.counters()
    return out


def blended_in_parallel(llm: Any, settings: Result) -> Result:
    """On several workers: everything computed anew, choices by attention and by values, and one worker that cannot while others can."""
    asker = Asker(llm)
    with_kvtier = "kvtier" in settings
    if with_kvtier:
        asker.store()
    cases = [asker.prompt(order, 60 + number) for number, order in enumerate(ORDERS[1:3])]

    def options(number: int, ratio: float, method: str) -> Result | None:
        return {"blend": {"spans": cases[number][1], "ratio": ratio, "method": method}, "store": False} if with_kvtier else None

    out: Result = {
        "answers": [asker.one(cases[number][0], options(number, 1.0, method)) for number, method in enumerate(("combined", "cacheblend"))]
    }
    if with_kvtier:
        out["chosen"] = [
            asker.one(cases[number][0], options(number, 0.3, method)) for number, method in enumerate(("combined", "cacheblend"))
        ]
        unsure = {"blend": {"spans": cases[0][1], "min_margin": MARGINS["unsure"]}, "store": False}
        out["unsure"] = [asker.one(cases[0][0], unsure)]
        llm.collective_rpc(lose_chunks_on_the_second_rank)
        out["lost"] = [asker.one(cases[number][0], options(number, 1.0, "combined")) for number in range(2)]
        llm.collective_rpc(break_off_on_the_second_rank)
        started_s = time.monotonic()
        try:
            asker.one(cases[0][0], options(0, 1.0, "combined"))
        except Exception as error:  # noqa: BLE001 - vLLM's own
            out["apart"] = {"error": type(error).__name__, "seconds": time.monotonic() - started_s}
    return out


def lose_chunks_on_the_second_rank(worker: Any) -> None:
    """In a worker's process: from now on its chunks are lost, unless it is the first one."""
    from kvtier.connectors import blend_worker  # noqa: PLC0415 - in another process

    if worker.rank == 1:
        blend_worker._problem = lambda arena, job: "injected"


def break_off_on_the_second_rank(worker: Any) -> None:
    """In a worker's process: from now on it breaks off blends in the middle, unless it is the first one; chunks are found again."""
    from kvtier.connectors import blend_worker  # noqa: PLC0415 - in another process
    from kvtier.connectors.vllm.blend_model import EngineModel  # noqa: PLC0415 - as above

    def fail(*_: object) -> None:
        raise RuntimeError("injected")

    blend_worker._problem = lambda arena, job: ""
    if worker.rank == 1:
        setattr(EngineModel, "finish", fail)  # noqa: B010 - a method may not be assigned


BLEND_SCENARIOS = {
    "blended": blended,
    "blended_under_pressure": blended_under_pressure,
    "blended_beside": blended_beside,
    "blended_briefly": blended_briefly,
    "blended_in_parallel": blended_in_parallel,
    "blended_as_served": blended_as_served,
}
