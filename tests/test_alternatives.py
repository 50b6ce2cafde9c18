"""The alternatives to GAE and to a KL in the reward: against loops, against exact gradients, and end to end.

The exact gradients come from a world small enough to write down every answer: a table of logits, one row a prefix.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import train_ppo
from minirlhf import data, losses
from minirlhf.logprobs import cross_entropy
from minirlhf.run import load_lm, load_reward_model, lm_corpus
from test_resume import test_killed_and_resumed_equals_uninterrupted as killed_and_resumed_equals_uninterrupted

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]],
                    dtype=torch.bool)
GARBAGE = [math.inf, -math.inf, math.nan, 1e30]


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- against loops ---------------------------------------------------------------------------


def totals_of(rewards):
    """What each answer of MASK earned, a list."""
    return [sum(row[t] for t in range(5) if kept[t]) for row, kept in zip(rewards.numpy(), MASK.numpy())]


def spread_over_tokens(per_answer):
    """numpy (6, 5): every token of an answer gets the answer's number, the rest 0."""
    return np.array([[value if kept[t] else 0.0 for t in range(5)] for value, kept in zip(per_answer, MASK.numpy())])


@pytest.mark.parametrize("group", [2, 3, 6])
def test_leave_one_out_equals_the_loop(group):
    rewards = normal(6, 5)
    totals, expected = totals_of(rewards), []
    for i in range(6):
        first = i // group * group
        rivals = [totals[j] for j in range(first, first + group) if j != i]
        expected.append(totals[i] - sum(rivals) / len(rivals))
    assert np.allclose(losses.leave_one_out(rewards, MASK, group).numpy(), spread_over_tokens(expected), atol=1e-12)


@pytest.mark.parametrize("group", [2, 3, 6])
@pytest.mark.parametrize("divide", [True, False])
def test_group_relative_equals_the_loop(group, divide):
    rewards = normal(6, 5)
    totals, expected = totals_of(rewards), []
    for i in range(6):
        first = i // group * group
        members = np.array(totals[first: first + group])
        std = math.sqrt(sum((x - members.mean()) ** 2 for x in members) / (group - 1))
        expected.append((totals[i] - members.mean()) / (std + 1e-4 if divide else 1.0))
    assert np.allclose(losses.group_relative(rewards, MASK, group, divide).numpy(), spread_over_tokens(expected), atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_reward_to_go_equals_the_loop(gamma):
    rewards, mask = normal(6, 5), MASK.numpy()
    returns = np.zeros((6, 5))
    for i, t in zip(*np.nonzero(mask)):
        returns[i, t] = sum(gamma ** (k - t) * rewards[i, k].item() for k in range(t, 5) if mask[i, k])
    expected = np.where(mask, returns - returns[mask].mean(), 0.0)
    assert np.allclose(losses.reward_to_go(rewards, MASK, gamma).numpy(), expected, atol=1e-12)


def test_equal_answers_of_a_group_have_no_advantage():
    """Nothing to choose between: 0, not 0 / 0."""
    rewards = torch.full((6, 5), 2.0).masked_fill(~MASK, 0.0) / MASK.sum(1, keepdim=True)
    for advantages in (losses.leave_one_out(rewards, MASK, 3), losses.group_relative(rewards, MASK, 3)):
        assert advantages.abs().max().item() < 1e-2  # rounding / 1e-4


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("advantage", [
    lambda rewards: losses.leave_one_out(rewards, MASK, 3),
    lambda rewards: losses.group_relative(rewards, MASK, 3),
    lambda rewards: losses.group_relative(rewards, MASK, 3, divide_by_std=False),
    lambda rewards: losses.reward_to_go(rewards, MASK, 0.9),
], ids=["rloo", "grpo", "grpo without std", "reinforce"])
def test_garbage_behind_the_mask_changes_no_advantage(advantage, garbage):
    rewards = normal(6, 5)
    advantages = advantage(rewards.masked_fill(~MASK, garbage))
    assert torch.equal(advantages, advantage(rewards.masked_fill(~MASK, 0.0)))
    assert (advantages[~MASK] == 0).all() and advantages[MASK].abs().min() > 0


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_garbage_behind_the_mask_changes_no_kl_loss(estimator, garbage):
    logprobs, reference = normal(6, 5, seed=1), normal(6, 5, seed=2)
    results = []
    for behind in (garbage, 0.0):
        policy = logprobs.masked_fill(~MASK, behind).requires_grad_()
        loss = losses.kl_loss(policy, reference.masked_fill(~MASK, -behind), MASK, estimator)
        loss.sum().backward()
        results.append((loss, policy.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_kl_loss_by_hand():
    """Log-ratios 0.5 and -0.2 make 0.3 for the answer: k2 0.045, k3 exp(-0.3) - 1 + 0.3; the sum comes first."""
    logprobs, mask = torch.tensor([[-1.0, -2.0, 9.0]]), torch.tensor([[True, True, False]])
    reference = torch.tensor([[-1.5, -1.8, 0.0]])
    assert losses.kl_loss(logprobs, reference, mask, "k2").tolist() == pytest.approx([0.045], abs=1e-6)
    assert losses.kl_loss(logprobs, reference, mask, "k3").tolist() == pytest.approx([math.exp(-0.3) - 0.7], abs=1e-6)


# ---- against the exact gradient --------------------------------------------------------------

BETA = 0.3


class Table:
    """A policy that is a table, with all N answers to one prompt: `symbols` letters and eos, at most A tokens.

    logits, ref_logits: float64 (prefixes, symbols + 1), the former a leaf. prefixes, tokens: int64 (N, A), the row of
    the table and the token that each step takes; mask: bool (N, A). scores: float64 (N,). values: float64 (N, A), any
    number for each prefix.
    """

    def __init__(self, symbols=3, A=3, seed=0):
        eos = symbols
        answers = [(*ids, eos) for k in range(A) for ids in itertools.product(range(symbols), repeat=k)]
        answers += itertools.product(range(symbols), repeat=A)
        rows = {ids: i for i, ids in enumerate(ids for k in range(A) for ids in itertools.product(range(symbols), repeat=k))}
        N = len(answers)
        self.prefixes, self.tokens = torch.zeros(N, A, dtype=torch.long), torch.zeros(N, A, dtype=torch.long)
        self.mask = torch.zeros(N, A, dtype=torch.bool)
        for i, ids in enumerate(answers):
            for t, token in enumerate(ids):
                self.prefixes[i, t], self.tokens[i, t], self.mask[i, t] = rows[ids[:t]], token, True
        self.logits = normal(len(rows), symbols + 1, seed=seed).requires_grad_()
        self.ref_logits = normal(len(rows), symbols + 1, seed=seed + 1)
        self.scores, self.values = normal(N, seed=seed + 2), normal(len(rows), seed=seed + 3)[self.prefixes]
        # Not masked: what stands behind the mask is some other token's log-prob.
        self.reference = self.ref_logits.log_softmax(-1)[self.prefixes, self.tokens]
        self.old = self.logprobs().detach()
        self.probability = self.old.masked_fill(~self.mask, 0.0).sum(1).exp()  # (N,)

    def logprobs(self):
        """(N, A)."""
        return self.logits.log_softmax(-1)[self.prefixes, self.tokens]

    def gradient(self, loss):
        return torch.autograd.grad(loss, self.logits)[0]

    def exact(self, reward=1.0, forward=0.0, reverse=0.0):
        """Gradient of reward E[r] - forward KL(π || π_ref) - reverse KL(π_ref || π), by autograd on the whole sums."""
        policy = self.logprobs().masked_fill(~self.mask, 0.0).sum(1)
        reference = self.reference.masked_fill(~self.mask, 0.0).sum(1)
        J = reward * (policy.exp() * self.scores).sum() - forward * (policy.exp() * (policy - reference)).sum()
        J = J - reverse * (reference.exp() * (reference - policy)).sum()
        return self.gradient(J)

    def expected(self, advantages, kl_coef=0.0, kl_loss=None, rows=None, weights=None):
        """The mean over answers of what train_ppo.py ascends in its first minibatch: (prefixes, symbols + 1).

        advantages (N', A). kl_loss: log-probs -> (N',). rows int64 (N',), weights (N',): which answers, and how often
        they come; default: all, as often as the policy gives them.
        """
        rows = torch.arange(len(self.tokens)) if rows is None else rows
        weights = self.probability if weights is None else weights
        new = self.logprobs()
        loss = losses.masked_sum_rows(losses.policy_loss(new[rows], self.old[rows], advantages, clip=0.2), self.mask[rows])
        if kl_loss is not None:
            loss = loss + kl_coef * kl_loss(new)[rows]
        return -self.gradient((weights * loss).sum())

    def kl(self, estimator):
        return lambda new: losses.kl_loss(new, self.reference, self.mask, estimator)

    def rewards(self, kl_coef):
        return losses.shaped_rewards(self.scores, self.old, self.reference, self.mask, kl_coef)


@pytest.fixture
def table():
    return Table()


def error(gradient, wanted):
    """Relative: |gradient - wanted| / |wanted|."""
    return ((gradient - wanted).norm() / wanted.norm()).item()


def test_the_table_is_a_policy_over_all_answers(table):
    assert len(table.mask) == 1 + 3 + 9 + 27
    assert table.probability.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert table.exact(forward=BETA).norm() > 0.1  # far from the optimum: there is a gradient to be right about


def test_kl_in_the_reward_k1_is_exact(table):
    rewards = table.rewards(BETA)
    wanted = table.exact(forward=BETA)
    whole_answer = table.mask * rewards.sum(1, keepdim=True)
    assert error(table.expected(whole_answer), wanted) < 1e-12
    # Reward to go drops what a token cannot change, and the baseline is a constant: neither moves the mean.
    assert error(table.expected(losses.reward_to_go(rewards, table.mask, 1.0)), wanted) < 1e-12
    # Without the KL it is the gradient of another objective.
    assert error(table.expected(losses.reward_to_go(table.rewards(0.0), table.mask, 1.0)), wanted) > 0.1


def test_gae_with_lambda_1_is_exact_for_any_value_function(table):
    rewards, wanted = table.rewards(BETA), table.exact(forward=BETA)
    for values in (table.values, 10 * table.values, torch.zeros_like(table.values)):
        advantages, _ = losses.gae(rewards, values, table.mask, 1.0, 1.0)
        assert error(table.expected(advantages), wanted) < 1e-12
    advantages, _ = losses.gae(rewards, table.values, table.mask, 1.0, 0.5)  # λ < 1 believes the values
    assert error(table.expected(advantages), wanted) > 0.1


def test_gae_with_the_true_values_is_exact_for_any_lambda(table):
    rewards = table.rewards(BETA)
    returns, _ = losses.gae(rewards, torch.zeros_like(rewards), table.mask, 1.0, 1.0)
    values = torch.zeros_like(rewards)
    for prefix in range(len(table.logits)):
        here = (table.prefixes == prefix) & table.mask
        weights = table.probability[:, None] * here
        values[here] = ((weights * returns).sum() / weights.sum()).item()
    for lam in (0.0, 0.5, 0.95):
        advantages, _ = losses.gae(rewards, values, table.mask, 1.0, lam)
        assert error(table.expected(advantages), table.exact(forward=BETA)) < 1e-12


def test_kl_in_the_loss_k2_is_exact(table):
    advantages = losses.reward_to_go(table.rewards(0.0), table.mask, 1.0)
    assert error(table.expected(advantages, BETA, table.kl("k2")), table.exact(forward=BETA)) < 1e-12


def test_kl_in_the_loss_k1_has_no_gradient(table):
    def k1(new):
        return losses.masked_sum_rows(losses.kl_estimates(new, table.reference)[0], table.mask)

    advantages = torch.zeros_like(table.values)
    assert table.expected(advantages, BETA, k1).norm() < 1e-12
    assert table.exact(reward=0.0, forward=BETA).norm() > 0.01  # what it should have been


def test_kl_in_the_loss_k3_has_the_other_direction(table):
    advantages = losses.reward_to_go(table.rewards(0.0), table.mask, 1.0)
    gradient = table.expected(advantages, BETA, table.kl("k3"))
    assert error(gradient, table.exact(reverse=BETA)) < 1e-12
    assert error(gradient, table.exact(forward=BETA)) > 0.1


def test_kl_in_the_loss_per_token_is_not_the_kl_of_answers(table):
    """k2 of each token by itself forgets what a token does to the KL of those after it."""
    def per_token(new):
        return losses.masked_sum_rows((new - table.reference) ** 2 / 2, table.mask)

    gradient = table.expected(torch.zeros_like(table.values), BETA, per_token)
    assert error(gradient, table.exact(reward=0.0, forward=BETA)) > 0.1


@pytest.mark.parametrize("per_token", [True, False], ids=["per token", "per answer"])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_k2_and_k3_in_the_reward_are_wrong(table, estimator, per_token):
    """Both have (nearly) the KL's mean, but in the reward their gradient is another one."""
    log_ratio = (table.old - table.reference).masked_fill(~table.mask, 0.0)
    if not per_token:
        log_ratio = log_ratio.sum(1, keepdim=True)
    k3 = torch.expm1(-log_ratio) + log_ratio
    price = (log_ratio**2 / 2 if estimator == "k2" else k3).sum(1, keepdim=True)
    gradient = table.expected(table.mask * (table.scores[:, None] - BETA * price))
    assert error(gradient, table.exact(forward=BETA)) > 0.2
    if estimator == "k3" and not per_token:  # it subtracts the other direction from the right one
        assert error(gradient, table.exact(forward=BETA, reverse=-BETA)) < 1e-12


def groups(table, size):
    """Every ordered group of answers: rows (N^size · size,), a weight a row: the group's probability / size."""
    rows = torch.tensor(list(itertools.product(range(len(table.mask)), repeat=size)))
    weights = table.probability[rows].prod(1, keepdim=True) / size
    return rows.flatten(), weights.expand(-1, size).flatten()


@pytest.mark.parametrize("shape, size", [((3, 3), 2), ((2, 2), 3)])
def test_rloo_is_exact_and_grpo_without_std_a_multiple_of_it(shape, size):
    """In the mean over all groups; R - mean counts the answer in its own baseline, which costs a factor (k - 1) / k."""
    table = Table(*shape)
    rows, weights = groups(table, size)
    rewards, mask = table.rewards(BETA)[rows], table.mask[rows]
    wanted = table.exact(forward=BETA)
    gradient = table.expected(losses.leave_one_out(rewards, mask, size), rows=rows, weights=weights)
    assert error(gradient, wanted) < 1e-12
    gradient = table.expected(losses.group_relative(rewards, mask, size, divide_by_std=False), rows=rows, weights=weights)
    assert error(gradient, (size - 1) / size * wanted) < 1e-12


@pytest.mark.parametrize("estimator, direction", [("k2", "forward"), ("k3", "reverse")])
def test_rloo_with_the_kl_in_the_loss(estimator, direction):
    table = Table(2, 2)
    rows, weights = groups(table, 3)
    advantages = losses.leave_one_out(table.rewards(0.0)[rows], table.mask[rows], 3)
    gradient = table.expected(advantages, BETA, table.kl(estimator), rows, weights)
    assert error(gradient, table.exact(**{direction: BETA})) < 1e-12


def test_grpo_is_blind_to_the_scale_of_a_prompts_rewards():
    """Two prompts, the second one's scores ten times as far apart. Divided by std, both pull equally hard, so the
    direction of the two together is not that of E[r]; as R - mean it is."""
    prompts = [Table(2, 2), Table(2, 2)]
    prompts[1].scores = 10 * prompts[1].scores

    def both(divide_by_std):
        parts = []
        for table in prompts:
            rows, weights = groups(table, 3)
            advantages = losses.group_relative(table.rewards(0.0)[rows], table.mask[rows], 3, divide_by_std)
            parts.append(table.expected(advantages, rows=rows, weights=weights))
        return parts

    def cosine(a, b):
        a, b = torch.cat(a).flatten(), torch.cat(b).flatten()
        return (a @ b / (a.norm() * b.norm())).item()

    wanted = [table.exact() for table in prompts]
    assert error(wanted[1], 10 * wanted[0]) < 1e-12
    assert cosine(both(divide_by_std=False), wanted) == pytest.approx(1.0, abs=1e-12)
    divided = both(divide_by_std=True)
    assert error(divided[1], divided[0]) < 1e-2  # but for the eps beside std
    assert cosine(divided, wanted) < 0.8


# ---- options that cannot mean anything -------------------------------------------------------


@pytest.mark.parametrize("options, named", [
    ("--advantage rloo", "--advantage rloo"),
    ("--advantage grpo", "--advantage grpo"),
    ("--samples_per_prompt 3", "--samples_per_prompt 3"),
    ("--stop_kl 0", "--stop_kl 0"),
    ("--kl_estimator k3", "--kl_estimator k3"),
    ("--kl_in loss --kl_estimator k1", "--kl_estimator"),
    ("--kl_target 3 --kl_coef 0", "--kl_target"),
    ("--kl_target 3 --kl_start 1", "--kl_start"),
    ("--kl_start 1 --kl_coef 0", "--kl_start"),
    ("--value rm --reward gold", "--value rm"),
    ("--value lm --advantage rloo --samples_per_prompt 2", "--value lm"),
    ("--no-grpo_std", "--no-grpo_std"),
    ("--no-grpo_std --advantage rloo --samples_per_prompt 2", "--no-grpo_std"),
])
def test_options_that_contradict_each_other_are_one_line(options, named, runs, tmp_path, cli):
    code, out, err = cli(train_ppo, f"--lm {runs}/lm --rm {runs}/rm --out_dir {tmp_path}/ppo --max_new_tokens 40",
                         f"--batch_size 16 --minibatch_size 8 {options}")
    assert code == 2 and named in err and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "ppo").exists()


# ---- end to end ------------------------------------------------------------------------------


@pytest.fixture
def ppo(runs, tmp_path):
    """ppo(reward_fn=None, **options) -> (rows of metrics.jsonl, rows of samples.jsonl, policy)."""

    def run(reward_fn=None, **options):
        options = dict(max_steps=2, batch_size=16, minibatch_size=8, max_new_tokens=40, eval_answers=2, device="cpu",
                       sample_every=1, save_every=1000) | options
        config = train_ppo.Config(lm=str(runs / "lm"), rm=str(runs / "rm"), out_dir=str(tmp_path / "ppo"), **options)
        policy, tokenizer = load_lm(config.lm, "cpu")
        reward_model, _ = load_reward_model(config.rm, "cpu")
        policy, _ = train_ppo.train(config, policy, reward_model, tokenizer, reward_fn)
        return *(rows_of(tmp_path / "ppo" / f"{name}.jsonl") for name in ("metrics", "samples")), policy

    return run


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def shorter(prompts, responses):
    return [-len(response) / 50 for response in responses]


def equal(*responses):
    return [1.0] * len(responses[1])


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def test_reinforce_trains_on_reward_to_go_less_one_number(ppo):
    rows, samples, _ = ppo(advantage="reinforce", gamma=0.9, lr=3e-3)
    assert all(row["value_loss"] is None and row["explained_variance"] is None for row in rows)
    for step in (1, 2):
        baselines = []
        for row in samples:
            if row["step"] == step:
                n = len(row["tokens"])
                returns = [sum(0.9 ** (k - t) * row["rewards"][k] for k in range(t, n)) for t in range(n)]
                baselines += [a - b for a, b in zip(returns, row["advantages"])]
        assert baselines == pytest.approx([baselines[0]] * len(baselines), abs=1e-4)


@pytest.mark.parametrize("options", [dict(advantage="rloo"), dict(advantage="grpo"), dict(advantage="grpo", grpo_std=False)],
                         ids=["rloo", "grpo", "grpo without std"])
def test_groups_compare_answers_to_one_prompt(options, ppo):
    """The four answers in the file are one group: their advantages follow from their rewards."""
    rows, samples, _ = ppo(**options, samples_per_prompt=4, lr=3e-3, kl_coef=0.3)
    assert all(row["value_loss"] is None and row["explained_variance"] is None for row in rows)
    for step in (1, 2):
        group = [row for row in samples if row["step"] == step]
        assert len(group) == 4 and len({row["prompt"] for row in group}) == 1 and len({row["response"] for row in group}) > 1
        totals = np.array([sum(row["rewards"]) for row in group])
        expected = totals - totals.mean()
        if options["advantage"] == "rloo":
            expected *= 4 / 3
        elif options.get("grpo_std", True):
            expected /= totals.std(ddof=1) + 1e-4
        for row, advantage in zip(group, expected):
            assert row["advantages"] == pytest.approx([advantage] * len(row["tokens"]), abs=1e-4)


@pytest.mark.parametrize("options", [
    dict(advantage="reinforce"), dict(advantage="rloo", samples_per_prompt=4), dict(advantage="grpo", samples_per_prompt=4),
    dict(value="lm")], ids=["reinforce", "rloo", "grpo", "value lm"])
def test_a_rewarded_answer_becomes_more_likely(options, ppo):
    def glad(prompts, responses):
        return [float(response.count("very") > 0) for response in responses]

    rows, *_ = ppo(glad, max_steps=10, lr=3e-3, kl_coef=0.0, batch_size=64, minibatch_size=32, **options)
    assert rows[-1]["score"] > rows[0]["score"] + 0.2


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_in_the_loss_leaves_the_reward_alone_and_holds_the_policy(estimator, ppo):
    def last_kl(kl_coef):
        rows, samples, _ = ppo(shorter, max_steps=10, lr=1e-3, batch_size=32, advantage="rloo", samples_per_prompt=4,
                               kl_in="loss", kl_estimator=estimator, kl_coef=kl_coef, missing_eos_penalty=0.0)
        for row in samples:
            assert row["rewards"] == pytest.approx([0.0] * (len(row["tokens"]) - 1) + [row["score"]], abs=1e-6)
        for row in rows:
            assert row["reward"] == pytest.approx(row["score"] - kl_coef * row["kl"], abs=1e-4)
        return rows[-1]["kl_k3"]

    assert last_kl(5.0) < 0.5 * last_kl(0.0)


def test_the_controller_steers_a_kl_in_the_loss(ppo):
    rows, *_ = ppo(shorter, kl_in="loss", kl_target=0.01, kl_horizon=100.0, lr=3e-3, max_steps=4)
    for before, after in zip(rows, rows[1:]):
        assert after["kl_coef"] == pytest.approx(losses.next_kl_coef(before["kl_coef"], before["kl"], 0.01, 16, 100.0))
    assert rows[-1]["kl_coef"] > rows[0]["kl_coef"]


def test_a_value_function_of_its_own_leaves_the_policy_alone(ppo, runs, tmp_path):
    """However much the value loss weighs: with a trunk of its own it does not move the policy, on the shared one it does."""
    policies = {}
    for value in ("lm", "shared"):
        for vf_coef in (0.1, 10.0):
            *_, policies[value, vf_coef] = ppo(shorter, value=value, vf_coef=vf_coef, max_steps=1, grad_clip=1e9, lr=1e-3)
    assert same_weights(policies["lm", 0.1], policies["lm", 10.0])
    assert not same_weights(policies["shared", 0.1], policies["shared", 10.0])
    ppo(shorter, value="lm", max_steps=1)
    checkpoint = torch.load(tmp_path / "ppo" / "ckpt.pt", weights_only=True)
    start = load_lm(runs / "lm", "cpu")[0].state_dict()
    assert not all(torch.equal(checkpoint["value_trunk"][name], start[name]) for name in start)  # it was trained


def test_values_start_as_the_reward_model_of_each_prefix(ppo, runs, tmp_path):
    """--value rm: before the first update the value of token t is the normalised score of the text before it."""
    _, samples, _ = ppo(value="rm", max_steps=1)
    reward_model, tokenizer = load_reward_model(runs / "rm", "cpu")
    assert reward_model.gain != 1 and reward_model.bias != 0
    for row in samples:
        ids = [tokenizer.eos] + tokenizer.encode(row["prompt"]) + row["ids"]
        lengths = range(len(ids) - len(row["ids"]), len(ids))  # of the texts before each token
        with torch.no_grad():
            expected = [reward_model.score(torch.tensor([ids[:n]]), torch.tensor([n - 1])).item() for n in lengths]
        assert row["values"] == pytest.approx(expected, abs=1e-4) and np.std(expected) > 0.01
    checkpoint = torch.load(tmp_path / "ppo" / "ckpt.pt", weights_only=True)
    trunk = reward_model.trunk.state_dict()
    assert not all(torch.equal(checkpoint["value_trunk"][name], trunk[name]) for name in trunk)  # trained, unlike the judge


def test_ptx_learns_the_text_where_the_reward_teaches_nothing(ppo, runs):
    """Equal rewards and no KL: without ptx no weight moves, with it the loss on held-out text falls."""
    start, tokenizer = load_lm(runs / "lm", "cpu")
    corpus = lm_corpus(runs / "lm")
    ids, _ = data.right_pad([[tokenizer.eos] + tokenizer.encode(prompt + text) for prompt, text in corpus.held_out[:64]])
    targets = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100)

    @torch.no_grad()
    def text_loss(model):
        return cross_entropy(model(ids[:, :-1]), model.head_weight, targets).item()

    options = dict(advantage="reinforce", kl_coef=0.0, missing_eos_penalty=0.0, max_steps=4, lr=3e-3)
    *_, still = ppo(equal, **options, ptx_coef=0.0)
    *_, policy = ppo(equal, **options, ptx_coef=1.0)
    assert same_weights(still, start)
    assert text_loss(policy) < text_loss(start) - 0.02


def test_stop_kl_ends_a_rollouts_epochs(ppo, monkeypatch):
    """Two minibatches an epoch: with a tiny limit one epoch of four is left, and the means are over what was done."""
    calls = []
    policy_loss = losses.policy_loss
    monkeypatch.setattr(losses, "policy_loss", lambda *arguments: calls.append(1) or policy_loss(*arguments))
    moved, updates = [], []
    for stop_kl in (1e-9, math.inf):
        calls.clear()
        rows, *_ = ppo(shorter, stop_kl=stop_kl, ppo_epochs=4, lr=1e-3, max_steps=3)
        updates.append(len(calls))
        moved.append([row["approx_kl"] for row in rows])
    assert updates == [3 * 2, 3 * 2 * 4]
    assert all(0 < stopped < free for stopped, free in zip(*moved))


def test_stop_kl_waits_until_it_is_passed(ppo):
    *_, free = ppo(shorter, ppo_epochs=3, max_steps=2)
    *_, far = ppo(shorter, ppo_epochs=3, max_steps=2, stop_kl=1e6)
    assert same_weights(free, far)


@pytest.mark.parametrize("options", ["--value lm --kl_in loss", "--ptx_coef 0.5 --advantage rloo --samples_per_prompt 4"],
                         ids=["value lm", "ptx"])
def test_resume_is_exact(options, runs, tmp_path, monkeypatch):
    killed_and_resumed_equals_uninterrupted(train_ppo, f"--max_steps 5 {options}", 2, 3, runs, tmp_path, monkeypatch)


def test_explain_without_a_value_function(runs, cli, tmp_path):
    code, out, _ = cli(train_ppo, f"--explain --lm {runs}/lm --rm {runs}/rm --out_dir {tmp_path}/ppo --max_new_tokens 40",
                       "--batch_size 16 --minibatch_size 8 --advantage rloo --samples_per_prompt 4")
    assert code == 0 and not (tmp_path / "ppo").exists()
    head = next(line.split() for line in out.splitlines() if line.startswith("token"))
    assert {"log-prob", "reference", "KL", "reward", "advantage", "new"} <= set(head) and "return" not in head
    column = head.index("advantage") - len(head)
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("token")) + 1
    advantages = {line.split()[column] for line in itertools.takewhile(str.strip, lines[first:])}
    assert len(advantages) == 1  # every token gets the whole answer's
