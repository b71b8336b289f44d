"""Dropout: the generator, its statistics, and that every backend drops the same weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from kernels.attention import scaled_dot_product_attention as attention
from kernels.attention import varlen_attention
from kernels.attention.pattern import Pattern, grid, keep_mask
from tests.attention import oracle
from tests.attention.compare import check

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

# The known answers of Random123, the authors' own implementation: (key, counter, result).
KNOWN = [
    ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF,) * 4,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0xA4093822, 0x299F31D0),
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("key", "counter", "want"), KNOWN)
def test_known_answers_of_the_generator(key, counter, want):
    assert oracle.philox(key, counter) == want


def kept_weights(seed, p, heads=2, length_q=40, length_k=70) -> Tensor:
    """What is left of equal weights: one-hot values show each weight by itself."""
    query = torch.zeros(1, heads, length_q, 1)
    key = torch.zeros(1, heads, length_k, 1)
    value = torch.eye(length_k).expand(1, heads, length_k, length_k)
    return attention(query, key, value, dropout_p=p, seed=seed)[0] * length_k


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_the_weights_that_are_kept(implementation, seed):
    for p in (0.1, 0.5, 0.97):
        want = oracle.kept(seed, (0, 1), 40, 70, p).float() / (1 - p)
        torch.testing.assert_close(kept_weights(seed, p), want)


def test_all_or_nothing(implementation):
    assert not kept_weights(3, 1.0).any()
    torch.testing.assert_close(kept_weights(3, 0.0), torch.ones(2, 40, 70))


@pytest.mark.parametrize("keywords", [{}, {"is_causal": True}, {"window": (9, 3)}], ids=str)
def test_values_and_gradients(implementation, keywords):
    for dtype in (torch.float32, torch.bfloat16):
        given = [torch.randn(2, h, n, 16).to(dtype) for h, n in ((4, 35), (2, 47), (2, 47))]
        check(
            lambda *call, **rest: attention(*call, enable_gqa=True, return_lse=True, **rest),
            [*given, None, torch.randn(4)],
            dropout_p=0.3,
            seed=11,
            **keywords,
        )


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_statistics(p):
    """Over 2 M weights: the share that stays, by heads, rows and columns, and that neighbours of
    every kind are independent."""
    length = 512
    pattern = Pattern(0, 0, -1, -1, 0, length, length)
    places = grid(pattern, length, length, torch.device("cpu"))
    keep = keep_mask(torch.tensor([1234]), places, 2, 4, pattern, p).double()
    share, deviation = 1 - round(p * 65536) / 65536, (p * (1 - p)) ** 0.5

    def normal(sums, count):
        """Sums of `count` weights in standard deviations; 6 of them are never seen."""
        return (sums / count - share).abs().max() / (deviation / count**0.5)

    assert normal(keep.sum(), keep.numel()) < 6
    assert normal(keep.sum((2, 3)), length**2) < 6
    assert normal(keep.sum((0, 1, 2)), 8 * length) < 6
    assert normal(keep.sum((0, 1, 3)), 8 * length) < 6
    centred = keep - share
    for step in (1, 2, 8, 32):
        for dimension in (2, 3):
            product = centred * centred.roll(step, dimension)
            assert product.mean().abs() / (deviation**2 / keep.numel() ** 0.5) < 6
    heads = centred.flatten(0, 1).flatten(1)
    correlation = heads @ heads.T / length**2 / deviation**2
    assert correlation.fill_diagonal_(0).abs().max() < 6 / length


def test_the_mean_over_seeds_is_the_result_without_dropout():
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in "qkv")
    runs = torch.stack([attention(q, k, v, dropout_p=0.3, seed=seed) for seed in range(200)])
    error = (runs.mean(0) - attention(q, k, v)) / (runs.std(0) / 200**0.5)
    assert error.abs().max() < 6


def test_pytorchs_seed_repeats_a_run():
    q, k, v = (torch.randn(1, 2, 30, 8) for _ in "qkv")
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append([attention(q, k, v, dropout_p=0.5) for _ in range(2)])
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert not torch.equal(runs[0][0], runs[0][1])
    assert not torch.equal(runs[0][0], runs[2][0])


def test_a_seed_leaves_pytorchs_generator_alone():
    q = torch.randn(1, 2, 30, 8)
    state = torch.get_rng_state()
    attention(q, q, q, dropout_p=0.5, seed=1)
    attention(q, q, q)
    assert torch.equal(torch.get_rng_state(), state)


def test_packed_sequences_drop_as_a_batch_would():
    q, k, v = (torch.randn(3, 20, 2, 8) for _ in "qkv")
    want = attention(*(x.transpose(1, 2) for x in (q, k, v)), dropout_p=0.4, seed=9)
    ends = torch.arange(0, 61, 20, dtype=torch.int32)
    for backend in ("reference", "eager"):
        with dispatch.use(backend):
            got = varlen_attention(
                *(x.flatten(0, 1) for x in (q, k, v)), ends, ends, dropout_p=0.4, seed=9
            )
        torch.testing.assert_close(got, want.transpose(1, 2).flatten(0, 1))
