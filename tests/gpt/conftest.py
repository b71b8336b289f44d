"""What the GPT tests share: a small real text, a cache of their own, tiny models."""

import random
from pathlib import Path

import pytest
import torch

from kernels.gpt import FUSED, GPT, TORCH, GPTConfig, Layers, data
from kernels.gpt.trainer import Trainer, TrainSettings


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small only lose time to more threads, most of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """20,000 characters with structure to learn: sentences of a few words."""
    words = ("the", "kernel", "reads", "a", "row", "and", "writes", "one", "of", "matrix")
    picks = random.Random(0)
    path = tmp_path / "text.txt"
    sentences = (" ".join(picks.choices(words, k=6)) + ".\n" for _ in range(800))
    path.write_text("".join(sentences)[:20_000])
    return path


@pytest.fixture
def text(text_file: Path) -> data.TextData:
    return data.load(data.Source(str(text_file)))


@pytest.fixture
def make_trainer(text: data.TextData):
    def make(layers: Layers = TORCH, steps: int = 100, **changes) -> Trainer:
        config = tiny(vocab_size=len(text.vocabulary), **changes)
        return Trainer(GPT(config, layers), text, TrainSettings(steps, 4, 2e-3))

    return make


def tiny(**changes) -> GPTConfig:
    sizes = {"vocab_size": 17, "block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    return GPTConfig(**sizes | changes)


@pytest.fixture(params=["torch", "fused"])
def layers(request: pytest.FixtureRequest) -> Layers:
    return {"torch": TORCH, "fused": FUSED}[request.param]


@pytest.fixture
def make_config():
    return tiny
