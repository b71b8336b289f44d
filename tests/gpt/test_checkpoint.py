"""A checkpoint comes back as it was, or is refused and left alone."""

import pytest
import torch
from safetensors.torch import save_file

from kernels._errors import CommandError
from kernels.gpt import FUSED, GPT, TORCH, checkpoint
from kernels.gpt.checkpoint import Checkpoint


@pytest.fixture
def stored(make_trainer):
    trainer = make_trainer(TORCH)
    for _ in range(2):
        trainer.train_step()
    trainer.validate(1)
    config, vocabulary = trainer.model.config, trainer.data.vocabulary
    return Checkpoint(config, vocabulary, 2, {"note": ["ü", 1]}, trainer.state())


def test_round_trip(stored, tmp_path):
    path = tmp_path / "new" / "c.safetensors"
    checkpoint.save(path, stored)
    loaded = checkpoint.load(path)
    for field in ("config", "vocabulary", "step", "run"):
        assert getattr(loaded, field) == getattr(stored, field)
    assert loaded.tensors.keys() == stored.tensors.keys()
    assert all(torch.equal(loaded.tensors[name], stored.tensors[name]) for name in loaded.tensors)
    assert [path.name for path in path.parent.iterdir()] == ["c.safetensors"]


def test_torch_checkpoint_loads_into_fused_layers(stored, tmp_path):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, stored)
    loaded = checkpoint.load(path)
    idx = torch.arange(10)[None]
    expected = loaded.model(TORCH)(idx)[0]
    torch.testing.assert_close(loaded.model(FUSED)(idx)[0], expected, rtol=1e-5, atol=1e-5)


def truncate(blob: bytes) -> bytes:
    return blob[: len(blob) // 2]


def flip_a_weight(blob: bytes) -> bytes:
    return blob[:-5] + bytes([blob[-5] ^ 1]) + blob[-4:]


def change_the_step(blob: bytes) -> bytes:
    assert blob.count(b'\\"step\\": 2') == 1  # JSON within JSON
    return blob.replace(b'\\"step\\": 2', b'\\"step\\": 3')


@pytest.mark.parametrize(
    "damage",
    [truncate, flip_a_weight, change_the_step, lambda _: b"", lambda _: b"not a checkpoint"],
)
def test_damaged_file_is_refused_and_kept(stored, tmp_path, damage):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, stored)
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(CommandError, match="damaged"):
        checkpoint.load(path)
    assert path.read_bytes() == before


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(CommandError, match="no checkpoint at"):
        checkpoint.load(tmp_path / "none.safetensors")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, foreign)
    with pytest.raises(CommandError, match="not a checkpoint of"):
        checkpoint.load(foreign)


def test_weights_of_another_size_are_refused(stored, make_config):
    other = GPT(make_config(n_embd=64)).state_dict()
    tensors = {f"model.{name}": value for name, value in other.items()}
    misfit = Checkpoint(stored.config, stored.vocabulary, 2, {}, tensors)
    with pytest.raises(CommandError, match="do not fit"):
        misfit.model(TORCH)


def test_failed_save_leaves_the_old_file(stored, tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    checkpoint.save(path, stored)
    before = path.read_bytes()

    def full_disk(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(CommandError, match="No space left"):
        checkpoint.save(path, stored)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.glob("*c*safetensors")] == ["c.safetensors"]
