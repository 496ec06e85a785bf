"""Small models with random weights, for what the real model cannot show.

python tests/engine/tiny.py KIND DIRECTORY TOKENIZER_DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

WINDOW = 64
"""tokens that a sliding-window layer sees, fewer than any prompt has"""
COMMON = {
    "vocab_size": 49152,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,  # or the next token is often the last one again, whatever the attention says
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}


def model_of(kind: str) -> Any:
    """A model, with the same weights every time.

    ``llama``: full attention, and heads that two workers can share (the real model's nine do not divide by two).
    ``hybrid``: layers with a sliding window and layers without. ``sliding``: only layers with a window. ``state``: Mamba layers.
    """
    import torch  # noqa: PLC0415 - only where the engine is installed
    import transformers  # type: ignore[import-not-found]  # noqa: PLC0415

    torch.manual_seed(7)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))
    if kind == "hybrid":
        layers = ["sliding_attention", "full_attention"] * 2
        config = transformers.Gemma3TextConfig(**COMMON, head_dim=64, query_pre_attn_scalar=64, sliding_window=WINDOW, layer_types=layers)
        return transformers.Gemma3ForCausalLM(config)
    if kind == "sliding":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON, sliding_window=WINDOW))
    if kind == "state":
        names = ("vocab_size", "hidden_size", "num_hidden_layers", "bos_token_id", "eos_token_id", "initializer_range")
        return transformers.MambaForCausalLM(transformers.MambaConfig(**{name: COMMON[name] for name in names}))
    raise ValueError(f"no kind of model is called {kind}")


def main(kind: str, directory: Path, tokenizer: Path) -> None:
    """Writes the checkpoint."""
    model_of(kind).float().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
