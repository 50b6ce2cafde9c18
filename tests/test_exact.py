"""The exact world: its sums against brute force, and train_ppo.train against the known optimum."""

import itertools
import json
import math

import pytest
import torch

from minirlhf.lab import exact
from minirlhf.run import load_lm


def logprobs_of(rows, generator):
    return torch.randn(4, rows, generator=generator, dtype=torch.float64).log_softmax(1)


@pytest.fixture
def four():
    """(policy, reference, rewards) of 4 prompts and 9 answers: random, float64."""
    generator = torch.Generator().manual_seed(3)
    return logprobs_of(9, generator), logprobs_of(9, generator), torch.randn(4, 9, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name, count", [("small", 364), ("hard", 1555)])
def test_worlds_hold_every_answer_once_and_never_change(name, count):
    world = exact.World(name, *exact.WORLDS[name])
    symbols, longest, _ = exact.WORLDS[name]
    assert len(set(world.answers)) == len(world.answers) == count and len(world.prompts) == 4
    for answer in world.answers:
        ended = answer[-1] == symbols
        assert len(answer) <= longest and symbols not in answer[:-1] and (ended or len(answer) == longest)
    assert len({prompt for prompt, _ in world.table}) == 5 and len(world.table) == 5 * count  # no two answers share a text
    assert abs(world.rewards.mean()) < 0.1 and abs(world.rewards.std() - 1) < 0.1
    assert torch.equal(world.rewards, exact.World(name, symbols, longest).rewards)
    assert world.reward([world.prompts[2]], [world.tokenizer.decode(world.answers[7])]) == [world.rewards[2, 7].item()]


def test_the_scripts_train_on_the_four_prompts_and_hold_out_the_fifth():
    for name, size in exact.WORLDS.items():
        world = exact.World(name, *size)
        train, held_out = exact.data.split(world.prompts + world.held_out, key=str)
        assert (train, held_out) == (world.prompts, world.held_out)
        corpus = world.corpus(64)
        assert {prompt for prompt, _ in corpus.train} == set(world.prompts)
        assert {prompt for prompt, _ in corpus.held_out} == set(world.held_out)


def test_enumerated_logprobs_are_the_models_own_and_sum_to_one(tiny_gpt):
    world = exact.World("tiny", 3, 3)
    model = tiny_gpt(vocab_size=4, block_size=6)
    logprobs = exact.enumerate_policy(model, world)
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-12)
    double = tiny_gpt(vocab_size=4, block_size=6, dtype=torch.float64)
    for i, prompt in enumerate(world.prompts):
        for j in (0, 1, 5, 12, 13, 39):  # the empty answer, ended ones, and some that were cut
            ids = [3] + world.tokenizer.encode(prompt) + list(world.answers[j])
            steps = (double(torch.tensor([ids]))[0] @ double.head_weight.T).log_softmax(-1)
            n = len(world.answers[j])
            want = sum(steps[len(ids) - n - 1 + t, ids[len(ids) - n + t]] for t in range(n))
            assert logprobs[i, j].item() == pytest.approx(want.item(), abs=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0])
def test_distance_to_the_optimum_is_beta_times_a_kl(four, beta):
    """J* - J(π) = β KL(π || π*) for every π, and J* is reached by π*."""
    policy, reference, rewards = four
    best, j_optimal = exact.optimum(reference, rewards, beta)
    for p in (policy, reference, best):
        gap = j_optimal - exact.objective(p, reference, rewards, beta)
        assert gap == pytest.approx(beta * exact.kl(p, best), abs=1e-12)
    row = exact.measure(policy, reference, rewards, beta)
    assert abs(row["j_optimal"] - row["j_policy"] - beta * row["kl_optimal"]) < 1e-9
    assert exact.measure(best, reference, rewards, beta)["gap_closed"] == pytest.approx(1)
    assert exact.measure(reference, reference, rewards, beta)["gap_closed"] == 0


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_optimum_of_the_reverse_kl_has_no_slope(four, beta):
    _, reference, rewards = four
    logits = exact.reverse_optimum(reference, rewards, beta).requires_grad_()
    p = logits.log_softmax(1)
    value = (p.exp() * rewards).sum() - beta * (reference.exp() * (reference - p)).sum()
    slope, = torch.autograd.grad(value, logits)
    assert slope.abs().max() < 1e-9
    random = exact.measure(four[0], reference, rewards, beta, "reverse")
    assert random["j_policy"] < random["j_optimal"]


def test_grpos_optimum_reproduces_its_own_spread(four):
    _, reference, rewards = four
    policy, sigma = exact.self_consistent(reference, rewards, 2.0)
    mean = (policy.exp() * rewards).sum(1, keepdim=True)
    spread = (policy.exp() * (rewards - mean) ** 2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(spread, sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(policy, (reference + rewards / (2.0 * sigma)).log_softmax(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_best_of_n_equals_all_ways_to_draw_n(four, n):
    _, reference, rewards = four
    reference, rewards = reference[:, :5].log_softmax(1), rewards[:, :5]
    want = torch.zeros(4, 5, dtype=torch.float64)
    for i in range(4):
        for draws in itertools.product(range(5), repeat=n):
            best = max(draws, key=lambda j: rewards[i, j])
            want[i, best] += math.exp(sum(reference[i, j] for j in draws))
    torch.testing.assert_close(exact.best_of_n(reference, rewards, n).exp(), want, rtol=1e-9, atol=1e-12)


def test_best_of_many_stays_a_distribution_below_the_bound():
    world = exact.World("small", *exact.WORLDS["small"])
    reference = logprobs_of(364, torch.Generator().manual_seed(1))
    for row in exact.best_of_n_rows(world, reference):
        assert 0 < row["kl"] <= row["kl_bound"] + 1e-9
    assert exact.best_of_n(reference, world.rewards, 1024).exp().sum(1).tolist() == pytest.approx([1.0] * 4)


def test_symbols_round_trip():
    symbols = exact.Symbols(4)
    assert symbols.decode(symbols.encode("abdc") + [symbols.eos]) == "abdc" and symbols.vocab_size == 5
    assert exact.Symbols.from_state(symbols.state()).state() == symbols.state()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """(world of 40 answers, folder of its language model)."""
    world, folder = exact.World("toy", 3, 3), tmp_path_factory.mktemp("toy")
    exact.train_reference(world, folder)
    return world, folder


@pytest.mark.parametrize("variant, beta", [("gae", 0.3)] + [(variant, 1.0) for variant in exact.VARIANTS])
def test_train_ppo_reaches_the_optimum_that_theory_names(toy, variant, beta, monkeypatch):
    """train_ppo.train itself, every way of it, against the closed form; nine tenths of the gap and more."""
    world, folder = toy
    options = dict(max_steps=30, batch_size=1024, minibatch_size=128, ppo_epochs=2)
    monkeypatch.setattr(exact, "DPO_PAIRS", 5000)
    monkeypatch.setattr(exact, "DPO", dict(lr=5e-3, batch_size=1024, epochs=16))
    row = exact.run_row(world, folder, variant, beta, 1, options)
    assert row["gap_closed"] >= 0.9
    assert row["kl_optimal"] < 0.1
    if exact.VARIANTS[variant][1] == "π*":
        assert abs(row["j_optimal"] - row["j_policy"] - beta * row["kl_optimal"]) < 1e-6
    if variant != "dpo":  # which samples nothing
        assert row["logged_k1"] == pytest.approx(row["kl_reference"], abs=0.2)
    assert load_lm(str(folder / "lm"), "cpu")[1].state() == {"kind": "symbols", "n": 3}


@pytest.mark.parametrize("arguments, words", [
    ("--symbols 26 --max_tokens 5", "12,356,631"),
    ("--symbols 2", "3 or more"),
    ("--worlds middle", "must be of small, hard"),
    ("--betas 0.1,0", "must be above 0"),
    ("--betas x", "not a number"),
    ("--variants ppo", "must be of"),
    ("--ppo speed=3", "no option 'speed'"),
    ("--ppo lr=fast", "not of the kind float"),
    ("--out /dev/null/x.json", "cannot be written"),
])
def test_bad_input_is_one_line(cli, arguments, words, tmp_path):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x.json")]
    code, _, err = cli(exact, arguments, out)
    assert code == 2 and words in err and err.count("\n") == 1


def test_the_command_writes_its_rows(cli, tmp_path):
    out = tmp_path / "deep" / "exact.json"
    code, printed, err = cli(exact, "--symbols 3 --max_tokens 2 --betas 1 --seeds 1,2", ["--out", str(out)],
                             ["--ppo", "max_steps=2 batch_size=64 minibatch_size=32"])
    assert code == 0, err
    written = json.loads(out.read_text())
    keys = "world advantage beta seed j_reference j_policy j_optimal gap_closed kl_optimal kl_optimal_reverse kl_reference"
    assert [row["seed"] for row in written["rows"]] == [1, 2] and set(keys.split()) <= set(written["rows"][0])
    assert {row["n"] for row in written["best_of_n"]} == set(exact.BEST_OF)
    assert "13 answers to each" in printed and f"{written['rows'][0]['gap_closed']:.3f}" in printed
