import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dq_lightning.core.errors import ConfigError
from dq_lightning.features.gradient import head_gradient


def autograd_twin(logits, labels, loss):
    z = logits.double().clone().requires_grad_(True)
    scores = z.softmax(1) if loss == "softmax_cross_entropy" else z
    F.cross_entropy(scores, labels, reduction="sum").backward()
    return z.grad


@pytest.mark.parametrize("loss", ["softmax_cross_entropy", "cross_entropy"])
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(2, 8), st.sampled_from([0.1, 1.0, 10.0]))
def test_equals_autograd(loss, seed, count, classes, scale):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(count, classes, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    gradient = head_gradient(logits, labels, loss)
    assert gradient.dtype == torch.float32
    torch.testing.assert_close(gradient.double(), autograd_twin(logits, labels, loss), rtol=1e-5, atol=1e-12)


def test_saturated_logits_keep_their_digits():
    # float64 autograd of log-softmax loses p - 1 here; the true value is -exp(-50)
    gradient = head_gradient(torch.tensor([[50.0, 0.0]]), torch.tensor([0]), "cross_entropy")
    torch.testing.assert_close(gradient.double(), torch.tensor([[-1.0, 1.0]]).double() * torch.exp(torch.tensor(-50.0)))


def test_published_gradient_vanishes_for_the_confidently_wrong_and_the_plain_one_does_not():
    logits, labels = torch.tensor([[40.0, 0.0, 0.0]]), torch.tensor([1])
    assert head_gradient(logits, labels).abs().max() < 1e-12
    assert head_gradient(logits, labels, "cross_entropy").abs().max() > 0.99


def test_unknown_loss():
    with pytest.raises(ConfigError, match="softmax_cross_entropy"):
        head_gradient(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), "hinge")
