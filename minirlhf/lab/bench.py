"""How fast the hot paths are: each beside its plain twin, beside what torch offers, and beside the machine's own limit.

    python -m minirlhf.lab.bench                  # all that this device can hold
    python -m minirlhf.lab.bench logprobs         # or sample, lm, ppo

Variants of a row are timed in turns, in one process, after one call each to warm up; the figure is the median, with the
fastest and the slowest round beside it. Peak memory is what a call adds: the allocator's counters on a GPU, VmHWM on Linux.
Errors are the largest, against float64, of log-probs and of both gradients, each relative to the largest entry. The share
of the limit is the time that the matrix products alone would take at the measured rate, divided by the time taken; for the
fused region, which has none, the time of reading its logits once at the measured copy rate.
"""

import contextlib
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

import train_lm
import train_ppo
from minirlhf import data, logprobs
from minirlhf.config import UserError, command, option, parse
from minirlhf.generate import generate
from minirlhf.graphs import Decoder
from minirlhf.model import GPT, RewardModel, Shape
from minirlhf.run import autocast, can_compile, pick_device, write_json

BENCHES = ("logprobs", "sample", "lm", "ppo", "all")


@dataclass
class Config:
    what: str = option("all", "what to time; the option's name may be left out", choices=BENCHES)
    rounds: int = option(5, "rounds of each row", low=5)
    compile: bool = option(True, "time the compiled paths too, where torch.compile works")
    device: str = option("auto", "cpu, cuda, mps or auto")
    seed: int = option(1, "seed of all inputs", low=0)
    out: str = option("runs/bench.json", "file to write the rows to")


# ---- measuring -------------------------------------------------------------------------------


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def status_mb(key):
    """A figure of /proc/self/status, in MB; None where there is no such file."""
    with contextlib.suppress(OSError):
        return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def peak_mb(function, device):
    """Memory in MB that one call adds at its peak; None where it cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        return function() and None
    before = status_mb("VmRSS")
    function()
    return status_mb("VmHWM") - before


def measure(variants, rounds, device):
    """{name: (list of ms, peak MB)} of {name: function}, timed in turns."""
    peaks, times = {}, {name: [] for name in variants}
    for name, function in variants.items():
        function()
        peaks[name] = peak_mb(function, device)
    for _ in range(rounds):
        for name, function in variants.items():
            synchronize(device)
            clock = time.perf_counter()
            function()
            synchronize(device)
            times[name].append(1000 * (time.perf_counter() - clock))
    return {name: (times[name], peaks[name]) for name in variants}


def limits(device, dtypes):
    """The machine as it is just now: TFLOP/s of a large matrix product by dtype, and GB/s of a copy (read plus written)."""
    size, found = 8192 if device.type == "cuda" else 1536, {}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        times, _ = measure({"product": lambda: torch.mm(a, b, out=out)}, 9, device)["product"]
        found[str(dtype)[6:]] = 2 * size**3 / statistics.median(times) / 1e9
    source = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    times, _ = measure({"copy": lambda: target.copy_(source)}, 9, device)["copy"]
    return found | {"copy_gb_per_s": 2 * source.nbytes / statistics.median(times) / 1e6}


class Table:
    """Rows as they come: on the terminal, and in the end in --out."""

    def __init__(self, config, device):
        self.config, self.device, self.rows = config, device, []
        self.limits = limits(device, (torch.float32, torch.bfloat16))
        print(f"{'bench':<9}{'variant':<26}{'shape':<36}{'dtype':<10}{'ms':>9}{'(fastest … slowest)':>22}"
              f"{'tokens/s':>11}{'peak MB':>9}{'error':>9}{'of limit':>9}")

    def add(self, bench, shape, dtype, variants, errors=(), **more):
        """Time {name: function} in turns; a row each."""
        for name, (times, peak) in measure(variants, self.config.rounds, self.device).items():
            self.add_row(bench, name, shape, dtype, times, peak, error=dict(errors).get(name), **more)

    def add_row(self, bench, name, shape, dtype, times, peak, tokens, flops=None, floor_ms=None, error=None):
        """times in ms. flops: of the matrix products; floor_ms: the limit, where it is none of them."""
        ms, limit = statistics.median(times), floor_ms or flops / self.limits[dtype] / 1e9
        row = {"bench": bench, "variant": name, "shape": shape, "dtype": dtype, "device": str(self.device), "ms": ms,
               "ms_fastest": min(times), "ms_slowest": max(times), "tokens_per_second": 1000 * tokens / ms,
               "peak_mb": peak, "max_error": error, "limit_share": limit / ms}
        self.rows.append(row)
        cells = [f"{row['tokens_per_second']:,.0f}", "-" if peak is None else f"{peak:,.0f}",
                 "-" if error is None else f"{error:.0e}", f"{row['limit_share']:.0%}"]
        print(f"{bench:<9}{name:<26}{shape:<36}{dtype:<10}{ms:>9.2f}{f'({min(times):.2f} … {max(times):.2f})':>22}"
              + "".join(cell.rjust(width) for cell, width in zip(cells, (11, 9, 9, 9))), flush=True)


# ---- log-probs -------------------------------------------------------------------------------

SHAPES = [(2048, 512, 128), (2048, 50257, 768)]  # rows, vocabulary, channels


def logprob_variants(hidden, weight, targets, dtype, compiled):
    """{name: function -> (log-probs or their sum, gradient of hidden, of weight)}: forward and backward of the sum."""
    mask = torch.ones(1, len(hidden), dtype=torch.bool, device=hidden.device)
    device = hidden.device

    def variant(nll):
        def call():
            h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            with autocast(device, dtype):
                value = nll(h, w)
            value.float().sum().backward()
            return -value.detach(), -h.grad, -w.grad
        return call

    names = ["plain"] + ["compiled"] * compiled + ["chunked"]
    found = {name: variant(lambda h, w, name=name: -logprobs.token_logprobs(h[None], w, targets[None], mask, path=name)[0])
             for name in names}
    found["chunked cross_entropy"] = variant(
        lambda h, w: logprobs.cross_entropy(h[None], w, targets[None], "sum", path="chunked"))
    found["F.cross_entropy"] = variant(lambda h, w: F.cross_entropy((h @ w.T).float(), targets, reduction="none"))
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        chunks = torch.nn.LinearCrossEntropyOptions()
        found["F.linear_cross_entropy"] = variant(lambda h, w: F.linear_cross_entropy(
            h.to(torch.bfloat16) if dtype == "bfloat16" else h, w.to(torch.bfloat16) if dtype == "bfloat16" else w, targets,
            reduction="none", options=chunks))
    else:
        print("logprobs F.linear_cross_entropy: missing in this torch")
    return found


def exact(hidden, weight, targets):
    """As above in float64, 256 rows at a time."""
    h, w = hidden.double(), weight.double()
    grad_w, parts = torch.zeros_like(w), []
    for rows in torch.arange(len(h), device=h.device).split(256):
        all_logprobs = (h[rows] @ w.T).log_softmax(-1)
        chosen = all_logprobs.gather(-1, targets[rows, None])
        grad = -all_logprobs.exp()
        grad.scatter_add_(-1, targets[rows, None], torch.ones_like(chosen))
        parts.append((chosen[:, 0], grad @ w))
        grad_w += grad.T @ h[rows]
    return torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]), grad_w


def bench_logprobs(table, config, device):
    cuda = device.type == "cuda"
    for N, V, C in SHAPES + [(16384, 50304, 768)] * cuda:
        for dtype in ("float32", "bfloat16") if cuda else ("float32",):
            generator = torch.Generator().manual_seed(config.seed)
            hidden = torch.randn(N, C, generator=generator).to(device)
            weight = (0.05 * torch.randn(V, C, generator=generator)).to(device)
            targets = torch.randint(V, (N,), generator=generator).to(device)
            variants = logprob_variants(hidden, weight, targets, dtype, config.compile and can_compile(device.type))
            wanted, errors = exact(hidden, weight, targets), {}
            for name, call in list(variants.items()):
                try:
                    value, *gradients = call()
                    pairs = [(value, wanted[0].sum() if value.dim() == 0 else wanted[0]), *zip(gradients, wanted[1:])]
                    errors[name] = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
                except (RuntimeError, ValueError, TypeError) as error:
                    print(f"logprobs {name}, N {N} V {V} {dtype}: does not run here ({str(error).splitlines()[0]})")
                    del variants[name]
            del wanted
            table.add("logprobs", f"N {N} V {V} C {C}", dtype, variants, flops=6 * N * V * C, tokens=N, errors=errors)
    if cuda and config.compile and can_compile("cuda"):
        N, V, C = 16384, 50304, 768
        hidden = torch.randn(N, C, device=device, dtype=torch.bfloat16)
        weight = 0.05 * torch.randn(V, C, device=device, dtype=torch.bfloat16)
        logits, targets = hidden @ weight.T, torch.randint(V, (N,), device=device)
        region, read_ms = logprobs.fused(logprobs.select), logits.nbytes / table.limits["copy_gb_per_s"] / 1e6
        with torch.no_grad():
            for name, moments in (("region, log-prob only", False), ("region, with entropy", True)):
                table.add("logprobs", f"logits {N} x {V}", "bfloat16", {name: lambda: region(logits, targets, moments)},
                          tokens=N, floor_ms=read_ms)
            both = {"product alone": lambda: hidden @ weight.T, "product + region": lambda: region(
                hidden @ weight.T, targets, False)}
            table.add("logprobs", f"N {N} V {V} C {C}", "bfloat16", both, flops=2 * N * V * C, tokens=N)


# ---- sampling, language model, PPO -----------------------------------------------------------

SMALL, MIDDLE = Shape(512, 64, 4, 4, 128), Shape(512, 256, 6, 6, 384)
GPT2 = Shape(50304, 1024, 12, 12, 768)  # 124M parameters


def products(shape):
    """Floating-point operations of a forward's matrix products, per token, those with the cache or the past left out."""
    return 2 * (12 * shape.n_layer * shape.n_embd**2 + shape.vocab_size * shape.n_embd)


def named(shape):
    return f"{shape.n_layer} x {shape.n_embd}, V {shape.vocab_size}"


def make_model(shape, config, device):
    torch.manual_seed(config.seed)
    return GPT(shape).to(device)


@torch.no_grad()
def without_cache(model, prompts, new):
    """The plain twin: a forward over the whole text for every token, and multinomial's draw."""
    ids = torch.tensor(prompts, device=model.head_weight.device)
    for _ in range(new):
        logits = model(ids)[:, -1] @ model.head_weight.T
        ids = torch.cat([ids, torch.multinomial(logits.float().softmax(-1), 1)], 1)
    return ids


def bench_sample(table, config, device):
    cuda = device.type == "cuda"
    for shape, new, dtype in [(SMALL, 48, "float32"), (MIDDLE, 48, "float32")] + [(GPT2, 256, "bfloat16")] * cuda:
        model = make_model(shape, config, device)
        prompts = torch.randint(shape.vocab_size, (64, 8), generator=torch.Generator().manual_seed(config.seed)).tolist()

        def in_dtype(function):
            def call():
                with autocast(device, dtype):
                    function()
            return call

        variants = {"generate": in_dtype(lambda: generate(model, prompts, new, eos=-1)),
                    "no cache": in_dtype(lambda: without_cache(model, prompts, new))}
        if cuda and config.compile and can_compile("cuda"):
            decoder = Decoder(model, 64, 8 + new, getattr(torch, dtype))
            variants["generate, one graph"] = in_dtype(lambda: generate(model, prompts, new, eos=-1, decoder=decoder))
        table.add("sample", f"{named(shape)}, 64 x (8 + {new})", dtype, variants, flops=64 * (8 + new) * products(shape),
                  tokens=64 * new)


def bench_lm(table, config, device):
    cuda = device.type == "cuda"
    for shape, B, T in [(MIDDLE, 8, 256)] + [(GPT2, 32, 1024)] * cuda:
        ids = torch.randint(shape.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(config.seed)).to(device)

        def step(dtype, compiled, path):
            model = make_model(shape, config, device)
            forward = torch.compile(model) if compiled else model
            optimizers = train_lm.make_optimizers(model, train_lm.Config())

            def call():
                with autocast(device, dtype):
                    loss = logprobs.cross_entropy(forward(ids[:, :-1]), model.head_weight, ids[:, 1:], path=path)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            return call

        shape_name, flops = f"{named(shape)}, {B} x {T}", 3 * B * T * products(shape)
        for dtype in ("float32", "bfloat16"):
            variants = {"step": step(dtype, False, "auto")}
            if cuda and config.compile and can_compile("cuda"):
                variants["step --compile"] = step(dtype, True, "auto")
            table.add("lm", shape_name, dtype, variants, flops=flops, tokens=B * T)


class Numbers:
    """A tokenizer for prompts that are ids already: "3 1 4"."""

    def __init__(self, vocab_size):
        self.eos, self.vocab_size = 0, vocab_size

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def state(self):
        return {"kind": "numbers"}


def bench_ppo(table, config, device):
    """train_ppo.train itself: an update is the time between two lines of its log. No answer ends early."""
    cuda = device.type == "cuda"
    flags = (False, True) if cuda and config.compile and can_compile("cuda") else (False,)
    cases = [(SMALL, 64, 8, 48, "float32", value, False) for value in ("shared", "lm")]
    cases += [(GPT2, 128, 64, 128, "bfloat16", value, flag) for value in ("shared", "lm") for flag in flags] * cuda

    def endless(model, prompts, new, eos, temperature, **rest):
        return generate(model, prompts, new, -1, temperature, **rest)

    for shape, B, prompt, new, dtype, value, flag in cases:
        model, tokenizer = make_model(shape, config, device), Numbers(shape.vocab_size)
        reward_model = RewardModel.from_lm(model).to(device).requires_grad_(False)
        generator = torch.Generator().manual_seed(config.seed)
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            lines = torch.randint(1, shape.vocab_size, (4 * B, prompt - 1), generator=generator).tolist()
            (Path(folder) / "prompts.txt").write_text("\n".join(" ".join(map(str, line)) for line in lines))
            options = train_ppo.Config(
                prompts=f"{folder}/prompts.txt", prompt_words=prompt, out_dir=f"{folder}/ppo", max_steps=config.rounds + 1,
                batch_size=B, minibatch_size=B // 4, ppo_epochs=4, max_new_tokens=new, value=value, dtype=dtype, lr=1e-5,
                compile=flag,
                eval_answers=2, save_every=1000, sample_every=1000, seed=config.seed)
            with mock.patch.object(train_ppo, "generate", endless), contextlib.redirect_stdout(nowhere), \
                    contextlib.redirect_stderr(nowhere):
                peak = peak_mb(lambda: train_ppo.train(options, model, reward_model, tokenizer), device)
            log = (Path(folder) / "ppo" / "metrics.jsonl").read_text().splitlines()
            seconds = [json.loads(line)["seconds"] for line in log]
        ms = [1000 * (b - a) for a, b in zip(seconds, seconds[1:])]
        table.add_row("ppo", f"value {value}" + " --compile" * flag, f"{named(shape)}, {B} x ({prompt} + {new})", dtype, ms, peak,
                           flops=B * (prompt + new) * products(shape) * (3 + 3 * 4 * (2 if value == "lm" else 1) + (value == "lm")),
                           tokens=B * new)


# ---- python -m minirlhf.lab.bench ------------------------------------------------------------


def main():
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--what")
    config = parse(Config, __doc__)
    device = pick_device(config.device)
    try:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        open(config.out, "a").close()
    except OSError as error:
        raise UserError(f"--out {config.out}: cannot be written ({error.strerror})") from None
    table = Table(config, device)
    for name, bench in (("logprobs", bench_logprobs), ("sample", bench_sample), ("lm", bench_lm), ("ppo", bench_ppo)):
        if config.what in (name, "all"):
            bench(table, config, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"device": str(device), "processor": name, "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "limits_before": table.limits,
               "limits_after": limits(device, (torch.float32, torch.bfloat16))}
    write_json(config.out, {"machine": machine, "rows": table.rows})
    for when in ("before", "after"):
        found = machine[f"limits_{when}"]
        print(f"limit {when}: {found['float32']:.3g} TFLOP/s fp32, {found['bfloat16']:.3g} bf16, copy {found['copy_gb_per_s']:.0f} GB/s")
    print(f"{name}, {config.rounds} rounds; {len(table.rows)} rows in {config.out}")


if __name__ == "__main__":
    command(main)
