"""A small Llama with random weights and an even number of heads, since the real model's nine do not divide by two.

python tests/engine/tiny.py DIRECTORY TOKENIZER_DIRECTORY
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path


def main(directory: Path, tokenizer: Path) -> None:
    """Writes the checkpoint. The same weights every time."""
    import torch  # noqa: PLC0415 - only where the engine is installed
    from transformers import LlamaConfig, LlamaForCausalLM  # type: ignore[import-not-found]  # noqa: PLC0415

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, directory / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
