"""The formulas of RLHF by hand, by brute force and by exact enumeration, and the figures of eval.json."""

import math

import numpy as np
import pytest
import torch

from minirlhf import losses
from minirlhf.generate import Rollout
from minirlhf.labelers import TAU
from minirlhf.logprobs import token_logprobs
from minirlhf.model import GPT, RewardModel, ScalarHead, Shape
from train_rm import calibration_error, evaluate, score_texts

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
GARBAGE = [math.inf, -math.inf, math.nan, 1e30]


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spoil(x, garbage):
    """x with garbage behind MASK."""
    return x.masked_fill(~MASK, garbage)


# ---- masked statistics -----------------------------------------------------------------------


def test_masked_statistics_equal_numpy_on_the_selected_values():
    x = 3 + 2 * normal(4, 5)
    kept = x[MASK].numpy()
    assert losses.masked_sum(x, MASK).item() == pytest.approx(kept.sum())
    assert losses.masked_mean(x, MASK).item() == pytest.approx(kept.mean())
    assert losses.masked_var(x, MASK).item() == pytest.approx(kept.var(ddof=0))
    expected = (kept - kept.mean()) / np.sqrt(kept.var(ddof=0) + 1e-8)
    assert losses.whiten(x, MASK)[MASK].tolist() == pytest.approx(expected.tolist())


def test_whitened_values_have_mean_0_and_std_1_and_are_0_behind_the_mask():
    white = losses.whiten(3 + 2 * normal(4, 5), MASK)
    assert white[MASK].mean().item() == pytest.approx(0, abs=1e-9)
    assert white[MASK].std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert torch.all(white[~MASK] == 0)


def test_whitening_equal_values_gives_zeros():
    """A constant reward: the eps keeps 0 / 0 away."""
    assert torch.all(losses.whiten(torch.full((4, 5), 2.0), MASK) == 0)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("statistic", [losses.masked_sum, losses.masked_mean, losses.masked_var, losses.whiten])
def test_garbage_behind_the_mask_changes_no_statistic(statistic, garbage):
    x = normal(4, 5)
    assert torch.equal(statistic(spoil(x, garbage), MASK), statistic(spoil(x, 0.0), MASK))


# ---- reward model ----------------------------------------------------------------------------


def test_pair_loss_by_hand():
    loss = losses.pair_loss(torch.tensor([2.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 1.0]))
    expected = [math.log(1 + math.exp(-1)), math.log(2), math.log(1 + math.exp(2))]
    assert loss.tolist() == pytest.approx(expected, abs=1e-6)


def test_a_margin_asks_for_that_much_more():
    chosen, rejected = torch.tensor([2.0, 2.0]), torch.tensor([0.5, 0.5])
    loss = losses.pair_loss(chosen, rejected, torch.tensor([1.5, 0.5]))
    assert loss.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(-1))], abs=1e-6)
    assert losses.pair_loss(chosen, rejected, 1.5)[0].item() == pytest.approx(math.log(2), abs=1e-6)


def test_a_tie_costs_the_mean_of_both_directions_and_wants_equal_scores():
    chosen, rejected = torch.tensor([1.5, 0.0, 1.5]).requires_grad_(), torch.tensor([0.0, 0.0, 0.0])
    loss = losses.pair_loss(chosen, rejected, tie=torch.tensor([True, True, False]))
    forth, back = math.log(1 + math.exp(-1.5)), math.log(1 + math.exp(1.5))
    assert loss.tolist() == pytest.approx([(forth + back) / 2, math.log(2), forth], abs=1e-6)
    loss.sum().backward()
    pull = [0.5 - 1 / (1 + math.exp(1.5)), 0.0, -1 / (1 + math.exp(1.5))]  # a tie pulls together, a choice apart
    assert chosen.grad.tolist() == pytest.approx(pull, abs=1e-6)


def test_pair_loss_pushes_chosen_up_and_rejected_down():
    chosen, rejected = torch.tensor([0.3, -2.0]).requires_grad_(), torch.tensor([0.1, 2.0]).requires_grad_()
    losses.pair_loss(chosen, rejected).sum().backward()
    wrong = [1 / (1 + math.exp(0.2)), 1 / (1 + math.exp(-4))]  # the probability given to the wrong order
    assert chosen.grad.tolist() == pytest.approx([-p for p in wrong], abs=1e-6)
    assert rejected.grad.tolist() == pytest.approx(wrong, abs=1e-6)


@pytest.mark.parametrize("tie", [None, torch.tensor([False, False]), torch.tensor([True, True])], ids=str)
def test_pair_loss_is_finite_at_extreme_differences(tie):
    chosen = torch.tensor([1e4, -1e4]).requires_grad_()
    loss = losses.pair_loss(chosen, torch.zeros(2), tie=tie)
    assert loss.tolist() == ([5e3, 5e3] if tie is not None and tie.all() else [0.0, 1e4])
    loss.sum().backward()
    assert torch.isfinite(chosen.grad).all()


def test_calibration_by_hand():
    gain, bias = losses.calibration(torch.tensor([1.0, 3.0, 1.0, 3.0]))  # mean 2, biased std 1 (unbiased: 1.15)
    assert (gain.item(), bias.item()) == pytest.approx((1.0, -2.0), abs=1e-6)
    scores = 5 + 0.3 * normal(50)
    gain, bias = losses.calibration(scores)
    calibrated = (gain * scores + bias).numpy()
    assert (calibrated.mean(), calibrated.std(ddof=0)) == pytest.approx((0, 1))


@pytest.mark.parametrize("constant", [0.0, 1.7, -1234.567])
def test_calibration_of_equal_scores_only_moves_them_to_0(constant):
    gain, bias = losses.calibration(torch.full((1000,), constant))
    assert gain.item() == 1.0 and bias.item() == pytest.approx(-constant, abs=1e-3)


# ---- KL --------------------------------------------------------------------------------------


@pytest.fixture
def two_distributions():
    """Log-probs of a policy and a reference over 6 outcomes, far apart."""
    return torch.log_softmax(normal(6, seed=1), 0), torch.log_softmax(2 * normal(6, seed=4), 0)


def test_both_estimators_have_the_mean_kl(two_distributions):
    """Exact: the expectation is a sum over all 6 outcomes, weighted by the policy that samples them."""
    p, q = two_distributions
    kl = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
    other = sum(math.exp(b) * (b - a) for a, b in zip(p.tolist(), q.tolist()))
    assert kl > 0.1 and abs(kl - other) > 0.1  # the direction can be told
    k1, k3 = losses.kl_estimates(p, q)
    assert (p.exp() * k1).sum().item() == pytest.approx(kl, abs=1e-12)
    assert (p.exp() * k3).sum().item() == pytest.approx(kl, abs=1e-12)


def test_k1_has_both_signs_and_k3_is_not_negative_and_varies_less(two_distributions):
    p, q = two_distributions
    k1, k3 = losses.kl_estimates(p, q)
    assert k1.min() < 0 < k1.max()
    assert torch.equal(k1 > 0, p > q)
    assert torch.all(k3 > 0)
    near = torch.log_softmax(p + 0.1 * normal(6, seed=3), 0)  # as in training, where the two are close
    k1, k3 = losses.kl_estimates(p, near)
    mean = (p.exp() * k1).sum()
    assert (p.exp() * (k3 - mean) ** 2).sum() < 0.1 * (p.exp() * (k1 - mean) ** 2).sum()


def test_equal_logprobs_have_no_kl():
    k1, k3 = losses.kl_estimates(torch.tensor([-1.3, -20.0]), torch.tensor([-1.3, -20.0]))
    assert k1.tolist() == k3.tolist() == [0.0, 0.0]


def test_k3_of_a_tiny_difference_is_half_its_square_to_the_last_digits():
    """exp(x) - 1 - x in fp32 would be off by 10 %, and below 0 now and then; x²/2 + x³/6 is the series."""
    for x in (1e-3, -1e-3, 3e-4):
        _, k3 = losses.kl_estimates(torch.zeros(()), torch.tensor(x))
        assert k3.item() == pytest.approx(x**2 / 2 + x**3 / 6, rel=1e-3)


# ---- shaped rewards --------------------------------------------------------------------------


def test_shaped_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, -3.0, 9.0], [-0.1, 9.0, 9.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -0.5], [-1.0, -3.5, 7.0], [-0.4, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    rewards = losses.shaped_rewards(torch.tensor([2.0, -1.0, 0.5]), logprobs, ref_logprobs, mask, kl_coef=0.1)
    expected = [[-0.05, 0.1, 2.0], [0.0, -0.05 - 1.0, 0.0], [0.5 - 0.03, 0.0, 0.0]]
    for row, wanted in zip(rewards.tolist(), expected):
        assert row == pytest.approx(wanted, abs=1e-6)


def test_a_rows_rewards_sum_to_score_less_kl():
    p, q, scores = normal(4, 5, seed=1), normal(4, 5, seed=2), normal(4, seed=3)
    penalties = torch.tensor([0.0, 1.0, 1.0, 0.0])
    rewards = losses.shaped_rewards(scores - penalties, p, q, MASK, kl_coef=0.3)
    for i in range(4):
        log_ratio = (p[i][MASK[i]] - q[i][MASK[i]]).sum().item()
        assert rewards[i].sum().item() == pytest.approx(scores[i].item() - penalties[i].item() - 0.3 * log_ratio)
    assert torch.all(rewards[~MASK] == 0)


def test_kl_free_rewards_are_the_score_on_the_last_true_token():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    rewards = losses.shaped_rewards(scores, normal(4, 5, seed=1), normal(4, 5, seed=2), MASK, kl_coef=0.0)
    assert rewards.tolist() == [[0, 0, 0, 0, 1], [0, 0, 2, 0, 0], [3, 0, 0, 0, 0], [0, 0, 0, 4, 0]]
    assert losses.last_index(MASK).tolist() == [4, 2, 0, 3]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_behind_the_mask_changes_no_reward(garbage):
    p, q, scores = normal(4, 5, seed=1), normal(4, 5, seed=2), normal(4, seed=3)
    wanted = losses.shaped_rewards(scores, p, q, MASK, 0.3)
    assert torch.equal(losses.shaped_rewards(scores, spoil(p, garbage), q, MASK, 0.3), wanted)
    assert torch.equal(losses.shaped_rewards(scores, p, spoil(q, garbage), MASK, 0.3), wanted)


def test_shaped_rewards_leaves_its_inputs_alone():
    p, q, scores = normal(4, 5, seed=1), normal(4, 5, seed=2), normal(4, seed=3)
    copies = [x.clone() for x in (p, q, scores)]
    losses.shaped_rewards(scores, p, q, MASK, 0.3)
    assert all(torch.equal(a, b) for a, b in zip((p, q, scores), copies))


@pytest.mark.parametrize("kl, expected", [
    (6.0, 0.1),  # on target
    (6.6, 0.1 * 1.01),  # 10 % above: 0.1 * 100 / 1000 more
    (5.4, 0.1 * 0.99),
    (60.0, 0.1 * 1.02),  # clipped at 20 %
    (-3.0, 0.1 * 0.98),
])
def test_next_kl_coef_by_hand(kl, expected):
    assert losses.next_kl_coef(0.1, kl, target=6.0, episodes=100, horizon=1000) == pytest.approx(expected, rel=1e-9)


# ---- advantages ------------------------------------------------------------------------------


def summed_advantages(rewards, values, gamma, lam):
    """The definition, O(T²): A_t = sum over k >= t of (γλ)^(k-t) (r_k + γ V_{k+1} - V_k); one row, no padding."""
    T, values = len(rewards), [*values, 0.0]
    deltas = [rewards[k] + gamma * values[k + 1] - values[k] for k in range(T)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, T)) for t in range(T)]


@pytest.mark.parametrize("gamma, lam", [(1, 0.95), (0.9, 0.6), (1, 1), (0.9, 1), (1, 0), (0.7, 0), (0, 0.5)])
def test_gae_equals_the_sum_in_its_definition(gamma, lam):
    rewards, values = normal(4, 5, seed=1), normal(4, 5, seed=2)
    advantages, returns = losses.gae(rewards, values, MASK, gamma, lam)
    for i in range(4):
        n = int(MASK[i].sum())
        expected = summed_advantages(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        assert advantages[i, :n].tolist() == pytest.approx(expected)
        assert returns[i, :n].tolist() == pytest.approx([a + v for a, v in zip(expected, values[i].tolist())])


def test_gae_by_hand():
    """γ 0.5, λ 0.5: δ = (1 + 2 - 2, 0 + 0 - 4) = (1, -4); A_1 = -4, A_0 = 1 + 0.25 (-4) = 0."""
    mask = torch.tensor([[True, True, False]])
    advantages, returns = losses.gae(torch.tensor([[1.0, 0.0, 9.0]]), torch.tensor([[2.0, 4.0, 9.0]]), mask, 0.5, 0.5)
    assert advantages[0, :2].tolist() == [0.0, -4.0] and returns[0, :2].tolist() == [2.0, 0.0]


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_lambda_1_gives_monte_carlo_returns_and_lambda_0_one_step(gamma):
    rewards, values = normal(4, 5, seed=1), normal(4, 5, seed=2)
    _, monte_carlo = losses.gae(rewards, values, MASK, gamma, 1.0)
    _, one_step = losses.gae(rewards, values, MASK, gamma, 0.0)
    for i in range(4):
        n = int(MASK[i].sum())
        for t in range(n):
            expected = sum(gamma ** (k - t) * rewards[i, k].item() for k in range(t, n))
            assert monte_carlo[i, t].item() == pytest.approx(expected)
            following = values[i, t + 1].item() if t + 1 < n else 0.0
            assert one_step[i, t].item() == pytest.approx(rewards[i, t].item() + gamma * following)


@pytest.mark.parametrize("garbage", GARBAGE)
def test_garbage_behind_the_mask_changes_no_advantage(garbage):
    rewards, values = normal(4, 5, seed=1), normal(4, 5, seed=2)
    wanted = losses.gae(rewards, values, MASK, 0.9, 0.8)
    for spoiled in ((spoil(rewards, garbage), values), (rewards, spoil(values, garbage))):
        for a, b in zip(losses.gae(*spoiled, MASK, 0.9, 0.8), wanted):
            assert torch.equal(a[MASK], b[MASK])
            assert torch.isfinite(a).all()


def test_gae_leaves_its_inputs_alone():
    rewards, values = normal(4, 5, seed=1), normal(4, 5, seed=2)
    copies = rewards.clone(), values.clone()
    losses.gae(rewards, values, MASK, 0.9, 0.8)
    assert torch.equal(rewards, copies[0]) and torch.equal(values, copies[1])


# ---- clipped losses --------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    # The gradient is that by the new log-prob: -ratio * advantage, or 0 where the clip has been passed for good reason.
    (1.5, 2.0, -1.2 * 2.0, 0.0),  # good and already likelier: clipped
    (1.5, -2.0, 1.5 * 2.0, 3.0),  # bad and likelier: must be able to come back
    (0.5, 2.0, -0.5 * 2.0, -1.0),  # good and less likely: must be able to come back
    (0.5, -2.0, 0.8 * 2.0, 0.0),  # bad and already less likely: clipped
    (1.1, 2.0, -1.1 * 2.0, -2.2),  # inside the clip
    (0.9, -2.0, 0.9 * 2.0, 1.8),
    (1.0, 2.0, -2.0, -2.0),  # the first minibatch
    (1.5, 0.0, 0.0, 0.0),
])
def test_policy_loss_case_by_case(ratio, advantage, loss, gradient):
    old = torch.tensor(-1.7, dtype=torch.float64)
    new = (old + math.log(ratio)).requires_grad_()
    out = losses.policy_loss(new, old, torch.tensor(advantage, dtype=torch.float64), clip=0.2)
    out.backward()
    assert out.item() == pytest.approx(loss) and new.grad.item() == pytest.approx(gradient)


def test_policy_loss_is_per_token():
    new, old, advantages = normal(4, 5, seed=1), normal(4, 5, seed=2), normal(4, 5, seed=3)
    out = losses.policy_loss(new, old, advantages, 0.3)
    for b in range(4):
        for t in range(5):
            ratio, A = math.exp(new[b, t] - old[b, t]), advantages[b, t].item()
            clipped = max(0.7, min(1.3, ratio))
            assert out[b, t].item() == pytest.approx(max(-ratio * A, -clipped * A))


@pytest.mark.parametrize("new, target, loss, gradient", [
    # The old value is 1 and may move by 0.2; loss ½ (V - R)², the larger of moved and clipped.
    (1.5, 3.0, 0.5 * 1.8**2, 0.0),  # towards the return, beyond the clip: the clipped value 1.2 counts
    (1.5, -1.0, 0.5 * 2.5**2, 2.5),  # away from the return, beyond the clip: comes back
    (0.5, -1.0, 0.5 * 1.8**2, 0.0),  # towards, below
    (0.5, 3.0, 0.5 * 2.5**2, -2.5),  # away, below
    (1.1, 3.0, 0.5 * 1.9**2, -1.9),  # inside the clip
    (1.5, 1.4, 0.5 * 0.2**2, 0.0),  # overshot a little: still the clipped value is farther
])
def test_value_loss_case_by_case(new, target, loss, gradient):
    new = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    old, target = torch.tensor(1.0, dtype=torch.float64), torch.tensor(target, dtype=torch.float64)
    out = losses.value_loss(new, old, target, value_clip=0.2)
    out.backward()
    assert out.item() == pytest.approx(loss) and new.grad.item() == pytest.approx(gradient, abs=1e-9)


# ---- one PPO update on a tiny network --------------------------------------------------------


@pytest.fixture
def update(tiny_gpt):
    """(model, value head, rollout, old log-probs, advantages, old values, returns) of 8 answers of 1 to 7 tokens."""
    model, generator = tiny_gpt(), torch.Generator().manual_seed(0)
    prompts, answers = torch.tensor([3, 1, 2, 3, 4, 1, 2, 3]), torch.tensor([1, 7, 3, 5, 2, 7, 1, 4])
    places = torch.arange(11)
    ids = torch.randint(13, (8, 11), generator=generator)
    ids[(places < 4 - prompts[:, None]) | (places >= 4 + answers[:, None])] = 0
    mask = torch.arange(7) < answers[:, None]
    rollout = Rollout(ids, 4 - prompts, mask, torch.ones(8, dtype=torch.bool))
    head = ScalarHead(8, std=0.5)
    with torch.no_grad():  # old and new differ enough for some ratios and values to be clipped
        hidden = rollout.hidden(model)
        logprobs = token_logprobs(hidden, model.head_weight, rollout.answers, mask)
        noise = [torch.randn(8, 7, generator=generator) for _ in range(4)]
        return (model, head, rollout, logprobs + 0.2 * noise[0], noise[1], head(hidden) + 0.2 * noise[2], 2 * noise[3])


def ppo_gradients(loss, model, head):
    return torch.autograd.grad(loss, [*model.parameters(), *head.parameters()])


def minibatch_loss(update, rows):
    """The expressions of train_ppo.py for one minibatch, not yet divided."""
    model, head, rollout, old_logprobs, advantages, old_values, returns = update
    part = rollout.rows(rows)
    A = part.mask.size(1)
    hidden = part.hidden(model)
    new_logprobs = token_logprobs(hidden, model.head_weight, part.answers, part.mask)
    policy = losses.policy_loss(new_logprobs, old_logprobs[rows, :A], advantages[rows, :A], 0.2)
    value = losses.value_loss(head(hidden), old_values[rows, :A], returns[rows, :A], 0.2)
    return losses.masked_sum(policy, part.mask) + 0.1 * losses.masked_sum(value, part.mask)


def token_mean_loss(update):
    """The mean over all real tokens, each row run alone and without padding, ratios and clips written out."""
    model, head, rollout, old_logprobs, advantages, old_values, returns = update
    total, clipped = 0.0, 0
    for b in range(8):
        n, start = int(rollout.mask[b].sum()), int(rollout.start[b])
        ids = rollout.ids[b, start: 4 + n]
        hidden = model(ids[None])[0, 4 - start - 1: -1]
        logprobs = torch.log_softmax(hidden @ model.head_weight.T, -1)[torch.arange(n), ids[4 - start:]]
        ratio, values = (logprobs - old_logprobs[b, :n]).exp(), head(hidden)
        for t in range(n):
            A, R, old = advantages[b, t], returns[b, t], old_values[b, t]
            total = total - torch.minimum(ratio[t] * A, ratio[t].clip(0.8, 1.2) * A)
            near = torch.maximum(torch.minimum(values[t], old + 0.2), old - 0.2)
            total = total + 0.1 * 0.5 * torch.maximum((values[t] - R) ** 2, (near - R) ** 2)
            clipped += abs(ratio[t] - 1) > 0.2
    assert 0 < clipped < rollout.mask.sum()
    return total / rollout.mask.sum()


@pytest.mark.parametrize("size", [8, 4, 2, 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_minibatches_average_to_the_gradient_of_the_mean_over_all_tokens(update, size, seed):
    """However the answers are split: short minibatches get no extra weight, and padding none at all."""
    model, head, rollout = update[:3]
    parts = torch.randperm(8, generator=torch.Generator().manual_seed(seed)).split(size)
    tokens_per_minibatch = rollout.mask.sum() / len(parts)
    each = [ppo_gradients(minibatch_loss(update, rows) / tokens_per_minibatch, model, head) for rows in parts]
    wanted = ppo_gradients(token_mean_loss(update), model, head)
    for gradient, *some in zip(wanted, *each, strict=True):
        torch.testing.assert_close(sum(some) / len(parts), gradient, rtol=1e-4, atol=1e-5)


def test_ids_behind_the_mask_change_no_ppo_gradient(update):
    model, head, rollout, *rest = update
    everything = torch.arange(8)
    before = ppo_gradients(minibatch_loss(update, everything), model, head)
    places = torch.arange(11)
    padded = (places < rollout.start[:, None]) | (places > rollout.last[:, None])
    ids = rollout.ids.clone()
    ids[padded] = torch.randint(1, 13, (int(padded.sum()),), generator=torch.Generator().manual_seed(1))
    spoiled = Rollout(ids, rollout.start, rollout.mask, rollout.finished)
    after = ppo_gradients(minibatch_loss((model, head, spoiled, *rest), everything), model, head)
    assert all(torch.equal(a, b) for a, b in zip(before, after))


# ---- figures of the reward model -------------------------------------------------------------


def test_calibration_error_by_hand():
    """Confidences 0.5, 0.7 (right) and 0.8 (wrong), 0.9 (right); p = 0.5 is half right."""
    p, correct = np.array([0.9, 0.8, 0.3, 0.5]), np.array([True, False, False, True])
    assert calibration_error(p, correct, bins=2) == pytest.approx((abs(0.6 - 0.75) + abs(0.85 - 0.5)) / 2)
    assert calibration_error(p, correct, bins=10) == pytest.approx((0.5 * 0 + 0.3 + 0.8 + 0.1) / 4)
    assert calibration_error(p, correct, bins=1) == pytest.approx(abs(0.725 - 0.625))


def test_calibration_error_equals_ten_bins_filled_one_by_one():
    rng = np.random.default_rng(0)
    p = rng.random(200)
    correct = rng.random(200) < 0.5
    seen = sorted((max(x, 1 - x), float((x > 0.5) == y)) for x, y in zip(p, correct))
    bins = [seen[i: i + 20] for i in range(0, 200, 20)]
    expected = sum(abs(sum(c for c, _ in part) - sum(r for _, r in part)) for part in bins) / 200
    assert expected > 0.1  # random answers are not calibrated
    assert calibration_error(p, correct) == pytest.approx(expected)


def test_evaluate_by_hand():
    d = np.array([2.0, -1.0, 0.0, 0.5], dtype=np.float32)
    golds = np.array([[3.0, 1.0], [0.0, 2.0], [1.0, 0.0], [2.0, 2.0]])
    figures = evaluate(d, golds)
    p = [1 / (1 + math.exp(-abs(a - b) / TAU)) for a, b in golds]  # how often the labeler agrees with gold
    assert figures["accuracy"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert figures["gold_accuracy"] == pytest.approx((1 + 1 + 0.5) / 3)  # equal golds have no better answer
    assert figures["bayes_accuracy"] == pytest.approx(sum(p) / 4)
    assert figures["log_loss"] == pytest.approx(sum(math.log(1 + math.exp(-x)) for x in d.tolist()) / 4)
    assert figures["bayes_log_loss"] == pytest.approx(-sum(x * math.log(x) + (1 - x) * math.log(1 - x) for x in p) / 4)
    right = {2.0: 1.0, -1.0: 0.0, 0.0: 0.5, 0.5: 1.0}  # fewer pairs than bins: each is its own bin
    confidence = {x: 1 / (1 + math.exp(-abs(x))) for x in right}
    assert figures["ece"] == pytest.approx(sum(abs(confidence[x] - right[x]) for x in right) / 4)
    assert figures["pairs"] == 4


def test_evaluate_without_golds_or_pairs_says_null():
    figures = evaluate(np.array([1.0, -1.0]), None)
    assert figures["accuracy"] == 0.5 and figures["pairs"] == 2
    assert figures["gold_accuracy"] is figures["bayes_accuracy"] is figures["bayes_log_loss"] is None
    assert evaluate(np.array([1.0]), np.array([[2.0, 2.0]]))["gold_accuracy"] is None  # no pair has a better answer
    nothing = evaluate(np.zeros(0), None)
    assert nothing.pop("pairs") == 0 and set(nothing) == set(figures) - {"pairs"} and set(nothing.values()) == {None}


def test_evaluate_is_finite_at_extreme_scores_and_golds():
    """One answer of forty empty sentences is 40 worse in gold: the labeler is then certain, which costs 0 nats."""
    figures = evaluate(np.array([1000.0, -1000.0]), np.array([[0.0, -40.0], [-40.0, 0.0]]))
    assert figures["log_loss"] == pytest.approx(500)
    assert figures["ece"] == pytest.approx(0.5)
    assert figures["bayes_accuracy"] == 1.0
    assert figures["bayes_log_loss"] == pytest.approx(0, abs=1e-9)


def test_the_labelers_own_scores_reach_the_bayes_figures():
    """Pairs chosen with Bradley-Terry noise and scored by gold / τ: nobody can do better."""
    rng = np.random.default_rng(0)
    golds = rng.normal(0, 0.7, (20_000, 2))
    lost = rng.random(len(golds)) > 1 / (1 + np.exp(-(golds[:, 0] - golds[:, 1]) / TAU))
    golds[lost] = golds[lost][:, ::-1]
    d = (golds[:, 0] - golds[:, 1]) / TAU
    figures = evaluate(d, golds)
    assert figures["gold_accuracy"] == 1.0
    assert figures["accuracy"] == pytest.approx(figures["bayes_accuracy"], abs=0.015)
    assert figures["log_loss"] == pytest.approx(figures["bayes_log_loss"], abs=0.015)
    assert figures["ece"] < 0.02 < 0.05 < evaluate(3 * d, golds)["ece"]


@pytest.mark.parametrize("part", [1, 3, 100])
def test_texts_read_in_parts_score_and_pull_as_each_alone(part):
    torch.manual_seed(0)
    model = RewardModel(GPT(Shape(19, 16, 2, 2, 16)))
    rows = [torch.randint(19, (n,)).tolist() for n in (9, 2, 16, 1, 5, 5, 12)]
    pull = torch.linspace(-1, 2, len(rows))
    found, wanted = [], []
    for scores, grads in ((score_texts(model, rows, "float32", part), found),
                          (torch.cat([model(torch.tensor([row]), torch.tensor([len(row) - 1])) for row in rows]), wanted)):
        model.zero_grad()
        (scores * pull).sum().backward()
        grads += [scores] + [parameter.grad.clone() for parameter in model.parameters()]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
