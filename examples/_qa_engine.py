"""One vLLM engine in a process of its own, spoken to in lines of JSON. Used by multi_round_qa.py.

vLLM talks on standard output; so the conversation has a pipe of its own and vLLM's words go to a log file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


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
    """A vLLM process. ``start`` returns at once; ``wait_until_ready`` waits until the model is loaded."""

    def __init__(self, log: Path) -> None:
        """Starts the process and lets it import vLLM, which takes most of the time."""
        read_answers, write_answers = os.pipe()
        command = [sys.executable, __file__, str(write_answers)]
        with log.open("ab") as log_file:
            environment = {**os.environ, **ENVIRONMENT}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log_file, stderr=log_file, pass_fds=[write_answers], env=environment
            )
        os.close(write_answers)
        self._answers = os.fdopen(read_answers)
        self._log = log

    def start(self, **engine_arguments: Any) -> None:
        """Begins to load the model."""
        self._send(engine_arguments)

    def wait_until_ready(self) -> float:
        """Returns when the engine can answer; how long it took from ``start``."""
        return float(self._receive()["seconds"])

    def ask(self, prompt: str, max_tokens: int) -> None:
        """Begins greedy decoding of one prompt; ``answer`` waits for it."""
        self._send({"prompt": prompt, "max_tokens": max_tokens})

    def answer(self) -> Answer:
        """The answer to the last ``ask``."""
        return Answer(**self._receive())

    def kill(self) -> None:
        """SIGKILL, as the out-of-memory killer would."""
        self._process.kill()
        self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise SystemExit(f"The engine's process ended unexpectedly. What it said last is in {self._log}")
        message: dict[str, Any] = json.loads(line)
        return message


def serve(answers: Any) -> None:
    """The engine's process: first line, the engine's arguments; each further line, a prompt."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - only this process needs it
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    arguments = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    if "kv_transfer_config" in arguments:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    llm = LLM(enforce_eager=True, disable_log_stats=False, **arguments)
    llm.generate(["Warm up."], SamplingParams(max_tokens=2), use_tqdm=False)
    print(json.dumps({"seconds": time.perf_counter() - started}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"])
        output = llm.generate([request["prompt"]], sampling, use_tqdm=False)[0]
        loaded = (output.kv_transfer_params or {}).get("kvtier") or {"host_tokens": 0, "disk_tokens": 0}
        answer = Answer(
            text=output.outputs[0].text,
            token_ids=list(output.outputs[0].token_ids),
            prompt_tokens=len(output.prompt_token_ids),
            ttft_s=output.metrics.first_token_latency,
            engine_tokens=max(0, output.num_cached_tokens - sum(loaded.values())),
            **loaded,
        )
        print(json.dumps(answer.__dict__), file=answers, flush=True)


if __name__ == "__main__":
    with os.fdopen(int(sys.argv[1]), "w") as pipe:
        serve(pipe)
