"""Cross-entropy and token log-probs against torch's own, in float64, and what the mask must hide."""

import math

import pytest
import torch
from torch import nn

from minirlhf.logprobs import cross_entropy, log_softmax, token_logprobs

# ---- log-softmax and cross-entropy -----------------------------------------------------------


@pytest.fixture
def batch():
    """Logits (4, 6, 11) and targets (4, 6) in float64."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, 6, 11, dtype=torch.float64, generator=generator)
    return logits, torch.randint(11, (4, 6), generator=generator)


def value_and_gradient(function, logits):
    """A function's value, and the gradient of its sum with unequal weights."""
    logits = logits.clone().requires_grad_()
    value = function(logits)
    pull = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    (value * pull).sum().backward()
    return value.detach(), logits.grad


def assert_same(ours, theirs, logits, atol=1e-12):
    for a, b in zip(value_and_gradient(ours, logits), value_and_gradient(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_log_softmax_equals_torch(batch):
    assert_same(log_softmax, lambda logits: torch.log_softmax(logits, -1), batch[0])


@pytest.mark.parametrize("ignored", ["none", "some", "one row"])
@pytest.mark.parametrize("ignore_index", [-100, 4])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_equals_torch_values_and_gradients(batch, reduction, ignore_index, ignored):
    logits, targets = batch
    if ignored == "some":
        targets[:, ::2] = ignore_index
    elif ignored == "one row":
        targets[1] = ignore_index
    options = dict(ignore_index=ignore_index, reduction=reduction)
    shape = targets.shape if reduction == "none" else ()

    def ours(logits):
        return cross_entropy(logits, targets, **options)

    def torch_loss(logits):
        return nn.CrossEntropyLoss(**options)(logits.flatten(0, 1), targets.flatten()).view(shape)

    def two_torch_modules(logits):
        return nn.NLLLoss(**options)(nn.LogSoftmax(-1)(logits).flatten(0, 1), targets.flatten()).view(shape)

    assert_same(ours, torch_loss, logits)
    assert_same(ours, two_torch_modules, logits)


def test_cross_entropy_ignores_minus_100_and_takes_the_mean_unless_told_otherwise(batch):
    logits, targets = batch
    targets[2, 3:] = -100
    expected = nn.CrossEntropyLoss()(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(cross_entropy(logits, targets), expected, rtol=0, atol=1e-12)


def test_cross_entropy_worked_example():
    logits = torch.tensor([[[2, 1, .1, .5, .3], [.2, 1.5, .3, .7, .8], [1, .2, .8, .5, 1.2]],
                           [[.5, 1, 1.5, .2, .3], [1.2, .7, .5, 1, .9], [.3, .8, 1, 1.5, .4]]])
    targets = torch.tensor([[0, 3, 4], [2, 1, 3]])
    expected = torch.tensor([[0.6540, 1.7241, 1.2100], [0.9354, 1.7982, 1.0069]])
    torch.testing.assert_close(cross_entropy(logits, targets, reduction="none"), expected, rtol=0, atol=5e-5)
    assert cross_entropy(logits, targets).item() == pytest.approx(1.2214, abs=5e-5)
    assert cross_entropy(logits, targets, reduction="sum").item() == pytest.approx(7.3286, abs=5e-5)


def test_uniform_logits_cost_log_v():
    loss = cross_entropy(torch.full((3, 7), 5.0), torch.tensor([0, 3, 6]))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


def test_huge_logits_stay_finite_and_exact():
    logits = torch.tensor([1e4, 0.0, -1e4]).repeat(3, 1).requires_grad_()
    nll = cross_entropy(logits, torch.tensor([0, 1, 2]), reduction="none")
    assert nll.tolist() == [0.0, 1e4, 2e4]
    nll.sum().backward()  # softmax - one-hot
    assert logits.grad.tolist() == [[0, 0, 0], [1, -1, 0], [1, 0, -1]]


# ---- log-probs of the chosen tokens ----------------------------------------------------------

B, T, C, V = 3, 5, 8, 13
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture
def tokens():
    """Hidden states (B, T, C), output layer (V, C) and targets (B, T), fp32, far from uniform."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, C, generator=generator)
    return hidden, torch.randn(V, C, generator=generator), torch.randint(V, (B, T), generator=generator)


def wanted(hidden, weight, targets, temperature):
    """(logprobs, entropy) of every slot in MASK, one at a time, and 0 elsewhere; in the inputs' dtype."""
    logprobs, entropy = [], []
    for b in range(B):
        for t in range(T):
            row = torch.log_softmax(weight @ hidden[b, t] / temperature, 0)
            logprobs.append(row[targets[b, t]] if MASK[b, t] else row.new_zeros(()))
            entropy.append(-(row.exp() * row).sum() if MASK[b, t] else row.new_zeros(()))
    return torch.stack(logprobs).view(B, T), torch.stack(entropy).view(B, T)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_entropy_equal_float64(tokens, temperature):
    hidden, weight, targets = tokens
    logprobs, entropy = token_logprobs(hidden, weight, targets, MASK, temperature)
    want_logprobs, want_entropy = wanted(hidden.double(), weight.double(), targets, temperature)
    torch.testing.assert_close(logprobs.double(), want_logprobs, rtol=0, atol=5e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=0, atol=5e-6)
    assert torch.all(logprobs[~MASK] == 0) and torch.all(entropy[~MASK] == 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprob_gradients_equal_float64(tokens, temperature):
    hidden, weight, targets = tokens
    pull = torch.randn(B, T, generator=torch.Generator().manual_seed(2))
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    (token_logprobs(*ours, targets, MASK, temperature)[0] * pull).sum().backward()
    (wanted(*exact, targets, temperature)[0] * pull).sum().backward()
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=2e-5)
    assert torch.all(ours[0].grad[~MASK] == 0)


def test_gradient_reaches_a_tied_embedding_from_both_ends(tokens):
    """The weight is input embedding and output layer at once; its gradient is the sum of both."""
    _, weight, targets = tokens
    inputs = targets.roll(1, 1)
    ours, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    token_logprobs(ours[inputs].tanh(), ours, targets, MASK)[0].sum().backward()
    wanted(exact[inputs].tanh(), exact, targets, 1.0)[0].sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_nothing_behind_the_mask_is_looked_at(tokens, garbage):
    hidden, weight, targets = tokens
    spoiled, wrong = hidden.clone(), targets.clone()
    spoiled[~MASK] = garbage
    wrong[~MASK] = 10**6  # no such token
    results = []
    for h, y in ((hidden, targets), (spoiled, wrong)):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = token_logprobs(h, w, y, MASK, 0.7)
        (logprobs * torch.arange(B * T).view(B, T)).sum().backward()
        results.append((logprobs, entropy, h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_entropy_carries_no_gradient(tokens):
    hidden, weight, targets = tokens
    logprobs, entropy = token_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets, MASK)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_entropy_of_flat_and_certain_distributions():
    weight = torch.eye(4)
    hidden = torch.tensor([[[0.0, 0, 0, 0], [1e4, 0, 0, 0]]])
    _, entropy = token_logprobs(hidden, weight, torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool))
    assert entropy[0].tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)


def test_logprobs_under_bf16_autocast_are_fp32_and_normalised(tokens):
    """bf16 logits are what they are, but the softmax over them must be exact: probabilities sum to 1."""
    hidden, weight, _ = tokens
    every, mask = torch.arange(V).expand(1, V), torch.ones(1, V, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = token_logprobs(hidden[:1, :1].expand(1, V, C), weight, every, mask)
    assert logprobs.dtype == entropy.dtype == torch.float32
    assert logprobs.exp().sum().item() == pytest.approx(1, abs=1e-5)
