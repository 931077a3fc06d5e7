"""Whitening against an obvious twin (singular values of the centred matrix), and where the rank is short."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dq_lightning.core.errors import FeatureError
from dq_lightning.features import whitening
from dq_lightning.features.whitening import whiten


def twin(values):
    """Left singular vectors of the centred matrix, scaled to unit variance; the sign of each column is open."""
    centred = values.astype(np.float64) - values.astype(np.float64).mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    rank = int((singular > 1e-5 * singular[0]).sum()) if singular[0] > 0 else 0
    return left[:, :rank] * np.sqrt(len(values))


def correlated(rows, width, rank=None, seed=0):
    random = np.random.default_rng(seed)
    inner = random.normal(size=(rows, rank or width)) * np.linspace(1, 3, rank or width)
    return (inner @ random.normal(size=(rank or width, width)) + 5 * random.normal(size=width)).astype(np.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 99))
def test_inner_products_are_those_of_the_twin(rows, width, seed):
    values = correlated(rows, width, seed=seed)
    made, wanted = whiten(torch.from_numpy(values)).double().numpy(), twin(values)
    assert made.shape == wanted.shape == (rows, min(rows - 1, width))
    # inner products do not depend on the signs, nor on turns inside equal variances
    np.testing.assert_allclose(made @ made.T, wanted @ wanted.T, atol=2e-3 * rows**0.5)


def test_columns_are_uncorrelated_with_variance_one(monkeypatch):
    monkeypatch.setattr(whitening, "ROWS_AT_ONCE", 64)
    made = whiten(torch.from_numpy(correlated(1000, 20)))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.mean(0), torch.zeros(20), atol=1e-5, rtol=0)
    torch.testing.assert_close(made.T @ made / 1000, torch.eye(20), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_directions_without_variance_are_left_out(dtype):
    values = torch.from_numpy(correlated(300, 4)).to(dtype)
    repeated = torch.cat([values, values[:, :2], torch.full((300, 1), 7.0, dtype=dtype)], dim=1)
    made = whiten(repeated)
    assert made.shape == (300, 4)
    torch.testing.assert_close(made @ made.T, whiten(values) @ whiten(values).T, atol=1e-2, rtol=1e-2)


def test_a_large_mean_of_one_column_hides_no_other():
    """Such as a time in seconds beside an age, in float64."""
    random = np.random.default_rng(0)
    table = np.stack(
        [1.7e9 + 1e5 * random.normal(size=500), 40 + 10 * random.normal(size=500), np.full(500, 1.7e9)], axis=1
    )
    made = whiten(torch.from_numpy(table)).double().numpy()
    wanted = (table[:, :2] - table[:, :2].mean(axis=0)) @ np.linalg.inv(
        np.linalg.cholesky(np.cov(table[:, :2].T, bias=True))
    ).T
    assert made.shape == (500, 2)
    np.testing.assert_allclose(made @ made.T, wanted @ wanted.T, atol=1e-3)


def test_fewer_rows_than_columns_and_equal_rows():
    assert whiten(torch.randn(5, 50)).shape == (5, 4)
    assert torch.equal(whiten(torch.randn(1, 6).repeat(9, 1)), torch.zeros(9, 1))
    assert torch.equal(whiten(torch.randn(1, 6)), torch.zeros(1, 1))
    assert torch.equal(whiten(torch.zeros(3, 6)), torch.zeros(3, 1))


def test_order_of_rows_goes_with_the_answer_and_repeats_exactly():
    values = torch.from_numpy(correlated(100, 6))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(whiten(values[order]), whiten(values)[order], atol=1e-5, rtol=1e-4)
    assert torch.equal(whiten(values), whiten(values.clone()))


def test_what_cannot_be_whitened():
    for bad in (torch.zeros(0, 3), torch.zeros(3, 0), torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64)):
        with pytest.raises(FeatureError, match=r"\[N, D\]"):
            whiten(bad)
    for value in (float("nan"), float("inf")):
        with pytest.raises(FeatureError, match="finite"):
            whiten(torch.tensor([[1.0, value], [0.0, 1.0]]))
