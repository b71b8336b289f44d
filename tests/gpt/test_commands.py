"""The commands as a user runs them: results, error lines and exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.__main__ import main

SMALL = [
    *("--n-layer", "1", "--n-head", "1", "--n-embd", "16", "--block-size", "16"),
    *("--batch-size", "2", "--threads", "1", "--validate-every", "4", "--validate-batches", "2"),
]


def run_module(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kernels", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def trained(text_file: Path, tmp_path: Path) -> Path:
    out = tmp_path / "run"
    assert main(["train", "--data", str(text_file), "--steps", "4", "--out", str(out), *SMALL]) == 0
    return out


def test_train_as_a_process(text_file, tmp_path):
    out = tmp_path / "run"
    result = run_module("train", "--data", text_file, "--steps", 4, "--out", out, *SMALL)
    assert result.returncode == 0, result.stderr
    assert str(out / "checkpoint.safetensors") in result.stdout
    assert "tokens/s" in result.stderr
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "losses.png"]


def test_error_is_one_line_and_exit_code_2(tmp_path):
    out = tmp_path / "run"
    result = run_module("train", "--data", tmp_path / "nowhere", "--out", out)
    assert result.returncode == 2
    assert result.stderr == f"error: no such file or folder: {tmp_path / 'nowhere'}\n"
    assert result.stdout == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "no such file or folder"),
        ("", [], "holds no text"),
        ("short " * 20, [], "too short"),
        ("long enough " * 200, ["--n-head", "3"], "n_embd"),
        ("long enough " * 200, ["--dropout", "1"], "dropout"),
        ("long enough " * 200, ["--device", "nonsense"], "--device nonsense"),
        ("long enough " * 200, ["--device", "meta"], "--device meta"),
        ("long enough " * 200, ["--resume"], "--block-size cannot be given with --resume"),
    ],
)
def test_train_errors_write_nothing(tmp_path, capsys, content, options, message):
    path, out = tmp_path / "t.txt", tmp_path / "run"
    if content is not None:
        path.write_text(content)
    arguments = ["train", "--data", str(path), "--out", str(out), *SMALL, *options]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", ["train", "demo"])
def test_unwritable_folder_is_found_before_training(command, text_file, tmp_path, capsys):
    blocker = tmp_path / "file"
    blocker.touch()
    assert main([command, "--data", str(text_file), "--out", str(blocker / "out")]) == 2
    captured = capsys.readouterr()
    assert "cannot create" in captured.err
    assert "step" not in captured.err + captured.out


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", "0"],
        ["--learning-rate", "nan"],
        ["--suffixes", "py"],
        ["--seed", "-1"],
        ["--threads", "99999999999"],
    ],
)
def test_bad_option_values_are_refused(options, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *options])
    assert caught.value.code == 2
    assert options[1] in capsys.readouterr().err


def test_run_is_not_overwritten_unasked(trained, text_file, capsys):
    path = trained / "checkpoint.safetensors"
    before = path.read_bytes()
    again = ["train", "--data", str(text_file), "--steps", "2", "--out", str(trained), *SMALL]
    assert main(again) == 2
    assert path.read_bytes() == before
    assert main(["train", "--out", str(trained), "--resume"]) == 2
    assert "4 of 4 steps" in capsys.readouterr().err
    assert main(["train", "--out", str(trained), "--resume", "--steps", "6", "--threads", "1"]) == 0
    assert path.read_bytes() != before
    assert main([*again, "--force"]) == 0


def test_damaged_checkpoint_is_left_alone(trained, capsys):
    path = trained / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    before = {file.name: file.read_bytes() for file in trained.iterdir()}
    assert main(["train", "--out", str(trained), "--resume"]) == 2
    assert main(["generate", str(trained)]) == 2
    assert capsys.readouterr().err.count("is damaged") == 2
    assert {file.name: file.read_bytes() for file in trained.iterdir()} == before


def test_generate(trained, capsys):
    def text(*options: str) -> str:
        capsys.readouterr()
        assert main(["generate", str(trained), "--count", "20", "--threads", "1", *options]) == 0
        return capsys.readouterr().out

    assert text("--prompt", "the ") == text("--prompt", "the ")
    assert text("--prompt", "the ", "--seed", "1") != text("--prompt", "the ")
    greedy = text("--prompt", "the ", "--temperature", "0")
    assert greedy == text("--prompt", "the ", "--top-k", "1", "--layers", "torch")
    assert greedy.startswith("the ")
    assert len(greedy) == 4 + 20 + 1


def test_unknown_characters_of_a_prompt_are_said_and_shown(trained, capsys):
    assert main(["generate", str(trained), "--prompt", "a€😀", "--count", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("a\ufffd\ufffd")
    assert "2 characters of the prompt" in captured.err


def test_missing_checkpoint(tmp_path, capsys):
    assert main(["generate", str(tmp_path / "none")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


def test_two_processes_of_torchrun_train_one_model(text_file, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command += ["-m", "kernels", "train", "--device", "cpu", "--data", str(text_file)]
    command += ["--steps", "4", "--out", str(out), *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("weights:") == 1
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.safetensors", "losses.png"]
