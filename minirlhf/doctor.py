"""The doctor: reads the log of a PPO run while it grows, and says in plain words what is wrong.

Each rule is a fault that PPO code is known for. It holds when every one of the last `rows` rollouts is ill. All limits
stand in RULES. `findings` is a pure function of the rows; train_ppo.py prints each cause once, the first time it holds
(a resumed run starts with no memory). Next: train_lm.py.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    keys: tuple  # of metrics.jsonl, what `ill` looks at; where one is null, nothing is said
    limit: float
    rows: int  # rollouts one after the other that must be ill
    ill: Callable  # (limit, values of the keys) -> bool
    line: str  # what is wrong, and why as a rule; filled in from the last row
    bfloat16: float | None = None  # the limit with --dtype bfloat16, where rounding alone reaches the other one


RULES = {
    # Old and new log-probs of the first minibatch come from the same weights, so only rounding may part them: 4e-6 on a
    # CPU, 0.06 under bfloat16.
    "ratio": Rule(("ratio_first",), 1e-3, 1, lambda limit, ratio: ratio > limit,
                  "π_new / π_old differs from 1 by {ratio_first:.2g} before any update: dropout, samples of another "
                  "policy, or other padding, positions, temperature or dtype in sampling than in training", bfloat16=0.5),
    # Standard deviations.
    "sampling": Rule(("sampling_z",), 5.0, 1, lambda limit, z: abs(z) > limit,
                     "the samples do not come from the distribution they are scored with (sampling_z {sampling_z:+.1f}): "
                     "top-k, top-p or a low temperature in sampling (negative), a high one (positive), or samples of "
                     "another policy"),
    # Standard errors; 1e-3 nats for rounding. Single rollouts may fall below by chance, k1 being skewed.
    "negative_kl": Rule(("kl", "kl_se"), 3.0, 3, lambda limit, kl, se: kl < -limit * se - 1e-3,
                        "the KL to the reference is {kl:.3g} ± {kl_se:.2g} nats, and no KL is negative: policy and "
                        "reference are swapped somewhere, or the samples are not the policy's own"),
    # Share of the answers that end by themselves.
    "no_eos": Rule(("eos_rate",), 0.0, 3, lambda limit, rate: rate <= limit,
                   "eos is never sampled: no answer ended by itself. The language model did not learn to end (a single "
                   "stream of text?), something masks eos out, or --max_new_tokens is far too small"),
    "cut": Rule(("eos_rate",), 0.5, 3, lambda limit, rate: rate < limit,
                "only {eos_rate:.0%} of the answers end by themselves, the others are cut: raise --max_new_tokens or "
                "--missing_eos_penalty"),
    # 0 is a constant; healthy runs dip to -0.4 for a few rollouts while the answers change fast.
    "value": Rule(("explained_variance",), -0.05, 20, lambda limit, explained: explained < limit,
                  "the value head has been worse than a constant for {rows} rollouts (explained variance "
                  "{explained_variance:.2f}): wrong returns, or a policy that changes faster than the values can follow; "
                  "lower --lr, or raise --vf_coef or --kl_coef"),
    # Nats per token; at 25 tokens an answer this is about e different answers to a prompt.
    "entropy": Rule(("entropy",), 0.05, 3, lambda limit, entropy: entropy < limit,
                    "the entropy is down to {entropy:.3f} nats per token, so all answers to a prompt are nearly the same: "
                    "lower --lr or raise --kl_coef, unless there is but one right answer"),
    # Relative to the score where that is above 1: rounding of the mean.
    "equal_scores": Rule(("score_std", "score"), 1e-6, 5, lambda limit, std, score: std <= limit * max(1, abs(score)),
                         "all answers have scored the same ({score:.4g}) for {rows} rollouts, so there is nothing to learn "
                         "from: a constant reward, or one that no answer earns yet, or that every answer earns by now"),
    # Nats per answer. Default runs end at 6 to 7 and may touch 50 for a rollout; --kl_coef 0 goes to 262.
    "far": Rule(("kl",), 100.0, 3, lambda limit, kl: kl > limit,
                "the policy is {kl:.0f} nats per answer away from the reference, where the reward model has seen nothing "
                "and a high score means little (over-optimization): raise --kl_coef, lower --lr, or look at the KL's sign"),
    # Share of tokens; the clip is a guard, not the step size. Healthy runs begin at 0.2 to 0.3.
    "clip": Rule(("clip_frac",), 0.5, 5, lambda limit, share: share > limit,
                 "{clip_frac:.0%} of the tokens are outside the clip, {rows} rollouts in a row: the updates go too far; "
                 "lower --lr or --ppo_epochs, or raise --clip if it is far below 0.2"),
}


def findings(rows, dtype="float32"):
    """[(cause, line)] of what holds now. rows: dicts as in metrics.jsonl, oldest first; more than MEMORY change nothing."""
    found = {}
    for cause, rule in RULES.items():
        limit = rule.bfloat16 if dtype == "bfloat16" and rule.bfloat16 is not None else rule.limit
        last = [[row.get(key) for key in rule.keys] for row in list(rows)[-rule.rows:]]
        if len(last) == rule.rows and all(known(values) and rule.ill(limit, *values) for values in last):
            found[cause] = rule.line.format(**rows[-1] | {"rows": rule.rows})
    if "no_eos" in found:
        del found["cut"]  # the same with less said
    return list(found.items())


def known(values):
    return all(value is not None and not math.isnan(value) for value in values)


MEMORY = max(rule.rows for rule in RULES.values())


class Doctor:
    """What it has seen of this run, and said about it."""

    def __init__(self, dtype):
        self.dtype, self.rows, self.said = dtype, deque(maxlen=MEMORY), set()

    def look(self, row):
        """The lines to print after this row: causes that hold and have not been named before."""
        self.rows.append(row)
        new = [(cause, line) for cause, line in findings(self.rows, self.dtype) if cause not in self.said]
        self.said |= {cause for cause, _ in new}
        return [f"doctor, step {row['step']}: {line}" for _, line in new]
