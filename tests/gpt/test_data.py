"""Text found, encoded once and cut: what is read, what is refused, what stays the same."""

import numpy as np
import pytest
import torch

from kernels._errors import CommandError
from kernels.gpt import data
from kernels.gpt.vocabulary import UNKNOWN, Vocabulary


def test_vocabulary_round_trip_and_unknown_characters():
    vocabulary = Vocabulary.of(["hello", " wörld"])
    assert vocabulary.characters == UNKNOWN + " dehlorwö"
    assert vocabulary.decode(vocabulary.encode("low").tolist()) == "low"
    assert vocabulary.decode(vocabulary.encode("l€\udcff😀w").tolist()) == f"l{UNKNOWN * 3}w"


def test_token_type_grows_with_the_vocabulary():
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
    vocabulary = Vocabulary.of([many])
    assert (Vocabulary.of(["ab"]).dtype, vocabulary.dtype) == (np.uint8, np.uint16)
    assert vocabulary.decode(vocabulary.encode(many).tolist()) == many


def test_folder_is_read_in_order_of_path_and_by_suffix(tmp_path):
    folder = tmp_path / "texts"
    for name, content in (("b/x.txt", "BB"), ("a.txt", "A"), ("b/a.py", "C"), ("n.bin", "no")):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content * 50)
    assert "".join(data.Source(str(folder)).chunks()) == "A" * 50 + "C" * 50 + "BB" * 50
    assert "".join(data.Source(str(folder), (".py",)).chunks()) == "C" * 50
    assert "".join(data.Source(str(folder), max_characters=60).chunks()) == "A" * 50 + "C" * 10


def test_chunks_cut_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 7)
    path = tmp_path / "wide.txt"
    path.write_text("aé漢😀\n" * 40, encoding="utf-8")
    text = data.load(data.Source(str(path)))
    assert text.vocabulary.decode(text.tokens.tolist()) == "aé漢😀\n" * 40


def test_standard_library_is_the_default_and_capped():
    text = "".join(data.Source(max_characters=3000).chunks())
    assert len(text) == 3000
    files = data.Source().files()
    assert all("site-packages" not in path.parts and "test" not in path.parts for path in files)
    assert {path.suffix for path in files} == {".py"}


def test_validation_characters_are_unknown_where_training_lacks_them(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("ab" * 450 + "xy" * 50)
    text = data.load(data.Source(str(path)))
    assert text.vocabulary.characters == UNKNOWN + "ab"
    assert len(text.split("train")) == 900
    assert not text.split("validation").any()


def test_undecodable_bytes_become_the_unknown_token(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"ok\xff\xfe" * 30)
    text = data.load(data.Source(str(path)))
    assert text.vocabulary.decode(text.tokens[:4].tolist()) == "ok" + UNKNOWN * 2


def test_encoded_once_and_memory_mapped(text_file, monkeypatch):
    source = data.Source(str(text_file))
    first = data.load(source)
    assert isinstance(first.tokens, np.memmap)
    monkeypatch.setattr(data, "_encode", lambda *_: pytest.fail("encoded a second time"))
    second = data.load(source)
    assert second.key == first.key
    assert np.array_equal(second.tokens, first.tokens)
    assert sorted(path.suffix for path in data.cache_folder().iterdir()) == [".json", ".npy"]


def test_batches_follow_the_generator(text):
    draws = [text.batch("train", 4, 16, torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(draws[0][0], draws[1][0])
    x, y = draws[0]
    assert x.shape == y.shape == (4, 16)
    assert x.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_shortest_text_that_fits_gives_its_only_crop(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 9)  # 9 characters validate: block size 8 fits, 9 does not
    text = data.load(data.Source(str(path)))
    text.check(8)
    x, y = text.batch("validation", 2, 8, torch.Generator())
    assert x[0].tolist() == text.split("validation")[:8].tolist()
    assert y[1].tolist() == text.split("validation")[1:].tolist()
    with pytest.raises(CommandError, match=r"too short.*holds 9.*block_size \+ 1 = 10"):
        text.check(9)


def test_missing_and_empty_sources_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    blank = tmp_path / "blank.txt"
    blank.touch()
    for path, message in (
        (tmp_path / "nowhere", "no such file or folder"),
        (empty, "holds no file that ends in .md or .py or .txt"),
        (blank, "holds no text"),
    ):
        with pytest.raises(CommandError, match=message):
            data.load(data.Source(str(path)))
    assert not data.cache_folder().exists()


def test_truncated_cache_is_reported(text_file):
    text = data.load(data.Source(str(text_file)))
    path = data.cache_folder() / f"{text.key}.npy"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CommandError, match="damaged"):
        data.load(data.Source(str(text_file)))
