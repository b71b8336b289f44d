"""Training: both layer sets along one curve, settings obeyed, resumed bit for bit."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from kernels._errors import CommandError
from kernels.gpt import FUSED, TORCH, checkpoint, data
from kernels.gpt.train import CHECKPOINT, PLOT, Run, resume, start, train
from kernels.gpt.trainer import TrainSettings, learning_rate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "variant", [{"norm": "pre"}, {"norm": "post", "activation": "relu", "qkv_bias": False}]
)
def test_hundred_steps_torch_against_fused(make_trainer, variant):
    first, second = make_trainer(TORCH, **variant), make_trainer(FUSED, **variant)
    for _ in range(100):
        first.train_step()
        second.train_step()
    differences = [abs(a - b) for a, b in zip(first.losses, second.losses, strict=True)]
    assert max(differences) < 1e-3
    assert first.losses[-1] < first.losses[0] - 0.5  # it learns, so the comparison means something


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    settings = TrainSettings(steps=1000, batch_size=1, learning_rate=2.0, warmup_steps=100)
    rates = [learning_rate(step, settings) for step in range(1001)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99] == rates[100] == 2.0
    assert rates[550] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[1000] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


def test_decay_concerns_matrices_only(make_trainer):
    matrices, vectors = make_trainer().optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {parameter.dim() for parameter in matrices["params"]} == {2}
    assert {parameter.dim() for parameter in vectors["params"]} == {1}
    assert matrices["betas"] == (0.9, 0.95)


def test_validation_is_the_same_each_time_and_trains_nothing(make_trainer):
    trainer = make_trainer(dropout=0.2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.validate(3) == trainer.validate(3)
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_follows_float32(make_trainer):
    full, half = make_trainer(FUSED), make_trainer(FUSED)
    half.settings = replace(half.settings, bf16=True)
    for _ in range(30):
        full.train_step()
        half.train_step()
    assert half.losses != full.losses
    assert half.losses[-1] == pytest.approx(full.losses[-1], abs=0.05)


def test_infinite_loss_stops_before_the_weights_are_spoilt(make_trainer):
    trainer = make_trainer()
    trainer.train_step()
    with torch.no_grad():
        trainer.model.token_embedding.weight[1:] = math.inf
    before = trainer.model.blocks[0].mlp.fc.weight.clone()
    with pytest.raises(CommandError, match="step 2"):
        trainer.train_step()
    assert torch.equal(trainer.model.blocks[0].mlp.fc.weight, before)


@pytest.fixture
def run(text_file):
    source = data.Source(str(text_file))
    settings = TrainSettings(steps=12, batch_size=4, learning_rate=2e-3, seed=7)
    return Run(source, data.prepare(source), "fused", settings, 4, 2)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_run_is_bit_equal(make_config, run, tmp_path, dropout):
    vocab_size = len(data.open_prepared(run.data_key).vocabulary)
    config = make_config(vocab_size=vocab_size, dropout=dropout)
    whole = start(config, run, CPU, tmp_path / "whole", force=False)
    train(whole, run, tmp_path / "whole")

    out = tmp_path / "parts"
    train(start(config, run, CPU, out, force=False), run, out, until=4)
    stored_run, second = resume(out, CPU, steps=None)
    assert (stored_run, second.step) == (run, 4)
    train(second, stored_run, out)

    assert second.losses == whole.losses
    assert second.validation == whole.validation
    assert [step for step, _ in whole.validation] == [0, 4, 8, 12]
    first, last = (checkpoint.load(tmp_path / name / CHECKPOINT) for name in ("whole", "parts"))
    assert first.tensors.keys() == last.tensors.keys()
    assert all(torch.equal(first.tensors[name], last.tensors[name]) for name in first.tensors)
    assert (out / PLOT).read_bytes().startswith(b"\x89PNG")


def test_resume_refuses_what_would_not_continue_the_run(make_config, run, tmp_path, text_file):
    config = make_config(vocab_size=len(data.open_prepared(run.data_key).vocabulary))
    train(start(config, run, CPU, tmp_path, force=False), run, tmp_path, until=4)
    with pytest.raises(CommandError, match=r"--resume.*--force"):
        start(config, run, CPU, tmp_path, force=False)
    with pytest.raises(CommandError, match="4 of 3 steps"):
        resume(tmp_path, CPU, steps=3)
    stored = checkpoint.load(tmp_path / CHECKPOINT)
    for name in ("optimizer.exp_avg.token_embedding.weight", "history.train"):
        rest = {key: value for key, value in stored.tensors.items() if key != name}
        checkpoint.save(tmp_path / "less" / CHECKPOINT, replace(stored, tensors=rest))
        with pytest.raises(CommandError, match=name):
            resume(tmp_path / "less", CPU, steps=None)
    checkpoint.save(tmp_path / "less" / CHECKPOINT, replace(stored, run={}))
    with pytest.raises(CommandError, match="does not describe a run"):
        resume(tmp_path / "less", CPU, steps=None)
    text_file.write_text(text_file.read_text() + "more")
    with pytest.raises(CommandError, match="is not the one"):
        resume(tmp_path, CPU, steps=None)
