"""What the processes of engines begin with: they are forked from one that has imported this, which takes longer than to start an engine."""

from __future__ import annotations

import gc

import vllm.entrypoints.llm
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.worker.cpu_worker  # noqa: F401

import kvtier.connectors.vllm.connector  # noqa: F401

gc.collect()
gc.freeze()  # an engine that starts collects several times: not what was there before it
