"""The demo end to end with few steps, and what it does when a process dies."""

import os
import signal
from pathlib import Path

import pytest

from kernels.__main__ import main
from kernels._errors import CommandError
from kernels.gpt import checkpoint, data
from kernels.gpt.trainer import TrainSettings
from kernels.gpt.worker import Job, Worker


def test_demo_with_few_steps(text_file: Path, tmp_path: Path, capfd):
    out = tmp_path / "demo"
    options = ["--data", str(text_file), "--steps", "7", "--threads", "1", "--out", str(out)]
    assert main(["demo", *options]) == 0
    captured = capfd.readouterr()
    for words in ("validation loss", "tokens/s", "peak memory, MiB", "largest difference"):
        assert words in captured.out
    assert "torch" in captured.err  # one progress bar per model
    assert "fused" in captured.err
    names = ["demo.png", "demo.safetensors", "demo.txt"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "demo.txt").read_text() in captured.out
    assert checkpoint.load(out / "demo.safetensors").step == 7


@pytest.fixture
def job(text_file, make_config):
    key = data.prepare(data.Source(str(text_file)))
    config = make_config(vocab_size=len(data.open_prepared(key).vocabulary))
    return Job("fused", config, TrainSettings(5, 2, 1e-3), key, threads=1)


def test_killed_process_is_reported_not_awaited(job):
    with Worker(job) as worker:
        worker.ask("validate", 1)
        worker.answer()
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(CommandError, match="exit code -9"):  # noqa: PT012 - either may notice
            worker.ask("train", 1)
            worker.answer()


def test_silent_process_is_given_up(job, monkeypatch):
    monkeypatch.setattr("kernels.gpt.worker.ANSWER_SECONDS", 0.1)
    with Worker(job) as worker, pytest.raises(CommandError, match="no answer"):
        worker.answer()
    assert not worker.process.is_alive()


def test_error_in_a_process_reaches_the_user(job, tmp_path):
    blocker = tmp_path / "file"
    blocker.touch()
    with Worker(job) as worker:
        worker.ask("save", blocker / "demo.safetensors")
        with pytest.raises(CommandError, match="the fused model failed: cannot write"):
            worker.answer()


def test_unusable_text_ends_before_a_process_starts(tmp_path, capsys):
    path = tmp_path / "t.txt"
    path.write_text("short")
    assert main(["demo", "--data", str(path), "--out", str(tmp_path / "demo")]) == 2
    assert "too short" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
