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
import signal
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
WORLDS = {"small": (3, 5, 20.0), "hard": (6, 4, 60.0)}  # symbols, longest answer in tokens, evenness of the reference
BEST_OF = (2, 4, 16, 64, 256, 1024)

# One set of options for every row.
PPO = dict(max_steps=74, batch_size=8192, minibatch_size=512, microbatch_size=512, ppo_epochs=2, lr=1e-3, muon_lr=5e-3,
           lam=0.75, vf_coef=0.5, value_clip=1.0, kl_start=1.0, missing_eos_penalty=0.0)
QUICK = dict(max_steps=28, batch_size=2048, minibatch_size=256, ppo_epochs=4, muon_lr=0.03, lam=0.8)


@dataclass
class Config:
    worlds: str = option("small,hard", "worlds to run, of small and hard")
    betas: str = option("0.1,0.3,1.0", "prices of a nat of KL")
    seeds: str = option("1,2,3", "seeds of PPO")
    variants: str = option("gae", "ways to train, see VARIANTS; all: every one")
    symbols: int = option(0, "a world of your own instead: symbols beside eos, 3 to 26; 0: none", low=0, high=26)
    max_tokens: int = option(4, "longest answer of a world of your own", low=1)
    out: str = option("runs/exact.json", "file to write the rows to")
    quick: bool = option(False, "one row: the small world, β 1, seed 1, fewer and smaller rollouts")
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
    rewards: float64 (4, N), independent N(0, 1) draws. evenness: the higher, the more alike the reference's answers are
    in probability.
    """

    def __init__(self, name, symbols, longest, evenness=60.0):
        count = sum(symbols**k for k in range(longest)) + symbols**longest
        if count > MOST_OUTCOMES:
            raise UserError(f"a world of {symbols} symbols and answers up to {longest} tokens has {count:,} answers to each "
                            f"prompt, too many to enumerate (at most {MOST_OUTCOMES:,}); lower --symbols or --max_tokens")
        self.name, self.longest, self.evenness, self.tokenizer = name, longest, evenness, Symbols(symbols)
        letters = range(symbols)
        self.answers = [(*ids, symbols) for k in range(longest) for ids in itertools.product(letters, repeat=k)]
        self.answers += list(itertools.product(letters, repeat=longest))
        # Prompts are equally long: if one began another, two contexts would look alike.
        texts = [self.tokenizer.decode(ids) for ids in itertools.product(letters, repeat=1 if symbols > 5 else 2)]
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
            alpha = [self.evenness] * (V - 1) + [self.evenness / 2]  # of the letters, and of eos
            steps = rng.dirichlet(alpha, size=V)  # (V, V): row = the token before; the last row begins
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


# ---- what each variant should reach ----------------------------------------------------------


def self_consistent(reference, rewards, beta, rounds=200):
    """(log π, σ): the fixed point π = π_ref exp(r / (β σ)) / Z with σ (4, 1) the standard deviation of r under π itself.

    Where GRPO ends that divides by the group's standard deviation and pays the KL in the loss, for large groups.
    """
    policy = reference
    for _ in range(rounds):
        mean = (policy.exp() * rewards).sum(1, keepdim=True)
        sigma = (policy.exp() * (rewards - mean) ** 2).sum(1, keepdim=True).sqrt().clamp(min=1e-6)
        policy, _ = optimum(reference, rewards / sigma, beta)
    return policy, sigma


def reverse_optimum(reference, rewards, beta):
    """log π that maximises E[r] - β KL(π_ref || π): π = β π_ref / (λ - r), where λ above every r is such that π sums to 1.

    λ by bisection.
    """
    low = rewards.max(1, keepdim=True).values
    high = low + beta
    for _ in range(200):
        middle = (low + high) / 2
        too_much = (beta * reference.exp() / (middle - rewards)).sum(1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (math.log(beta) + reference - (high - rewards).log()).log_softmax(1)


def measure(policy, reference, rewards, beta, goal="π*"):
    """The exact figures of a policy; policy and reference are log-probs, (4, N). goal: the optimum it is held against.

    j_optimal - j_policy = β kl_optimal holds for every policy where the goal is π* (of r, or of r / σ).
    """
    if goal == "grpo":
        _, sigma = self_consistent(reference, rewards, beta)
        rewards = rewards / sigma
    if goal == "reverse":
        best = reverse_optimum(reference, rewards, beta)
        j_reference, j_policy, j_optimal = ((p.exp() * rewards).sum(1).mean().item() - beta * kl(reference, p)
                                            for p in (reference, policy, best))
    else:
        best, j_optimal = optimum(reference, rewards, beta)
        j_reference, j_policy = (objective(p, reference, rewards, beta) for p in (reference, policy))
    return {
        "j_reference": j_reference, "j_policy": j_policy, "j_optimal": j_optimal,
        "gap_closed": (j_policy - j_reference) / (j_optimal - j_reference),
        "kl_optimal": kl(policy, best), "kl_optimal_reverse": kl(best, policy), "kl_reference": kl(policy, reference),
    }


# ---- one row ---------------------------------------------------------------------------------

GROUP = dict(samples_per_prompt=64)
VARIANTS = {  # options, and the optimum that theory names
    "gae": ({}, "π*"),
    "gae+value_lm": (dict(value="lm"), "π*"),
    "gae+k2": (dict(kl_in="loss"), "π*"),
    "reinforce": (dict(advantage="reinforce"), "π*"),
    "rloo": (dict(advantage="rloo", **GROUP), "π*"),
    "rloo+k2": (dict(advantage="rloo", kl_in="loss", **GROUP), "π*"),
    "rloo+k3": (dict(advantage="rloo", kl_in="loss", kl_estimator="k3", **GROUP), "reverse"),
    "grpo": (dict(advantage="grpo", kl_in="loss", **GROUP), "grpo"),
    "grpo-std": (dict(advantage="grpo", grpo_std=False, kl_in="loss", **GROUP), "π*"),
    "gae+stop_kl": (dict(stop_kl=0.02), "π*"),
    "dpo": (None, "π*"),  # minirlhf/lab/dpo.py, on preferences between answers of the reference
}
DPO = dict(lr=3e-3, batch_size=8192, epochs=64)
DPO_PAIRS = 30_000  # to each prompt


def train_reference(world, folder):
    """The language model of a world, trained by train_lm.train, in folder/lm."""
    config = train_lm.Config(out_dir=str(folder / "lm"), n_layer=1, n_head=4, n_embd=64, batch_size=64, max_steps=300,
                             block_size=1 + len(world.prompts[0]) + world.longest, eval_every=300, save_every=300,
                             device="cpu")
    with silence():
        train_lm.train(config, world.corpus(), world.tokenizer)


def preference_pairs(world, reference, seed):
    """Pairs of answers drawn from the reference; a is preferred with probability σ(r_a - r_b) (Bradley and Terry 1952)."""
    rng, pairs = np.random.default_rng(seed), []
    for prompt, logprobs, rewards in zip(world.prompts, reference, world.rewards.numpy()):
        two = rng.choice(len(rewards), (DPO_PAIRS, 2), p=logprobs.softmax(0).numpy())  # (pairs, 2)
        first_wins = rng.random(DPO_PAIRS) < 1 / (1 + np.exp(rewards[two[:, 1]] - rewards[two[:, 0]]))
        for a, b in np.where(first_wins[:, None], two, two[:, ::-1]):
            if a != b:
                chosen, rejected = world.answers[a], world.answers[b]
                finished = (chosen[-1] == world.tokenizer.eos, rejected[-1] == world.tokenizer.eos)
                texts = world.tokenizer.decode(chosen), world.tokenizer.decode(rejected)
                pairs.append(data.Pair(prompt, *texts, finished=finished))
    return pairs


def run_row(world, folder, variant, beta, seed, options):
    """Train with train_ppo.train, then compute everything about the policy by enumeration."""
    clock = time.time()
    out_dir = folder / f"{variant} {beta} {seed}"
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(world.prompts + world.held_out) + "\n")
    chosen, goal = VARIANTS[variant]
    policy, _ = load_lm(str(folder / "lm"), "cpu")
    reference = enumerate_policy(policy, world)
    shared = dict(seed=seed, lm=str(folder / "lm"), out_dir=str(out_dir), device="cpu")
    if variant == "dpo":
        from minirlhf.lab import dpo  # here: the rest works without that file
        with silence():
            pairs = preference_pairs(world, reference, seed)
            dpo.train(dpo.Config(beta=beta, **DPO, **shared), policy, pairs, world.tokenizer)
        logged = {"kl": math.nan, "kl_k3": math.nan}
    else:
        config = train_ppo.Config(**{**PPO, **chosen, **options}, **shared, kl_coef=beta, reward="exact:reward",
                                  max_new_tokens=world.longest, prompts=str(prompts), eval_answers=2,
                                  save_every=10**6, sample_every=10**6)
        with silence():
            train_ppo.train(config, policy, None, world.tokenizer, world.reward)
        logged = json.loads((out_dir / "metrics.jsonl").read_text().splitlines()[-1])
    row = {"world": world.name, "advantage": variant, "beta": beta, "seed": seed}
    row |= measure(enumerate_policy(policy, world), reference, world.rewards, beta, goal)
    return row | {"logged_k1": logged["kl"], "logged_k3": logged["kl_k3"], "seconds": time.time() - clock}


def start_worker():
    """One thread: so small a network gains nothing from more. Ctrl-C is for the loop that runs, not for a waiting worker."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def silence():
    """What the scripts print along the way goes nowhere."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


# ---- the command -----------------------------------------------------------------------------

COLUMNS = (("world", "{:<6}"), ("advantage", "{:<15}"), ("beta", "{:>5}"), ("seed", "{:>4}"), ("j_reference", "{:>12.4f}"),
           ("j_policy", "{:>9.4f}"), ("j_optimal", "{:>10.4f}"), ("gap_closed", "{:>11.3f}"), ("kl_optimal", "{:>11.4f}"),
           ("kl_optimal_reverse", "{:>19.4f}"), ("kl_reference", "{:>13.3f}"), ("logged_k1", "{:>10.3f}"),
           ("logged_k3", "{:>10.3f}"), ("seconds", "{:>8.0f}"))


def print_row(row=None):
    """A line of the table; the heading without a row."""
    if row is None:
        print("  ".join(name.rjust(len(cell.format(0))) if ">" in cell else name.ljust(len(cell.format(0)))
                        for name, cell in COLUMNS))
    else:
        print("  ".join(cell.format(row[name]).rjust(len(name)) for name, cell in COLUMNS), flush=True)


def best_of_n_rows(world, reference):
    """Exact reward and KL of best-of-n from the reference; beside it the usual formula, an upper bound (Beirami et al. 2024)."""
    rows = []
    for n in BEST_OF:
        policy = best_of_n(reference, world.rewards, n)
        rows.append({"world": world.name, "n": n, "reward": (policy.exp() * world.rewards).sum(1).mean().item(),
                     "kl": kl(policy, reference), "kl_bound": math.log(n) - (n - 1) / n})
    return rows


def options_of(text):
    """{"lr": 0.001} of "lr=0.001", checked against train_ppo.Config."""
    kinds = {name: type(value) for name, value in vars(train_ppo.Config()).items()}
    options = {}
    for part in text.split():
        name, _, value = part.partition("=")
        if name not in kinds:
            raise UserError(f"--ppo {part}: train_ppo.py has no option {name!r}")
        try:
            options[name] = {"True": True, "False": False}[value] if kinds[name] is bool else kinds[name](value)
        except (ValueError, KeyError):
            raise UserError(f"--ppo {part}: {value!r} is not of the kind {kinds[name].__name__}") from None
    return options


def listed(config, name, kind, choices=None):
    """The values of a comma-separated option."""
    values = []
    for text in getattr(config, name).split(","):
        try:
            value = kind(text.strip())
        except ValueError:
            raise UserError(f"--{name} {text!r}: not a number") from None
        if choices and value not in choices:
            raise UserError(f"--{name} {value!r}: must be of {', '.join(choices)}")
        if kind is not str and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name} {text}: must be above 0")
        values.append(value)
    return values


def main():
    config = parse(Config, __doc__)
    if config.quick:
        config.worlds, config.betas, config.seeds = "small", "1.0", "1"
    betas, seeds = listed(config, "betas", float), listed(config, "seeds", int)
    variants = list(VARIANTS) if config.variants == "all" else listed(config, "variants", str, VARIANTS)
    options = (QUICK if config.quick else {}) | options_of(config.ppo)
    if config.symbols:
        if config.symbols < 3:
            raise UserError(f"--symbols {config.symbols}: four prompts need 3 or more")
        worlds = [World(f"{config.symbols}x{config.max_tokens}", config.symbols, config.max_tokens)]
    else:
        worlds = [World(name, *WORLDS[name]) for name in listed(config, "worlds", str, WORLDS)]
    try:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        open(config.out, "a").close()
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error.strerror})") from None

    clock, rows, best_rows = time.time(), [], []
    jobs = list(itertools.product(worlds, variants, betas, seeds))
    workers = min(len(jobs), os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as leave:
        leave.callback(pool.shutdown, cancel_futures=True)
        folders = {world.name: Path(temporary) / world.name for world in worlds}
        for trained in [pool.submit(train_reference, world, folders[world.name]) for world in worlds]:
            trained.result()
        for world in worlds:
            print(f"{world.name}: {world.tokenizer.n} symbols + eos, answers up to {world.longest} tokens: "
                  f"{len(world.answers):,} answers to each of the prompts {' '.join(world.prompts)}; "
                  f"rewards N(0, 1), seed {REWARD_SEED}")
            reference, _ = load_lm(str(folders[world.name] / "lm"), "cpu")
            best_rows += best_of_n_rows(world, enumerate_policy(reference, world))
        print(f"{len(jobs)} rows, {workers} at a time; J in units of the reward, KL in nats per answer\n")
        print_row()
        for future in as_completed([pool.submit(run_row, job[0], folders[job[0].name], *job[1:], options) for job in jobs]):
            rows.append(future.result())
            print_row(rows[-1])
            rows.sort(key=lambda row: (row["world"], row["advantage"], row["beta"], row["seed"]))
            write_json(config.out, {"rows": rows, "best_of_n": best_rows, "options": PPO | options,
                                    "seconds": time.time() - clock})
            left = (time.time() - clock) / max(len(rows), workers) * (len(jobs) - len(rows))
            print(f"{len(rows)} of {len(jobs)}, about {left / 60:.0f} min left", end="\r", file=sys.stderr)
    print("\nkl_optimal, mean and largest: KL(policy || optimum)")
    for world in worlds:
        for variant in variants:
            found = [row["kl_optimal"] for row in rows if (row["world"], row["advantage"]) == (world.name, variant)]
            print(f"  {world.name:<6}  {variant:<15}  {sum(found) / len(found):.4f}  {max(found):.4f}")
    print("\nbest of n from the reference, by enumeration; bound: ln n - (n - 1) / n")
    for row in best_rows:
        print("  {world:<6}  n {n:>4}  reward {reward:+.3f}  KL {kl:.4f}  bound {kl_bound:.4f}".format(**row))
    print(f"\n{len(rows)} rows in {config.out}, {time.time() - clock:.0f} s")


if __name__ == "__main__":
    command(main)
