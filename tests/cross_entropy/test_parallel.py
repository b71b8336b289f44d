"""Classes split over two processes (gloo) against one process that has them all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, multiprocessing

from kernels.cross_entropy import cross_entropy

RANKS = 2


def _compare(rank, store):
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        group = distributed.group.WORLD
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(9, 2 * 70, generator=generator) * 3
        target = torch.randint(0, 140, (9,), generator=generator)
        target[2] = -100
        weight = torch.rand(140, generator=generator) + 0.1
        mine = slice(70 * rank, 70 * (rank + 1))
        for keywords in (
            {},
            {"reduction": "sum", "label_smoothing": 0.1},
            {"reduction": "none", "weight": weight},
            {"weight": weight, "label_smoothing": 0.3},
        ):
            for extra in ({}, {"z_loss": 0.01, "softcap": 5.0, "logit_scale": 0.7}):
                whole = logits.clone().requires_grad_()
                want, all_stats = cross_entropy(
                    whole, target, return_stats=True, **keywords, **extra
                )
                part = logits[:, mine].clone().requires_grad_()
                got, stats = cross_entropy(
                    part, target, return_stats=True, process_group=group, **keywords, **extra
                )
                torch.testing.assert_close(got, want)
                torch.testing.assert_close(stats, all_stats)
                (want_gradient,) = torch.autograd.grad(want.sum() + all_stats.lse.sum(), whole)
                (gradient,) = torch.autograd.grad(got.sum() + stats.lse.sum(), part)
                torch.testing.assert_close(gradient, want_gradient[:, mine])
                if not extra:
                    torch.testing.assert_close(got, F.cross_entropy(logits, target, **keywords))
        with pytest.raises(IndexError, match="target 140 at position 0"):
            cross_entropy(part, torch.full((9,), 140), process_group=group)
        part = logits[:, mine].clone().requires_grad_()
        loss = cross_entropy(part, target, process_group=group)
        (first,) = torch.autograd.grad(loss, part, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_every_rank_gets_the_loss_of_all_classes(tmp_path):
    multiprocessing.start_processes(
        _compare, (f"file://{tmp_path}/store",), nprocs=RANKS, start_method="spawn"
    )
