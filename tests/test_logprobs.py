"""Cross-entropy and token log-probs against torch's own, in float64, and what the mask must hide."""

import math

import pytest
import torch
from torch import nn

from minirlhf import logprobs as paths
from minirlhf.logprobs import cross_entropy, log_softmax, token_logprobs, token_stats
from minirlhf.run import can_compile

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


def of_logits(logits, targets, **options):
    """cross_entropy of given logits: hidden states that an output layer of ones and zeros hands through."""
    return cross_entropy(logits, torch.eye(logits.size(-1), dtype=logits.dtype), targets, **options)


def assert_same(ours, theirs, logits, atol=1e-12):
    for a, b in zip(value_and_gradient(ours, logits), value_and_gradient(theirs, logits), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


def test_log_softmax_equals_torch(batch):
    assert_same(log_softmax, lambda logits: torch.log_softmax(logits, -1), batch[0])


@pytest.mark.parametrize("path", ["plain", "chunked"])
@pytest.mark.parametrize("ignored", ["none", "some", "one row"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_equals_torch_values_and_gradients(batch, reduction, ignored, path, monkeypatch):
    logits, targets = batch
    monkeypatch.setattr(paths, "CHUNK", 4 * logits.size(-1))  # four rows at a time
    if ignored == "some":
        targets[:, ::2] = -100
    elif ignored == "one row":
        targets[1] = -100
    options = dict(reduction=reduction)
    shape = targets.shape if reduction == "none" else ()

    def ours(logits):
        return of_logits(logits, targets, path=path, **options)

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
    torch.testing.assert_close(of_logits(logits, targets), expected, rtol=0, atol=1e-12)


def test_cross_entropy_worked_example():
    logits = torch.tensor([[[2, 1, .1, .5, .3], [.2, 1.5, .3, .7, .8], [1, .2, .8, .5, 1.2]],
                           [[.5, 1, 1.5, .2, .3], [1.2, .7, .5, 1, .9], [.3, .8, 1, 1.5, .4]]])
    targets = torch.tensor([[0, 3, 4], [2, 1, 3]])
    expected = torch.tensor([[0.6540, 1.7241, 1.2100], [0.9354, 1.7982, 1.0069]])
    torch.testing.assert_close(of_logits(logits, targets, reduction="none"), expected, rtol=0, atol=5e-5)
    assert of_logits(logits, targets).item() == pytest.approx(1.2214, abs=5e-5)
    assert of_logits(logits, targets, reduction="sum").item() == pytest.approx(7.3286, abs=5e-5)


def test_uniform_logits_cost_log_v():
    loss = of_logits(torch.full((1, 3, 7), 5.0), torch.tensor([[0, 3, 6]]))
    assert loss.item() == pytest.approx(math.log(7), abs=1e-6)


# ---- log-probs of the chosen tokens, by each of the three paths ------------------------------

B, T, C, V = 3, 5, 8, 13
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture(params=["plain", "compiled", "chunked"])
def path(request, monkeypatch):
    """A path; chunked in three chunks of the eight rows that MASK leaves, the last of them not full."""
    if request.param == "compiled" and not can_compile("cpu"):
        pytest.skip("no C++ compiler for torch.compile")
    monkeypatch.setattr(paths, "CHUNK", 3 * V)
    monkeypatch.setattr(paths, "PIECE", 2 * V)
    return request.param


def test_huge_logits_stay_finite_and_exact(path):
    logits = torch.tensor([[1e4, 0.0, -1e4]]).repeat(1, 3, 1).requires_grad_()
    nll = of_logits(logits, torch.tensor([[0, 1, 2]]), reduction="none", path=path)
    assert nll.tolist() == [[0.0, 1e4, 2e4]]
    nll.sum().backward()  # softmax - one-hot
    assert logits.grad.tolist() == [[[0, 0, 0], [1, -1, 0], [1, 0, -1]]]


@pytest.fixture
def tokens():
    """Hidden states (B, T, C), output layer (V, C) and targets (B, T), fp32, far from uniform."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, C, generator=generator)
    return hidden, torch.randn(V, C, generator=generator), torch.randint(V, (B, T), generator=generator)


def wanted(hidden, weight, targets, temperature, mask=MASK):
    """(logprobs, entropy, variance) of every slot in the mask, one at a time, and 0 elsewhere; in the inputs' dtype."""
    columns = torch.zeros(3, *mask.shape, dtype=hidden.dtype)
    for b, t in mask.nonzero().tolist():
        row = torch.log_softmax(weight @ hidden[b, t] / temperature, 0)
        mean = -(row.exp() * row).sum()
        columns[:, b, t] = torch.stack([row[targets[b, t]], mean, (row.exp() * (-row - mean) ** 2).sum()])
    return columns


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_variance_equal_float64(tokens, temperature, path):
    hidden, weight, targets = tokens
    columns = token_stats(hidden, weight, targets, MASK, temperature, path)
    for ours, exact in zip(columns, wanted(hidden.double(), weight.double(), targets, temperature), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)
        assert torch.all(ours[~MASK] == 0)
    assert torch.equal(token_logprobs(hidden, weight, targets, MASK, temperature, path), columns[0])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprob_gradients_equal_float64(tokens, temperature, path):
    hidden, weight, targets = tokens
    pull = torch.randn(B, T, generator=torch.Generator().manual_seed(2))
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    (token_logprobs(*ours, targets, MASK, temperature, path) * pull).sum().backward()
    (wanted(*exact, targets, temperature)[0] * pull).sum().backward()
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=2e-5)
    assert torch.all(ours[0].grad[~MASK] == 0)


def test_gradient_reaches_a_tied_embedding_from_both_ends(tokens, path):
    """The weight is input embedding and output layer at once; its gradient is the sum of both."""
    _, weight, targets = tokens
    inputs = targets.roll(1, 1)
    ours, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    token_logprobs(ours[inputs].tanh(), ours, targets, MASK, path=path).sum().backward()
    wanted(exact[inputs].tanh(), exact, targets, 1.0)[0].sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_nothing_behind_the_mask_is_looked_at(tokens, garbage, path):
    hidden, weight, targets = tokens
    spoiled, wrong = hidden.clone(), targets.clone()
    spoiled[~MASK] = garbage
    wrong[~MASK] = 10**6  # no such token
    results = []
    for h, y in ((hidden, targets), (spoiled, wrong)):
        h, w = h.clone().requires_grad_(), weight.clone().requires_grad_()
        columns = token_stats(h, w, y, MASK, 0.7, path)
        (columns[0] * torch.arange(B * T).view(B, T)).sum().backward()
        results.append((*columns, h.grad, w.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_one_row(tokens, path):
    hidden, weight, targets = tokens
    mask = torch.zeros_like(MASK)
    mask[1, 2] = True
    ours, exact = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    columns = token_stats(ours, weight, targets, mask, 1.0, path)
    want = wanted(exact, weight.double(), targets, 1.0, mask)
    for a, b in zip(columns, want):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-5)
    columns[0].sum().backward()
    want[0].sum().backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=2e-5)


def test_no_row_at_all(tokens, path):
    hidden, weight, targets = tokens
    columns = token_stats(hidden.requires_grad_(), weight, targets, torch.zeros_like(MASK), 1.0, path)
    columns[0].sum().backward()
    assert all(column.shape == MASK.shape and not column.any() for column in columns) and not hidden.grad.any()


def test_a_vocabulary_of_50257(path, monkeypatch):
    """Four rows and a target at each end; the chunks are as in use, and three rows."""
    V = 50257
    generator = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(1, 4, C, generator=generator), torch.randn(V, C, generator=generator)
    targets, mask = torch.tensor([[0, V - 1, 7, 40000]]), torch.ones(1, 4, dtype=torch.bool)
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    want = wanted(*exact, targets, 0.9, mask)
    want[0].sum().backward()
    for chunk in (2**24, 3 * V)[: 1 + (path == "chunked")]:
        monkeypatch.setattr(paths, "CHUNK", chunk)
        ours = [x.clone().requires_grad_() for x in (hidden, weight)]
        columns = token_stats(*ours, targets, mask, 0.9, path)
        columns[0].sum().backward()
        for a, b in zip((*columns, *(x.grad for x in ours)), (*want, *(x.grad for x in exact))):
            torch.testing.assert_close(a.double(), b.detach(), rtol=1e-4, atol=2e-5)


def test_entropy_and_variance_carry_no_gradient(tokens, path):
    hidden, weight, targets = tokens
    logprobs, *moments = token_stats(hidden.requires_grad_(), weight.requires_grad_(), targets, MASK, 1.0, path)
    assert logprobs.requires_grad and not any(column.requires_grad for column in moments)


def test_moments_of_flat_and_certain_distributions(path):
    weight = torch.eye(4)
    hidden = torch.tensor([[[0.0, 0, 0, 0], [1e4, 0, 0, 0]]])
    _, entropy, variance = token_stats(hidden, weight, torch.zeros(1, 2, dtype=torch.long),
                                       torch.ones(1, 2, dtype=torch.bool), 1.0, path)
    assert entropy[0].tolist() == pytest.approx([math.log(4), 0.0], abs=1e-6)
    assert variance[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_under_bf16_autocast_results_are_fp32_and_normalised(tokens, path):
    """bf16 logits are what they are, but the softmax over them must be exact: probabilities sum to 1."""
    hidden, weight, _ = tokens
    every, mask = torch.arange(V).expand(1, V), torch.ones(1, V, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        columns = token_stats(hidden[:1, :1].expand(1, V, C), weight, every, mask, 1.0, path)
    assert {column.dtype for column in columns} == {torch.float32}
    assert columns[0].exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_bf16_gradients_are_those_of_bf16_logits(tokens, path):
    """Against fp32 gradients at the rounded inputs: off by bf16's rounding of products, not of sums over rows."""
    hidden, weight, targets = tokens
    ours = [x.clone().requires_grad_() for x in (hidden, weight)]
    exact = [x.bfloat16().double().requires_grad_() for x in (hidden, weight)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs = token_logprobs(*ours, targets, MASK, path=path)
    logprobs.sum().backward()
    wanted(*exact, targets, 1.0)[0].sum().backward()
    for a, b in zip(ours, exact):
        assert a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=0.1)
        assert (a.grad.double() - b.grad).norm() < 0.02 * b.grad.norm()


def test_compiled_once_for_any_number_of_rows():
    if not can_compile("cpu"):
        pytest.skip("no C++ compiler for torch.compile")
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(V, C, generator=generator)

    def step(rows, length):
        hidden = torch.randn(rows, length, C, generator=generator).requires_grad_()
        targets = torch.randint(V, (rows, length), generator=generator)
        mask = torch.ones(rows, length, dtype=torch.bool)
        token_logprobs(hidden, weight, targets, mask, path="compiled").sum().backward()

    step(2, 3)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, length in ((1, 1), (1, 2), (2, 3), (5, 7), (64, 55)):
            step(rows, length)


def test_the_path_is_chosen_by_size_where_none_is_forced(monkeypatch):
    weight = torch.empty(50257, 1)
    assert paths.choose_path("auto", 2048, weight) == "plain"  # 0.4 GB of logits
    assert paths.choose_path("auto", 8192, weight) == "chunked"
    assert paths.choose_path("plain", 10**9, weight) == "plain" and paths.choose_path("chunked", 1, weight) == "chunked"
