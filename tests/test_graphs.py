"""The decode step at fixed shapes draws what the growing cache draws."""

import pytest
import torch
from torch._dynamo.utils import counters

from minirlhf.generate import generate
from minirlhf.graphs import Decoder
from minirlhf.model import GPT, Shape
from minirlhf.run import can_compile

SHAPE = Shape(vocab_size=19, block_size=40, n_layer=2, n_head=2, n_embd=16)
PROMPTS = [[0, 3, 4], [0], [0, 5, 6, 7, 8, 9], [0, 1]]
NEW = 12


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(SHAPE)
    for parameter in model.parameters():  # far from uniform, so that a slot too many or too few is seen
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make(model, prompts=PROMPTS, compile=False):
    return Decoder(model, len(prompts), max(map(len, prompts)) + NEW, torch.float32, compile)


def rollout(model, prompts, decoder, seed=1, eos=-1):
    torch.manual_seed(seed)
    return generate(model, prompts, NEW, eos, decoder=decoder)


@pytest.mark.parametrize("prompts", [PROMPTS, [[0, 1, 2]] * 3, [[0]], [[0]] * 5], ids=str)
def test_it_draws_the_same_tokens(model, prompts):
    decoder = make(model, prompts)
    for seed in (1, 2):  # the second time over what the first has left in the cache
        fixed, growing = rollout(model, prompts, decoder, seed), rollout(model, prompts, None, seed)
        assert torch.equal(fixed.ids, growing.ids) and torch.equal(fixed.mask, growing.mask)
        torch.testing.assert_close(fixed.states, growing.states, rtol=0, atol=1e-5)


def test_prompts_shorter_than_the_last_ones(model):
    decoder = make(model)
    rollout(model, PROMPTS, decoder)
    shorter = [[0, 2], [0], [0, 1], [0]]
    assert torch.equal(rollout(model, shorter, decoder).ids, rollout(model, shorter, None).ids)


def test_rows_that_have_ended_stay_and_change_nothing(model):
    found = rollout(model, PROMPTS * 8, make(model, PROMPTS * 8), eos=4)
    assert 0 < found.finished.sum() < len(found.finished) or found.mask.size(1) < NEW
    assert len(set(found.mask.sum(1).tolist())) > 2
    assert found.mask.any(0).all() and not (found.ids[:, found.prompt_length:][~found.mask] != 0).any()
    torch.testing.assert_close(found.states[found.mask], found.hidden(model)[found.mask].detach(), rtol=0, atol=1e-5)


def test_it_follows_the_weights(model):
    """PPO updates them in place between rollouts."""
    decoder = make(model)
    rollout(model, PROMPTS, decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    torch.testing.assert_close(rollout(model, PROMPTS, decoder).states, rollout(model, PROMPTS, None).states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiled_it_is_the_same_and_compiles_once(model, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    if not can_compile(device):
        pytest.skip(f"torch.compile has no working compiler for {device} here")
    model.to(device)
    decoder = make(model, compile=True)
    torch._dynamo.reset()
    counters.clear()
    for seed in (1, 2, 3):
        fixed, growing = rollout(model, PROMPTS, decoder, seed), rollout(model, PROMPTS, None, seed)
        torch.testing.assert_close(fixed.states, growing.states, rtol=0, atol=1e-4)
        assert torch.equal(fixed.ids, growing.ids)
    assert counters["stats"]["unique_graphs"] == 1
