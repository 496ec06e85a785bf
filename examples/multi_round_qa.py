"""Questions over long documents, in the real vLLM, with kvtier and without.

    make demo

Three documents together are larger than the engine's own KV memory, so by the time a document's turn comes again the engine has
lost it. vLLM alone computes the whole conversation anew; with kvtier it gets the KV back from host memory.  Then the engine is killed
(SIGKILL) and a new one finds the KV on disk.  The tokens must be the same throughout; the exit status says so.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from _qa_engine import Engine, import_vllm
from _qa_report import Exchange, print_table, verdict, write_chart, write_json
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("What is this text about?", "Name one detail of it.")
LAST_QUESTION = "What must one not do?"
MAX_TOKENS = 6
BLOCK_TOKENS = 32
KV_BLOCKS = 96
"""the engine's own KV memory: 3,072 tokens, prefix caching on"""
# float32, so that every token can be compared: in bfloat16 the last bit depends on how many tokens are computed at once.
ENGINE = {"dtype": "float32", "block_size": BLOCK_TOKENS, "num_gpu_blocks_override": KV_BLOCKS, "max_model_len": 2816, "max_num_seqs": 2}


def documents() -> dict[str, str]:
    """Real texts that are at hand everywhere: the licence, and chapters of Python's own reference. about 1,500 tokens each."""
    topics = pydoc_data.topics.topics
    return {
        "Apache License": (ROOT / "LICENSE").read_text()[:7800],
        "Python: format strings": topics["formatstrings"][:6000],
        "Python: the import system": topics["import"][:6500],
    }


def kvtier_arguments(directory: Path) -> dict[str, object]:
    """How vLLM is told to use kvtier: nothing but configuration."""
    return {
        "kv_transfer_config": {
            "kv_connector": "KVTierConnector",
            "kv_connector_module_path": "kvtier.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "tiers": [
                    {"type": "host", "capacity": "1GiB"},
                    {"type": "disk", "path": str(directory), "capacity": "2GiB"},
                ]
            },
        }
    }


class Conversation:
    """A document and the questions and answers so far, in the model's chat format."""

    def __init__(self, document: str) -> None:
        self._text = f"<|im_start|>user\n{document}\n\n"

    def ask(self, question: str) -> str:
        """The prompt for the next question."""
        self._text += f"{question}<|im_end|>\n<|im_start|>assistant\n"
        return self._text

    def answered(self, answer: str) -> None:
        """Takes the answer into the conversation."""
        self._text += f"{answer}<|im_end|>\n<|im_start|>user\n"


def answers(stage: str, question: str, talks: dict[str, Conversation], engines: tuple[Engine, Engine]) -> Iterator[Exchange]:
    """Puts one question on every document to both engines, one after the other, so that neither slows the other down."""
    alone, kvtier = engines
    for name, talk in talks.items():
        prompt = talk.ask(question)
        exchange = Exchange(stage, name, alone=alone.ask(prompt, MAX_TOKENS), kvtier=kvtier.ask(prompt, MAX_TOKENS))
        talk.answered(exchange.alone.text)
        yield exchange


def run(model: str, work: Path, console: Console) -> list[Exchange]:
    """The whole demonstration."""
    tier = work / "tier"
    shutil.rmtree(tier, ignore_errors=True)
    talks = {name: Conversation(text) for name, text in documents().items()}
    exchanges: list[Exchange] = []
    console.print("importing vLLM ...")
    import_vllm()
    alone, kvtier, successor = (Engine(work / f"{name}.log") for name in ("alone", "kvtier", "restarted"))
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        starting = progress.add_task("starting vLLM, twice: alone and with kvtier", total=2)
        alone.start(model=model, **ENGINE)
        kvtier.start(model=model, **ENGINE, **kvtier_arguments(tier))
        for engine in (alone, kvtier):
            engine.wait_until_ready()
            progress.advance(starting)
        for number, question in enumerate(QUESTIONS, start=1):
            asking = progress.add_task(f"round {number}: {question}", total=len(talks))
            exchanges += progress.track(answers(f"round {number}", question, talks, (alone, kvtier)), task_id=asking)
        restarting = progress.add_task("killing the engine, starting a new one", total=1)
        kvtier.kill()
        successor.start(model=model, **ENGINE, **kvtier_arguments(tier))
        successor.wait_until_ready()
        progress.advance(restarting)
        asking = progress.add_task(f"after the restart: {LAST_QUESTION}", total=len(talks))
        exchanges += progress.track(answers("restarted", LAST_QUESTION, talks, (alone, successor)), task_id=asking)
    alone.kill()
    successor.kill()
    return exchanges


def main() -> int:
    """Plays, prints, draws. 0 where the tokens were the same and KV was reused from host memory and disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / ".cache" / "smollm2"), help="directory of the checkpoint")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "demo", help="directory for logs, chart and the disk tier")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    exchanges = run(arguments.model, arguments.work, console)
    print_table(console, exchanges)
    write_json(arguments.work / "demo.json", exchanges)
    write_chart(arguments.work / "demo.png", exchanges)
    console.print(f"chart: {arguments.work / 'demo.png'}", highlight=False)
    problem = verdict(exchanges)
    if problem is not None:
        console.print(f"FAILED: {problem}; logs are in {arguments.work}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
