"""PPO against the known optimum, in worlds small enough to write down every answer.

For J(π) = E[r] - β KL(π || π_ref) the best policy is known: π*(y|x) = π_ref(y|x) exp(r(y)/β) / Z(x), with
J* = β log Z, and J* - J(π) = β KL(π || π*) for every π (Ziegler et al. 2019, section 2; Korbak et al. 2022). Here
`train_ppo.train` itself is run, and everything about its policy is computed by summing over all answers.

    python -m minirlhf.lab.exact                  # 2 worlds x 3 β x 3 seeds
    python -m minirlhf.lab.exact --quick          # one row
    python -m minirlhf.lab.exact --worlds small --betas 0.3 --variants all
"""

import contextlib
import copy
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train_lm
import train_ppo
from minirlhf import data, tokenizer
from minirlhf.config import UserError, command, option, parse
from minirlhf.logprobs import log_softmax
from minirlhf.run import load_lm, write_json

REWARD_SEED = 2026  # the worlds never change
MOST_OUTCOMES = 100_000
WORLDS = {"small": (3, 5), "hard": (6, 4)}  # symbols, longest answer in tokens
BEST_OF = (2, 4, 16, 64, 256, 1024)

# One set of options for every row.
PPO = dict(max_steps=80, batch_size=2048, minibatch_size=512, ppo_epochs=4, lr=2e-3, lam=1.0, missing_eos_penalty=0.0)


@dataclass
class Config:
    worlds: str = option("small,hard", "worlds to run, of small and hard")
    betas: str = option("0.1,0.3,1.0", "prices of a nat of KL")
    seeds: str = option("1,2,3", "seeds of PPO")
    variants: str = option("gae", "ways to train, see VARIANTS; all: every one")
    symbols: int = option(0, "a world of your own: symbols beside eos", low=0, high=26)
    max_tokens: int = option(4, "longest answer of a world of your own", low=1)
    out: str = option("runs/exact.json", "file to write the rows to")
    quick: bool = option(False, "one row: the small world, β 0.3, seed 1")
    ppo: str = option("", "other options of PPO for every row, as in 'max_steps=40 lr=0.001'")


class Symbols:
    """Ids 0 to n - 1 are the letters a, b, c, …; id n is eos."""

    def __init__(self, n):
        self.n, self.eos, self.vocab_size = n, n, n + 1

    def encode(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        return "".join(chr(ord("a") + i) for i in ids if i != self.eos)

    def state(self):
        return {"kind": "symbols", "n": self.n}

    @classmethod
    def from_state(cls, state):
        return cls(state["n"])


tokenizer.KINDS["symbols"] = Symbols


class World:
    """prompts: four to train on, and one that the scripts hold out; answers: every text that can be sampled, as ids.

    Answers are as long as `longest` tokens; one that reaches it without eos is an outcome of its own.
    rewards: float64 (4, N), independent N(0, 1) draws.
    """

    def __init__(self, name, symbols, longest):
        count = sum(symbols**k for k in range(longest)) + symbols**longest
        if count > MOST_OUTCOMES:
            raise UserError(f"a world of {symbols} symbols and answers up to {longest} tokens has {count:,} answers to each "
                            f"prompt, too many to enumerate (at most {MOST_OUTCOMES:,}); lower --symbols or --max_tokens")
        self.name, self.longest, self.tokenizer = name, longest, Symbols(symbols)
        letters = range(symbols)
        self.answers = [(*ids, symbols) for k in range(longest) for ids in itertools.product(letters, repeat=k)]
        self.answers += list(itertools.product(letters, repeat=longest))
        # No prompt begins another one, so that no two contexts look alike.
        texts = ["".join(ids) for ids in itertools.product("abc"[:max(2, symbols)], repeat=2)]
        train, held_out = data.split(texts, key=str)
        self.prompts, self.held_out = train[:4], held_out[:1]
        generator = torch.Generator().manual_seed(REWARD_SEED)
        self.rewards = torch.randn(4, count, generator=generator, dtype=torch.float64)
        self.table = {(prompt, self.tokenizer.decode(answer)): reward for prompt, rewards in
                      zip(self.prompts + self.held_out, self.rewards.tolist() + [[0.0] * count])
                      for answer, reward in zip(self.answers, rewards)}

    def reward(self, prompts, responses):
        return [self.table[key] for key in zip(prompts, responses)]

    def corpus(self, size=4096):
        """Text for the language model: a Markov chain whose steps depend on the prompt, every answer possible."""
        rng = np.random.default_rng(REWARD_SEED)
        V = self.tokenizer.vocab_size
        documents = []
        for prompt in self.prompts + self.held_out:
            steps = rng.dirichlet([2.0] * V, size=V)  # (V, V): row = the token before; the last row begins
            for _ in range(size // 4):
                ids, last = [], V - 1
                while len(ids) < self.longest and (last := rng.choice(V, p=steps[last])) != V - 1:
                    ids.append(last)
                documents.append((prompt, self.tokenizer.decode(ids)))
        held = set(self.held_out)
        return data.Corpus([d for d in documents if d[0] not in held], [d for d in documents if d[0] in held])


# ---- by enumeration --------------------------------------------------------------------------


@torch.no_grad()
def enumerate_policy(model, world):
    """log π(y|x) of every answer to every training prompt: float64 (4, N)."""
    model = copy.deepcopy(model).double()
    lengths = torch.tensor([len(answer) for answer in world.answers])
    answers = torch.tensor([list(answer) + [0] * (world.longest - len(answer)) for answer in world.answers])  # (N, A)
    rows = []
    for prompt in world.prompts:
        ids = torch.tensor([world.tokenizer.eos] + world.tokenizer.encode(prompt)).expand(len(answers), -1)
        hidden = model(torch.cat([ids, answers[:, :-1]], 1))[:, ids.size(1) - 1:]  # (N, A, C)
        logprobs = log_softmax(hidden @ model.head_weight.T).gather(-1, answers[..., None]).squeeze(-1)
        rows.append(logprobs.masked_fill(torch.arange(world.longest) >= lengths[:, None], 0.0).sum(1))
    return torch.stack(rows)


def kl(p, q):
    """KL(p || q) of log-probs (4, N), mean over the prompts."""
    return (p.exp() * (p - q)).sum(1).mean().item()


def optimum(reference, rewards, beta):
    """(log π*, J*): π* = π_ref exp(r/β) / Z, log-probs (4, N); J* = β log Z, mean over the prompts."""
    tilted = reference + rewards / beta
    log_z = tilted.logsumexp(1, keepdim=True)
    return tilted - log_z, beta * log_z.mean().item()


def objective(policy, reference, rewards, beta):
    """J(π) = E[r] - β KL(π || π_ref)."""
    return (policy.exp() * rewards).sum(1).mean().item() - beta * kl(policy, reference)


def best_of_n(reference, rewards, n):
    """log-probs (4, N) of the best of n draws: F(r)^n - F(r just below)^n, where no two rewards are equal."""
    order = rewards.argsort(1)
    p = reference.exp().gather(1, order)
    up_to = p.cumsum(1) / p.sum(1, keepdim=True)
    below = up_to - p / p.sum(1, keepdim=True)
    # log(b^n - a^n) = n log b + log(1 - (a/b)^n)
    log_p = n * up_to.log() + torch.log1p(-(below / up_to).clamp(0, 1) ** n)
    return torch.empty_like(log_p).scatter_(1, order, log_p)


# ---- one row ---------------------------------------------------------------------------------

VARIANTS = {
    "gae": {},
    "gae value lm": dict(value="lm"),
    "reinforce": dict(advantage="reinforce"),
    "rloo": dict(advantage="rloo", samples_per_prompt=32),
    "grpo no std": dict(advantage="grpo", samples_per_prompt=32, grpo_std=False, kl_in="loss"),
    "grpo": dict(advantage="grpo", samples_per_prompt=32, kl_in="loss"),
    "rloo k2 loss": dict(advantage="rloo", samples_per_prompt=32, kl_in="loss"),
    "rloo k3 loss": dict(advantage="rloo", samples_per_prompt=32, kl_in="loss", kl_estimator="k3"),
}


def train_reference(world, folder):
    """The language model of a world, trained by train_lm.train, in folder/lm."""
    config = train_lm.Config(out_dir=str(folder / "lm"), n_layer=2, n_head=2, n_embd=32, block_size=3 + world.longest,
                             batch_size=64, max_steps=300, eval_every=300, save_every=300, device="cpu")
    train_lm.train(config, world.corpus(), world.tokenizer)


def run_row(world, folder, variant, beta, seed, options):
    """Train with train_ppo.train, then compute everything about the policy by enumeration."""
    clock = time.time()
    torch.set_num_threads(1)
    out_dir = folder / f"{variant} {beta} {seed}"
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(world.prompts + world.held_out) + "\n")
    config = train_ppo.Config(**{**PPO, **VARIANTS[variant], **options}, kl_coef=beta, seed=seed, reward="exact:reward",
                              max_new_tokens=world.longest, lm=str(folder / "lm"), out_dir=str(out_dir),
                              prompts=str(prompts), eval_answers=2, device="cpu", save_every=10**6, sample_every=10**6)
    policy, _ = load_lm(config.lm, "cpu")
    reference = enumerate_policy(policy, world)
    with silence():
        policy, _ = train_ppo.train(config, policy, None, world.tokenizer, world.reward)
    logged = json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])
    row = {"world": world.name, "advantage": variant, "beta": beta, "seed": seed}
    row |= measure(enumerate_policy(policy, world), reference, world.rewards, beta)
    return row | {"kl_logged_k1": logged["kl"], "kl_logged_k3": logged["kl_k3"], "seconds": time.time() - clock}


def measure(policy, reference, rewards, beta):
    """The exact figures of a policy; all but rewards are log-probs, (4, N)."""
    best, j_optimal = optimum(reference, rewards, beta)
    j_policy, j_reference = (objective(p, reference, rewards, beta) for p in (policy, reference))
    return {
        "j_reference": j_reference, "j_policy": j_policy, "j_optimal": j_optimal,
        "gap_closed": (j_policy - j_reference) / (j_optimal - j_reference),
        "kl_optimal": kl(policy, best), "kl_optimal_reverse": kl(best, policy),
        "kl_reference": kl(policy, reference), "reward": (policy.exp() * rewards).sum(1).mean().item(),
    }


@contextlib.contextmanager
def silence():
    """What the scripts print along the way goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
