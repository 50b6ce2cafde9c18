"""Invariants of train_ppo.train: each of them names a bug that has bitten other PPO code."""

import json
import re

import pytest
import torch

import train_ppo
from minirlhf import losses, reviews
from minirlhf.run import load_lm, load_reward_model


def rows_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture
def ppo(runs, tmp_path):
    """ppo(reward_fn=None, **options) -> (rows of metrics.jsonl, rows of samples.jsonl, policy, reference)."""

    def run(reward_fn=None, **options):
        options = dict(max_steps=2, batch_size=16, minibatch_size=8, max_new_tokens=40, eval_answers=8, device="cpu",
                       sample_every=1, save_every=1000) | options
        config = train_ppo.Config(lm=str(runs / "lm"), rm=str(runs / "rm"), out_dir=str(tmp_path / "ppo"), **options)
        policy, tokenizer = load_lm(config.lm, "cpu")
        reward_model, _ = load_reward_model(config.rm, "cpu")
        policy, _ = train_ppo.train(config, policy, reward_model, tokenizer, reward_fn)
        return rows_of(tmp_path / "ppo"), rows_of(tmp_path / "ppo", "samples.jsonl"), policy, load_lm(config.lm, "cpu")[0]

    return run


def test_before_the_first_update_policy_and_reference_are_one(ppo):
    rows, *_ = ppo(max_steps=3)
    assert abs(rows[0]["kl"]) < 1e-5 and rows[0]["kl_k3"] < 1e-9  # a token at a time or all at once: only rounding differs
    assert rows[-1]["kl_k3"] > 0
    assert all(row["ratio_first"] <= 1e-4 for row in rows)  # in every rollout, not only the first
    assert rows[0]["approx_kl"] > 0  # the update did move the policy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_without_learning_rate_nothing_moves(ppo, temperature):
    rows, _, policy, reference = ppo(lr=0.0, ppo_epochs=3, temperature=temperature)
    for row in rows:
        assert abs(row["kl"]) < 1e-5 and row["kl_k3"] < 1e-9 and row["clip_frac"] == 0.0
        assert row["ratio_first"] <= 1e-4 and row["approx_kl"] < 1e-8
    for new, old in zip(policy.parameters(), reference.parameters()):
        assert torch.equal(new, old)


def test_constant_reward_gives_no_reason_to_leave_the_reference(ppo):
    rows, *_ = ppo(lambda prompts, responses: [1.0] * len(prompts), max_steps=21, kl_coef=0.1, missing_eos_penalty=0.0)
    # All that is left is rounding, which whitening and Adam blow up until the KL holds it.
    assert abs(rows[-1]["kl"]) < 0.5 and rows[-1]["kl_k3"] < 0.5


def test_kl_with_a_large_price_stays_near_zero_and_without_one_grows(ppo):
    def shorter(prompts, responses):
        return [-len(response) / 50 for response in responses]

    def last_kl(kl_coef):
        return ppo(shorter, max_steps=12, lr=1e-3, batch_size=32, kl_coef=kl_coef)[0][-1]["kl"]

    # The wrong sign of the KL term would reward leaving the reference.
    assert last_kl(5.0) < 0.3 * last_kl(0.0)


def test_a_rewarded_answer_becomes_more_likely(ppo):
    def glad(prompts, responses):
        return [float(response.count("very") > 0) for response in responses]

    rows, *_ = ppo(glad, max_steps=12, lr=3e-3, kl_coef=0.0, batch_size=64, minibatch_size=32)
    assert rows[-1]["score"] > rows[0]["score"] + 0.2


def test_sample_rows_add_up(ppo):
    """Score on the last token, KL on all of them, eos a token like the others: recomputed from the file alone."""
    rows, samples, *_ = ppo(kl_coef=0.3, lr=3e-3, missing_eos_penalty=0.7, max_steps=3)
    finished = set()
    for row in samples:
        ended = row["tokens"][-1] == "<eos>"
        finished.add(ended)
        assert "<eos>" not in row["tokens"][:-1]
        if "\ufffd" not in row["response"]:  # a token may hold part of a character
            assert "".join(row["tokens"][: len(row["tokens"]) - ended]) == row["response"]
        log_ratio = [a - b for a, b in zip(row["logprobs"], row["ref_logprobs"])]
        expected = [-0.3 * x for x in log_ratio]
        expected[-1] += row["score"] - (0.0 if ended else 0.7)
        assert row["rewards"] == pytest.approx(expected, abs=1e-5)
        assert row["gold"] == reviews.gold(row["prompt"], row["response"])
    assert True in finished
    first, last = ([row["prompt"] for row in samples if row["step"] == step] for step in (1, 3))
    assert first == last


def test_logged_advantages_are_gae_of_logged_rewards_and_values(ppo):
    _, samples, *_ = ppo(gamma=0.9, lam=0.6, lr=3e-3, max_steps=3)
    for row in samples:
        n = len(row["tokens"])
        values = row["values"] + [0.0]  # nothing is worth anything after the last token
        deltas = [row["rewards"][t] + 0.9 * values[t + 1] - values[t] for t in range(n)]
        expected = [sum(0.54 ** (k - t) * deltas[k] for k in range(t, n)) for t in range(n)]
        assert row["advantages"] == pytest.approx(expected, abs=1e-4)


def test_sample_logprobs_are_those_of_the_model_for_this_text(ppo, runs):
    """Recomputed without padding, cache or mask, from the ids in the file, at the run's temperature."""
    _, samples, *_ = ppo(temperature=0.7, max_steps=1)
    model, tokenizer = load_lm(runs / "lm", "cpu")
    for row in samples:
        prompt = [tokenizer.eos] + tokenizer.encode(row["prompt"])
        logits = model(torch.tensor([prompt + row["ids"]]))[0] @ model.head_weight.T
        logprobs = (logits / 0.7).log_softmax(-1)
        expected = [logprobs[len(prompt) - 1 + t, i].item() for t, i in enumerate(row["ids"])]
        assert row["logprobs"] == pytest.approx(expected, abs=1e-4)
        assert row["ref_logprobs"] == pytest.approx(expected, abs=1e-4)


def test_reward_model_score_is_that_of_the_text_alone(ppo, runs):
    _, samples, *_ = ppo(max_steps=2)
    reward_model, tokenizer = load_reward_model(runs / "rm", "cpu")
    for row in samples:
        ids = [tokenizer.eos] + tokenizer.encode(row["prompt"]) + row["ids"]
        hidden = reward_model.trunk(torch.tensor([ids]))[0, -1]
        raw = hidden @ reward_model.head.linear.weight[0] + reward_model.head.linear.bias[0]
        assert row["score"] == pytest.approx((reward_model.gain * raw + reward_model.bias).item(), abs=1e-4)


def test_reward_is_mean_score_less_penalties_and_kl(ppo):
    rows, *_ = ppo(lambda prompts, responses: [2.0] * len(prompts), kl_coef=0.5, missing_eos_penalty=0.7, lr=3e-3, max_steps=4)
    for row in rows:
        assert row["score"] == 2.0
        assert row["reward"] == pytest.approx(2.0 - 0.7 * (1 - row["eos_rate"]) - 0.5 * row["kl"], abs=1e-4)


def test_reward_function_gets_prompts_and_answers_in_order(ppo):
    seen = []

    def reward(prompts, responses):
        assert isinstance(prompts, list) and isinstance(responses, list)
        seen.extend(zip(prompts, responses))
        return [float(len(response)) for response in responses]

    _, samples, *_ = ppo(reward, max_steps=2)
    for row in samples:
        assert row["score"] == len(row["response"])
        assert (row["prompt"], row["response"]) in seen


def test_adaptive_controller_follows_the_logged_kl(ppo):
    rows, *_ = ppo(kl_target=0.05, kl_horizon=100.0, lr=3e-3, max_steps=5)
    for before, after in zip(rows, rows[1:]):
        error = max(-0.2, min(0.2, before["kl"] / 0.05 - 1))
        assert after["kl_coef"] == pytest.approx(before["kl_coef"] * (1 + error * 16 / 100))
    assert rows[-1]["kl_coef"] != rows[0]["kl_coef"]


def test_value_head_learns_to_expect_the_score(ppo):
    """Long answers score 1, others 0: while the policy stands still, later tokens must come to know it."""
    rows, *_ = ppo(lambda prompts, responses: [float(len(r.split()) > 12) for r in responses], max_steps=20, lr=1e-3,
                   kl_coef=1.0, batch_size=32, minibatch_size=8, ppo_epochs=4, vf_coef=1.0)
    assert rows[-1]["explained_variance"] > 0.05 > rows[0]["explained_variance"]


def test_returns_stay_in_reward_units(ppo, monkeypatch):
    """Returns are formed before whitening: without KL and with λ = γ = 1 they are the answer's score on every token."""
    seen, scores = [], []
    original = losses.value_loss

    def spy(new_values, old_values, returns, value_clip):
        seen.extend(returns[:, 0].tolist())
        return original(new_values, old_values, returns, value_clip)

    def reward(prompts, responses):
        lengths = [float(len(response)) for response in responses]
        if len(responses) == 16:  # the rollout; not the probe before it, nor the evaluation after it
            scores[:] = lengths
        return lengths

    monkeypatch.setattr(losses, "value_loss", spy)
    ppo(reward, max_steps=1, ppo_epochs=1, lam=1.0, kl_coef=0.0, missing_eos_penalty=0.0)
    assert sorted(seen) == pytest.approx(sorted(scores), rel=1e-4)


def test_samples_are_drawn_at_the_temperature_of_the_logprobs(ppo):
    """Near temperature 0 every drawn token is the likeliest one: drawn hotter, its log-prob would be far below 0."""
    _, samples, *_ = ppo(temperature=0.01, max_steps=1)
    assert min(min(row["logprobs"]) for row in samples) > -5


def test_policy_is_trained_on_whitened_advantages_without_gradient(ppo, monkeypatch):
    seen, masks = [], []
    policy_loss, whiten = losses.policy_loss, losses.whiten

    def spy(new_logprobs, old_logprobs, advantages, clip):
        assert new_logprobs.requires_grad and not old_logprobs.requires_grad and not advantages.requires_grad
        seen.append(advantages)
        return policy_loss(new_logprobs, old_logprobs, advantages, clip)

    def spy_whiten(x, mask, *rest):
        masks.append(mask)
        return whiten(x, mask, *rest)

    monkeypatch.setattr(losses, "policy_loss", spy)
    monkeypatch.setattr(losses, "whiten", spy_whiten)
    ppo(max_steps=1, ppo_epochs=1)
    values = torch.cat([x.flatten() for x in seen])
    n = int(masks[0].sum())  # whitening must see the mask: mean 0 and variance 1 over real tokens, 0 elsewhere
    assert n < masks[0].numel()
    assert values.sum().item() == pytest.approx(0, abs=1e-2)
    assert (values**2).sum().item() / n == pytest.approx(1, abs=1e-3)


def test_minibatches_add_up_to_the_rollout(ppo, monkeypatch):
    """A minibatch's loss is its masked sum / (tokens / number of minibatches): with lr 0 the mean of the
    minibatches' losses is the loss of the whole rollout, however long each minibatch's answers are."""
    totals = {}
    backward = torch.Tensor.backward

    def spy(self, *args, **kwargs):
        totals.setdefault(size, []).append(self.item())
        return backward(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", spy)
    for size in (16, 4):
        ppo(max_steps=1, ppo_epochs=1, lr=0.0, minibatch_size=size)
    assert len(totals[16]) == 1 and len(totals[4]) == 4
    assert sum(totals[4]) / 4 == pytest.approx(totals[16][0], rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"ptx_coef": 1.0}, {"kl_in": "loss", "value": "lm"}], ids=str)
def test_parts_of_a_minibatch_add_up_to_it(ppo, options):
    """Gradients of a minibatch taken in parts, by length, are those of the whole: the same policy but for rounding."""
    found = {}
    for size in (1, 3, 8):
        rows, _, policy, _ = ppo(max_steps=1, ppo_epochs=1, lr=1e-3, minibatch_size=8, microbatch_size=size, **options)
        found[size] = rows[0], torch.cat([p.flatten() for p in policy.parameters()])
    for size in (1, 3):
        torch.testing.assert_close(found[size][1], found[8][1], rtol=0, atol=1e-5)  # Adam's steps are 1e-3 and more
        for key in ("policy_loss", "value_loss", "approx_kl", "clip_frac", "ratio_first"):
            assert found[size][0][key] == pytest.approx(found[8][0][key], rel=1e-3, abs=1e-5)


def test_explain_prints_one_answer_and_writes_nothing(runs, cli, tmp_path):
    code, out, _ = cli(train_ppo, f"--explain --lm {runs}/lm --rm {runs}/rm --out_dir {tmp_path}/ppo --max_new_tokens 40",
                       "--batch_size 16 --minibatch_size 8")
    assert code == 0 and not (tmp_path / "ppo").exists()
    head = next(line.split() for line in out.splitlines() if line.startswith("token"))
    assert head[1:] == ["log-prob", "reference", "value", "KL", "reward", "advantage", "return", "new"]
    numbers = [line.split()[-8:] for line in out.splitlines() if re.search(r"([+-]\d+\.\d{4}\s*){8}$", line)]
    score = float(re.search(r"score\s+([+-][\d.]+)", out)[1])
    assert len(numbers) >= 1
    assert float(numbers[-1][4]) == pytest.approx(score, abs=1.001)  # KL is 0 at the start; at most the eos penalty apart
    assert all(float(row[3]) == 0 for row in numbers)


def test_explain_of_a_trained_policy_leaves_its_run_alone(runs, cli):
    before = {path.name: path.read_bytes() for path in (runs / "ppo").iterdir()}
    code, out, _ = cli(train_ppo, f"--explain --resume --out_dir {runs}/ppo")
    assert code == 0 and "<eos>" in out or "score" in out
    assert before == {path.name: path.read_bytes() for path in (runs / "ppo").iterdir()}


def test_evaluation_figures(ppo, tmp_path):
    """With lr 0 policy and reference are equal: KL 0 and a win rate near one half; n and standard errors as stated."""
    ppo(max_steps=1, lr=0.0, eval_answers=400)
    figures = json.loads((tmp_path / "ppo" / "eval.json").read_text())
    assert figures["n"] == 400 and abs(figures["kl"]) < 1e-5
    for key in ("score", "gold"):
        rate, error = figures[f"win_rate_{key}"], figures[f"win_rate_{key}_se"]
        assert abs(rate - 0.5) < 5 * error and 0.4 * (1 / 400) ** 0.5 < error <= 0.5 * (1 / 400) ** 0.5
    assert figures["reference"]["gold_std"] > 0.5
