"""Stage 1: pretrain a small GPT on text by next-token cross-entropy.

    python train_lm.py                                   # the built-in restaurant reviews
    python train_lm.py --data my.txt --data more.txt     # your own text, or .jsonl documents

Writes runs/lm: the policy-to-be and frozen reference of the later stages. Next: train_rm.py.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minirlhf import data
from minirlhf.config import UserError, command, option, parse
from minirlhf.generate import generate
from minirlhf.logprobs import PATHS, cross_entropy
from minirlhf.model import GPT, Shape
from minirlhf.run import (Run, autocast, check_machine, learning_rate, load_lm, pick_device, refuse_inputs_in_out_dir,
                          saved_config, write_json)
from minirlhf.tokenizer import BPE


@dataclass
class Config:
    # files
    data: tuple = option((), "text to learn: .txt (one stream) or .jsonl documents; none: the built-in reviews")
    out_dir: str = option("runs/lm", "run folder to write")
    # model
    vocab_size: int = option(1024, "most tokens the tokenizer may have, 257 and up", low=257)
    n_layer: int = option(2, "transformer blocks", low=1)
    n_head: int = option(4, "attention heads", low=1)
    n_embd: int = option(128, "channels", low=1)
    block_size: int = option(64, "longest sequence, in tokens", low=4)
    # optimisation
    batch_size: int = option(64, "windows per step", low=1)
    max_steps: int = option(200, "optimizer steps", low=1)
    lr: float = option(3e-3, "peak learning rate of AdamW", low=0)
    muon_lr: float = option(0.02, "peak learning rate of Muon for the blocks' matrices; 0: AdamW for them too", low=0)
    warmup: int = option(20, "steps of linear warm-up; then linear decay to 0", low=0)
    weight_decay: float = option(0.1, "weight decay, on matrices only", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", low=0)
    # log
    eval_every: int = option(100, "steps between evaluations on the held-out split", low=1)
    save_every: int = option(200, "steps between checkpoints", low=1)
    # machine
    seed: int = option(1, "seed of weights, batches and samples", low=0)
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("float32", "bfloat16: autocast", choices=("float32", "bfloat16"))
    compile: bool = option(False, "run the training forward through torch.compile")
    logprobs: str = option("auto", "how log-probs are formed from hidden states, see minirlhf/logprobs.py", choices=PATHS)
    resume: bool = option(False, "go on from out_dir's checkpoint, with its options")


def make_optimizers(model, config):
    """AdamW, and Muon (Jordan et al. 2024) for the blocks' matrices; weight decay on matrices only."""
    blocks = [p for p in model.blocks.parameters() if p.dim() == 2] if config.muon_lr else []
    taken = set(blocks)
    others = [p for p in model.parameters() if p not in taken]
    groups = [{"params": [p for p in others if p.dim() == 2], "weight_decay": config.weight_decay},
              {"params": [p for p in others if p.dim() != 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)]
    if blocks:
        optimizers.append(torch.optim.Muon(blocks, lr=config.muon_lr, weight_decay=config.weight_decay))
    return optimizers


@torch.no_grad()
def evaluate(model, corpus, tokenizer, dtype, path="auto", batch_size=64):
    """(nats per token, bits per byte) over the whole held-out split, each token scored once.

    A text longer than the block is read in windows that overlap by half, and a token is scored in
    the first window that reaches it.
    """
    device, T = model.head_weight.device, model.shape.block_size
    half = T // 2
    texts = [[tokenizer.eos] + tokenizer.encode(prompt) + tokenizer.encode(text) + [tokenizer.eos]
             for prompt, text in corpus.held_out]
    texts += [[tokenizer.eos] + tokenizer.encode(text) for text in corpus.held_out_streams if text]
    windows = []  # (ids, index of the first target to score)
    for ids in texts:
        for first in range(0, max(1, len(ids) - 1 - half), T - half):
            windows.append((ids[first: first + T + 1], half if first else 0))
    windows.sort(key=lambda window: len(window[0]))
    nats = 0.0
    for i in range(0, len(windows), batch_size):
        pieces, first = zip(*windows[i: i + batch_size])
        ids, last = data.right_pad(pieces)  # (B, T' + 1), (B,)
        slots = torch.arange(ids.size(1) - 1)
        scored = (slots >= torch.tensor(first)[:, None]) & (slots < last[:, None])  # (B, T')
        targets = ids[:, 1:].masked_fill(~scored, -100)
        with autocast(device, dtype):
            loss = cross_entropy(model(ids[:, :-1].to(device)), model.head_weight, targets.to(device), "sum", path)
        nats += loss.item()
    num_bytes = sum(len(text.encode()) for text in [*map("".join, corpus.held_out), *corpus.held_out_streams])
    return nats / sum(len(ids) - 1 for ids in texts), nats / (math.log(2) * num_bytes)


def train(config, corpus, tokenizer=None):
    """Train on `corpus` (data.Corpus) and return (model, tokenizer); tokenizer None: train a BPE on it."""
    device = pick_device(config.device)
    if config.n_embd % config.n_head:
        raise UserError(f"--n_embd {config.n_embd} must be divisible by --n_head {config.n_head}")
    check_machine(config, device)

    # ---- setup ----
    run = Run("lm", config, device)
    if run.checkpoint:
        model, tokenizer = load_lm(run.folder, device)
        for name in ("n_layer", "n_head", "n_embd", "block_size"):
            kept = getattr(model.shape, name)
            if getattr(config, name) != kept:
                raise UserError(f"--{name} {getattr(config, name)}: a resumed run keeps its network, {kept} here")
    else:
        tokenizer = tokenizer or BPE.train(corpus.training_texts(), config.vocab_size)
        shape = Shape(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd)
        model = GPT(shape).to(device)
    forward = torch.compile(model) if config.compile else model
    optimizers = make_optimizers(model, config)
    windows = data.Windows(corpus, tokenizer, config.block_size)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size} tokens in the "
          f"vocabulary, {windows.num_tokens:,} to train on, {device}")

    # ---- loop ----
    first = run.restore(optimizers)
    if first == 0:
        run.save(0, model.shape, tokenizer, optimizers, model=model.state_dict())
    seen, clock = 0, time.time()
    run.catch_interrupts()
    bar = tqdm(range(first, config.max_steps), initial=first, total=config.max_steps, desc="lm", mininterval=0.5)
    for step in bar:
        for optimizer, peak in zip(optimizers, (config.lr, config.muon_lr)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(peak, step, config.max_steps, config.warmup)
        inputs, targets = windows.batch(config.seed, step, config.batch_size)  # (B, T) each
        with autocast(device, config.dtype):
            hidden = forward(inputs.to(device))  # (B, T, C)
            loss = cross_entropy(hidden, model.head_weight, targets.to(device), path=config.logprobs)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        run.check_finite(step, loss=loss.item(), gradient=norm.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        seen += inputs.numel()
        done = step + 1
        last = done == config.max_steps
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
        row = {"step": done, "loss": loss.item(), "lr": optimizers[0].param_groups[0]["lr"]}
        if done % config.eval_every == 0 or last:
            speed = seen / (time.time() - clock)
            val_loss, bits_per_byte = evaluate(model, corpus, tokenizer, config.dtype, config.logprobs)
            run.check_finite(done, val_loss=val_loss)
            figures = {"val_loss": val_loss, "bits_per_byte": bits_per_byte, "tokens_per_second": speed}
            run.log(**row, **figures)
            texts = generate(model, [[tokenizer.eos]] * 3, config.block_size - 1, tokenizer.eos,
                             generator=torch.Generator(device).manual_seed(done)).texts(tokenizer)
            run.log_samples([{"step": done, "prompt": "", "response": text} for text in texts])
            tqdm.write(f"step {done}: held-out {val_loss:.3f} nats/token, {bits_per_byte:.3f} bits/byte. "
                       f"Sample: {texts[0].strip()[:160]!r}")
            seen, clock = 0, time.time()
        elif done % 10 == 0:
            run.log(**row)
        if done % config.save_every == 0 or last or run.interrupted:
            run.save(done, model.shape, tokenizer, optimizers, model=model.state_dict())
        if last:
            write_json(run.folder / "eval.json", figures)
        else:
            run.stop_if_interrupted("train_lm.py")
    return model, tokenizer


def main():
    config = parse(Config, __doc__, saved_config=saved_config("lm"))
    refuse_inputs_in_out_dir(config, "data")
    config.data = tuple(str(Path(path).resolve()) for path in config.data)  # later stages look there for prompts
    train(config, data.read_corpus(config.data))
    print(f"saved in {config.out_dir}; next: python train_rm.py")


if __name__ == "__main__":
    command(main)
