"""``kvtier bench gpu-chunks``: prompts of reused chunks on a GPU, beside full prefill, with a model of 8B's shape and random weights.

The worker's own code: chunks lie in pinned host memory, come to the device a layer at a time, and are put together into KV that stands for
the engine's; then the question is computed behind them. Full prefill is the model's own forward pass in transformers, with torch's
attention. Random weights answer nothing, so this is about time alone; that ratio 1 gives full prefill's logits is checked and reported.
Needs torch and transformers; with ``--device cpu --shape tiny`` it runs anywhere, for trying it out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtier.bench.options import add_json, add_rounds, whole
from kvtier.bench.report import Record, publish, write
from kvtier.bench.scratch import scratch_directory

if TYPE_CHECKING:
    from kvtier.bench.chunks_on_device import ChunksOnDevice

MOST_TOKENS = 131_072
MOST_CHUNK_TOKENS = 8192
NO_CHUNK_TOKENS = 128
"""of a prompt: the system's and the question's"""
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--device", default="cuda:0", help="torch's name of the device (default: cuda:0)")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b", help="of the model (default: 8b)")
    parser.add_argument("--tokens", type=whole(256, MOST_TOKENS), default=16_384, help="tokens of a prompt (default: 16384)")
    parser.add_argument("--chunk-tokens", type=whole(16, MOST_CHUNK_TOKENS), default=512, help="tokens of a chunk (default: 512)")
    add_json(parser)
    add_rounds(parser, 5)


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status: 2 where there is no such device, or no room for a chunk."""
    if args.chunk_tokens > args.tokens - NO_CHUNK_TOKENS:
        print(f"--chunk-tokens is {args.chunk_tokens}; at most --tokens less {NO_CHUNK_TOKENS} is allowed", file=sys.stderr)
        return 2
    try:
        import torch  # noqa: PLC0415 - --help works without it

        from kvtier.bench.chunks_on_device import ChunksOnDevice  # noqa: PLC0415 - as above

        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (ImportError, RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        print(f"nothing was measured: there is no device {args.device}, or no torch and transformers ({error})", file=sys.stderr)
        return 2
    with (
        scratch_directory(Path("/dev/shm")) as directory,
        torch.inference_mode(),
        ChunksOnDevice(device, SHAPES[args.shape], args.tokens, args.chunk_tokens, directory) as bench,
    ):
        bench.check()
        records: list[Record] = []
        for item in _figures(bench, args.rounds, has_memory=device.type == "cuda"):
            records.append(item)
            if args.json is not None:
                write(records, args.json)  # also where time runs out before the next one
    publish("kvtier bench gpu-chunks", records, args.json)
    return 0


def _figures(bench: ChunksOnDevice, rounds: int, *, has_memory: bool) -> Iterator[Record]:
    """All, each when it is measured. ``has_memory``: the device tells what was taken of its memory."""
    yield from bench.first_tokens(rounds)
    yield bench.loading(rounds)
    yield bench.storing(rounds)
    yield from bench.attention(rounds)
    if has_memory:
        yield from bench.taken()
