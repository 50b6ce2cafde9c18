"""Log-probabilities of tokens, and the cross-entropy made of them.

    log softmax(z)_i = z_i - log sum_j exp(z_j)            (computed after subtracting max z)
    cross-entropy(z, target) = -log softmax(z)_target      (torch.nn.CrossEntropyLoss = LogSoftmax + NLLLoss)

One temperature for every log-prob of a run: rollout, old, reference and new alike. Next: generate.py.
"""

import torch


def log_softmax(logits):
    """(..., V) -> (..., V), in nats; exact for any finite logits, large ones too."""
    shifted = logits - logits.amax(-1, keepdim=True).detach()
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def cross_entropy(logits, targets, ignore_index=-100, reduction="mean"):
    """Negative log-likelihood of targets, in nats.

    logits (..., V), targets int64 (...). Positions whose target is ignore_index count nothing.
    reduction: "none" (...), "sum", or "mean" over the positions that count.
    """
    counted = targets != ignore_index
    index = targets.masked_fill(~counted, 0)
    nll = -log_softmax(logits).gather(-1, index[..., None]).squeeze(-1)
    nll = nll.masked_fill(~counted, 0.0)
    if reduction == "none":
        return nll
    return nll.sum() / counted.sum() if reduction == "mean" else nll.sum()


def token_logprobs(hidden, weight, targets, mask, temperature=1.0):
    """Log-probability of each token the policy chose, and the entropy it was chosen from.

    hidden (B, T, C), weight (V, C), targets int64 (B, T), mask bool (B, T). Position t of hidden
    is the one that predicts target t. Returns logprobs (B, T) with gradients and entropy (B, T)
    without, fp32, in nats, 0 where the mask is False; nothing behind the mask is looked at.
    """
    logits = (hidden[mask] @ weight.T).float() / temperature  # (N, V), N = mask.sum()
    all_logprobs = log_softmax(logits)
    chosen = all_logprobs.gather(-1, targets[mask][:, None]).squeeze(-1)  # (N,)
    with torch.no_grad():
        entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)  # (N,)
    zeros = torch.zeros(mask.shape, device=hidden.device)
    return zeros.masked_scatter(mask, chosen), zeros.masked_scatter(mask, entropy)


@torch.no_grad()
def surprisal_variance(hidden, weight, mask, temperature=1.0):
    """Var(-log π) of each next-token distribution, (B, T) in nats², 0 where the mask is False. Its mean is the entropy."""
    all_logprobs = log_softmax((hidden[mask] @ weight.T).float() / temperature)  # (N, V)
    weighted = all_logprobs.exp() * all_logprobs
    variance = ((weighted * all_logprobs).sum(-1) - weighted.sum(-1) ** 2).clamp(min=0)  # (N,)
    return torch.zeros(mask.shape, device=hidden.device).masked_scatter(mask, variance)
