"""Chunk reuse put together for vLLM: what the scheduler half is told of the model, and a worker's blender over the loaded one."""

from __future__ import annotations

import logging
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tp_group

from kvtier.blend.methods import methods_with
from kvtier.blend.separators import TokenTexts
from kvtier.blend.transformers_models import check_family, frequencies_of
from kvtier.config import BlendConfig, Config
from kvtier.connectors.blend_worker import ChunkBlender, Ranks
from kvtier.connectors.blending import BlendParts
from kvtier.connectors.vllm.blend_model import EngineModel
from kvtier.connectors.vllm.drafters import drafter_of
from kvtier.connectors.vllm.geometry import BlockSizes
from kvtier.connectors.vllm.model_access import loaded_model
from kvtier.connectors.vllm.paged_tokens import PagedTokens
from kvtier.errors import BlendRefusedError, ConfigError, RefusalReason

_LOG = logging.getLogger(__name__)
TURN_MARKERS = ("<|im_start|>", "<|start_header_id|>", "[INST]", "[TOOL_RESULTS]", "<tool_response>")
"""texts of the tokens that messages begin with, in the chat templates of the families that chunks can be reused with"""
_BEFORE = "a"


def blend_parts_of(vllm_config: VllmConfig, config: Config) -> BlendParts:
    """For the scheduler half. Raises ConfigError for a primer that cannot be read."""
    if not config.blend.enabled:
        return BlendParts(config.blend)
    tokenizer = _tokenizer(vllm_config)
    model_config = vllm_config.model_config
    num_positions = max(model_config.max_model_len, getattr(model_config.hf_text_config, "max_position_embeddings", 0))
    refusal = _refusal(vllm_config)
    max_step_tokens = config.blend.max_step_tokens or vllm_config.scheduler_config.max_num_batched_tokens
    return BlendParts(
        config.blend, _primer(tokenizer, config), turn_markers(tokenizer), token_texts(tokenizer), refusal, num_positions, max_step_tokens
    )


def blender_of(num_blocks: int, sizes: BlockSizes, config: BlendConfig, max_rows: int) -> ChunkBlender | None:
    """A worker's blender; ``None``, and a warning that says why, where this worker cannot. Call it when KV memory is registered.

    ``max_rows``: as :class:`~kvtier.connectors.vllm.blend_model.EngineModel` says.
    """
    loaded = loaded_model()
    if loaded is None:
        _LOG.warning("kvtier: chunks are not reused: the loaded model is not at hand (is kvtier among VLLM_PLUGINS?)")
        return None
    try:
        model = EngineModel(loaded, max_rows)
        tokens = PagedTokens(model.attentions, num_blocks, sizes.engine_block_tokens)
        methods = methods_with(config.first_layer, config.last_layer)
        return ChunkBlender(
            model,
            tokens,
            methods,
            block_tokens=sizes.block_tokens,
            block_bytes=sizes.part_bytes,
            part_offset=get_tp_group().rank_in_group * sizes.part_bytes,
            ranks=Ranks(get_tp_group().world_size, _all_ranks),
        )
    except (BlendRefusedError, ValueError) as error:
        _LOG.warning("kvtier: chunks are not reused: %s", error)
        return None


def _all_ranks(ready: bool) -> bool:
    """Whether every tensor-parallel worker says yes. All of them ask."""
    group = get_tp_group()
    if group.world_size == 1:
        return ready
    answer = torch.tensor(int(ready))
    torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(answer)


def _refusal(vllm_config: VllmConfig) -> str:
    """Why chunks cannot be reused with this engine; empty: they can."""
    model_config = vllm_config.model_config
    try:
        check_family(model_config.hf_text_config)
        frequencies_of(model_config.hf_text_config, model_config.get_head_size())
    except BlendRefusedError as error:
        return str(error)
    if drafter_of(vllm_config):
        return f"speculative decoding with a drafter that has KV of its own ({drafter_of(vllm_config)}), which chunks do not bring"
    if vllm_config.lora_config is not None:  # its layers add the adapters of the step's own tokens, whatever is computed with them
        return "enable_lora is true: with adapters the model cannot be run outside of the engine's steps"
    return ""


def _tokenizer(vllm_config: VllmConfig) -> Any | None:
    """The model's; ``None`` where it has none."""
    from transformers import AutoTokenizer  # type: ignore[import-not-found]  # noqa: PLC0415 - only where chunks are reused

    model = vllm_config.model_config
    try:
        return AutoTokenizer.from_pretrained(model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:  # one may need a package that is not there
        _LOG.warning("kvtier: no tokenizer: %s", error)
        return None


def turn_markers(tokenizer: Any | None) -> frozenset[int]:
    """The tokens that messages begin with; none where there is no tokenizer."""
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    return frozenset(vocabulary[text] for text in TURN_MARKERS if text in vocabulary)


def token_texts(tokenizer: Any | None) -> TokenTexts | None:
    """The texts of a tokenizer's tokens; ``None`` where there is none."""
    if tokenizer is None:
        return None
    pieces = [piece or "\0" for piece in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    before = "".join(tokenizer.tokenize(_BEFORE))

    def written(text: str) -> str:
        # Some tokenizers mark what a text begins with, and a separator is in the middle of one.
        whole = "".join(tokenizer.tokenize(_BEFORE + text))
        if not whole.startswith(before):
            raise BlendRefusedError(RefusalReason.FORMAT, f"separator is {text!r}, which the tokenizer writes otherwise behind other text")
        return whole.removeprefix(before)

    return TokenTexts(pieces, written)


def _primer(tokenizer: Any | None, config: Config) -> tuple[int, ...]:
    path = config.blend.primer
    if path is None:
        return ()
    if tokenizer is None:
        raise ConfigError(f"blend.primer is {path}: the model has no tokenizer; allowed: null")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"blend.primer is {path}: {error}; allowed: null, or a text file") from error
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
