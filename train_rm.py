"""Stage 2: gather preferences between sampled answers and train a reward model on them.

    python train_rm.py                                      # answers of runs/lm, labelled by the gold rule
    python train_rm.py --labeler human                      # labelled by you
    python train_rm.py --prefs my_pairs.jsonl               # labelled already

Writes runs/rm: pairs.jsonl with every pair used, and the reward model. Next: train_ppo.py.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from minirlhf import data, labelers, losses, reviews
from minirlhf.config import UserError, command, option, parse
from minirlhf.generate import generate, generate_all
from minirlhf.model import RewardModel
from minirlhf.run import (Run, autocast, check_machine, learning_rate, lm_prompts, load_lm, pick_device,
                          refuse_inputs_in_out_dir, saved_config, write_json, write_jsonl)


@dataclass
class Config:
    # files
    lm: str = option("runs/lm", "language-model run: the trunk to start from, and the reference of the normalisation")
    out_dir: str = option("runs/rm", "run folder to write")
    prefs: tuple = option((), "read preference pairs from .jsonl; no new ones are sampled unless --policy is given")
    prompts: str = option("", "prompts to answer (.jsonl or .txt); default: those of the language model's text")
    prompt_words: int = option(4, "words of a text that make its prompt, where the text has none", low=1)
    # preferences
    labeler: str = option("gold", "who labels sampled answers", choices=("gold", "human"))
    policy: str = option("", "run whose answers are compared; default: --lm")
    num_pairs: int = option(0, "pairs to gather; 0: 20480 with gold, 100 with a person", low=0)
    answers_per_prompt: int = option(4, "answers sampled per prompt, every two of them a pair", low=2)
    max_new_tokens: int = option(48, "longest answer, in tokens", low=1)
    # optimisation
    epochs: int = option(2, "passes over the pairs", low=1)
    lr: float = option(2e-3, "peak learning rate; linear warm-up, linear decay to 0", low=0)
    warmup: int = option(20, "steps of linear warm-up", low=0)
    batch_size: int = option(128, "pairs per step; those of one prompt stay together", low=1)
    grad_clip: float = option(1.0, "largest gradient norm", low=0)
    save_every: int = option(100, "steps between checkpoints", low=1)
    # machine
    seed: int = option(1, "seed of the sampled answers, the labels' noise, the head and the batches", low=0)
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("float32", "bfloat16: autocast", choices=("float32", "bfloat16"))
    compile: bool = option(False, "run the training forward through torch.compile")
    resume: bool = option(False, "go on from out_dir's checkpoint and pairs.jsonl, with their options")


def sample_pairs(config, policy, tokenizer, prompts):
    """New pairs: the policy's answers to `prompts`, every two to one prompt compared by --labeler."""
    per_prompt = math.comb(config.answers_per_prompt, 2)
    wanted = config.num_pairs or {"gold": 20480, "human": 100}[config.labeler]
    spare = 1.5 if config.labeler == "human" else 1.0  # a person skips some
    chosen = [prompts[i] for i in data.order(len(prompts), config.seed, 0, math.ceil(spare * wanted / per_prompt))]
    other = [prompt for prompt in chosen if not reviews.dish_of(prompt)]
    if config.labeler == "gold" and other:
        raise UserError(f"--labeler gold judges reviews of a dish, not answers to {other[0][:40]!r}; give pairs with --prefs, "
                        "or label them yourself with --labeler human")
    room = data.prompt_room(policy.shape.block_size, config.max_new_tokens, config.policy or config.lm)
    ids, cut = data.encode_prompts(tokenizer, chosen, room)
    if cut:
        print(f"{cut} prompts were cut from the left to fit the model's {policy.shape.block_size} tokens")
    repeated = [row for row in ids for _ in range(config.answers_per_prompt)]
    generator = torch.Generator(policy.head_weight.device).manual_seed(config.seed)
    answers, finished = [], []
    for rollout in tqdm(generate_all(policy, repeated, config.max_new_tokens, tokenizer.eos, generator=generator),
                        desc="sampling", total=math.ceil(len(repeated) / 1024)):
        answers += rollout.texts(tokenizer)
        finished += rollout.finished.tolist()
    questions = labelers.questions_of(chosen, answers, finished, config.answers_per_prompt)
    if config.labeler == "human":
        return labelers.label_by_person(questions, wanted, Path(config.out_dir) / "labels.jsonl", config.seed)
    return labelers.label_by_gold(questions[:wanted], config.seed)


class Texts:
    """The pairs' texts as ids, each (prompt, answer) once."""

    def __init__(self, tokenizer, block_size):
        self.tokenizer, self.block_size = tokenizer, block_size
        self.rows, self.index, self.cut = [], {}, 0

    def of_pair(self, pair):
        """Row numbers of the chosen and the rejected text."""
        keys = [(pair.prompt, text, done) for text, done in zip((pair.chosen, pair.rejected), pair.finished)]
        for key in keys:
            if key not in self.index:
                ids, cut = data.encode_answer(self.tokenizer, *key, self.block_size)
                self.index[key] = len(self.rows)
                self.rows.append(ids)
                self.cut += cut
        return [self.index[key] for key in keys]


def make_batches(pairs, batch_size, epochs, seed):
    """A list of batches, each a list of pairs: groups shuffled anew in each epoch, kept together."""
    groups = [group[i: i + batch_size] for group in data.groups_of(pairs) for i in range(0, len(group), batch_size)]
    batches = []
    for epoch in range(epochs):
        batches.append([])
        for i in data.order(len(groups), seed, epoch * len(groups), len(groups)):
            if batches[-1] and len(batches[-1]) + len(groups[i]) > batch_size:
                batches.append([])
            batches[-1] += groups[i]
    return batches


def score_texts(model, rows, dtype, part=512):
    """Raw scores (N,) of lists of ids, in their order. They are read `part` at a time by length, so little is padding."""
    device = model.gain.device
    scores = torch.zeros(len(rows), device=device)
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for i in range(0, len(rows), part):
        chosen = by_length[i: i + part]
        ids, last = data.right_pad([rows[j] for j in chosen])
        with autocast(device, dtype):
            scores[chosen] = model(ids.to(device), last.to(device)).float()
    return scores


def calibration_error(probabilities, correct, bins=10):
    """Expected calibration error: mean over equal-count bins of |mean confidence - mean accuracy|, weighted by count.

    probabilities (N,) that the first is better, correct (N,) bool: was it? Confidence is max(p, 1 - p).
    """
    confidence = np.maximum(probabilities, 1 - probabilities)
    right = np.where(probabilities == 0.5, 0.5, (probabilities > 0.5) == correct)
    order = np.argsort(confidence, kind="stable")
    return float(sum(abs(confidence[part].mean() - right[part].mean()) * len(part)
                     for part in np.array_split(order, bins) if len(part)) / len(order))


def evaluate(differences, golds):
    """The figures of eval.json from raw score differences chosen - rejected (N,), ties left out.

    golds: (N, 2) of chosen and rejected, or None where gold is not known.
    """
    d = differences.astype(np.float64)
    names = ("accuracy", "log_loss", "ece", "gold_accuracy", "bayes_accuracy", "bayes_log_loss")
    figures = dict.fromkeys(names) | {"pairs": len(d)}
    if len(d):
        figures["accuracy"] = float(np.mean((d > 0) + 0.5 * (d == 0)))
        figures["log_loss"] = float(np.logaddexp(0, -d).mean())
        figures["ece"] = calibration_error(1 / (1 + np.exp(-d.clip(-500, 500))), np.ones(len(d), dtype=bool))
    if len(d) and golds is not None:
        delta = golds[:, 0] - golds[:, 1]
        agree = np.where(d == 0, 0.5, np.sign(d) == np.sign(delta))
        figures["gold_accuracy"] = float(agree[delta != 0].mean()) if (delta != 0).any() else None
        x = np.abs(delta) / labelers.TAU
        p = labelers.prefer_probability(np.abs(delta), 0)
        figures["bayes_accuracy"] = float(p.mean())
        figures["bayes_log_loss"] = float((p * np.logaddexp(0, -x) + (1 - p) * np.logaddexp(0, x)).mean())
    return figures


def train(config, lm, tokenizer, policy=None):
    """Gather pairs, train the reward model, normalise and evaluate it; returns the model.

    lm: GPT to start from and to normalise on. policy: GPT whose answers are compared (None: lm).
    """
    device = lm.head_weight.device
    check_machine(config, device)
    block_size = lm.shape.block_size
    room = data.prompt_room(block_size, config.max_new_tokens, config.lm)

    # ---- 1. prompts and preferences ----
    pairs, skipped = data.read_pairs(config.prefs)
    if config.prompts:
        prompts = data.read_prompts(config.prompts, config.prompt_words)
    else:
        prompts = sorted({pair.prompt for pair in pairs} - {""}) or lm_prompts(config.lm, config.prompt_words)
    pairs_file = Path(config.out_dir) / "pairs.jsonl"
    if config.resume:
        pairs, _ = data.read_pairs([pairs_file])
    elif config.policy or not config.prefs:
        pairs += sample_pairs(config, policy or lm, tokenizer, prompts)
    if skipped and not config.resume:
        print(f"{skipped} pairs skipped: equal answers, an empty answer, or different prompts")
    if len(pairs) < 8:
        raise UserError(f"{len(pairs)} preference pairs; at least 8 are needed")
    run = Run("rm", config, device)

    # ---- 2. rows of ids, their gold scores where known, and batches ----
    texts = Texts(tokenizer, block_size)
    for pair in pairs:
        texts.of_pair(pair)
    if texts.cut:
        print(f"{texts.cut} of {len(texts.rows)} texts were cut to the model's {block_size} tokens "
              "(prompts from the left, then answers from the right)")
    golds = None
    if all(reviews.dish_of(pair.prompt) for pair in pairs):
        golds = np.array([reviews.gold(prompt, answer) for prompt, answer, _ in texts.index])  # in the order of texts.rows
    write_jsonl(pairs_file, [pair.row() | ({} if golds is None else {"gold": golds[texts.of_pair(pair)].tolist()})
                             for pair in pairs])
    train_pairs, held_out = data.split_pairs(pairs)
    batches = make_batches(train_pairs, config.batch_size, config.epochs, config.seed)
    print(f"{len(train_pairs)} pairs to train on, {len(held_out)} held out, {len(texts.rows)} texts, {device}")

    # ---- 3. train ----
    torch.manual_seed(config.seed)
    model = RewardModel.from_lm(lm).to(device)
    if run.checkpoint:
        model.load_state_dict(run.checkpoint["model"])
    forward = torch.compile(model, dynamic=True) if config.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, eps=1e-5, fused=True)

    def save(step):
        run.save(step, lm.shape, tokenizer, [optimizer], model=model.state_dict())

    first = run.restore([optimizer])
    if first == 0:
        save(0)
    run.catch_interrupts()
    bar = tqdm(range(first, len(batches)), initial=first, total=len(batches), desc="rm", mininterval=0.5)
    for step in bar:
        optimizer.param_groups[0]["lr"] = lr = learning_rate(config.lr, step, len(batches), config.warmup)
        batch = batches[step]
        numbers = torch.tensor([texts.of_pair(pair) for pair in batch])  # (N, 2): row numbers of chosen and rejected
        unique, places = numbers.unique(return_inverse=True)  # each text runs once, however many pairs it is in
        scores = score_texts(forward, [texts.rows[i] for i in unique.tolist()], config.dtype, part=32)  # (texts,)
        chosen, rejected = scores[places.to(device)].unbind(1)  # (N,) each
        margin = torch.tensor([pair.margin for pair in batch], device=device)
        tie = torch.tensor([pair.tie for pair in batch], device=device)
        loss = losses.pair_loss(chosen, rejected, margin, tie).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        run.check_finite(step, loss=loss.item(), gradient=norm.item())
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        accuracy = ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()
        bar.set_postfix_str(f"loss {loss.item():.3f}, accuracy {accuracy:.2f}", refresh=False)
        run.log(step=done, lr=lr, loss=loss.item(), train_accuracy=accuracy)
        if done % config.save_every == 0 or run.interrupted:
            save(done)
        run.stop_if_interrupted("train_rm.py")

    # ---- 4. gain and bias: scores of reference samples get mean 0 and standard deviation 1 ----
    rows, _ = data.encode_prompts(tokenizer, [prompts[i] for i in data.order(len(prompts), 0, 0, 1024)], room)
    generator = torch.Generator(device).manual_seed(config.seed)
    rollout = generate(lm, rows, config.max_new_tokens, tokenizer.eos, generator=generator)
    samples = [prompt + answer[mask].tolist()
               for prompt, answer, mask in zip(rows, rollout.answers.cpu(), rollout.mask.cpu())]
    with torch.no_grad():
        gain, bias = losses.calibration(score_texts(model, samples, config.dtype))
        model.gain.copy_(gain)
        model.bias.copy_(bias)
        scores = score_texts(model, texts.rows, config.dtype).cpu().numpy()
    save(len(batches))

    # ---- 5. held-out figures, from the score difference before gain and bias ----
    scored = [pair for pair in held_out if not pair.tie]
    numbers = np.array([texts.of_pair(pair) for pair in scored], dtype=int).reshape(-1, 2)
    figures = evaluate(scores[numbers[:, 0]] - scores[numbers[:, 1]], None if golds is None else golds[numbers])
    write_json(run.folder / "eval.json", figures)
    run.log_samples([{"step": len(batches), "prompt": pair.prompt, "response": text,
                      "score": float(model.gain.cpu() * scores[number] + model.bias.cpu())}
                     for pair, row in zip(scored[:8], numbers) for text, number in zip((pair.chosen, pair.rejected), row)])
    print("held-out: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items() if value is not None))
    return model


def main():
    config = parse(Config, __doc__, saved_config=saved_config("rm"))
    refuse_inputs_in_out_dir(config, "lm", "policy", "prefs", "prompts")
    device = pick_device(config.device)
    lm, tokenizer = load_lm(config.lm, device)
    policy = None
    if config.policy:
        policy, policy_tokenizer = load_lm(config.policy, device)
        if policy_tokenizer.state() != tokenizer.state():
            raise UserError(f"--policy {config.policy} has another tokenizer than --lm {config.lm}")
    train(config, lm, tokenizer, policy)
    print(f"saved in {config.out_dir}; next: python train_ppo.py")


if __name__ == "__main__":
    command(main)
