"""What the tests of speculative decoding let the real engine do."""

from __future__ import annotations

from typing import Any

from tests.engine.scenarios import prompts

BLOCK_TOKENS = 32
MAX_TOKENS = 36
"""more than a block: one at least is filled by tokens that were drafted"""
Result = dict[str, Any]


def drafted(llm: Any, settings: Result) -> Result:
    """Prompts at once, then what goes on from their answers; ``num_rounds`` times, with the engine's own prefix cache forgotten in between.

    Every second prompt has one token more than full blocks.
    """
    tokenizer = llm.get_tokenizer()
    texts = [list(tokenizer(text)["input_ids"]) for text in prompts()[1:5]]
    texts = [ids[-(len(ids) // BLOCK_TOKENS * BLOCK_TOKENS - BLOCK_TOKENS + 1) :] if place % 2 else ids for place, ids in enumerate(texts)]
    question = list(tokenizer(" And after that? Answer:")["input_ids"])
    rounds = []
    for _ in range(settings["num_rounds"]):
        llm.reset_prefix_cache()
        before = _accepted(llm)
        first = _ask(llm, texts)
        again = _ask(llm, [[*ids, *answer["tokens"], *question] for ids, answer in zip(texts, first, strict=True)])
        rounds.append({"answers": [*first, *again], "accepted": _accepted(llm) - before})
    return {"rounds": rounds}


def _ask(llm: Any, token_ids: list[list[int]]) -> list[Result]:
    from vllm import SamplingParams  # noqa: PLC0415 - after the environment is set

    sampling = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in token_ids], sampling, use_tqdm=False)
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": [next(iter(step.values())).logprob for step in output.outputs[0].logprobs],
            "loaded": (output.kv_transfer_params or {}).get("kvtier"),
        }
        for output in outputs
    ]


def _accepted(llm: Any) -> int:
    """Drafts that were accepted so far."""
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens")
