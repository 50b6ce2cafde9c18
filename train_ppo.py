"""Stage 3: fine-tune the language model with PPO against the reward model, on a KL leash to itself.

    python train_ppo.py                                     # runs/lm against runs/rm
    python train_ppo.py --reward my_rewards:creative        # against any Python function
    python train_ppo.py --explain                           # one step, one answer, token by token

Four roles. *policy*: trained, starts as the language model. *reference*: the language model,
frozen. *reward model*: frozen, judges whole answers. *value head*: trained, on the policy's trunk,
predicts the return from every token on. The six numbered steps of the loop below:

    1 sample answers   2 score them   3 log-probs under policy and reference, values
    4 reward = score at the last token - β KL per token   5 GAE   6 clipped policy + value epochs

Writes runs/ppo. Afterwards: python -m minirlhf.generate --run runs/ppo --compare runs/lm
"""

import copy
import importlib
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minirlhf import data, losses, reviews
from minirlhf.config import UserError, command, option, parse
from minirlhf.doctor import Doctor
from minirlhf.generate import columns, generate, generate_all
from minirlhf.graphs import Decoder
from minirlhf.logprobs import PATHS, cross_entropy, token_logprobs, token_stats
from minirlhf.model import ScalarHead
from minirlhf.run import (Run, autocast, check_machine, learning_rate, lm_corpus, lm_prompts, load_lm, load_reward_model,
                          pick_device, refuse_inputs_in_out_dir, saved_config, write_json)


@dataclass
class Config:
    # files
    lm: str = option("runs/lm", "language-model run: policy at the start, and frozen reference")
    rm: str = option("runs/rm", "reward-model run")
    out_dir: str = option("runs/ppo", "run folder to write")
    prompts: str = option("", "prompts to answer (.jsonl or .txt); default: those of the reward model's pairs")
    prompt_words: int = option(4, "words of a text that make its prompt, where the text has none", low=1)
    reward: str = option("rm", "what to maximise: rm, gold (built-in world) or MODULE:FUNCTION")
    # rollouts
    max_steps: int = option(60, "rollouts", low=1)
    batch_size: int = option(256, "answers per rollout", low=1)
    max_new_tokens: int = option(48, "longest answer, in tokens", low=1)
    temperature: float = option(1.0, "of the softmax, in sampling and in every log-prob", low=0.01)
    missing_eos_penalty: float = option(1.0, "taken off the score of an answer that did not end by itself", low=0)
    samples_per_prompt: int = option(1, "answers to each prompt of a rollout; rloo and grpo compare them", low=1)
    # reward
    kl_coef: float = option(0.05, "β, price of a nat of KL to the reference", low=0)
    kl_start: float = option(0.0, "β starts here and falls to kl_coef over four fifths of the run; 0: it does not", low=0)
    kl_in: str = option("reward", "where the KL is paid: in each token's reward, or in the loss", choices=("reward", "loss"))
    kl_estimator: str = option("k2", "of the KL in the loss: k2 has KL(policy || reference)'s gradient, k3 the other "
                               "direction's", choices=("k2", "k3"))
    kl_target: float = option(0.0, "steer β so that KL ends here, nats per answer; 0: β stays fixed", low=0)
    kl_horizon: float = option(1000.0, "episodes over which β may change by a fifth", low=1)
    # PPO
    advantage: str = option("gae", "how an answer is compared: gae with the value head, reinforce with the batch's mean, "
                            "rloo with the other answers to the prompt, grpo with those in units of their spread",
                            choices=("gae", "reinforce", "rloo", "grpo"))
    grpo_std: bool = option(True, "grpo: divide by the group's standard deviation")
    ppo_epochs: int = option(2, "passes over each rollout", low=1)
    stop_kl: float = option(math.inf, "end a rollout's epochs once one moved the policy this far, nats per token", low=0)
    minibatch_size: int = option(64, "answers per optimizer step", low=1)
    microbatch_size: int = option(32, "answers per forward and backward: less needs less memory and changes nothing else",
                                  low=1)
    lr: float = option(6e-4, "learning rate of Adam, falling linearly to 0", low=0)
    muon_lr: float = option(0.0, "learning rate of Muon for the blocks' matrices; 0: Adam for them too", low=0)
    gamma: float = option(1.0, "discount per token", low=0, high=1)
    lam: float = option(0.95, "λ of GAE", low=0, high=1)
    clip: float = option(0.2, "ε of the policy's clip", low=0)
    value_clip: float = option(0.2, "how far a value may move in a rollout's update", low=0)
    vf_coef: float = option(0.1, "weight of the value loss", low=0)
    value: str = option("shared", "the value head sits on the policy's trunk, or on a copy of its own that starts as "
                        "the language model or as the reward model", choices=("shared", "lm", "rm"))
    ptx_coef: float = option(0.0, "weight of the next-token loss on the language model's text (PPO-ptx)", low=0)
    grad_clip: float = option(1.0, "largest gradient norm", low=0)
    # log
    eval_every: int = option(0, "rollouts between evaluations; 0: only at the end", low=0)
    eval_answers: int = option(1024, "answers per evaluation, on held-out prompts", low=2)
    sample_every: int = option(20, "rollouts between entries in samples.jsonl", low=1)
    save_every: int = option(20, "rollouts between checkpoints", low=1)
    explain: bool = option(False, "one step, one answer token by token, nothing written; --resume: a trained one")
    # machine
    seed: int = option(1, "seed of the samples, the order of prompts and the minibatches", low=0)
    device: str = option("auto", "cpu, cuda, mps or auto")
    dtype: str = option("float32", "bfloat16: autocast", choices=("float32", "bfloat16"))
    compile: bool = option(False, "run forwards through torch.compile, and on CUDA the sampler as one graph")
    logprobs: str = option("auto", "how log-probs are formed from hidden states, see minirlhf/logprobs.py", choices=PATHS)
    resume: bool = option(False, "go on from out_dir's checkpoint, with its options")


# ---- rewards ---------------------------------------------------------------------------------


def load_reward_function(name):
    """The function that `MODULE:FUNCTION` names, looked for in the current folder first."""
    module_name, _, function_name = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise UserError(f"--reward {name}: cannot be loaded ({type(error).__name__}: {error}); "
                        "name a module in this folder and a function in it, MODULE:FUNCTION") from None
    if not callable(function):
        raise UserError(f"--reward {name}: is not a function")
    return function


def call_reward_function(function, name, prompts, responses):
    """function(prompts, responses), checked: one finite number for each response; fp32 (B,)."""
    try:
        scores = function(list(prompts), list(responses))
        if isinstance(scores, str):
            raise TypeError("it returned a string, not a list of numbers")
        scores = [float(score) for score in scores]
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--reward {name} failed: {type(error).__name__}: {error}") from None
    if len(scores) != len(responses):
        raise UserError(f"--reward {name} returned {len(scores)} scores for {len(responses)} responses")
    for response, score in zip(responses, scores):
        if not math.isfinite(score):
            raise UserError(f"--reward {name} returned {score} for {response[:60]!r}; a finite number is needed")
    return torch.tensor(scores)


def gold_reward(prompts, responses):
    return [reviews.gold(prompt, response) for prompt, response in zip(prompts, responses)]


# ---- evaluation and display ------------------------------------------------------------------


@torch.no_grad()
def evaluate(config, policy, reference, score_rollout, tokenizer, prompts, prompt_ids, gold_known):
    """(figures of eval.json, texts, shown): policy and reference answer the same held-out prompts.

    texts: {"policy": [...], "reference": [...]}, an answer to each of `prompts`; shown: the same
    keys, its gold score, or where gold is not known its score.
    """
    device = policy.head_weight.device
    figures, texts, per_answer = {}, {}, {}
    for name, model, seed in (("reference", reference, 1), ("policy", policy, 2)):
        generator = torch.Generator(device).manual_seed(seed)
        scores, lengths, finished, kl, texts[name] = [], [], [], [], []
        for rollout in generate_all(model, prompt_ids, config.max_new_tokens, tokenizer.eos, config.temperature,
                                    generator, batch_size=512):
            some = prompts[len(texts[name]): len(texts[name]) + len(rollout.mask)]
            responses = rollout.texts(tokenizer)
            texts[name] += responses
            scores.append(score_rollout(rollout, some, responses))
            lengths.append(rollout.mask.sum(1).float().cpu())
            finished.append(rollout.finished.float().cpu())
            if name == "policy":
                with autocast(device, config.dtype):
                    log_ratio = (answer_logprobs(policy, rollout, config.temperature, rollout.states)
                                 - answer_logprobs(reference, rollout, config.temperature))
                kl.append(log_ratio.sum(1).cpu())
        per_answer[name] = {"score": torch.cat(scores).cpu()}
        if gold_known:
            per_answer[name]["gold"] = torch.tensor(gold_reward(prompts, texts[name]))
        figures[name] = {key: value.mean().item() for key, value in per_answer[name].items()}
        if gold_known:
            figures[name]["gold_std"] = per_answer[name]["gold"].std(correction=0).item()
        figures[name] |= {"length": torch.cat(lengths).mean().item(), "eos_rate": torch.cat(finished).mean().item()}
    figures["kl"] = torch.cat(kl).mean().item()
    for key in per_answer["policy"]:
        difference = per_answer["policy"][key] - per_answer["reference"][key]
        wins = (difference > 0).float() + 0.5 * (difference == 0).float()  # ties half
        figures[f"win_rate_{key}"] = wins.mean().item()
        figures[f"win_rate_{key}_se"] = wins.std(correction=0).item() / math.sqrt(len(wins))
    figures["n"] = len(prompts)
    return figures, texts, {name: columns[key].tolist() for name, columns in per_answer.items()}


def answer_logprobs(model, rollout, temperature, hidden=None, path="auto"):
    """Log-probs of the answers' tokens under a model (B, A). hidden: its states, where they are known (B, A, C)."""
    hidden = rollout.hidden(model) if hidden is None else hidden
    return token_logprobs(hidden, model.head_weight, rollout.answers, rollout.mask, temperature, path)


def print_comparison(prompts, texts, scores):
    """Three held-out prompts, before and after, side by side."""
    print("\n" + columns(["before (reference)", "after (policy)"]))
    for i in range(min(3, len(prompts))):
        print("\n" + prompts[i])
        print(columns([f"{texts[name][i].strip()} [{scores[name][i]:+.1f}]" for name in ("reference", "policy")]))
    print()


def print_explanation(tokens, prompt, score, finished, config, kl_coef, step_columns):
    """One answer token by token; step_columns: {(number of the step, name): list of floats}."""
    print(f"\nprompt    {prompt}\nanswer    {''.join(tokens).strip()}")
    penalty = 0.0 if finished else config.missing_eos_penalty
    note = "" if finished else f", minus {penalty} for the missing eos"
    print(f"score     {score:+.3f} (step 2){note};  β = {kl_coef:.4g}\n")
    width = max(9, *map(len, tokens)) + 1
    print("step".ljust(width) + "".join(f"{number:>11}" for number, _ in step_columns))
    print("token".ljust(width) + "".join(f"{name:>11}" for _, name in step_columns))
    for t, token in enumerate(tokens):
        print(token.ljust(width) + "".join(f"{values[t] + 0.0:>+11.4f}" for values in step_columns.values()))
    print("\n4: reward = score on the last token (less the penalty) - β KL.   5: return = advantage + value; what the"
          "\npolicy is trained on is the advantage whitened over the rollout.   6: the log-prob after this step's update.\n")


def display_tokens(tokenizer, ids):
    return ["<eos>" if i == tokenizer.eos else tokenizer.decode([i]) for i in ids]


# ---- the stage -------------------------------------------------------------------------------


def choose_prompts(config):
    """--prompts, else those of the reward model's pairs, else those of the language model's text."""
    if config.prompts:
        return data.read_prompts(config.prompts, config.prompt_words)
    prompts = []
    if config.reward == "rm":
        pairs, _ = data.read_pairs([Path(config.rm) / "pairs.jsonl"])
        prompts = list(dict.fromkeys(pair.prompt for pair in pairs if pair.prompt))
    return prompts or lm_prompts(config.lm, config.prompt_words)


def check_options(config):
    """One line for each combination that cannot mean anything."""
    for divisor in ("minibatch_size", "samples_per_prompt"):
        if config.batch_size % getattr(config, divisor):
            raise UserError(f"--batch_size {config.batch_size} must be divisible by --{divisor} {getattr(config, divisor)}")
    if config.advantage in ("rloo", "grpo") and config.samples_per_prompt < 2:
        raise UserError(f"--advantage {config.advantage} compares answers to the same prompt: "
                        "it needs --samples_per_prompt 2 or more")
    if not config.grpo_std and config.advantage != "grpo":
        raise UserError(f"--no-grpo_std means nothing with --advantage {config.advantage}; add --advantage grpo")
    if config.kl_in == "reward" and config.kl_estimator != "k2":
        raise UserError(f"--kl_estimator {config.kl_estimator} is for --kl_in loss; in the reward only k1 is right")
    if config.kl_target and not config.kl_coef:
        raise UserError("--kl_target cannot steer --kl_coef 0, which stays 0 whatever it is multiplied by; start from 0.05")
    if config.kl_target and config.kl_start:
        raise UserError("--kl_target and --kl_start both steer β; leave one of them out")
    if config.kl_start and not config.kl_coef:
        raise UserError("--kl_start falls by a constant factor a step and never reaches --kl_coef 0; name a small one")
    if config.value != "shared" and config.advantage != "gae":
        raise UserError(f"--value {config.value} is for --advantage gae; {config.advantage} has no value function")
    if config.value == "rm" and config.reward != "rm":
        raise UserError(f"--value rm needs the reward model, which --reward {config.reward} does not read; use --value lm")
    if config.stop_kl == 0:
        raise UserError("--stop_kl 0 would end every rollout's update at once; name a KL such as 0.02, or leave it out")


def train(config, policy, reward_model, tokenizer, reward_fn=None):
    """The whole of PPO; returns (policy, value head).

    policy: GPT, trained in place; the reference is a frozen copy of it. reward_model: RewardModel,
    not read where reward_fn, a function (prompts, responses) -> list of floats, takes its place.
    """
    check_options(config)
    room = data.prompt_room(policy.shape.block_size, config.max_new_tokens, config.lm)
    if reward_fn is None and reward_model.trunk.shape.block_size < policy.shape.block_size:
        raise UserError(f"--rm {config.rm} reads {reward_model.trunk.shape.block_size} tokens, fewer than the "
                        f"{policy.shape.block_size} of --lm {config.lm}")

    # ---- setup ----
    device = policy.head_weight.device
    check_machine(config, device)
    prompts = choose_prompts(config)
    train_prompts, held_out = data.split(prompts, key=str)
    held_out = held_out or train_prompts
    held_out = [held_out[i % len(held_out)] for i in range(config.eval_answers)]
    train_ids, cut = data.encode_prompts(tokenizer, train_prompts, room)
    held_out_ids, _ = data.encode_prompts(tokenizer, held_out, room)
    if cut:
        print(f"{cut} of {len(train_prompts)} prompts were cut from the left to leave room for "
              f"{config.max_new_tokens} new tokens")
    gold_known = all(reviews.dish_of(prompt) for prompt in prompts)
    if reward_fn is not None:  # find out whether it works before an earlier run's files are replaced
        generator = torch.Generator(device).manual_seed(0)
        probe = generate(policy, train_ids[:2], config.max_new_tokens, tokenizer.eos, generator=generator)
        call_reward_function(reward_fn, config.reward, train_prompts[:2], probe.texts(tokenizer))

    run = Run("ppo", config, device, write=not config.explain)
    reference = copy.deepcopy(policy).requires_grad_(False)
    value_head = ScalarHead(policy.shape.n_embd, std=0.0).to(device)  # starts at 0: no opinion yet
    value_trunk = None  # the policy's own
    if config.value == "lm":
        value_trunk = copy.deepcopy(policy)
    elif config.value == "rm":  # Stiennon et al. 2020: the value function starts as the reward model
        value_trunk = copy.deepcopy(reward_model.trunk).requires_grad_(True)
        value_head = reward_model.normalised_head().requires_grad_(True)
    kl_coef = config.kl_coef
    if run.checkpoint:
        policy.load_state_dict(run.checkpoint["model"])
        value_head.load_state_dict(run.checkpoint["value_head"])
        if value_trunk is not None:
            value_trunk.load_state_dict(run.checkpoint["value_trunk"])
        kl_coef = run.checkpoint["kl_coef"]
    forward, value_forward, decoder = policy, value_trunk, None
    if config.compile:
        forward = torch.compile(policy, dynamic=True)
        value_forward = value_trunk and torch.compile(value_trunk, dynamic=True)
        if device.type == "cuda":
            decoder = Decoder(policy, config.batch_size, max(map(len, train_ids)) + config.max_new_tokens,
                              torch.bfloat16 if config.dtype == "bfloat16" else torch.float32)
    trained = nn.ModuleList([policy, value_head] if value_trunk is None else [policy, value_head, value_trunk])
    matrices, others = [], []
    for name, parameter in trained.named_parameters():
        (matrices if config.muon_lr and ".blocks." in name and parameter.dim() == 2 else others).append(parameter)
    optimizers = [torch.optim.Adam(others, lr=config.lr, eps=1e-5, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=config.muon_lr, weight_decay=0.0))
    if config.ptx_coef:
        windows = data.Windows(lm_corpus(config.lm), tokenizer, policy.shape.block_size)
    print(f"{len(train_prompts)} prompts to train on, {len(set(held_out))} held out, reward {config.reward}, {device}")

    def score_rollout(rollout, prompts, responses):
        """Scores (B,): the reward model reads the sampled ids themselves, a function reads texts."""
        if reward_fn is not None:
            return call_reward_function(reward_fn, config.reward, prompts, responses).to(device)
        with torch.no_grad(), autocast(device, config.dtype):
            return reward_model.score(rollout.ids, rollout.last, rollout.start)

    def save(step):
        run.save(step, policy.shape, tokenizer, optimizers, model=policy.state_dict(), value_head=value_head.state_dict(),
                 value_trunk=value_trunk and value_trunk.state_dict(), kl_coef=kl_coef)

    # ---- loop ----
    first = run.restore(optimizers)
    if config.explain:  # one step, wherever the checkpoint stands
        first = min(first, config.max_steps - 1)
    elif first == 0:
        save(0)
    run.catch_interrupts()
    eval_args = (config, policy, reference, score_rollout, tokenizer, held_out, held_out_ids, gold_known)
    doctor = Doctor(config.dtype)
    bar = tqdm(range(first, config.max_steps), initial=first, total=config.max_steps, desc="ppo", mininterval=0.5)
    for step in bar:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = learning_rate(optimizer.defaults["lr"], step, config.max_steps)
        if config.kl_start:
            kl_coef = losses.annealed_kl_coef(config.kl_start, config.kl_coef, step / config.max_steps)

        # ---- 1. sample answers: B of them, at most A tokens long ----
        num_prompts = config.batch_size // config.samples_per_prompt
        chosen = data.order(len(train_ids), config.seed, step * num_prompts, num_prompts)
        show = step % config.sample_every == 0 or step == config.max_steps - 1
        if show:  # the same first prompts each time, so that samples.jsonl shows what changed
            chosen[:4] = data.order(len(train_ids), config.seed, 0, 4)[: len(chosen)]
        chosen = chosen.repeat(config.samples_per_prompt)  # answers to one prompt stand together
        batch_prompts = [train_prompts[i] for i in chosen]
        batch_ids = [train_ids[i] for i in chosen]
        with autocast(device, config.dtype):
            rollout = generate(policy, batch_ids, config.max_new_tokens, tokenizer.eos, config.temperature, decoder=decoder)
        mask = rollout.mask  # (B, A)
        responses = rollout.texts(tokenizer)

        # ---- 2. score them; an answer that did not end by itself pays a penalty ----
        scores = score_rollout(rollout, batch_prompts, responses)  # (B,)
        golds = gold_reward(batch_prompts, responses) if gold_known else None
        penalties = config.missing_eos_penalty * ~rollout.finished
        if reward_fn is not None and step == 0 and config.advantage == "gae":
            # A function's scores have any mean, a reward model's have mean 0. Until the value head had learned that
            # mean, GAE with λ < 1 would take it for a reason to end early.
            nn.init.constant_(value_head.linear.bias, (scores - penalties).mean().item())

        # ---- 3. log-probs under policy and reference, values: those of token t come from position t - 1 ----
        with torch.no_grad(), autocast(device, config.dtype):
            hidden, sampler_gap = rollout.states, None  # (B, A, C)
            if config.dtype == "bfloat16":  # one token at a time rounds differently: score with the forward of step 6
                sampled_logprobs = answer_logprobs(policy, rollout, config.temperature, hidden, config.logprobs)
                hidden = rollout.hidden(forward)
            old_logprobs, entropy, spread = token_stats(hidden, policy.head_weight, rollout.answers, mask,
                                                        config.temperature, config.logprobs)  # (B, A) each
            if config.dtype == "bfloat16":
                sampler_gap = losses.masked_mean((sampled_logprobs - old_logprobs).abs(), mask).item()
            if value_trunk is not None:
                hidden = rollout.hidden(value_forward)
            old_values = value_head(hidden).masked_fill(~mask, 0.0)  # (B, A)
            ref_logprobs = answer_logprobs(reference, rollout, config.temperature, path=config.logprobs)

        # ---- 4. reward = score at the last token - β KL per token ----
        k1, k3 = losses.kl_estimates(old_logprobs, ref_logprobs)  # (B, A) each, 0 behind the mask
        coef = kl_coef if config.kl_in == "reward" else 0.0
        rewards = losses.shaped_rewards(scores - penalties, old_logprobs, ref_logprobs, mask, coef)  # (B, A)

        # ---- 5. advantages and returns; whitening comes after the returns ----
        group, returns = config.samples_per_prompt, None
        if config.advantage == "gae":
            advantages, returns = losses.gae(rewards, old_values, mask, config.gamma, config.lam)  # (B, A) each
        elif config.advantage == "reinforce":
            advantages = losses.reward_to_go(rewards, mask, config.gamma)
        elif config.advantage == "rloo":
            advantages = losses.leave_one_out(rewards, mask, group)
        else:
            advantages = losses.group_relative(rewards, mask, group, config.grpo_std)
        whiten = config.advantage in ("gae", "reinforce") and config.kl_in == "reward"  # else β would change its meaning
        whitened = losses.whiten(advantages, mask) if whiten else advantages

        # ---- 6. epochs of clipped policy and value updates on shuffled minibatches ----
        num_minibatches = config.batch_size // config.minibatch_size
        ptx_step = step * config.ppo_epochs * num_minibatches  # of the text's batches
        tokens_per_minibatch = mask.sum() / num_minibatches  # short minibatches get no extra weight
        lengths = mask.sum(1)  # (B,)
        sums = torch.zeros(4, device=device)  # policy loss, value loss, approx_kl, clip_frac, over all tokens
        ratio_first = None
        for epoch in range(config.ppo_epochs):
            approx_kl_before = sums[2].item()
            for minibatch in torch.randperm(config.batch_size).to(device).split(config.minibatch_size):
                # By length, so that little of a part is padding; the parts' gradients add up to the minibatch's.
                minibatch, largest = minibatch[lengths[minibatch].argsort()], torch.zeros((), device=device)
                for rows in minibatch.split(config.microbatch_size):
                    part = rollout.rows(rows)
                    part_mask = part.mask  # (rows, A'), A' the longest answer of these rows
                    A = part_mask.size(1)
                    with autocast(device, config.dtype):
                        hidden = part.hidden(forward)
                        new_logprobs = answer_logprobs(policy, part, config.temperature, hidden, config.logprobs)
                        if value_trunk is not None:
                            hidden = part.hidden(value_forward)
                        new_values = value_head(hidden)
                    old = old_logprobs[rows, :A]
                    policy_loss = losses.policy_loss(new_logprobs, old, whitened[rows, :A], config.clip)
                    policy_loss = losses.masked_sum(policy_loss, part_mask)
                    loss, value_loss = policy_loss, torch.zeros((), device=device)
                    if returns is not None:
                        value_loss = losses.value_loss(new_values, old_values[rows, :A], returns[rows, :A], config.value_clip)
                        value_loss = losses.masked_sum(value_loss, part_mask)
                        loss = loss + config.vf_coef * value_loss
                    if config.kl_in == "loss":
                        kl_loss = losses.kl_loss(new_logprobs, ref_logprobs[rows, :A], part_mask, config.kl_estimator)
                        loss = loss + kl_coef * kl_loss.sum()
                    loss = loss / tokens_per_minibatch
                    loss.backward()
                    with torch.no_grad():
                        _, approx_kl = losses.kl_estimates(old, new_logprobs)
                        outside = ((new_logprobs - old).exp() - 1).abs()
                        largest = torch.maximum(largest, outside.masked_fill(~part_mask, 0.0).max())
                        clipped = (outside > config.clip).float()
                        sums += torch.stack([policy_loss, value_loss, losses.masked_sum(approx_kl, part_mask),
                                             losses.masked_sum(clipped, part_mask)])
                if config.ptx_coef:
                    inputs, targets = windows.batch(config.seed, ptx_step, config.minibatch_size)  # (rows, T) each
                    ptx_step += 1
                    with autocast(device, config.dtype):
                        ptx_loss = cross_entropy(forward(inputs.to(device)), policy.head_weight, targets.to(device),
                                                 path=config.logprobs)
                    (config.ptx_coef * ptx_loss).backward()
                norm = nn.utils.clip_grad_norm_(trained.parameters(), config.grad_clip)
                run.check_finite(step, loss=loss.item(), gradient=norm.item())
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                ratio_first = largest.item() if ratio_first is None else ratio_first
            if (sums[2].item() - approx_kl_before) / lengths.sum().item() > config.stop_kl:
                break

        # ---- log ----
        done = step + 1
        policy_loss, value_loss, approx_kl, clip_frac = (sums / ((epoch + 1) * mask.sum())).tolist()
        explained_variance = None
        if returns is None:
            value_loss = None
        else:
            unexplained = losses.masked_var(returns - old_values, mask) / losses.masked_var(returns, mask)
            explained_variance = 1 - unexplained.item()
        kl = k1.sum(1).mean().item()
        row = {
            "step": done, "episodes": done * config.batch_size, "lr": optimizers[0].param_groups[0]["lr"],
            "score": scores.mean().item(), "reward": (scores - penalties).mean().item() - kl_coef * kl,
            "kl": kl, "kl_k3": k3.sum(1).mean().item(), "kl_coef": kl_coef,
            "entropy": losses.masked_mean(entropy, mask).item(), "sampler_gap": sampler_gap, "ratio_first": ratio_first,
            "approx_kl": approx_kl,
            "clip_frac": clip_frac, "policy_loss": policy_loss, "value_loss": value_loss,
            "explained_variance": explained_variance, "length": mask.sum(1).float().mean().item(),
            "eos_rate": rollout.finished.float().mean().item(),
            "sampling_z": losses.sampling_z(old_logprobs, entropy, spread, mask).item(),
            "kl_se": k1.sum(1).std(correction=0).item() / math.sqrt(len(k1) - 1) if len(k1) > 1 else None,
            "score_std": scores.std(correction=0).item() if len(scores) > 1 else None,
        }
        if golds:
            row["gold"] = sum(golds) / len(golds)
        gold_figure = f", gold {row['gold']:+.2f}" if golds else ""
        bar.set_postfix_str(f"score {row['score']:+.2f}, kl {kl:.2f}{gold_figure}", refresh=False)
        if config.explain:
            with torch.no_grad():
                new_logprobs = answer_logprobs(policy, rollout, config.temperature)
            n = int(mask[0].sum())
            numbers = {
                (3, "log-prob"): old_logprobs, (3, "reference"): ref_logprobs, (3, "value"): old_values,
                (4, "KL"): k1, (4, "reward"): rewards, (5, "advantage"): advantages, (5, "return"): returns,
                (6, "new"): new_logprobs,
            }
            numbers = {key: x for key, x in numbers.items() if x is not None}
            tokens = display_tokens(tokenizer, rollout.answers[0, :n].tolist())
            numbers = {key: x[0, :n].tolist() for key, x in numbers.items()}
            bar.close()
            finished = bool(rollout.finished[0])
            print_explanation(tokens, batch_prompts[0], scores[0].item(), finished, config, kl_coef, numbers)
            return policy, value_head
        if show:
            per_token = {"logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "values": old_values,
                         "advantages": advantages, "rewards": rewards}
            run.log_samples([{
                "step": done, "prompt": batch_prompts[i], "response": responses[i], "score": scores[i].item(),
                "gold": golds[i] if golds else None, "ids": (ids := rollout.answers[i][mask[i]].tolist()),
                "tokens": display_tokens(tokenizer, ids),
                **{key: x[i][mask[i]].tolist() for key, x in per_token.items()},
            } for i in range(min(4, len(chosen)))])
        if config.kl_target:
            kl_coef = losses.next_kl_coef(kl_coef, kl, config.kl_target, config.batch_size, config.kl_horizon)
        if config.eval_every and done % config.eval_every == 0 and done < config.max_steps:
            row["eval"] = evaluate(*eval_args)[0]
        run.log(**row)
        for line in doctor.look(row):
            tqdm.write(line)
        if done % config.save_every == 0 or done == config.max_steps or run.interrupted:
            save(done)
        run.stop_if_interrupted("train_ppo.py")

    # ---- finish: held-out prompts, reference against policy ----
    figures, texts, shown = evaluate(*eval_args)
    write_json(run.folder / "eval.json", figures)
    key = "gold" if gold_known else "score"
    print_comparison(held_out, texts, shown)
    for name in ("reference", "policy"):
        print(f"{name:>10}: " + ", ".join(f"{k} {v:.2f}" for k, v in figures[name].items()))
    print(f"{'kl':>10}: {figures['kl']:.2f} nats per answer;  "
          f"policy wins {100 * figures[f'win_rate_{key}']:.1f} % by {key}, on {figures['n']} answers to held-out prompts")
    return policy, value_head


def main():
    config = parse(Config, __doc__, saved_config=saved_config("ppo"))
    refuse_inputs_in_out_dir(config, "lm", "prompts", *(["rm"] if config.reward == "rm" else []))
    device = pick_device(config.device)
    policy, tokenizer = load_lm(config.lm, device)
    reward_model = reward_fn = None
    if config.reward == "rm":
        reward_model, rm_tokenizer = load_reward_model(config.rm, device)
        if rm_tokenizer.state() != tokenizer.state():
            raise UserError(f"--rm {config.rm} has another tokenizer than --lm {config.lm}: "
                            "train the reward model on this language model")
    elif config.reward == "gold":
        reward_fn = gold_reward
    elif ":" in config.reward:
        reward_fn = load_reward_function(config.reward)
    else:
        raise UserError(f"--reward {config.reward}: must be rm, gold or MODULE:FUNCTION")
    train(config, policy, reward_model, tokenizer, reward_fn)
    if not config.explain:
        print(f"saved in {config.out_dir}; talk to it: "
              f"python -m minirlhf.generate --run {config.out_dir} --compare {config.lm}")


if __name__ == "__main__":
    command(main)
