from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from core.data import corpus
from core.data.corpus import TableWriter, admissible, class_prompts, fits, is_english
from core.data.features import TsvFeatures
from core.data.tsv import open_tables
from core.folder import FileStore
from core.models.text import SLOTS, tokens


def test_only_the_first_of_equal_sentences_is_kept_whatever_its_blanks_and_capitals() -> None:
    sentences = ["A red car", "a  red car ", "a blue car", "", "a red car", "a blue car."]
    assert admissible(sentences, 0.9).tolist() == [True, False, True, False, False, True]


def test_a_sentence_fits_when_none_of_its_tokens_is_cut_off() -> None:
    for words in (10, 75, 76, 200):
        text = " ".join(["cat"] * words)
        assert fits(text) == (words <= 75) == (len(tokens(text)) <= SLOTS)
    assert not fits("\u732b" * 75)


@pytest.mark.parametrize(
    ("text", "english"),
    [
        ("a dog on the beach", True),
        ("red sports car", True),
        ("Café in Los Angeles, on the corner", True),
        ("ein Hund mit einem Ball und eine Katze", False),
        ("un chien dans la rue avec une balle", False),
        ("собака на пляже", False),
        ("1234", False),
    ],
)
def test_english_is_told_by_letters_and_function_words(text: str, english: bool) -> None:
    assert is_english(text, 0.9) == english
    assert admissible([text], 0.0).all()


def test_tables_of_pairs_are_read_back_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "ROWS_OF_TABLE", 2)
    store, vectors = FileStore(tmp_path), np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    writer = TableWriter(store)
    texts = ["a cat", "tab\tand\nline", "tags: a caption", "caf\u00e9", "7"]
    for i, text in enumerate(texts):
        writer.add(f"k{i}", text, vectors[i])
    assert store.size("text.list") is None
    writer.close()
    tables, features = open_tables(store, "text"), open_tables(store, "text_feat")
    assert tables is not None
    assert features is not None
    assert [json.loads(tables.pair(i)[1])["captions"] for i in range(5)] == [[text] for text in texts]
    np.testing.assert_array_equal(TsvFeatures(features).read(np.arange(5))["teacher"], vectors)
    assert writer.rows == 5


def test_a_class_has_a_prompt_for_each_template() -> None:
    prompts = class_prompts(["tabby, cat", "dog"])
    assert len(prompts) == len(set(prompts)) == 162
    assert "a photo of a tabby cat." in prompts
    assert "dog." in prompts
