"""`python -m kernels quantize`: what it writes, what reads it, what it refuses."""

import pytest
import torch

from kernels.__main__ import main
from kernels._errors import CommandError
from kernels.gpt import FUSED, TORCH, checkpoint
from kernels.gpt.checkpoint import Checkpoint
from kernels.gpt.quantize import quantize, weight_bytes

STEPS = 30


@pytest.fixture
def learnt(make_trainer):
    """A trainer whose model has learnt a little, and its checkpoint."""
    trainer = make_trainer(FUSED, STEPS, n_embd=64)
    for _ in range(STEPS):
        trainer.train_step()
    vocabulary = trainer.data.vocabulary
    return trainer, Checkpoint(trainer.model.config, vocabulary, STEPS, {}, trainer.state())


@pytest.fixture
def run(learnt, tmp_path):
    path = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint.save(path, learnt[1])
    return path


@pytest.mark.parametrize(("mode", "rise"), [("dynamic", 0.01), ("weight_only", 0.003)])
def test_quality_and_size(learnt, mode, rise):
    trainer, stored = learnt
    before = trainer.validate(5)
    smaller, names = quantize(stored, mode)
    assert len(names) == 2 * 4 + 2
    for layers in (FUSED, TORCH):
        trainer.model = smaller.model(layers)
        assert trainer.validate(5) < before + rise
    # Narrow rows have as many bytes of scales and biases as of anything: 64 columns, not 128.
    assert weight_bytes(smaller) / weight_bytes(stored) < 0.29


@pytest.mark.parametrize("mode", ["dynamic", "weight_only"])
def test_the_file_comes_back_as_it_was(learnt, tmp_path, mode):
    smaller, _ = quantize(learnt[1], mode)
    path = tmp_path / "q.safetensors"
    checkpoint.save(path, smaller)
    loaded = checkpoint.load(path)
    assert loaded.quantization == mode
    assert not any(name.startswith(("optimizer", "history")) for name in loaded.tensors)
    index = torch.arange(10)[None]
    assert torch.equal(loaded.model(FUSED)(index)[0], smaller.model(FUSED)(index)[0])
    blob = path.read_bytes()
    assert blob.count(mode.encode()) == 1
    path.write_bytes(blob.replace(mode.encode(), mode.upper().encode()))
    with pytest.raises(CommandError, match="damaged"):
        checkpoint.load(path)


def test_generate_reads_what_quantize_writes(run, capsys):
    assert main(["quantize", str(run.parent)]) == 0
    written = run.with_name("checkpoint-int8.safetensors")
    out = capsys.readouterr().out
    assert str(written) in out
    assert "10 layers to int8, mode dynamic" in out
    for layers in ("torch", "fused"):
        options = ["--count", "20", "--threads", "1", "--prompt", "the ", "--layers", layers]
        assert main(["generate", str(written), *options]) == 0
        assert len(capsys.readouterr().out) >= 20
    other = run.with_name("w.safetensors")
    assert main(["quantize", str(run), "--mode", "weight_only", "--out", str(other)]) == 0
    assert checkpoint.load(other).quantization == "weight_only"


def test_nothing_is_overwritten_unasked(run, capsys):
    out = run.with_name("out.safetensors")
    out.write_text("mine")
    before = run.read_bytes()
    assert main(["quantize", str(run), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {out} exists; --force overwrites it\n"
    assert out.read_text() == "mine"
    assert main(["quantize", str(run), "--out", str(run), "--force"]) == 2
    assert "is the checkpoint itself" in capsys.readouterr().err
    assert main(["quantize", str(run), "--out", str(out), "--force"]) == 0
    assert checkpoint.load(out).quantization == "dynamic"
    assert run.read_bytes() == before
    assert sorted(path.name for path in run.parent.iterdir()) == [run.name, out.name]


def test_what_is_refused_is_one_line(run, tmp_path, capsys):
    def error(*arguments):
        assert main(["quantize", *map(str, arguments)]) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert text.count("\n") == 1
        return text

    assert "no checkpoint at" in error(tmp_path / "none")
    smaller = tmp_path / "q.safetensors"
    assert main(["quantize", str(run), "--out", str(smaller)]) == 0
    assert "quantised already, with mode dynamic" in error(smaller)
    assert "cannot write" in error(run, "--out", smaller / "x.safetensors")
    damaged = tmp_path / "d.safetensors"
    damaged.write_bytes(run.read_bytes()[:-9])
    assert "is damaged" in error(damaged)
    folder = tmp_path / "again"
    folder.mkdir()
    smaller.rename(folder / "checkpoint.safetensors")
    assert main(["train", "--out", str(folder), "--resume"]) == 2
    assert "is quantised: it can be used, but not trained" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", str(run), "--mode", "int4"])
