"""``kvtier bench sharing``: what one engine has prefilled, answered by another one, by the store between them. Needs vLLM and the servers.

Two engines in processes of their own share nothing but the store, or the daemon. The first one computes each prompt; the second one has
never seen it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kvtier.bench.engine import ENVIRONMENT, open_engine, prompt_of
from kvtier.bench.options import MOST_TOKENS, add_json, add_rounds, whole
from kvtier.bench.report import Record, publish, record
from kvtier.bench.scratch import scratch_directory
from kvtier.testing.daemons import DaemonProcess
from kvtier.testing.servers import MooncakeMaster, S3Server, Server, ValkeyServer
from kvtier.tiers.remote import Deadline

PATHS = ("daemon", "redis-unix", "redis-tcp", "mooncake", "s3")
_SETTLE_S = 3.0
"""until the first engine's last write has arrived"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.add_argument("--model", required=True, help="directory of a checkpoint that vLLM can load")
    add_json(parser)
    add_rounds(parser, 5, "prompts per figure")
    parser.add_argument(
        "--tokens", type=whole(1, MOST_TOKENS), nargs="+", default=[900, 3600], help="tokens of a prompt (default: 900 3600)"
    )
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=list(PATHS), help="stores (default: all)")


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes. Returns the exit status."""
    os.environ.update(ENVIRONMENT)
    records: list[Record] = []
    with scratch_directory() as directory:
        for path in args.paths:
            records += measure(path, args.model, args.tokens, args.rounds, directory)
    publish("kvtier bench sharing", records, args.json)
    return 0


def measure(path: str, model: str, sizes: list[int], rounds: int, directory: Path) -> Iterator[Record]:
    """Time to first token in the first engine (computed), then in the second one (through the store), then there again (host memory)."""
    folder = directory / path
    folder.mkdir()
    with ExitStack() as stack:
        tiers: list[dict[str, Any]] = [{"type": "host", "capacity": "2GiB"}]
        more: dict[str, Any] = {}
        if path == "daemon":
            more["daemon"] = {"socket": str(_start_daemon(tiers, folder, stack.callback)), "deadline": "2s"}
        else:
            tiers.append(_start(path, folder, stack.callback))
        first = stack.enter_context(open_engine(model, folder, tiers, **more))
        second = stack.enter_context(open_engine(model, folder, tiers, **more))
        for size in sizes:
            prompts = [prompt_of(size, size // 10 + number) for number in range(rounds)]  # no size is a prefix of another one
            computed = [first([prompt])["ttft_s"] for prompt in prompts]
            time.sleep(_SETTLE_S)
            first([prompt_of(64, 1)])  # a step takes note of the writes
            answers = [second([prompt]) for prompt in prompts]
            again = [second([prompt])["ttft_s"] for prompt in prompts]
            least = min(answer["host_tokens" if path == "daemon" else "loaded_tokens"] for answer in answers)
            if least < size - 64:
                raise RuntimeError(f"only {least} of {size} tokens came through {path}")
            loaded = [answer["ttft_s"] for answer in answers]
            for what, times in (("computed", computed), ("through the store", loaded), ("again, from host memory", again)):
                yield record(f"time to first token, {what}", {"path": path, "tokens": size}, times, "ms")
            share = statistics.median(loaded) / statistics.median(computed)
            yield Record("of computing, through the store", {"path": path, "tokens": size}, share, "ratio", 0.0)


def _start_daemon(tiers: list[dict[str, Any]], folder: Path, at_end: Callable[[Callable[[], None]], object]) -> Path:
    """A daemon that owns the tiers; its socket."""
    place = folder / "run"
    place.mkdir(mode=0o700)
    config = folder / "kvtier.yaml"
    config.write_text(json.dumps({"tiers": tiers}))
    at_end(DaemonProcess(config, place / "socket").close)
    return place / "socket"


def _start(path: str, folder: Path, at_end: Callable[[Callable[[], None]], object]) -> dict[str, Any]:
    """The server, and the tier that uses it."""
    server: Server
    if path == "mooncake":
        from kvtier.tiers.mooncake import MooncakeAccess, MooncakeClient  # noqa: PLC0415 - its libraries are not everywhere

        server = master = MooncakeMaster(folder).start()
        at_end(server.kill)
        member = MooncakeClient(MooncakeAccess(master=master.url.partition("//")[2], segment_bytes=1 << 30))
        member.ping(Deadline(60.0))
        at_end(member.close)
        return {"type": "mooncake", "url": master.url}
    if path == "s3":
        server = bucket = S3Server(folder).start()
        at_end(server.kill)
        os.environ["KVTIER_BENCH_SECRET"] = "any"
        place = {"url": f"s3://{bucket.bucket}", "endpoint": bucket.endpoint, "region": "us-east-1"}
        return {"type": "object", **place, "access_key": "any", "secret_key_env": "KVTIER_BENCH_SECRET"}
    server = valkey = ValkeyServer(folder).start()
    at_end(server.kill)
    return {"type": "redis", "url": valkey.unix_url if path == "redis-unix" else valkey.tcp_url}
