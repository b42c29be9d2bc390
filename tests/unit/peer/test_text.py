"""Text to tokens and back, token by token."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from potluck.peer.export import Text


def of(name: str) -> Any:
    return Text(SimpleNamespace(data=SimpleNamespace(tokenizer=name)))  # type: ignore[arg-type]


def streamed(text: Any, ids: list[int], prompt: int) -> str:
    parts = [text.decode(ids[:prompt])]
    parts += [text.more(token) for token in ids[prompt:]]
    return "".join([*parts, text.rest()])


@given(st.text(max_size=40), st.integers(0, 10))
def test_bytes_come_as_whole_characters(written: str, prompt: int) -> None:
    text = of("bytes")
    ids = text.encode(written)
    cut = len(written[:prompt].encode())
    assert streamed(text, ids, cut) == (written or "\n")


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of bytes with spaces inside its tokens, as GPT-2's."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("written", ["def f(x):\n    return x", "Zwölf Boxkämpfer 🥊 jagen", "  two  spaces "])
def test_hub_tokens_keep_their_spaces_and_characters(byte_pairs: Path, written: str) -> None:
    text = of(f"hf:{byte_pairs}")
    ids = text.encode(written)
    for prompt in (0, len(text.encode(written[:5])), len(ids)):
        assert streamed(text, ids, prompt) == written
