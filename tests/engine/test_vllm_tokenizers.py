"""What chunk reuse asks of tokenizers as models have them: byte-level ones, Mistral's, and those that mark what a text begins with."""

from __future__ import annotations

import os
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import mistral_common  # type: ignore[import-not-found]
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast  # type: ignore[import-not-found]

from kvtier.blend.separators import TokenTexts
from kvtier.connectors.vllm.blend_parts import token_texts, turn_markers

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
SEPARATORS = ("\n---\n", "<doc>", " # # ", "\n\n", "~", "a", "é", "🙂")
documents = st.lists(st.text(st.sampled_from("ab -#\n<d>é🙂.") | st.characters(codec="utf-8"), max_size=12), min_size=1, max_size=4)


@cache
def tokenizer(kind: str) -> Any:
    """SmolLM2's, Mistral's, or one of Llama 2's kind: words begin with a mark, so does every text, and what is no word is bytes."""
    if kind == "byte-level":
        return AutoTokenizer.from_pretrained(os.environ["KVTIER_TEST_MODEL"])
    if kind == "mistral":
        return mistrals()
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "d",
        "▁a",
        "▁b",
        "ab",
        "▁ab",
        "-",
        "--",
        "#",
        "▁#",
        "<",
        ">",
        "do",
        "c",
    ]
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b"), ("▁", "ab"), ("-", "-"), ("▁", "#")]
    model = models.BPE({word: number for number, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def mistrals() -> Any:
    """As transformers loads it beside a model's weights: not one of its own classes."""
    data = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(data, Path(folder) / "tekken.json")
        (Path(folder) / "config.json").write_text('{"model_type": "mistral", "architectures": ["MistralForCausalLM"]}')
        return AutoTokenizer.from_pretrained(folder)


@cache
def texts(kind: str) -> TokenTexts:
    found = token_texts(tokenizer(kind))
    assert found is not None
    return found


def chunks(kind: str, text: str, separator: str) -> list[list[int]]:
    """Token ids of what is found between separators."""
    ids = list(tokenizer(kind)(text, add_special_tokens=False)["input_ids"])
    return [ids[span.start : span.end] for span in texts(kind).separated_spans(ids, separator)]


@pytest.mark.parametrize("kind", ["byte-level", "marked", "mistral"])
@given(documents=documents, separator=st.sampled_from(SEPARATORS))
@example(documents=["ab\n", "\n\nab"], separator="\n\n")
@example(documents=[" a", "b "], separator=" # # ")
def test_documents_are_found_in_any_order(kind: str, documents: list[str], separator: str) -> None:
    """What is found is text of the documents without a separator in it, and the same tokens wherever the document stands."""
    documents = [document for document in documents if separator not in document]
    joined = separator.join(["What is asked.", *documents, "Answer:"])
    turned = separator.join(["What is asked.", *reversed(documents), "Answer:"])
    found = chunks(kind, joined, separator)
    assert len(found) <= joined.count(separator)
    for ids in found:
        assert separator not in tokenizer(kind).decode(ids)
    if joined.count(separator) == turned.count(separator) == len(documents) + 1:
        assert sorted(found) == sorted(chunks(kind, turned, separator))


@pytest.mark.parametrize("kind", ["byte-level", "marked", "mistral"])
@pytest.mark.parametrize("separator", ["\n---\n", "<doc>", " # # ", "\n\n"])
def test_whole_documents(kind: str, separator: str) -> None:
    """A chunk is all of its document, but for a first word that is one token with the space before it, where that is the separator's."""
    parts = ["ab ab", "ab ab ab\nab"]
    found = chunks(kind, separator.join(["ab", *parts, "b"]), separator)
    expected = [part.removeprefix("ab ") for part in parts] if separator.endswith(" ") else parts
    assert expected == [tokenizer(kind).decode(ids).strip() for ids in found]


@pytest.mark.parametrize(("kind", "markers"), [("byte-level", ["<|im_start|>"]), ("mistral", ["[INST]", "[TOOL_RESULTS]"]), ("marked", [])])
def test_what_messages_begin_with(kind: str, markers: list[str]) -> None:
    """Tokens of their own, as far as a tokenizer has them."""
    assert set(markers) == {tokenizer(kind).convert_ids_to_tokens([marker])[0] for marker in turn_markers(tokenizer(kind))}


def test_no_tokenizer() -> None:
    """Such a model's separators have to be token ids, and its prompts have no messages."""
    assert token_texts(None) is None
    assert not turn_markers(None)
