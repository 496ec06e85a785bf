"""The command line: ``kvtier config``, ``serve``, ``check``, ``simulate``, ``plan``, ``bench``, ``env`` and ``version``.

A command imports what it needs when it runs, so that ``kvtier version`` answers at once and a machine without, say, a
working LMDB can still have its configuration checked.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import kvtier
from kvtier.errors import ConfigError, TraceError
from kvtier.sim import arguments

if TYPE_CHECKING:
    from kvtier.types import Damage

OK, DAMAGED, UNUSABLE = 0, 1, 2
"""exit statuses: all is well; the answer is no; the question could not be asked (argparse's own choice too)"""

BENCHMARKS = {
    "blend": ("kvtier.bench.blend", "how near answers with reused chunks come to those of full prefill"),
    "chunks": ("kvtier.bench.chunks", "prompts of reused chunks in the real vLLM, and the requests beside them"),
    "copy": ("kvtier.bench.copy", "moving blocks to host memory and back, and hashing prompts"),
    "control": ("kvtier.bench.control", "what deciding costs: lookups, steps, evictions"),
    "disk": ("kvtier.bench.disk", "the disk tier beside the disk it lies on"),
    "gpu": ("kvtier.bench.gpu", "copies between host memory and a GPU, beside large pinned copies"),
    "gpu-chunks": ("kvtier.bench.gpu_chunks", "prompts of reused chunks on a GPU, with a model of 8B's shape"),
    "engine": ("kvtier.bench.engine", "the whole path in the real vLLM"),
    "faults": ("kvtier.bench.faults", "what a store that goes wrong adds to a request"),
    "sharing": ("kvtier.bench.sharing", "time to first token of what another engine has prefilled, by the store between them"),
    "policies": ("kvtier.bench.policies", "what eviction policies cost by themselves, and the memory of their books"),
    "remote": ("kvtier.bench.remote", "the tiers in remote stores beside raw transfers to the same servers"),
    "serve": ("kvtier.bench.serve", "what a daemon in between costs, beside a cache in the engine's process"),
    "tier": ("kvtier.bench.tier", "storing and loading through the engine facade beside the bare copy"),
}
"""name -> the module with ``add_arguments`` and ``run``, what it measures"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 well, 1 damage found, 2 wrong usage or nothing to work on, 130 interrupted.

    Raises:
        SystemExit: from argparse, for ``--help`` (0) and wrong usage (2).
    """
    # a stream that was closed before the start is None here
    sys.stdout, sys.stderr = (stream or Path(os.devnull).open("w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115 - open to the end
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        status = command(options)
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not _reader_is_gone():
            return _refuse(f"the other end of a connection has gone: {error}")
        _drop_output()  # the reader has seen enough
        return OK
    except OSError as error:  # what can fail otherwise has been told by the command itself
        _drop_output()
        return _refuse(f"standard output: {error.strerror or error}")
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvtier", description="Keeps the KV cache of an LLM engine alive beyond GPU memory.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    config = commands.add_parser("config", help="work with configuration files")
    config_commands = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    text = "report everything that is wrong with a file, or print all settings that it means"
    config_check = config_commands.add_parser("check", help=text, description=text.capitalize() + ".")
    config_check.add_argument("file", type=Path, metavar="FILE", help="a YAML file of settings")
    config_check.set_defaults(command=_check_config)
    text = "print a file to start from: every setting with its default, explained"
    defaults = config_commands.add_parser("show-defaults", help=text, description=text.capitalize() + ".")
    defaults.set_defaults(command=_show_defaults)

    text = "own the tiers of this machine and serve all engines on it through a Unix socket"
    serve = commands.add_parser("serve", help=text, description=text.capitalize() + ". Runs until SIGTERM or SIGINT.")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="a YAML file of settings: the tiers")
    serve.add_argument("--socket", type=Path, default=None, metavar="PATH", help="where to listen (default: daemon.socket of the file)")
    serve.set_defaults(command=_serve)

    text = "verify every record in the directory of a disk tier that no process has open; changes nothing"
    check = commands.add_parser("check", help=text, description=text.capitalize() + ".")
    check.add_argument("path", type=Path, metavar="PATH", help="the directory of a disk tier")
    check.set_defaults(command=_check_directory)

    text = "replay a recorded workload through kvtier's own decisions, for any policy and size"
    simulation = commands.add_parser("simulate", help=text, description=text.capitalize() + ".")
    arguments.add_simulate(simulation)
    simulation.set_defaults(command=_simulate)

    text = "find the cheapest sizes of the tiers that meet a time to first token, by simulation"
    planning = commands.add_parser("plan", help=text, description=text.capitalize() + ".")
    arguments.add_plan(planning)
    planning.set_defaults(command=_plan)

    bench = commands.add_parser(
        "bench",
        help="measure kvtier on this machine",
        description="Measure kvtier on this machine.",
        epilog="\n".join(f"{name:<10} {about}" for name, (_, about) in BENCHMARKS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("name", choices=sorted(BENCHMARKS), help="what to measure")
    bench.add_argument("options", nargs=argparse.REMAINDER, help="options of the benchmark: kvtier bench NAME --help")
    bench.set_defaults(command=_bench)

    text = "print what kvtier finds on this machine: memory, disk, GPUs and the measured ways of copying to them"
    env = commands.add_parser("env", help=text, description=text.capitalize() + ".")
    env.add_argument("--path", type=Path, default=Path.cwd(), metavar="DIR", help="a directory on the disk to ask about (default: here)")
    env.add_argument("--json", action="store_true", help="as one JSON object")
    env.add_argument("--no-measure", action="store_true", help="leave the GPUs alone")
    env.set_defaults(command=_env)

    version = commands.add_parser("version", help="print the version", description="Print the version.")
    version.set_defaults(command=_version)
    return parser


def _check_config(options: argparse.Namespace) -> int:
    from kvtier.config import Config  # noqa: PLC0415 - takes pydantic

    try:
        config = Config.load(options.file)
    except ConfigError as error:
        return _refuse(str(error))
    _print_yaml(config.effective())
    return OK


def _show_defaults(options: argparse.Namespace) -> int:  # noqa: ARG001 - all commands are called alike
    from kvtier.config import commented_defaults  # noqa: PLC0415 - as above

    _print_yaml(commented_defaults())
    return OK


def _serve(options: argparse.Namespace) -> int:
    from kvtier.config import Config  # noqa: PLC0415 - takes pydantic

    try:
        from kvtier.serve.command import serve  # noqa: PLC0415 - takes msgspec, numpy
    except ImportError as error:
        return _refuse(f"kvtier serve needs the extra kvtier[serve], which is not installed ({error})")
    try:
        serve(Config.load(options.config), options.socket)
    except (ConfigError, OSError) as error:  # DaemonError, ArenaError and TierError are OSErrors
        return _refuse(str(error))
    return OK


def _check_directory(options: argparse.Namespace) -> int:
    path: Path = options.path
    if not path.is_dir():
        return _refuse(f"{path} is not a directory" if path.exists() else f"{path} does not exist")
    from kvtier.tiers.disk import check_path  # noqa: PLC0415 - takes lmdb

    try:
        found = check_path(path)
    except OSError as error:  # TierError is one; others tell of a directory that cannot be read
        return _refuse(str(error))
    if not found:
        print(f"{path}: healthy, every record was verified")
        return OK
    _print_damage(found)
    print(f"{path}: {len(found)} {'finding' if len(found) == 1 else 'findings'}")
    return DAMAGED


def _simulate(options: argparse.Namespace) -> int:
    from kvtier.sim.command import simulate  # noqa: PLC0415 - takes numpy

    return _answer(simulate, options)


def _plan(options: argparse.Namespace) -> int:
    from kvtier.sim.plan import plan  # noqa: PLC0415 - takes numpy

    return _answer(plan, options)


def _answer(work: Callable[[argparse.Namespace], bool], options: argparse.Namespace) -> int:
    try:
        return OK if work(options) else DAMAGED
    except (ConfigError, TraceError, ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        return _refuse(str(error))


def _bench(options: argparse.Namespace) -> int:
    module_name, about = BENCHMARKS[options.name]
    parser = argparse.ArgumentParser(prog=f"kvtier bench {options.name}", description=f"Measure {about}.")
    try:
        module = importlib.import_module(module_name)
        module.add_arguments(parser)
        with _terminated_in_order():
            return int(module.run(parser.parse_args(options.options)))
    except (
        ImportError,
        MemoryError,
        OSError,
        RuntimeError,
    ) as error:  # a package, memory, a disk, a server: what was to be measured failed
        if isinstance(error, BrokenPipeError):
            raise
        return _refuse(f"{parser.prog}: {str(error) or type(error).__name__}")


@contextlib.contextmanager
def _terminated_in_order() -> Iterator[None]:
    """SIGTERM ends what runs here as an exception does: its files, gigabytes at times, and the servers that it started are cleared away."""
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous or signal.SIG_DFL)  # None: it was not Python that set it


def _env(options: argparse.Namespace) -> int:
    path: Path = options.path
    if not path.is_dir() or not os.access(path, os.W_OK):
        return _refuse(f"--path: {path} is not a directory that this process may write to")
    from kvtier.machine import describe  # noqa: PLC0415 - takes numpy

    topics = describe(path, measure_gpus=not options.no_measure)
    if options.json:
        print(json.dumps(topics, indent=1))
        return OK
    width = max(len(name) for facts in topics.values() for name in facts)
    for topic, facts in topics.items():
        print(topic)
        for name, answer in facts.items():
            print(f"  {name:<{width}}  {answer}")
    return OK


def _version(_: argparse.Namespace) -> int:
    print(f"kvtier {kvtier.__version__}")
    return OK


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except (OSError, ValueError):  # no file: a test's, or closed
        return False
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _drop_output() -> None:
    """What is still to be printed goes nowhere; without this the interpreter fails once more when it flushes at its end."""
    with contextlib.suppress(OSError, ValueError):  # no file: a test's, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return UNUSABLE


def _print_yaml(text: str) -> None:
    if not sys.stdout.isatty():
        print(text, end="")
        return
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.syntax import Syntax  # noqa: PLC0415

    Console().print(Syntax(text.rstrip("\n"), "yaml", background_color="default"))


def _print_damage(found: Sequence[Damage]) -> None:
    if not sys.stdout.isatty():
        for damage in found:
            print(": ".join([damage.where, *([damage.key.hex()] if damage.key is not None else []), damage.what]))
        return
    from rich.console import Console  # noqa: PLC0415 - only for a terminal
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table("where", "block", "what")
    for damage in found:
        # Text: names of files may look like rich's markup
        table.add_row(Text(damage.where), damage.key.hex() if damage.key is not None else "", Text(damage.what))
    Console().print(table)
