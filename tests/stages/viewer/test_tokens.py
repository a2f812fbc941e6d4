"""How tokens are spelled: text, special tokens, bytes that are no text; and the turns of a chat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stages.viewer.chat import messages_of
from stages.viewer.tokens import Speller, Vocabulary


def byte_level(folder: Path) -> Path:
    """A byte-level tokenizer whose vocabulary is the 256 bytes, a word with a space, and a special token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"Ġhi": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("naïve<b>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_bytes_that_are_no_text_are_hex_and_special_tokens_are_told_apart(tmp_path: Path) -> None:
    path = byte_level(tmp_path)
    speller, tokenizer = Speller(path), Tokenizer.from_file(str(path))
    ids = {piece: tokenizer.token_to_id(piece) for piece in ("Ġhi", "Ċ", "â", "<|im_end|>", "naïve<b>")}
    assert speller.entry(ids["Ġhi"]) == {"id": 256, "t": " hi"}
    assert speller.entry(ids["Ċ"]) == {"id": ids["Ċ"], "t": "\n"}
    assert speller.entry(ids["â"]) == {"id": ids["â"], "b": "e2"}
    assert speller.entry(ids["<|im_end|>"]) == {"id": ids["<|im_end|>"], "s": "<|im_end|>"}
    assert speller.entry(ids["naïve<b>"])["t"] == "naïve<b>"
    assert speller.entry(9999) == {"id": 9999, "s": "id 9999"}


def test_pieces_of_sentencepiece_are_spelled_with_their_spaces(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "▁the": 1, "é": 2, "<0xE2>": 3, "<0x0A>": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    speller = Speller(tmp_path / "tokenizer.json")
    spelled = [speller.entry(number) for number in range(1, 5)]
    assert [entry.get("t", entry.get("b")) for entry in spelled] == [" the", "é", "e2", "\n"]


def test_without_a_tokenizer_tokens_are_their_ids() -> None:
    speller = Speller(None)
    assert not speller.knows_texts
    assert speller.entry(17) == {"id": 17, "t": "17 "}


def test_a_vocabulary_holds_each_token_once_the_most_frequent_first() -> None:
    vocabulary = Vocabulary([np.array([7, 7, 3]), np.array([3, 7, -1, 9])])
    assert [entry["id"] for entry in vocabulary.entries(Speller(None).entry)] == [7, 3, 9]
    assert vocabulary.places(np.array([9, -1, 7])).tolist() == [2, -1, 0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (
            "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi\n?<|im_end|>\n"
            "<|im_start|>assistant\n",
            [("system", "Be short."), ("user", "Hi\n?")],
        ),
        (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            [("user", "Hi")],
        ),
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n", [("user", "Hi")]),
        ("<|user|>How many?<|assistant|>", [("user", "How many?")]),
        (
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            [("user", "Hi"), ("assistant", "<think>\n\n</think>\n\n")],
        ),
    ],
    ids=["chatml", "llama3", "gemma", "demo", "prefilled"],
)
def test_turns_of_common_templates_are_read(prompt: str, expected: list[tuple[str, str]]) -> None:
    found = messages_of(prompt)
    assert found is not None
    assert [(turn["role"], turn["content"]) for turn in found] == expected


@pytest.mark.parametrize(
    "prompt", ["", "Question: 2 + 2?", "x <|im_start|>user\nHi<|im_end|>\n", "[INST] Hi [/INST]"]
)
def test_a_prompt_of_another_form_is_not_guessed_at(prompt: str) -> None:
    assert messages_of(prompt) is None
