"""Over-optimization, measured: what the reward model says (proxy) and what is true (gold) against √KL.

A reward model is an imperfect copy of gold. What maximises it gains gold at first, then loses it while the proxy climbs on
(Gao et al. 2022, arXiv 2210.10760). Here gold is known, so both are measured, for two sizes of preference data: PPO without
a leash (β = 0) step by step, PPO's end points at other β, the best of n answers of the reference, and DPO.

    python -m minirlhf.lab.overopt                # from runs/lm; start it again and it goes on where it stopped
    python -m minirlhf.lab.overopt --quick        # one seed, small sizes
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import train_ppo
import train_rm
from minirlhf import data, reviews
from minirlhf.config import UserError, command, option, parse
from minirlhf.generate import generate_all
from minirlhf.run import lm_prompts, load_checkpoint, load_lm, load_reward_model, pick_device, write_json

MAX_NEW_TOKENS = 48
DPO_BETAS = (0.1, 0.5)
QUICK = dict(sizes="1024,8192", seeds="1", betas="0.1", steps=24, beta_steps=16, lr=6e-4, best_prompts=32, best_answers=256)


@dataclass
class Config:
    lm: str = option("runs/lm", "language-model run of the built-in world: the reference")
    work: str = option("runs/overopt", "folder for samples, reward models and policies; finished parts are kept")
    out: str = option("runs/overopt.json", "file to write the rows and fits to")
    sizes: str = option("2048,20480", "sizes of the preference data, in pairs")
    seeds: str = option("1,2,3", "seeds of the pairs, the reward model and the policy")
    betas: str = option("0.02,0.1,0.5", "β of PPO's other end points")
    steps: int = option(60, "rollouts of PPO with β = 0", low=2)
    beta_steps: int = option(40, "rollouts of PPO with another β", low=1)
    lr: float = option(2e-4, "learning rate of PPO: the lower, the more points before gold's peak", low=0)
    best_prompts: int = option(64, "prompts of best-of-n", low=2, high=480)
    best_answers: int = option(1024, "answers to each of them, N; n = 1, 2, 4 ... N", low=16)
    dpo: bool = option(True, "DPO on the same pairs, as a point")
    quick: bool = option(False, "small: " + ", ".join(f"{name} {value}" for name, value in QUICK.items()))
    workers: int = option(0, "parts side by side, a core each; 0: one per core, one in all on a GPU", low=0)
    device: str = option("auto", "cpu, cuda, mps or auto")


# ---- mathematics -----------------------------------------------------------------------------


def best_of_n(proxy, gold, n):
    """(proxy, gold) to expect of the best by proxy of n of these N answers, over all C(N, n) choices; arrays (N,) in.

    Σᵢ C(i-1, n-1) / C(N, n) gold₍ᵢ₎, answers sorted by proxy, in log space; equal proxies share their mean gold.
    """
    def log_choose(m, k):
        return math.lgamma(m + 1) - math.lgamma(k + 1) - math.lgamma(m - k + 1)

    N = len(proxy)
    values, block, counts = np.unique(proxy, return_inverse=True, return_counts=True)  # ascending
    means = np.bincount(block, gold) / counts
    weights = np.exp([log_choose(i - 1, n - 1) - log_choose(N, n) for i in range(n, N + 1)])  # rank i < n is never the best
    return tuple(float(weights @ np.repeat(x, counts)[n - 1:]) for x in (values, means))


def best_of_n_kl(n):
    """ln n - (n-1)/n nats: an upper bound of the best-of-n policy's KL (Beirami et al. 2024, arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


def fit(d, gain, form):
    """Least squares of gain = a d - b d ln d (form "rl") or a d - b d² ("best_of_n"), Gao et al. 2022; d = √KL (N,).

    r2: 1 - residual / variance about the mean; it can be negative. The peak is null where the fitted curve has none.
    """
    basis = np.stack([d, -d * np.log(np.where(d > 0, d, 1.0)) if form == "rl" else -d**2], 1)  # d ln d is 0 at 0
    a, b = np.linalg.lstsq(basis, gain, rcond=None)[0]
    total, peak = ((gain - gain.mean())**2).sum(), None
    if b > 0 and (form == "rl" or a > 0):
        peak = math.exp(min(a / b - 1, 50.0)) if form == "rl" else a / (2 * b)
    return {"form": form, "a": a, "b": b, "r2": 1 - ((gain - basis @ [a, b])**2).sum() / total if total > 0 else None,
            "peak_kl": peak and peak**2, "peak_inside": peak is not None and bool(peak <= d.max()), "points": len(d)}


# ---- the parts: what each returns is kept in its part.json -----------------------------------


def point(kl, proxy, gold, gold_se, **more):
    """A row. held_out: measured on held-out prompts after training, else on the rollout of `step` before its update."""
    return {"n": None, "step": None, "kl": kl, "kl_kind": "k1", "proxy": proxy, "gold": gold, "gold_se": gold_se,
            "held_out": True, "solid": True} | more


def end_point(figures, step):
    """The row of the figures of eval.json."""
    policy = figures["policy"]
    return point(figures["kl"], policy["score"], policy["gold"], policy["gold_std"] / math.sqrt(figures["n"]), step=step)


def sample(options, folder, config, device):
    """Answers of the reference, once for every reward model: ids, their lengths, and gold (P, N) into samples.npz."""
    model, tokenizer = load_lm(config.lm, device)
    train, held_out = data.split(lm_prompts(config.lm, 4), key=str)
    prompts = (held_out + train)[: options["prompts"]]
    ids, _ = data.encode_prompts(tokenizer, prompts, data.prompt_room(model.shape.block_size, MAX_NEW_TOKENS, config.lm))
    which = [i for i in range(len(prompts)) for _ in range(options["answers"])]
    rows, gold = [], []
    for rollout in generate_all(model, [ids[i] for i in which], MAX_NEW_TOKENS, tokenizer.eos,
                                generator=torch.Generator(device).manual_seed(0)):
        for answer, mask, text in zip(rollout.answers.cpu(), rollout.mask.cpu(), rollout.texts(tokenizer)):
            gold.append(reviews.gold(prompts[which[len(rows)]], text))
            rows.append(ids[which[len(rows)]] + answer[mask].tolist())
    gold = np.array(gold).reshape(len(prompts), -1)
    np.savez(folder / "samples.npz", gold=gold, ids=np.concatenate(rows), lengths=[len(row) for row in rows])
    return {"gold": gold.mean(), "gold_se": gold.mean(1).std(ddof=1) / math.sqrt(len(gold)), "gold_std": gold.std()}


def train_reward_model(options, folder, config, device):
    lm, tokenizer = load_lm(config.lm, device)
    train_rm.train(train_rm.Config(lm=config.lm, out_dir=str(folder), max_new_tokens=MAX_NEW_TOKENS,
                                   num_pairs=options["rm_pairs"], seed=options["seed"]), lm, tokenizer)
    return json.loads((folder / "eval.json").read_text())


def train_policy(options, folder, config, device):
    """PPO. Its log has the mean of a rollout's gold, not the spread, so gold_reward is watched for that."""
    policy, tokenizer = load_lm(config.lm, device)
    ppo = train_ppo.Config(lm=config.lm, rm=f"{config.work}/{options['rm']}", prompts=f"{config.work}/prompts.txt",
                           out_dir=str(folder), max_new_tokens=MAX_NEW_TOKENS, kl_coef=options["beta"],
                           max_steps=options["steps"], lr=options["lr"], seed=options["seed"], save_every=10**6)
    spreads, gold_reward = [], train_ppo.gold_reward

    def watched(prompts, responses):
        gold = gold_reward(prompts, responses)
        spreads.append(np.std(gold) / math.sqrt(len(gold)))
        return gold

    train_ppo.gold_reward = watched
    try:
        train_ppo.train(ppo, policy, load_reward_model(ppo.rm, device)[0], tokenizer)
    finally:
        train_ppo.gold_reward = gold_reward
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if ppo.kl_coef == 0 else []
    curve = [point(row["kl"], row["score"], row["gold"], spread, step=row["step"], held_out=False)
             for row, spread in zip(log, spreads)]  # one call a step; those of the evaluation come after them
    return {"rows": curve + [end_point(json.loads((folder / "eval.json").read_text()), ppo.max_steps)]}


def train_dpo(options, folder, config, device):
    """DPO, in a process of its own. The proxy is the reward model's score, not DPO's own reward as in its eval.json."""
    rm, root = f"{config.work}/{options['rm']}", str(Path(__file__).parents[2])
    words = {"lm": config.lm, "prefs": f"{rm}/pairs.jsonl", "out_dir": folder, "beta": options["beta"],
             "seed": options["seed"], "max_new_tokens": MAX_NEW_TOKENS, "device": config.device}
    done = subprocess.run(
        [sys.executable, "-m", "minirlhf.lab.dpo", *(f"--{name}={word}" for name, word in words.items())],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])})
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or ["no message"])[-1] + " (--no-dpo leaves DPO out)")
    (policy, tokenizer), reward_model = load_lm(folder, device), load_reward_model(rm, device)[0]
    held_out = data.split(data.read_prompts(f"{config.work}/prompts.txt", 4), key=str)[1]
    ppo = train_ppo.Config(max_new_tokens=MAX_NEW_TOKENS)
    prompts = [held_out[i % len(held_out)] for i in range(ppo.eval_answers)]
    ids, _ = data.encode_prompts(tokenizer, prompts, data.prompt_room(policy.shape.block_size, MAX_NEW_TOKENS, config.lm))

    def score(rollout, *_):
        return reward_model.score(rollout.ids, rollout.last, rollout.start)

    figures = train_ppo.evaluate(ppo, policy, load_lm(config.lm, device)[0], score, tokenizer, prompts, ids, True)[0]
    return {"rows": [end_point(figures, None)]}


def choose_best(options, folder, config, device):
    """Best-of-n by one reward model: a row for each n, means over prompts. Above n = N/4 few choices are left: dotted."""
    samples = np.load(f"{config.work}/{options['samples']}/samples.npz")
    gold, reward_model = samples["gold"], load_reward_model(f"{config.work}/{options['rm']}", device)[0]
    ids = [row.tolist() for row in np.split(samples["ids"], np.cumsum(samples["lengths"])[:-1])]
    scores = reward_model.gain.cpu() * train_rm.score_texts(reward_model, ids, "float32").cpu() + reward_model.bias.cpu()
    proxy, rows = scores.double().numpy().reshape(gold.shape), []
    for n in (2**k for k in range(gold.shape[1].bit_length())):
        best = np.array([best_of_n(x, y, n) for x, y in zip(proxy, gold)])  # (P, 2)
        rows.append(point(best_of_n_kl(n), *best.mean(0), best[:, 1].std(ddof=1) / math.sqrt(len(best)), n=n,
                          kl_kind="upper bound", solid=4 * n <= gold.shape[1]))
    return {"rows": rows}


RUN = {"samples": sample, "rm": train_reward_model, "ppo": train_policy, "dpo": train_dpo, "best_of_n": choose_best}


# ---- which parts, and running them -----------------------------------------------------------


class Part(NamedTuple):
    """kind: key of RUN; name: folder in --work, ending in a hash of all it depends on; cost: seconds on one core, about."""

    kind: str
    name: str
    options: dict
    cost: float


def plan(config):
    """Two waves of parts: those that need the language model alone, then those that need a reward model."""
    lm = (Path(config.lm) / "ckpt.pt").read_bytes()

    def part(kind, label, cost, **options):
        key = hashlib.sha256(json.dumps([kind, options]).encode() + lm).hexdigest()[:8]
        return Part(kind, f"{kind}-{label}-{key}", options, cost)

    answers = config.best_prompts * config.best_answers
    first, second = [part("samples", answers, answers / 1200, prompts=config.best_prompts, answers=config.best_answers)], []
    for pairs in numbers(config, "sizes", int):
        for seed in numbers(config, "seeds", int):
            label, same = f"{pairs}-s{seed}", {"rm_pairs": pairs, "seed": seed}
            first.append(part("rm", label, 4 + pairs / 250, **same))
            same["rm"] = first[-1].name
            for beta in [0.0] + numbers(config, "betas", float):
                steps, pace = (config.beta_steps, 1.4) if beta else (config.steps, 2.4)  # without a leash answers grow long
                more = {"beta": beta, "steps": steps, "lr": config.lr}
                second.append(part("ppo", f"{label}-b{beta:g}", 8 + pace * steps, **same, **more))
            second.append(part("best_of_n", label, answers / 1500, **same, samples=first[0].name))
            for beta in DPO_BETAS * config.dpo:
                second.append(part("dpo", f"{label}-b{beta:g}", 10 + pairs / 350, **same, beta=beta))
    return [sorted(wave, key=lambda p: -p.cost) for wave in (first, second)]  # long ones first: no worker waits at the end


def result_of(part, config):
    """What part.json of a finished part keeps, else None."""
    try:
        return json.loads((Path(config.work) / part.name / "part.json").read_text())
    except (OSError, ValueError):
        return None


def run_part(part, config):
    """Run one part in silence; part.json, written last, says that it is finished. Returns its seconds."""
    handler, clock = signal.signal(signal.SIGINT, signal.default_int_handler), time.time()
    folder = Path(config.work) / part.name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            found = RUN[part.kind](part.options, folder, config, pick_device(config.device))
    except SystemExit:  # how the scripts leave after Ctrl-C
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, handler)
    seconds = time.time() - clock
    write_json(folder / "part.json", {"kind": part.kind, "options": part.options, "seconds": seconds, **found})
    return seconds


def start_worker():
    """One thread each, in DPO's process too; Ctrl-C is for the part that runs, not for a worker that waits."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def outcomes(parts, config, workers):
    """Yields (part, function that returns its seconds or raises its error) as parts finish."""
    if workers == 1:
        yield from ((part, lambda part=part: run_part(part, config)) for part in parts)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    try:
        futures = {pool.submit(run_part, part, config): part for part in parts}
        yield from ((futures[future], future.result) for future in as_completed(futures))
    finally:
        pool.shutdown(cancel_futures=True)


def run_all(waves, config, workers):
    """Run every part that is not finished, with a line and the time left for each."""
    parts = sum(waves, [])
    seconds = {part.name: found["seconds"] for part in parts if (found := result_of(part, config))}

    def left():  # this machine is as slow for the parts to come as it was for the finished ones
        cost = sum(part.cost for part in parts if part.name in seconds)
        pace = sum(seconds.values()) / cost if cost else 1.0
        return f"about {pace * sum(p.cost for p in parts if p.name not in seconds) / workers / 60:.1f} minutes to go"

    print(f"{len(parts)} parts, {len(seconds)} finished before, {workers} side by side, {left()}", flush=True)
    for wave in waves:
        failed = []
        for part, outcome in outcomes([part for part in wave if part.name not in seconds], config, workers):
            try:
                seconds[part.name] = outcome()
                print(f"[{len(seconds)}/{len(parts)}] {part.name}: {seconds[part.name]:.0f} s, {left()}", flush=True)
            except UserError as error:
                failed.append(f"{part.name}: {error}")
        if failed:
            raise UserError(f"{len(failed)} parts failed, finished ones are kept in {config.work}; the first: {failed[0]}")


# ---- what came out ---------------------------------------------------------------------------


def curve_of(rows, method, pairs, seed):
    """The rows of one curve: β = 0 step by step, or the solid part of best-of-n."""
    return [row for row in rows if (row["method"], row["rm_pairs"], row["seed"]) == (method, pairs, seed)
            and row["solid"] and (method == "best_of_n" or not row["held_out"])]


def make_fits(curve, gold_reference):
    """Fits of R = gold - gold of the reference along one curve; PPO's to all steps, and up to gold's lowest after its peak.

    Both forms bend once. Past its lowest point gold recovers while KL still grows: the answers dissolve into ever fewer
    sentences, and this rule takes 1 off for each. The paper describes no such part; the fit of all steps shows the misfit.
    """
    d = np.sqrt(np.maximum([row["kl"] for row in curve], 0.0))  # a k1 estimate may lie a little below 0
    gain = np.array([row["gold"] for row in curve]) - gold_reference
    form, other, ends = "best_of_n", "rl", {"solid": len(d)}
    if curve[0]["method"] == "ppo":
        top = gain.argmax()
        form, other, ends = "rl", "best_of_n", {"to_lowest": top + gain[top:].argmin() + 1, "all": len(d)}
    same = {key: curve[0][key] for key in ("method", "rm_pairs", "seed")}
    return [same | {"part": part} | fit(d[:end], gain[:end], form) | {"r2_other_form": fit(d[:end], gain[:end], other)["r2"]}
            for part, end in ends.items()]


def summarise(curve, gold_std):
    """Peak of gold and end of one curve; from peak to end the proxy's rise, and gold's fall in units of gold_std."""
    peak, end = max(curve, key=lambda row: row["gold"]), curve[-1]
    return {key: peak[key] for key in ("method", "rm_pairs", "seed")} | {
        "peak_gold": peak["gold"], "peak_kl": peak["kl"], "peak_at": peak["step"] or peak["n"], "end_gold": end["gold"],
        "end_kl": end["kl"], "end_proxy": end["proxy"], "proxy_rise": end["proxy"] - peak["proxy"],
        "lowest_gold": min(row["gold"] for row in curve[curve.index(peak):]),
        "gold_fall": (peak["gold"] - end["gold"]) / gold_std}


def table(items, by, keys):
    """Print a line for each group of items with equal `by`: mean (lowest … highest) of `keys` over the group."""
    groups, lines = {}, [[*by, *keys]]
    for item in items:
        groups.setdefault(tuple(item[key] for key in by), []).append(item)
    for name, group in sorted(groups.items()):
        lines.append([str(cell) for cell in name])
        for values in ([item[key] for item in group] for key in keys):
            known = all(value is not None and math.isfinite(value) for value in values)
            spread = f" ({min(values):.2f} … {max(values):.2f})" if known and len(values) > 1 else ""
            lines[-1].append(f"{sum(values) / len(values):.2f}{spread}" if known else "none")
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n" + "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines))


def judge(curves):
    """The bar, a line for each run with β = 0: the proxy rose while gold fell at least one gold_std from its peak."""
    ppo = [curve for curve in curves if curve["method"] == "ppo"]
    lines = [("met: " if c["proxy_rise"] > 0 and c["gold_fall"] >= 1 else "NOT MET: ")
             + f"{c['rm_pairs']} pairs, seed {c['seed']}, from gold's peak at step {c['peak_at']} to the end: "
             f"proxy {c['proxy_rise']:+.2f}, gold {-c['gold_fall']:+.2f} gold_std" for c in ppo]
    peaks = {size: np.mean([c["peak_kl"] for c in ppo if c["rm_pairs"] == size]) for size in {c["rm_pairs"]: 0 for c in ppo}}
    return lines + [f"gold peaks latest with {max(peaks, key=peaks.get)} pairs: at "
                    + ", ".join(f"{kl:.1f} nats with {size}" for size, kl in peaks.items())]


def numbers(config, name, kind):
    """The numbers in an option such as "1,2,3", each once."""
    low, wanted = {"sizes": (8, "whole numbers from 8"), "seeds": (0, "whole numbers from 0"),
                   "betas": (1e-9, "numbers above 0, which is run anyway")}[name]
    try:
        found = list(dict.fromkeys(kind(word) for word in getattr(config, name).split(",")))
    except ValueError:
        found = [-1]
    if not all(low <= number < math.inf for number in found):
        raise UserError(f"--{name} {getattr(config, name)!r}: must be {wanted}, with commas between them")
    return found


def machine():
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].splitlines()[0]
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, torch {torch.__version__}"


def main():
    config = parse(Config, __doc__)
    config = replace(config, **QUICK) if config.quick else config
    if config.dpo and importlib.util.find_spec("minirlhf.lab.dpo") is None:
        print("minirlhf/lab/dpo.py is missing: no rows of DPO")
        config.dpo = False
    device = pick_device(config.device)
    load_checkpoint(config.lm, ("lm", "ppo"))
    waves, prompts = plan(config), lm_prompts(config.lm, 4)
    if not all(map(reviews.dish_of, prompts)):
        raise UserError(f"--lm {config.lm} did not learn the built-in world, so its answers have no gold score; "
                        "train one that did: python train_lm.py")
    for name, path in (("work", Path(config.work, "prompts.txt")), ("out", Path(config.out))):
        try:  # now rather than after the work
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            path.open("a").close()
            if new:
                path.unlink()
        except OSError as error:
            raise UserError(f"--{name} {getattr(config, name)}: cannot be written ({error.strerror})") from None
    Path(config.work, "prompts.txt").write_text("\n".join(prompts) + "\n")
    run_all(waves, config, config.workers or (1 if device.type != "cpu" else os.cpu_count() or 1))

    found = [(part, result_of(part, config)) for part in sum(waves, [])]
    reference = next({key: result[key] for key in ("gold", "gold_se", "gold_std")}
                     for part, result in found if part.kind == "samples")
    rows = [{"method": part.kind, **{key: part.options.get(key) for key in ("rm_pairs", "seed", "beta")}, **row}
            for part, result in found for row in result.get("rows", [])]
    curves = [curve_of(rows, method, pairs, seed) for method in ("ppo", "best_of_n")
              for pairs in numbers(config, "sizes", int) for seed in numbers(config, "seeds", int)]
    fits = [figures for curve in curves for figures in make_fits(curve, reference["gold"])]
    ends = [row for row in rows if row["held_out"] and row["method"] != "best_of_n"]
    for row in ends:  # does β buy more gold than stopping early at the same KL? (the paper: no)
        path = sorted((other["kl"], other["gold"]) for other in curve_of(rows, "ppo", row["rm_pairs"], row["seed"]))
        row["gold_beta_0"] = float(np.interp(row["kl"], *zip(*path)))
    curves = [summarise(curve, reference["gold_std"]) for curve in curves]
    bars, work = judge(curves), sum(result["seconds"] for _, result in found)
    write_json(config.out, {
        "machine": machine(), "options": asdict(config), "reference": reference, "rows": rows, "fits": fits,
        "curves": curves, "bars": bars, "seconds": {part.name: round(result["seconds"], 1) for part, result in found}})

    print(f"\nreference: gold {reference['gold']:.2f} ± {reference['gold_se']:.2f}, gold_std {reference['gold_std']:.2f}. "
          "Mean (lowest … highest) over the seeds; KL in nats per answer, of best-of-n an upper bound")
    print("\nβ = 0 step by step, and best-of-n up to n = N/4")
    table(curves, ("method", "rm_pairs"), ("peak_gold", "peak_kl", "end_gold", "lowest_gold", "end_kl", "end_proxy"))
    print("\nend points on held-out prompts; gold_beta_0: gold of the run with β = 0 when it passed that KL")
    table(ends, ("method", "beta", "rm_pairs"), ("kl", "proxy", "gold", "gold_beta_0"))
    print("\nfits of gold - gold of the reference: a d - b d ln d (ppo), a d - b d² (best_of_n); d = √KL")
    table(fits, ("method", "part", "rm_pairs"), ("a", "b", "r2", "r2_other_form", "peak_kl"))
    print("\n" + "\n".join(bars) + f"\n\n{work / 60:.0f} minutes of work in all; rows and fits are in {config.out}")


if __name__ == "__main__":
    command(main)
