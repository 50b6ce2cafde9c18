"""Sampling: prefill the prompts, then decode one token at a time from the cache.

No top-k, no top-p: PPO's log-probs are those of the full softmax, so its samples must be too.
`python -m minirlhf.generate --run runs/ppo --prompt "..."` talks to any run. Next: graphs.py.
"""

import itertools
import shutil
import textwrap
from dataclasses import dataclass

import torch

from minirlhf.config import command, option, parse
from minirlhf.data import encode_prompts, prompt_room
from minirlhf.model import KVCache
from minirlhf.run import load_lm, pick_device


@dataclass
class Rollout:
    """Prompts with the answers sampled for them.

    ids: int64 (B, P + A), prompts left-padded to P, answers right-padded to A; padded slots hold 0.
    start: int64 (B,), padded slots on the left; None if there are none.
    mask: bool (B, A), True for the tokens that the policy chose, eos included.
    finished: bool (B,), did the answer end with eos?
    states: (B, A, C), the hidden states that the tokens were drawn from, so that their log-probs and values need no
    further forward; None where the answers were not sampled here.
    """

    ids: torch.Tensor
    start: torch.Tensor | None
    mask: torch.Tensor
    finished: torch.Tensor
    states: torch.Tensor | None = None

    @property
    def prompt_length(self):
        return self.ids.size(1) - self.mask.size(1)

    @property
    def answers(self):
        """int64 (B, A)."""
        return self.ids[:, self.prompt_length:]

    @property
    def last(self):
        """Index into ids of each row's last real token (B,)."""
        return self.prompt_length + self.mask.sum(1) - 1

    def rows(self, index):
        """The rollout of these rows (int64 (B',)), its answers trimmed to the longest."""
        mask = self.mask[index]
        A = int(mask.sum(1).max())
        start = None if self.start is None else self.start[index]
        return Rollout(self.ids[index, : self.prompt_length + A], start, mask[:, :A], self.finished[index])

    def hidden(self, model):
        """model's hidden states (B, A, C) for the answers: the one at t comes from position t - 1.

        Without gradients a few rows at a time, whose activations fit into a CPU's cache.
        """
        size = len(self.ids) if torch.is_grad_enabled() else 256
        starts = itertools.repeat(None) if self.start is None else self.start.split(size)
        hidden = [model(ids[:, :-1], start)[:, self.prompt_length - 1:] for ids, start in zip(self.ids.split(size), starts)]
        return torch.cat(hidden) if len(hidden) > 1 else hidden[0]

    def texts(self, tokenizer):
        """The answers as text, eos left out."""
        lengths = self.mask.sum(1).tolist()
        return [tokenizer.decode(ids[:n]) for ids, n in zip(self.answers.tolist(), lengths)]


def left_pad(rows):
    """Lists of ids -> int64 ids (B, P) padded on the left with id 0, and start (B,), None if all are equally long."""
    P = max(map(len, rows))
    ids = torch.tensor([[0] * (P - len(row)) + row for row in rows])
    start = torch.tensor([P - len(row) for row in rows])
    return ids, start if start.any() else None


def sample(logits, temperature=1.0, generator=None):
    """Draw one token a row from softmax(logits / temperature): (B, V) -> int64 (B,).

    One uniform u a row, then the first token whose cumulative probability exceeds u * total. In
    float64, where the sum's rounding cannot be seen; a token of probability 0 never qualifies.
    """
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=dtype)  # (B, V)
    u = torch.rand(len(logits), 1, device=logits.device, dtype=dtype, generator=generator)
    token = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).squeeze(-1)
    return token.clamp(max=logits.size(-1) - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, eos, temperature=1.0, generator=None, decoder=None):
    """Sample one answer to each prompt, up to eos or max_new_tokens.

    prompts: lists of ids, each beginning with eos (the document start). generator: None for the
    device's global one. Rows that have ended leave the batch when at most half are still going.
    decoder: graphs.Decoder of the model for as many rows, which stay to the end; None: none.
    """
    device = model.head_weight.device
    ids, start = left_pad(prompts)
    B, P = ids.shape
    A = max_new_tokens
    ids = torch.cat([ids, ids.new_zeros(B, A)], 1).to(device)  # (B, P + A)
    mask = torch.zeros(B, A, dtype=torch.bool, device=device)
    start = None if start is None else start.to(device)
    rows, alive = slice(None), torch.ones(B, dtype=torch.bool, device=device)  # rows: those still in the batch, now all
    check_every = 8 if device.type == "cuda" else 1  # to ask whether all have ended, the CPU has to wait for the GPU
    if decoder is None:
        bf16 = torch.is_autocast_enabled(device.type)
        cache = KVCache(model.shape, B, P + A, device, torch.bfloat16 if bf16 else model.head_weight.dtype)
        hidden = model(ids[:, :P], start, cache)[:, -1]  # (B, C)
    else:
        hidden = decoder.prefill(ids[:, :P], start)
    states = hidden.new_zeros(B, A, hidden.size(1))
    for t in range(A):
        states[rows, t] = hidden
        token = sample(hidden @ model.head_weight.T, temperature, generator)  # (rows,)
        ids[rows, P + t] = torch.where(alive, token, 0)
        mask[rows, t] = alive
        alive = alive & (token != eos)
        if t == A - 1:
            break
        if (t + 1) % check_every == 0:
            going = int(alive.sum())
            if going == 0:
                break
            if decoder is None and going <= len(alive) // 2:
                cache.keep(alive)
                rows = torch.arange(B, device=device)[rows][alive]
                token, alive = token[alive], alive[alive]
        if decoder is None:
            hidden = model(token[:, None], None if start is None else start[rows], cache)[:, -1]
        else:
            hidden = decoder(token)
    finished = (ids[:, P:] == eos).any(1)
    A = int(mask.any(0).sum())  # the longest answer
    return Rollout(ids[:, : P + A], start, mask[:, :A], finished, states[:, :A])


def generate_all(model, prompts, max_new_tokens, eos, temperature=1.0, generator=None, batch_size=1024):
    """generate() for any number of prompts, a batch at a time: yields Rollouts in order."""
    for i in range(0, len(prompts), batch_size):
        yield generate(model, prompts[i: i + batch_size], max_new_tokens, eos, temperature, generator)


def printable(text):
    """Control characters, which a weak model may well sample, do not reach the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def columns(cells, width=None):
    """Texts side by side, wrapped into equal columns: one string of lines."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 120)
    each = (width - 3 * (len(cells) - 1)) // len(cells)
    wrapped = [[part for line in printable(cell).splitlines() or [""] for part in textwrap.wrap(line, each) or [""]]
               for cell in cells]
    lines = itertools.zip_longest(*wrapped, fillvalue="")
    return "\n".join(" | ".join(part.ljust(each) for part in parts).rstrip() for parts in lines)


# ---- python -m minirlhf.generate -------------------------------------------------------------


@dataclass
class Config:
    run: str = option("runs/ppo", "run folder of a language model or a PPO policy")
    compare: str = option("", "a second run, whose answers are shown beside the first one's")
    prompt: tuple = option((), "what to answer; none: two prompts of the built-in world")
    num_samples: int = option(3, "answers to each prompt", low=1)
    max_new_tokens: int = option(48, "longest answer, in tokens", low=1)
    temperature: float = option(1.0, "of the softmax; below 1 plays safe", low=0.01)
    seed: int = option(1, "seed of the samples", low=0)
    device: str = option("auto", "cpu, cuda, mps or auto")


def answers_of(config, run_dir, prompts):
    """Lists of config.num_samples answers, one list a prompt."""
    model, tokenizer = load_lm(run_dir, pick_device(config.device))
    room = prompt_room(model.shape.block_size, config.max_new_tokens, run_dir)
    rows, cut = encode_prompts(tokenizer, prompts, room)
    if cut:
        print(f"{cut} prompts were cut from the left to fit {run_dir}'s {model.shape.block_size} tokens")
    torch.manual_seed(config.seed)
    rollout = generate(model, [row for row in rows for _ in range(config.num_samples)], config.max_new_tokens,
                       tokenizer.eos, config.temperature)
    texts = [text.strip() + ("" if done else " …")
             for text, done in zip(rollout.texts(tokenizer), rollout.finished.tolist())]
    return [texts[i: i + config.num_samples] for i in range(0, len(texts), config.num_samples)]


def main():
    config = parse(Config, "Print answers of a run, or of two runs side by side.")
    prompts = list(config.prompt) or ["I had the ramen at Luna.", "I had the salad at Willow."]
    runs = [config.run] + ([config.compare] if config.compare else [])
    answers = [answers_of(config, run_dir, prompts) for run_dir in runs]
    for i, prompt in enumerate(prompts):
        print(f"\n{prompt}")
        if config.compare:
            print(columns(runs))
        for texts in zip(*(run_answers[i] for run_answers in answers)):
            print(columns([f"- {text}" for text in texts]))


if __name__ == "__main__":
    command(main)
