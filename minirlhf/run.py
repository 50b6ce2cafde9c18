"""One run: its device, its folder, its log, its checkpoints.

    run.json       argv, options, versions, device, git commit
    metrics.jsonl  a row per logged step; KEYS below says what each key means
    samples.jsonl  texts along the way
    ckpt.pt        all that is needed to go on or to use the model
    eval.json      the figures at the end

The loop is not here: it stands in the scripts. Next: logprobs.py.
"""

import functools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from minirlhf.config import UserError
from minirlhf.data import corpus_prompts, read_corpus
from minirlhf.model import GPT, RewardModel, Shape
from minirlhf.tokenizer import KINDS, load_tokenizer

IMPORTED = time.time()

STEP_KEYS = {
    "step": "optimizer steps so far", "lr": "learning rate of this step",
    "seconds": "wall time since the process started, everything included (earlier sittings of a resumed run too)",
}
KEYS = {
    "lm": STEP_KEYS | {
        "loss": "training loss of this step's batch, nats per token",
        "tokens_per_second": "training tokens per second since the last evaluation",
        "val_loss": "nats per token on the held-out split",
        "bits_per_byte": "total nats on the held-out split, eos included / (ln 2 x bytes)",
    },
    "rm": STEP_KEYS | {
        "loss": "pair loss of this step's batch, nats per pair",
        "train_accuracy": "share of this step's pairs in which chosen scored higher (equal scores count half)",
    },
    "dpo": STEP_KEYS | {"loss": "DPO loss of this step's batch, nats per pair"},
    "ppo": STEP_KEYS | {
        "step": "rollouts so far", "episodes": "answers sampled so far",
        "score": "mean normalised reward before penalties", "gold": "mean gold score, where known",
        "score_std": "standard deviation of the scores over the answers of the step; null for one answer",
        "reward": "mean per answer of score - penalties - β KL",
        "kl": "k1 estimate of KL(policy || reference) before the update: nats summed over an answer, mean over answers",
        "kl_k3": "k3 estimate of the same", "kl_coef": "β used in this step",
        "kl_se": "standard error of kl over the answers of the step; null for one answer",
        "entropy": "of the policy's next-token distribution, mean per token, nats",
        "sampling_z": "surprise at the sampled tokens less its mean, in standard deviations: beyond ±5 they were not "
                      "drawn from the distribution they are scored with (losses.sampling_z)",
        "sampler_gap": "with bfloat16: mean |log-prob while sampling - log-prob in a forward over the whole answer|, nats",
        "ratio_first": "largest |π_new / π_old - 1| in the rollout's first minibatch: 0 but for rounding",
        "approx_kl": "k3 of KL(old || new), mean per token over the update",
        "clip_frac": "share of tokens whose ratio was outside the clip, over the update",
        "policy_loss": "clipped policy loss, mean over the update", "value_loss": "clipped value loss, likewise",
        "explained_variance": "1 - Var(returns - old values) / Var(returns); null where returns do not vary",
        "length": "mean tokens per answer, eos counted", "eos_rate": "share of answers that ended by themselves",
        "eval": "the figures of eval.json, at the cadence of --eval_every",
    },
}


# ---- the machine -----------------------------------------------------------------------------


def process_seconds():
    """Wall time since this process started: from /proc on Linux, elsewhere since this import."""
    try:
        started = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])  # in clock ticks after boot
        return float(Path("/proc/uptime").read_text().split()[0]) - started / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time() - IMPORTED


def pick_device(name):
    """auto: cuda, else mps, else cpu. A device that is not there is a UserError."""
    torch.set_float32_matmul_precision("highest")  # no TF32: ratios are made of log-probs; --dtype bfloat16 is the fast way
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: no such device here; use --device cpu or auto") from None
    return device


@functools.cache
def can_compile(device_type):
    """Whether torch.compile works here: it needs Triton on a GPU, a C++ compiler on a CPU."""
    try:
        return torch.compile(lambda x: x.exp() + 1)(torch.zeros(2, device=device_type)).sum().item() == 4
    except Exception:  # whatever a compiler that is missing or broken throws
        return False


def check_machine(config, device):
    """One line now for what the first step could not do here."""
    if config.dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"--dtype bfloat16: {torch.cuda.get_device_name(device)} cannot compute in it; leave it out")
    if device.type == "cuda" and not can_compile("cuda"):
        print("torch.compile does not work here (it needs Triton): log-probs take the plain path, which is slower")
    for option, asked in (("--compile", config.compile),
                          ("--logprobs compiled", getattr(config, "logprobs", "") == "compiled")):
        if asked and not can_compile(device.type):
            raise UserError(f"{option}: torch.compile has no working compiler for {device.type} here (it needs Triton on a "
                            "GPU, a C++ compiler on a CPU); leave it out")
        if asked:
            print(f"{option}: the first steps take a minute or so, while torch.compile works")


def autocast(device, dtype):
    """The context in which forwards run: bf16 matrix products with --dtype bfloat16, else nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def learning_rate(lr, step, max_steps, warmup=0):
    """Linear warm-up over `warmup` steps, then a straight line down to 0 at max_steps.

    >>> [learning_rate(1.0, step, 5, warmup=1) for step in range(5)]
    [1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * max(0.0, (max_steps - step) / max(1, max_steps - warmup))


# ---- files -----------------------------------------------------------------------------------


def plain(value):
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (torch.Tensor, np.generic)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path, write):
    """write(temporary path), then move it into place: a reader never sees half a file."""
    temporary = Path(f"{path}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(plain(value), indent=1) + "\n"))


def write_jsonl(path, rows):
    write_atomic(path, lambda temporary: temporary.write_text("".join(json.dumps(plain(row)) + "\n" for row in rows)))


def read_rows(path):
    """The rows of a JSONL file that only grows, and that may not exist; a line cut short by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            rows.append(json.loads(line))
    return rows


RESULTS = {"lm": "a language model", "rm": "a reward model", "ppo": "a policy trained with PPO",
           "dpo": "a policy trained with DPO"}  # what the checkpoint of a stage holds
LANGUAGE_MODELS = ("lm", "ppo", "dpo")  # the stages whose checkpoints hold one


def load_checkpoint(run_dir, stages):
    """The dict in run_dir/ckpt.pt, on the CPU; one line for each way in which it can be unusable."""
    path = Path(run_dir) / "ckpt.pt"
    if not path.is_file():
        there = "has no ckpt.pt" if Path(run_dir).is_dir() else "does not exist"
        raise UserError(f"run folder {run_dir} {there}; train it first, or name another folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch.load meets foreign bytes with many kinds of errors
        raise UserError(f"{path}: truncated, or not a checkpoint of minirlhf; train that stage again") from None
    needed = {"format", "stage", "step", "shape", "tokenizer", "config", "model"}
    if not isinstance(checkpoint, dict) or not needed <= set(checkpoint) or checkpoint["format"] != "minirlhf":
        raise UserError(f"{path}: not a checkpoint of minirlhf")
    if checkpoint["tokenizer"]["kind"] not in KINDS:
        raise UserError(f"{path}: its tokenizer is of the kind {checkpoint['tokenizer']['kind']!r}, unknown here")
    if checkpoint["stage"] not in stages:
        held = RESULTS.get(checkpoint["stage"], f"the unknown stage {checkpoint['stage']!r}")
        raise UserError(f"{path}: holds {held}; needed: {' or '.join(RESULTS[stage] for stage in stages)}")
    return checkpoint


def saved_config(stage):
    """A function from the folder of a run of this stage to the options it was started with (config.parse asks it)."""
    return lambda run_dir: load_checkpoint(run_dir, (stage,))["config"]


def refuse_inputs_in_out_dir(config, *options):
    """A run rewrites its out_dir, so nothing that it reads may lie there, and no run that it starts from."""
    out_dir = Path(config.out_dir).resolve()
    for option in options:
        value = getattr(config, option)
        for path in value if isinstance(value, tuple) else (value,) if value else ():
            if Path(path).resolve().is_relative_to(out_dir):
                raise UserError(f"--{option} {path} lies in --out_dir {config.out_dir}, which this run rewrites; "
                                "name another --out_dir")


def load_lm(run_dir, device):
    """(GPT, tokenizer) of a language-model, PPO or DPO run."""
    checkpoint = load_checkpoint(run_dir, LANGUAGE_MODELS)
    model = GPT(Shape(**checkpoint["shape"]))
    model.load_state_dict(checkpoint["model"])
    return model.to(device), load_tokenizer(checkpoint["tokenizer"])


def load_reward_model(run_dir, device):
    """(RewardModel, tokenizer) of a reward-model run."""
    checkpoint = load_checkpoint(run_dir, ("rm",))
    model = RewardModel(GPT(Shape(**checkpoint["shape"])))
    model.load_state_dict(checkpoint["model"])
    return model.to(device).requires_grad_(False), load_tokenizer(checkpoint["tokenizer"])


def lm_corpus(run_dir):
    """The text that a language model learned (data.Corpus)."""
    config = load_checkpoint(run_dir, LANGUAGE_MODELS)["config"]
    if "data" not in config:  # a policy: what its language model learned
        return lm_corpus(config["lm"])
    try:
        return read_corpus(config["data"])
    except UserError as error:
        raise UserError(f"{error}: the text that {run_dir} learned; put it back, or name prompts with --prompts") from None


def lm_prompts(run_dir, words):
    """The prompts in the text that a language model learned; without any, the first words of its documents."""
    prompts = corpus_prompts(lm_corpus(run_dir), words)
    if not prompts:
        raise UserError(f"the text that {run_dir} learned has no document of more than {words} words to take a prompt "
                        "from; lower --prompt_words, or name prompts with --prompts")
    return prompts


def git_commit():
    try:
        return subprocess.check_output(["git", "rev-parse", "HEAD"], stderr=subprocess.DEVNULL, text=True, timeout=5,
                                       cwd=Path(__file__).parent).strip()
    except (OSError, subprocess.SubprocessError):
        return None


# ---- the run ---------------------------------------------------------------------------------


class Run:
    """A run folder that is being written: a fresh run replaces the files of an earlier one; a resumed run reads its
    checkpoint, and drops log rows that are later than it, as after a kill. `write=False` leaves no trace."""

    def __init__(self, stage, config, device, write=True):
        self.stage, self.config, self.device, self.write = stage, config, device, write
        self.folder = Path(config.out_dir)
        self.checkpoint = load_checkpoint(self.folder, (stage,)) if config.resume else None
        self.saved_step = self.checkpoint["step"] if config.resume else None
        self.seconds_before = self.checkpoint["seconds"] if config.resume else 0.0
        self.interrupted = False
        torch.manual_seed(config.seed)
        if not write:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("metrics.jsonl", "samples.jsonl", "ckpt.pt", "eval.json"):
                if not config.resume:
                    (self.folder / name).unlink(missing_ok=True)
                elif name.endswith(".jsonl"):
                    self.drop_rows_after(self.folder / name, self.saved_step)
            write_json(self.folder / "run.json", {
                "stage": stage, "argv": sys.argv, "config": asdict(config), "device": str(device),
                "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
                "threads": torch.get_num_threads(), "git_commit": git_commit(), "cwd": os.getcwd(),
                "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            })
        except OSError as error:
            raise UserError(f"--out_dir {self.folder}: cannot be written ({error.strerror})") from None

    def catch_interrupts(self):
        """From here on Ctrl-C sets `interrupted`, so that the loop can finish its step and save."""
        self.handler = signal.signal(signal.SIGINT, self.on_interrupt)

    def on_interrupt(self, *_):
        self.interrupted = True
        signal.signal(signal.SIGINT, self.handler)  # a second Ctrl-C stops at once
        print("\nfinishing this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)

    @staticmethod
    def drop_rows_after(path, step):
        write_jsonl(path, [row for row in read_rows(path) if row["step"] <= step])

    def append(self, name, rows):
        if self.write:
            with open(self.folder / name, "a") as file:
                file.writelines(json.dumps(plain(row)) + "\n" for row in rows)

    def log(self, **row):
        """One row of metrics.jsonl; every key stands in KEYS."""
        unknown = set(row) - set(KEYS[self.stage])
        assert not unknown, f"{unknown} missing in run.KEYS"
        self.append("metrics.jsonl", [row | {"seconds": round(self.seconds_before + process_seconds(), 3)}])

    def log_samples(self, rows):
        self.append("samples.jsonl", rows)

    def save(self, step, shape, tokenizer, optimizers, **tensors):
        """ckpt.pt, atomically. tensors: state dicts and plain values by name."""
        if not self.write:
            return
        for name, tensor in tensors["model"].items():
            if not tensor.isfinite().all():
                self.check_finite(step, **{f"weight {name}": math.nan})
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        state = {
            "format": "minirlhf", "stage": self.stage, "step": step, "shape": asdict(shape),
            "tokenizer": tokenizer.state(), "config": {key: list(value) if isinstance(value, tuple) else value
                                                       for key, value in asdict(self.config).items()},
            "optimizers": [optimizer.state_dict() for optimizer in optimizers], "rng": rng,
            "seconds": self.seconds_before + process_seconds(), **tensors,
        }
        write_atomic(self.folder / "ckpt.pt", lambda temporary: torch.save(state, temporary))
        self.saved_step = step

    def restore(self, optimizers):
        """Put the checkpoint's optimizers and random states back; returns its step (0 without one)."""
        if self.checkpoint is None:
            return 0
        for optimizer, state in zip(optimizers, self.checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        torch.set_rng_state(self.checkpoint["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in self.checkpoint["rng"]:
            torch.cuda.set_rng_state(self.checkpoint["rng"]["cuda"], self.device)
        return self.checkpoint["step"]

    def check_finite(self, step, **figures):
        """Stop before a NaN reaches the weights; the last checkpoint stays as it is."""
        for name, value in figures.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {float(value)} at step {step}: the run stopped. The last good checkpoint is "
                                f"{self.folder / 'ckpt.pt'} (step {self.saved_step}); go on with --resume and a lower --lr")

    def stop_if_interrupted(self, script):
        """After Ctrl-C and a save: say how to go on, and leave."""
        if self.interrupted:
            print(f"\nstopped; step {self.saved_step} is saved in {self.folder}. "
                  f"Go on with: python {script} --resume --out_dir {shlex.quote(str(self.folder))}", file=sys.stderr)
            sys.exit(130)
