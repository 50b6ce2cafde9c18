"""The mathematics of RLHF as pure functions: tensors in, tensors out.

mask: bool (B, T), True for the tokens that the policy chose, eos included. Whatever stands behind
the mask changes nothing, not even if it is inf. Log-probs, KL and entropy are in nats.
No networks, no options, no sampling here. Next: doctor.py.
"""

import torch
from torch.nn import functional as F

# ---- masked statistics -----------------------------------------------------------------------


def masked_sum(x, mask):
    return x.masked_fill(~mask, 0.0).sum()


def masked_sum_rows(x, mask):
    """(B, T) -> (B,)."""
    return x.masked_fill(~mask, 0.0).sum(1)


def masked_mean(x, mask):
    """Mean over the True slots.

    >>> masked_mean(torch.tensor([1.0, 2.0, 99.0]), torch.tensor([True, True, False])).item()
    1.5
    """
    return masked_sum(x, mask) / mask.sum()


def masked_var(x, mask):
    """Biased variance over the True slots."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x, mask, eps=1e-8):
    """(x - mean) / sqrt(var + eps) over the True slots, 0 elsewhere (Ziegler et al. 2019's code).

    The biased variance; once over the whole rollout, not once a minibatch as in that code.
    """
    whitened = (x - masked_mean(x, mask)) * torch.rsqrt(masked_var(x, mask) + eps)
    return whitened.masked_fill(~mask, 0.0)


# ---- reward model ----------------------------------------------------------------------------


def pair_loss(chosen, rejected, margin=0.0, tie=None):
    """-log sigmoid(r_chosen - r_rejected - margin), (N,) (Ouyang et al. 2022, eq. 1).

    margin (Touvron et al. 2023, eq. 2): by how much chosen should score higher, at least.
    tie: bool (N,) or None; a tie's loss is the mean of both directions, smallest at equal scores.
    """
    difference = chosen - rejected
    loss = -F.logsigmoid(difference - margin)
    if tie is None:
        return loss
    both = -(F.logsigmoid(difference) + F.logsigmoid(-difference)) / 2
    return torch.where(tie, both, loss)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """-log sigmoid(β [log π/π_ref of chosen - log π/π_ref of rejected]), (N,) (Rafailov et al. 2023, eq. 7).

    All four: log-probs summed over the answer, (N,). It is pair_loss with β log π/π_ref for a reward.
    """
    return pair_loss(beta * (chosen - ref_chosen), beta * (rejected - ref_rejected))


def calibration(scores):
    """(gain, bias) with which gain * scores + bias has mean 0 and (biased) standard deviation 1.

    Equal scores cannot be stretched: their gain is 1.
    """
    std = scores.std(correction=0)
    gain = torch.where(std > 1e-6, 1 / std, torch.ones_like(std))
    return gain, -gain * scores.mean()


# ---- KL --------------------------------------------------------------------------------------


def kl_estimates(logprobs, ref_logprobs):
    """(k1, k3) of KL(policy || reference) per token, from samples of the policy (Schulman 2020).

    k1 = -log r and k3 = r - 1 - log r with r = reference / policy. Both have the mean KL; k1 can be negative, k3 cannot.
    k3 varies less while the two are close; far apart its tail is heavy, and a batch misses it. Only k1 belongs in the reward.
    """
    log_ratio = ref_logprobs - logprobs
    return -log_ratio, torch.expm1(log_ratio) - log_ratio


def shaped_rewards(scores, logprobs, ref_logprobs, mask, kl_coef):
    """(B, T): -β (log π - log π_ref) on every token, plus the score on the last one (Ziegler et al. 2019, eq. 2).

    scores (B,). The last token is the last True slot of a row: its eos, or the token it was cut at.
    """
    rewards = (-kl_coef * (logprobs - ref_logprobs)).masked_fill(~mask, 0.0)
    rows = torch.arange(len(mask), device=mask.device)
    rewards[rows, last_index(mask)] += scores
    return rewards


def kl_loss(logprobs, ref_logprobs, mask, estimator):
    """(B,): a loss whose gradient, for answers sampled from the policy itself, is that of a KL of whole answers.

    With l = Σ_t log π - log π_ref. "k2": l²/2, E[l ∇log π] = ∇KL(policy || reference). "k3": exp(-l) - 1 + l (Shao et
    al. 2024, eq. 4, there per token), E[(1 - π_ref/π) ∇log π] = ∇KL(reference || policy), the other direction.
    k1 = l has no gradient in the mean (E[∇log π] = 0), so it is not on offer.
    """
    log_ratio = masked_sum_rows(logprobs - ref_logprobs, mask)
    return log_ratio**2 / 2 if estimator == "k2" else torch.expm1(-log_ratio) + log_ratio


def sampling_z(logprobs, entropy, variance, mask, floor=100.0):
    """Are the tokens drawn from the distribution they are scored with? Σ (-log π - H) / sqrt(Σ Var(-log π)).

    If so, mean 0 and variance 1: given the tokens before it, -log π of a token has mean H, so the terms are martingale
    differences and their variances add up. logprobs, entropy H and variance: (B, T), of each next-token distribution.
    floor: least sum of variances, in nats²; with less chance at play, one rare token of a policy that is
    nearly certain would look like many standard deviations.
    """
    return masked_sum(-logprobs - entropy, mask) / masked_sum(variance, mask).clamp(min=floor).sqrt()


def last_index(mask):
    """Index of the last True slot of each row (B,); rows are True from the left, at least once."""
    return mask.sum(-1) - 1


def next_kl_coef(kl_coef, kl, target, episodes, horizon):
    """The adaptive controller: β (1 + clip(KL/target - 1, ±0.2) n / horizon) (Ziegler et al. 2019, section 2.2).

    kl in nats summed over an answer, mean over the `episodes` answers of the step.

    >>> round(next_kl_coef(0.1, kl=12.0, target=6.0, episodes=100, horizon=1000), 6)
    0.102
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def annealed_kl_coef(start, end, progress):
    """β of this step: from start to end by a constant factor a step over the first four fifths of the run, then end.

    The best policies of neighbouring β are close to each other, so no good answer is lost before it has been tried.

    >>> [round(annealed_kl_coef(0.4, 0.1, progress), 6) for progress in (0.0, 0.4, 0.8, 1.0)]
    [0.4, 0.2, 0.1, 0.1]
    """
    return end * (start / end) ** max(0.0, 1 - progress / 0.8)


# ---- PPO -------------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): (advantages, returns), both (B, T).

    δ_t = r_t + γ V_{t+1} - V_t and A_t = δ_t + γ λ A_{t+1}, where the value and the advantage after
    the last token are 0. returns = A + V, the target of the value loss, before any whitening.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    advantages = torch.zeros_like(rewards)
    advantage = next_value = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.size(1))):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
    return advantages, advantages + values


def reward_to_go(rewards, mask, gamma):
    """REINFORCE (Williams 1992), (B, T): Σ_{k ≥ t} γ^{k-t} r_k, minus its mean over all tokens as the baseline."""
    returns, _ = gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)
    return (returns - masked_mean(returns, mask)).masked_fill(~mask, 0.0)


def leave_one_out(rewards, mask, group):
    """RLOO (Kool et al. 2019; Ahmadian et al. 2024, eq. 9), (B, T): the answer's reward less the mean of its rivals'.

    Rows i·group, …, i·group + group - 1 answer one prompt. Every token gets the whole answer's advantage.
    """
    totals = masked_sum_rows(rewards, mask).view(-1, group)
    others = (totals.sum(1, keepdim=True) - totals) / (group - 1)
    return mask * (totals - others).view(-1, 1)


def group_relative(rewards, mask, group, divide_by_std=True, eps=1e-4):
    """GRPO (Shao et al. 2024, section 4.1.2), (B, T): (R - mean) / std of the answers to the same prompt; groups as above.

    divide_by_std=False: R - mean, whose optimum does not depend on the spread of R (Liu et al. 2025, section 3.2).
    """
    totals = masked_sum_rows(rewards, mask).view(-1, group)
    advantages = totals - totals.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (totals.std(1, keepdim=True) + eps)
    return mask * advantages.view(-1, 1)


def policy_loss(new_logprobs, old_logprobs, advantages, clip):
    """-min(ρ A, clip(ρ, 1 - ε, 1 + ε) A) per token, ρ = π_new / π_old (Schulman et al. 2017, eq. 7)."""
    ratio = (new_logprobs - old_logprobs).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def value_loss(new_values, old_values, returns, value_clip):
    """½ max((V - R)², (V_clipped - R)²) per token (Ziegler et al. 2019's code).

    V_clipped is V, held within ±value_clip of the rollout's V_old.
    """
    clipped = old_values + (new_values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)
