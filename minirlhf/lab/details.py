"""Implementation details that decide whether PPO-RLHF works: where each one lives here, and what it is worth.

    python -m minirlhf.lab.details                      # every row that can be measured; resumable
    python -m minirlhf.lab.details --only "policy clip,epochs" --seeds 1,2
    python -m minirlhf.lab.details --markdown           # what --out holds, as a table for the README

A row with a change is measured in the built-in world: `train_ppo.train` with that one change against the code as it is,
same seed, language model and reward model (so the same first rollout; after it the two runs go apart). Only what users
tune is an option of train_ppo.py; for any other detail DETAILS holds a function that stands in for one of the core's
while a run lasts. Differences of the final gold and KL (eval.json) are taken seed by seed. The verdict rests on a 95 %
interval, Student's t with (seeds - 1) degrees of freedom: ± 4.30 standard errors for three seeds, ± 12.7 for two.
Where it holds 0, the verdict is "no effect larger than" its far end.
"""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

import torch
from torch.optim import Adam

import train_ppo
from minirlhf import losses, reviews
from minirlhf.config import UserError, command, option, parse
from minirlhf.generate import Rollout, generate
from minirlhf.losses import kl_estimates, shaped_rewards, whiten
from minirlhf.model import RewardModel, ScalarHead
from minirlhf.run import load_lm, load_reward_model, pick_device, write_json

PPO = train_ppo.Config()  # what every run starts from
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 % quantile of t, 1 to 9 degrees of freedom
FOOTNOTE = ("gold and KL: difference to the unchanged code ± standard error over the seeds. Verdict, and none > x (no effect "
            "larger than x): 95 % intervals (t), of which one in twenty misses by chance.")


@dataclass
class Config:
    lm: str = option("runs/lm", "language-model run, shared by all runs")
    rm: str = option("runs/rm", "reward-model run, shared by all runs")
    only: str = option("", "names of the rows to measure, with commas; default: all that can be")
    seeds: str = option("1,2,3", "seeds of PPO, two to ten of them")
    steps: int = option(30, "rollouts of each run (--max_steps of train_ppo.py)", low=1)
    work: str = option("runs/details", "folder of the runs; those that are there, with the same options, are kept")
    out: str = option("runs/details.json", "file to write the table to")
    markdown: bool = option(False, "train nothing, print the table of --out as Markdown")
    device: str = option("auto", "cpu (two processes of one thread), cuda or mps (one process), or auto")


# ---- the table ---------------------------------------------------------------------------------


@dataclass
class Detail:
    """One row. where: FILE:NAME. change: what is measured, "" if nothing is; by options of train_ppo.py or by a swap."""

    name: str
    where: str
    default: str
    source: str
    change: str = ""
    options: dict = field(default_factory=dict)
    swap: tuple = ()  # (owner, name, what stands in for owner.name)


class EosBehindMask(Rollout):
    last = None  # set below: the reward model reads eos all the same


def hide_eos(model, prompts, max_new_tokens, eos, temperature, **rest):
    """A rollout whose mask ends before eos; an answer that is nothing but eos keeps it."""
    rollout = generate(model, prompts, max_new_tokens, eos, temperature, **rest)
    lengths = (rollout.mask.sum(1) - rollout.finished.long()).clamp(min=1)
    mask = torch.arange(rollout.mask.size(1), device=lengths.device) < lengths[:, None]
    hidden = EosBehindMask(rollout.ids, rollout.start, mask, rollout.finished, rollout.states)
    hidden.last = rollout.last
    return hidden


UNCHANGED = Detail("unchanged", "train_ppo.py:train", "", "")
LOSSES, LOOP, GENERATE, MODEL = "minirlhf/losses.py", "train_ppo.py:train", "minirlhf/generate.py", "minirlhf/model.py"
ZIEGLER, HUANG = "Ziegler et al. 2019 (code)", "Huang et al. 2024 (code)"

DETAILS = [
    # reward
    Detail("KL in the reward", f"{LOSSES}:shaped_rewards", "k1, on every token", "Ziegler et al. 2019, eq. 2",
           "k3 instead", swap=(losses, "shaped_rewards", lambda scores, new, ref, mask, kl_coef: shaped_rewards(
               scores, kl_estimates(new, ref)[1], torch.zeros_like(ref), mask, kl_coef))),
    Detail("KL price", f"{LOSSES}:next_kl_coef", f"β = {PPO.kl_coef}, fixed; --kl_target steers it",
           "Ziegler et al. 2019, section 2.2"),
    Detail("score position", f"{LOSSES}:last_index", "the last token: eos, or where the answer was cut",
           f"{ZIEGLER}; {HUANG}: one past eos"),
    Detail("reward normalised", f"{LOSSES}:calibration", "mean 0, standard deviation 1 on the reference's answers",
           "Ziegler et al. 2019, section 2.1", "gain 1, bias 0",
           swap=(RewardModel, "score", lambda model, *texts: model(*texts))),
    Detail("reward head", f"{MODEL}:RewardModel", "N(0, 1/(C + 1)), bias 0", f"{ZIEGLER}; Stiennon et al. 2020 (code)"),
    Detail("pairs of a prompt", "train_rm.py:make_batches", "together in one batch", "Ouyang et al. 2022"),
    Detail("missing eos", LOOP, f"score - {PPO.missing_eos_penalty}", f"{ZIEGLER}, Huang et al. 2024: score -1 instead"),
    # sampling
    Detail("temperature", f"{GENERATE}:sample", f"{PPO.temperature}, in sampling and in every log-prob",
           f"{ZIEGLER}, {HUANG}", f"{0.7 * PPO.temperature} in sampling only", swap=(
               train_ppo, "generate", lambda *arguments, **rest: generate(*arguments[:-1], 0.7 * arguments[-1], **rest))),
    Detail("full softmax", f"{GENERATE}:sample", "no top-k, no top-p", HUANG),
    Detail("eos is an action", f"{GENERATE}:generate", "inside the mask: trained, pays KL, earns the score", HUANG,
           "outside the mask", swap=(train_ppo, "generate", hide_eos)),
    Detail("positions", f"{MODEL}:GPT.forward", "count real tokens; prompts are left-padded", ZIEGLER),
    Detail("dropout", f"{MODEL}:GPT", "none, so that the first ratio is 1", f"{ZIEGLER}, {HUANG}"),
    # advantages
    Detail("GAE", f"{LOSSES}:gae", f"λ = {PPO.lam} (γ = {PPO.gamma})", "Schulman et al. 2016, eq. 16", "λ = 1",
           dict(lam=1.0)),
    Detail("value after the end", f"{LOSSES}:gae", "0, even of an answer that was cut", f"{ZIEGLER}, {HUANG}"),
    Detail("returns", f"{LOSSES}:gae", "advantages + values, before whitening", f"{ZIEGLER}, {HUANG}"),
    Detail("whitening", f"{LOSSES}:whiten", "advantages, over the rollout", f"{ZIEGLER}: over each minibatch",
           "none", swap=(losses, "whiten", lambda x, mask: x)),
    Detail("whitening mask", f"{LOSSES}:masked_var", "statistics over the answers' tokens only", HUANG,
           "padding counted as 0", swap=(losses, "whiten", lambda x, mask: whiten(x, torch.ones_like(mask)) * mask)),
    # loss
    Detail("policy clip", f"{LOSSES}:policy_loss", f"ε = {PPO.clip}", "Schulman et al. 2017, eq. 7", "off",
           dict(clip=math.inf)),
    Detail("value clip", f"{LOSSES}:value_loss", f"± {PPO.value_clip}", ZIEGLER, "off", dict(value_clip=math.inf)),
    Detail("mean over tokens", LOOP, "every token of the rollout weighs the same",
           "Liu et al. 2025: a mean over each answer favours long bad ones"),
    Detail("value head", LOOP, "starts at 0", ZIEGLER, "N(0, 1/(C + 1))",
           swap=(train_ppo, "ScalarHead", lambda channels, std: ScalarHead(channels, 1 / math.sqrt(channels + 1)))),
    Detail("value network", LOOP, "shares the policy's trunk",
           f"{ZIEGLER}; Stiennon et al. 2020: its own, from the reward model",
           "its own, from the language model", dict(value="lm")),
    # optimizer
    Detail("epochs", LOOP, str(PPO.ppo_epochs), f"{ZIEGLER}, {HUANG}: 4", "4", dict(ppo_epochs=4)),
    Detail("Adam's ε", LOOP, "1e-5", f"{ZIEGLER}, {HUANG}", "1e-8",
           swap=(torch.optim, "Adam", lambda parameters, **options: Adam(parameters, **options | {"eps": 1e-8}))),
    Detail("learning rate", "minirlhf/run.py:learning_rate", "falls linearly to 0", f"{ZIEGLER}, {HUANG}", "constant",
           swap=(train_ppo, "learning_rate", lambda lr, step, max_steps: lr)),
    Detail("gradient clip", LOOP, f"norm {PPO.grad_clip}", "Pascanu et al. 2013"),
]


# ---- one run -----------------------------------------------------------------------------------


def fingerprint(config):
    """Of what all runs share beside their options: both models, the prompts, the core's code, torch."""
    root = Path(train_ppo.__file__).parent
    files = [Path(config.lm) / "ckpt.pt", Path(config.rm) / "ckpt.pt", Path(config.rm) / "pairs.jsonl",
             root / "train_ppo.py", *sorted((root / "minirlhf").glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files) + torch.__version__.encode()).hexdigest()


def config_of(detail, base, seed, work, shared):
    """train_ppo.Config of one run. Its folder's name ends in a hash of all that decides its result."""
    config = replace(base, **detail.options, seed=seed, save_every=10**9)
    code = [(f.__code__.co_code, f.__code__.co_consts, f.__code__.co_names) for f in detail.swap[2:]]
    key = hashlib.sha256(f"{replace(config, lm='', rm='')} {code} {shared}".encode()).hexdigest()[:10]
    return replace(config, out_dir=str(Path(work) / f"{detail.name.replace(' ', '_')}-{seed}-{key}"))


def run_one(job):
    """Train one run, write and return its result; job: (detail's name, train_ppo.Config). Its checkpoint is not kept."""
    name, config = job
    detail = next(row for row in (UNCHANGED, *DETAILS) if row.name == name)
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    policy, tokenizer = load_lm(config.lm, config.device)
    reward_model, _ = load_reward_model(config.rm, config.device)
    result = {"name": name, "seed": config.seed, "gold": None, "kl": None, "stopped": None}
    with open(folder / "log.txt", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            with mock.patch.object(*detail.swap) if detail.swap else contextlib.nullcontext():
                policy, _ = train_ppo.train(config, policy, reward_model, tokenizer)
        except UserError as error:  # the change made a loss or a weight infinite: that, too, is a result
            result["stopped"] = str(error)
        else:
            figures = json.loads((folder / "eval.json").read_text())
            weights = b"".join(p.detach().cpu().numpy().tobytes() for p in policy.parameters())
            result |= {"gold": figures["policy"]["gold"], "kl": figures["kl"]}
            result["weights"] = hashlib.sha256(weights).hexdigest()
    (folder / "ckpt.pt").unlink(missing_ok=True)
    write_json(folder / "result.json", result)
    return result


def finished(config):
    """The result of a run that is there, else None."""
    path = Path(config.out_dir) / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


# ---- statistics and tables ---------------------------------------------------------------------


def paired_difference(changed, unchanged):
    """(mean, standard error) of changed - unchanged, one number a seed in each list."""
    differences = [a - b for a, b in zip(changed, unchanged, strict=True)]
    return statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def verdict(what, mean, error, seeds):
    """In words: the 95 % interval of a difference, or, where it holds 0, how large the difference can be at most.

    >>> verdict("gold", -1.0, 0.1, 3), verdict("gold", 0.2, 0.1, 3)
    ('gold -1.43 to -0.57', 'no effect on gold larger than 0.63')
    """
    half = T95[seeds - 2] * error
    if abs(mean) <= half:
        return f"no effect on {what} larger than {abs(mean) + half:.2f}"
    return f"{what} {mean - half:+.2f} to {mean + half:+.2f}"


def row_of(detail, changed, unchanged):
    """A row of --out. changed, unchanged: results of runs, None where one is missing."""
    row = {key: getattr(detail, key) for key in ("name", "where", "default", "source", "change")}
    row |= dict.fromkeys(("gold_difference", "gold_se", "kl_difference", "kl_se", "verdict", "gold", "kl"))
    if not detail.change or None in changed or None in unchanged:
        return row
    row |= {key: [result[key] for result in changed] for key in ("gold", "kl")}
    stopped = [result["stopped"] for result in changed + unchanged if result["stopped"]]
    if stopped:
        return row | {"verdict": f"{len(stopped)} of {len(changed + unchanged)} runs stopped: {stopped[0].split(':')[0]}"}
    for key in ("gold", "kl"):
        row[f"{key}_difference"], row[f"{key}_se"] = paired_difference(row[key], [result[key] for result in unchanged])
    words = [verdict(what, row[f"{what.lower()}_difference"], row[f"{what.lower()}_se"], len(changed))
             for what in ("gold", "KL")]
    return row | {"verdict": "; ".join(words)}


def cells(row):
    """The measured cells of a row: gold, KL, verdict."""
    differences = [(row[f"{key}_difference"], row[f"{key}_se"]) for key in ("gold", "kl")]
    return ["" if mean is None else f"{mean:+.2f} ± {error:.2f}" for mean, error in differences] + [row["verdict"] or ""]


def print_table(rows):
    """Two lines a row: the detail; what was changed and what that did."""
    widths = {key: max(len(row[key]) for row in rows) for key in ("name", "where", "default")}
    for row in rows:
        print(*(row[key].ljust(width) for key, width in widths.items()), row["source"], sep="  ")
        if row["change"]:
            gold, kl, words = cells(row)
            measured = f"gold {gold}, KL {kl}: {words}" if gold else words or "not measured yet"
            print(f"{'':{widths['name']}}  -> {row['change']}: {measured}")


def markdown(rows):
    """The table for the README: the verdict stands in the cells of gold and KL, "none > x" for no effect larger than x."""
    lines = [["detail", "where", "default", "source", "changed to", "gold", "KL"], ["---"] * 7]
    for row in rows:
        *differences, words = cells(row)
        limits = [f" (none > {found[1]})" if (found := re.search("larger than (.+)", part)) else "" for part in words.split("; ")]
        measured = [a + b for a, b in zip(differences, limits)] if differences[0] else [words, ""]
        lines.append([row["name"], f"`{row['where']}`", row["default"], row["source"], row["change"], *measured])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- python -m minirlhf.lab.details --------------------------------------------------------------


def read_seeds(text):
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: must be whole numbers with commas, such as 1,2,3") from None
    if not 2 <= len(seeds) <= len(T95) + 1 or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"--seeds {text}: a standard error needs 2 to {len(T95) + 1} different seeds, none below 0")
    return seeds


def choose(only):
    """The rows to measure."""
    measurable = {row.name: row for row in DETAILS if row.change}
    names = [name.strip() for name in only.split(",")] if only else list(measurable)
    for name in names:
        if name not in measurable:
            raise UserError(f"--only {name}: not a row that is measured; these are: {', '.join(measurable)}")
    return [measurable[name] for name in names]


def measure(config):
    """Train the runs that are missing, write --out, return its content."""
    seeds, chosen, device = read_seeds(config.seeds), choose(config.only), pick_device(config.device)
    base = replace(PPO, lm=config.lm, rm=config.rm, max_steps=config.steps, device=str(device))
    if load_lm(config.lm, "cpu")[1].state() != load_reward_model(config.rm, "cpu")[1].state():
        raise UserError(f"--rm {config.rm} has another tokenizer than --lm {config.lm}; train it on this language model")
    if not all(map(reviews.dish_of, train_ppo.choose_prompts(base))):
        raise UserError(f"--rm {config.rm}: gold is known only in the built-in world, and its prompts are others")
    try:
        for folder in (Path(config.work), Path(config.out).parent):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None

    shared = fingerprint(config)
    runs = {row.name: [config_of(row, base, seed, config.work, shared) for seed in seeds] for row in (UNCHANGED, *DETAILS)}
    wanted = [(row.name, run) for row in (UNCHANGED, *chosen) for run in runs[row.name]]
    jobs = [job for job in wanted if finished(job[1]) is None]
    workers = min(2, os.cpu_count()) if device.type == "cpu" else 1
    print(f"{len(wanted)} runs of {config.steps} steps on {device}, {len(wanted) - len(jobs)} of them there already")
    clock = time.time()
    if jobs:
        with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
            for done, result in enumerate(pool.imap_unordered(run_one, jobs), 1):
                left = (time.time() - clock) / done * (len(jobs) - done)
                what = result["stopped"] or f"gold {result['gold']:+.2f}, KL {result['kl']:.2f}"
                print(f"[{done}/{len(jobs)}] {result['name']}, seed {result['seed']}: {what}; "
                      f"about {left / 60:.0f} min left", flush=True)
            pool.close()
            pool.join()

    results = {name: [finished(run) for run in configs] for name, configs in runs.items()}
    unchanged = results[UNCHANGED.name]
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    table = {
        "machine": {"platform": platform.platform(), "processor": processor, "cpus": os.cpu_count(),
                    "torch": torch.__version__, "device": str(device), "processes": workers, "threads": 1},
        "seeds": seeds, "config": asdict(base),
        "unchanged": {key: [run[key] for run in unchanged] for key in ("gold", "kl")},
        "rows": [row_of(detail, results[detail.name], unchanged) for detail in DETAILS],
    }
    write_json(config.out, table)
    return table


def main():
    config = parse(Config, __doc__)
    if config.markdown:
        try:
            rows = json.loads(Path(config.out).read_text())["rows"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--out {config.out}: holds no table; run python -m minirlhf.lab.details first") from None
        print(f"{markdown(rows)}\n\n{FOOTNOTE}")
        return
    table = measure(config)
    print()
    print_table(table["rows"])
    figures = [f"{key} " + ", ".join("stopped" if x is None else f"{x:.2f}" for x in table["unchanged"][key])
               for key in ("gold", "kl")]
    print(f"\nunchanged, seeds {config.seeds}: {'; '.join(figures)}\n{FOOTNOTE}\nsaved in {config.out}")


if __name__ == "__main__":
    command(main)
