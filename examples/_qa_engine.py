"""vLLM engines, each in a process of its own. Used by multi_round_qa.py.

Importing vLLM takes longer than starting it with a small model. So it is imported once, and the processes are forked from there.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": str(min(os.cpu_count() or 1, 8)),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

_fork = multiprocessing.get_context("fork")
_pipes: list[Connection] = []
"""our ends; a forked process closes those it got a copy of, so that each sees the end of its own"""


def import_vllm() -> None:
    """To be called before the first :class:`Engine`, and before the process has threads."""
    os.environ.update(ENVIRONMENT)  # vLLM and its libraries read them when they are imported
    gc.disable()  # nothing of what is imported becomes garbage; not looking for it saves a second or two per engine
    importlib.import_module("vllm.entrypoints.llm")
    gc.freeze()
    gc.enable()


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    ttft_s: float
    engine_tokens: int
    """prompt tokens whose KV the engine still had itself"""
    host_tokens: int
    disk_tokens: int


class Engine:
    """A vLLM process. ``start`` returns at once, ``wait_until_ready`` waits for what it began."""

    def __init__(self, log: Path) -> None:
        """Forks the process, which waits for ``start``. All that vLLM says goes to ``log``."""
        self._log = log
        self._pipe, theirs = _fork.Pipe()
        _pipes.append(self._pipe)
        self._process = _fork.Process(target=serve, args=(theirs, log), daemon=True)
        self._process.start()
        theirs.close()

    def start(self, **engine_arguments: Any) -> None:
        """Begins to load the model."""
        self._pipe.send(engine_arguments)

    def wait_until_ready(self) -> float:
        """Returns when the engine can answer; how long it took from ``start``, in seconds."""
        return float(self._receive())

    def ask(self, prompt: str, max_tokens: int) -> Answer:
        """Greedy decoding of one prompt."""
        self._pipe.send((prompt, max_tokens))
        answer: Answer = self._receive()
        return answer

    def kill(self) -> None:
        """SIGKILL, as the out-of-memory killer would."""
        self._process.kill()
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise SystemExit(f"The engine's process ended unexpectedly. What it said last is in {self._log}") from None


def serve(pipe: Connection, log: Path) -> None:
    """The engine's process: takes the engine's arguments, then one prompt after the other."""
    for ours in _pipes:
        ours.close()
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    try:
        arguments = pipe.recv()
        started = time.perf_counter()
        llm = load(arguments)
        pipe.send(time.perf_counter() - started)
        while True:
            pipe.send(ask(llm, *pipe.recv()))
    except EOFError:
        return  # nobody asks any more


def load(arguments: dict[str, Any]) -> Any:
    """A warmed-up engine. Everything that concerns kvtier is in ``kv_transfer_config``."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - imported already, by import_vllm
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    if "kv_transfer_config" in arguments:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    llm = LLM(enforce_eager=True, disable_log_stats=False, **arguments)
    llm.generate(["Warm up."], SamplingParams(max_tokens=2), use_tqdm=False)
    return llm


def ask(llm: Any, prompt: str, max_tokens: int) -> Answer:
    """One prompt, and where its KV came from."""
    from vllm import SamplingParams  # noqa: PLC0415

    output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=max_tokens), use_tqdm=False)[0]
    loaded = (output.kv_transfer_params or {}).get("kvtier") or {"host_tokens": 0, "disk_tokens": 0}
    return Answer(
        text=output.outputs[0].text,
        token_ids=list(output.outputs[0].token_ids),
        prompt_tokens=len(output.prompt_token_ids),
        ttft_s=output.metrics.first_token_latency,
        engine_tokens=max(0, output.num_cached_tokens - sum(loaded.values())),
        **loaded,
    )
