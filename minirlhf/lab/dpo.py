"""Direct preference optimisation (Rafailov et al. 2023): a policy from preference pairs, no reward model, no sampling.

The best policy for a reward r is π_ref exp(r/β) / Z, so r = β log π/π_ref + β log Z, and Z cancels in a reward model's
loss: DPO is train_rm.py with β log π/π_ref of the answer for a score. Ties and margins are not used."""
import copy
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minirlhf import data, losses, reviews
from minirlhf.config import UserError, command, option, parse
from minirlhf.generate import Rollout
from minirlhf.run import Run, learning_rate, load_lm, pick_device, refuse_inputs_in_out_dir, write_json
from train_ppo import answer_logprobs, evaluate
from train_rm import Texts, make_batches


@dataclass
class Config:
    lm: str = option("runs/lm", "language-model run: policy at the start, and frozen reference")
    prefs: str = option("runs/rm/pairs.jsonl", "preference pairs to learn from (.jsonl)")
    out_dir: str = option("runs/dpo", "run folder to write")
    beta: float = option(0.5, "β, price of a nat of KL to the reference", low=1e-6)
    epochs: int = option(1, "passes over the pairs", low=1)
    lr: float = option(1e-4, "learning rate, falling linearly to 0", low=0)
    batch_size: int = option(64, "pairs per step; those of one prompt stay together", low=1)
    max_new_tokens: int = option(48, "longest answer in the evaluation, in tokens", low=1)
    seed: int = option(1, "seed of the order of the pairs", low=0)
    device: str = option("auto", "cpu, cuda, mps or auto")
    temperature, dtype, resume = 1.0, "float32", False  # fixed: what has no annotation is no option


def train(config, policy, pairs, tokenizer):
    """Train policy (GPT, in place) on all of `pairs` (list of data.Pair), write the run folder, return the policy."""
    batches = make_batches([pair for pair in pairs if not pair.tie], config.batch_size, config.epochs, config.seed)
    if not batches[0]:
        raise UserError(f"{config.prefs}: no pair is left to train on, ties and held-out pairs aside; add pairs")
    reference, room = copy.deepcopy(policy).requires_grad_(False), policy.shape.block_size - 1
    texts = Texts(tokenizer, room + 1)
    batches = [torch.tensor([texts.of_pair(pair) for pair in batch]) for batch in batches]  # (N, 2): chosen, rejected
    lengths = torch.tensor([min(len(tokenizer.encode(answer)) + done, room - min(len(tokenizer.encode(prompt)), room // 2))
                            for prompt, answer, done in texts.index])  # of the answers, as data.encode_answer cuts them
    run = Run("dpo", config, policy.head_weight.device)
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.lr, eps=1e-5, fused=True)
    for step, batch in enumerate(tqdm(batches, desc="dpo", mininterval=0.5)):
        optimizer.param_groups[0]["lr"] = lr = learning_rate(config.lr, step, len(batches))
        unique, places = batch.unique(return_inverse=True)  # each text runs once, however many pairs it is in
        ids, last = data.right_pad([texts.rows[i] for i in unique.tolist()])  # (texts, T + 1)
        to_go = last[:, None] - torch.arange(ids.size(1) - 1)  # (texts, T): tokens after slot t, which predicts id t + 1
        rows = Rollout(ids.to(run.device), None, ((to_go > 0) & (to_go <= lengths[unique, None])).to(run.device), None)
        new, ref = (answer_logprobs(model, rows, 1.0).sum(1)[places] for model in (policy, reference))  # (N, 2) each
        loss = losses.dpo_loss(*new.unbind(1), *ref.unbind(1), config.beta).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not norm.isfinite():
            raise UserError(f"loss {loss.item()}, gradient {norm.item()} at step {step}: the run stopped; lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        run.log(step=step + 1, lr=lr, loss=loss.item())
    run.save(len(batches), policy.shape, tokenizer, [optimizer], model=policy.state_dict())
    return policy


def main():
    config = parse(Config, __doc__)
    refuse_inputs_in_out_dir(config, "lm", "prefs")
    lm, tokenizer = load_lm(config.lm, pick_device(config.device))
    pairs, held_out = data.split_pairs(data.read_pairs([config.prefs])[0])
    prompts = (list(dict.fromkeys(pair.prompt for pair in held_out)) * 1024)[:1024]
    ids, _ = data.encode_prompts(tokenizer, prompts, data.prompt_room(lm.shape.block_size, config.max_new_tokens, config.lm))
    policy = train(config, copy.deepcopy(lm), pairs, tokenizer)
    figures, *_ = evaluate(config, policy, lm, lambda rollout, *_: config.beta * (answer_logprobs(policy, rollout, 1.0) -
        answer_logprobs(lm, rollout, 1.0)).sum(1), tokenizer, prompts, ids, all(map(reviews.dish_of, prompts)))
    write_json(f"{config.out_dir}/eval.json", figures)
    print(f"{figures}\nsaved in {config.out_dir}; score there is DPO's own reward, β log π/π_ref")


if __name__ == "__main__":
    command(main)
