"""The doctor: every fault is put into the real train_ppo.train, and must be named; healthy runs must stay silent."""

import json
import math
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train_ppo
from minirlhf import generate, losses
from minirlhf.doctor import MEMORY, RULES, Doctor, findings
from minirlhf.generate import Rollout, sample
from minirlhf.logprobs import log_softmax, token_stats
from minirlhf.run import load_lm, load_reward_model, plain

NUMBER = r"[+-]?\d[\d.e+-]*"
LINES = {  # what must be printed
    "ratio": rf"π_new / π_old differs from 1 by {NUMBER} before any update: dropout",
    "sampling": rf"the samples do not come from the distribution they are scored with \(sampling_z {NUMBER}\): top-k",
    "negative_kl": rf"the KL to the reference is -{NUMBER} ± {NUMBER} nats, and no KL is negative: policy and reference are",
    "no_eos": r"eos is never sampled: no answer ended by itself\.",
    "cut": r"only [1-4]?\d% of the answers end by themselves, the others are cut: raise --max_new_tokens",
    "value": rf"worse than a constant for 20 rollouts \(explained variance -{NUMBER}\): wrong returns",
    "entropy": r"the entropy is down to 0\.0\d* nats per token, so all answers to a prompt are nearly the same: lower --lr",
    "equal_scores": rf"all answers have scored the same \({NUMBER}\) for 5 rollouts, so there is nothing to learn from: a c",
    "far": r"the policy is 1\d\d nats per answer away from the reference.* raise --kl_coef",
    "clip": r"[5-9]\d% of the tokens are outside the clip, 5 rollouts in a row: the updates go too far; lower --lr",
}


def causes_in(out):
    """[(step, cause)] of what the doctor printed; a line that is not exactly one of LINES fails."""
    said = []
    for line in out.splitlines():
        if "doctor" in line:
            step, text = re.fullmatch(r"doctor, step (\d+): (.+)", line).groups()
            (cause,) = [cause for cause, pattern in LINES.items() if re.search(pattern, text)]
            said.append((int(step), cause))
    return said


@pytest.fixture
def ppo(runs, tmp_path, capsys):
    """ppo(reward_fn=None, prepare=None, **options) -> (what the doctor said, rows of metrics.jsonl).

    prepare: a function that may change the loaded policy.
    """

    def run(reward_fn=None, prepare=None, **options):
        options = dict(max_steps=4, batch_size=16, minibatch_size=8, max_new_tokens=40, eval_answers=2, device="cpu",
                       save_every=1000) | options
        config = train_ppo.Config(lm=str(runs / "lm"), rm=str(runs / "rm"), out_dir=str(tmp_path / "ppo"), **options)
        policy, tokenizer = load_lm(config.lm, "cpu")
        if prepare:
            prepare(policy)
        reward_model, _ = load_reward_model(config.rm, "cpu")
        capsys.readouterr()
        train_ppo.train(config, policy, reward_model, tokenizer, reward_fn)
        rows = [json.loads(line) for line in (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines()]
        return causes_in(capsys.readouterr().out), rows

    return run


def very(prompts, responses):
    return [float(response.count("very")) for response in responses]


# ---- faults in the real loop -----------------------------------------------------------------


def top_k(logits, temperature, generator=None):
    least = logits.topk(5).values[:, -1:]
    return sample(logits.masked_fill(logits < least, -math.inf), temperature, generator)


def top_p(logits, temperature, generator=None):
    ordered, index = (logits / temperature).softmax(-1).sort(descending=True)
    dropped = ordered.cumsum(-1) - ordered > 0.9
    return sample(logits.masked_fill(dropped.gather(-1, index.argsort(-1)), -math.inf), temperature, generator)


def colder(logits, temperature, generator=None):
    return sample(logits, 0.8 * temperature, generator)


def hotter(logits, temperature, generator=None):
    return sample(logits, 1.25 * temperature, generator)


@pytest.mark.parametrize("fault, sign", [(top_k, -1), (top_p, -1), (colder, -1), (hotter, 1)])
def test_samples_from_another_distribution_are_named_at_the_first_step(ppo, monkeypatch, fault, sign):
    """There the KL is 0 by construction: it cannot tell."""
    monkeypatch.setattr(generate, "sample", fault)
    said, rows = ppo(max_steps=1, batch_size=128, minibatch_size=64)
    assert said == [(1, "sampling")] and abs(rows[0]["kl"]) < 1e-5
    assert sign * rows[0]["sampling_z"] > 5


def test_stale_samples_are_named(ppo, monkeypatch):
    """Answers of the policy as it was at the start: they surprise the policy of now, and their "KL" is negative."""
    first = {}

    def stale(model, *args, **rest):
        rollout = generate.generate(first.setdefault("model", train_ppo.copy.deepcopy(model)), *args, **rest)
        rollout.states = rollout.hidden(model)
        return rollout

    monkeypatch.setattr(train_ppo, "generate", stale)
    said, rows = ppo(max_steps=7, lr=1e-2, batch_size=64, minibatch_size=16, kl_coef=0.0)
    assert sorted(cause for _, cause in said) == ["negative_kl", "sampling"] and min(said)[0] > 1
    assert rows[-1]["kl"] < 0


def test_samples_and_log_probs_of_an_older_policy_are_named(ppo, monkeypatch):
    """They agree with each other; the first ratio tells."""
    first = {}
    monkeypatch.setattr(train_ppo, "generate", lambda model, *args, **rest: generate.generate(
        first.setdefault("model", train_ppo.copy.deepcopy(model)), *args, **rest))
    said, _ = ppo(max_steps=2, lr=1e-2, batch_size=64, minibatch_size=16)
    assert said == [(2, "ratio")]


def other_temperature(monkeypatch, factor=0.8):
    right = train_ppo.answer_logprobs

    def wrong(model, rollout, temperature, *more, **options):
        return right(model, rollout, factor * temperature if torch.is_grad_enabled() else temperature, *more, **options)

    monkeypatch.setattr(train_ppo, "answer_logprobs", wrong)


def dropout(policy):
    policy.register_forward_hook(lambda _, inputs, out: F.dropout(out, 0.1) if torch.is_grad_enabled() else out)


def forgotten_padding(monkeypatch):
    right = Rollout.rows

    def wrong(self, index):
        part = right(self, index)
        return Rollout(part.ids, None, part.mask, part.finished)

    monkeypatch.setattr(Rollout, "rows", wrong)


def half_precision(monkeypatch):
    right = train_ppo.autocast
    monkeypatch.setattr(train_ppo, "autocast",
                        lambda device, dtype: right(device, "bfloat16" if torch.is_grad_enabled() else dtype))


@pytest.mark.parametrize("fault", [other_temperature, forgotten_padding, half_precision])
def test_an_update_that_sees_other_log_probs_is_named(ppo, monkeypatch, tmp_path, fault):
    prompts = tmp_path / "prompts.txt"  # of different lengths, so that there is padding to forget
    prompts.write_text("\n".join("I had the soup and the bread at Luna again.".rsplit(" ", k % 9)[0] + " ok" * (k // 9)
                                 for k in range(40)))
    assert ppo(max_steps=1, prompts=str(prompts))[0] == []
    fault(monkeypatch)
    assert ppo(max_steps=1, prompts=str(prompts))[0] == [(1, "ratio")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropout_in_the_update_is_named(ppo, dtype):
    assert ppo(max_steps=1, prepare=dropout, dtype=dtype)[0] == [(1, "ratio")]


@pytest.mark.parametrize("dtype, expected", [("float32", [(1, "ratio")]), ("bfloat16", [])])
def test_the_loop_tells_the_doctor_its_dtype(ppo, monkeypatch, dtype, expected):
    """A difference as large as bfloat16 rounds is a fault in float32 only."""
    other_temperature(monkeypatch, 0.99)
    said, rows = ppo(max_steps=1, dtype=dtype)
    assert said == expected and 1e-2 < rows[0]["ratio_first"] < 0.3


def test_policy_and_reference_swapped_is_named(ppo, monkeypatch):
    right = losses.kl_estimates
    monkeypatch.setattr(losses, "kl_estimates", lambda logprobs, ref_logprobs: right(ref_logprobs, logprobs))
    said, rows = ppo(max_steps=5, batch_size=64, lr=5e-3)
    assert said == [(4, "negative_kl")] and abs(rows[0]["kl"]) < 1e-5  # steps 2 to 4


def test_a_masked_eos_is_named(ppo, monkeypatch):
    """Its probability goes to the other tokens, so that the samples' distribution is another one too."""
    eos = []

    def remember(model, prompts, max_new_tokens, eos_id, *args, **rest):
        eos.append(eos_id)
        return generate.generate(model, prompts, max_new_tokens, eos_id, *args, **rest)

    def without_eos(logits, temperature, generator=None):
        logits[:, eos[0]] = -math.inf
        return sample(logits, temperature, generator)

    monkeypatch.setattr(train_ppo, "generate", remember)
    monkeypatch.setattr(generate, "sample", without_eos)
    said, rows = ppo(max_steps=4)
    assert (3, "no_eos") in said and {cause for _, cause in said} <= {"no_eos", "sampling"}


def test_answers_cut_at_the_cap_are_named(ppo):
    said, rows = ppo(max_steps=4, batch_size=64, max_new_tokens=8, lr=0.0)
    assert said == [(3, "cut")] and 0 < rows[0]["eos_rate"] < 0.5


@pytest.mark.parametrize("std, expected", [(1.0, [(20, "value")]), (0.0, [])])
def test_a_value_head_that_guesses_and_never_learns_is_named(ppo, monkeypatch, std, expected):
    """Its loss forgotten, and not begun at 0. Begun at 0 it stays a constant, which explains 0 and is no worse."""
    right = train_ppo.ScalarHead
    monkeypatch.setattr(train_ppo, "ScalarHead", lambda n_embd, **_: right(n_embd, std=std))
    said, rows = ppo(very, max_steps=22, vf_coef=0.0, lam=1.0, lr=1e-4)
    assert said == expected and len(rows) == 22


def test_a_policy_without_chance_is_named(ppo):
    """So cold that each prompt has one answer (for this language model, one that goes round and round)."""
    said, rows = ppo(temperature=0.02, lr=0.0)
    assert (3, "entropy") in said and {cause for _, cause in said} <= {"entropy", "no_eos", "cut"}
    assert rows[-1]["entropy"] < 0.05


def test_a_constant_reward_is_named_and_once_a_sitting(ppo):
    def constant(prompts, responses):
        return [0.1] * len(responses)

    assert ppo(constant, max_steps=7)[0] == [(5, "equal_scores")]
    assert ppo(constant, max_steps=13, resume=True)[0] == [(12, "equal_scores")]  # five of its own rollouts


def test_a_leash_that_pushes_is_named(ppo, monkeypatch):
    """The KL's minus forgotten: leaving the reference is what pays."""
    right = losses.shaped_rewards
    monkeypatch.setattr(losses, "shaped_rewards", lambda *args: right(*args[:-1], -args[-1]))
    said, rows = ppo(kl_coef=1.0, lr=5e-3, batch_size=64, minibatch_size=16, max_steps=18, max_new_tokens=48)
    assert "far" in {cause for _, cause in said} <= {"far", "cut", "no_eos"} and rows[-1]["kl"] > 100


def test_a_pinned_clip_is_named(ppo):
    assert ppo(clip=1e-4, max_steps=8)[0] == [(5, "clip")]


# ---- healthy runs ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("options", [
    dict(advantage="gae"), dict(advantage="reinforce"), dict(advantage="rloo", samples_per_prompt=2),
    dict(advantage="grpo", samples_per_prompt=4),
], ids=lambda options: options["advantage"])
def test_healthy_runs_are_silent(ppo, options, seed):
    said, rows = ppo(max_steps=8, seed=seed, **options)
    assert said == [] and len(rows) == 8
    assert all(abs(row["sampling_z"]) < 5 and row["kl_se"] >= 0 and row["score_std"] > 0 for row in rows)


@pytest.mark.parametrize("options", [dict(dtype="bfloat16"), dict(temperature=0.7), dict(kl_in="loss"), dict(value="rm")],
                         ids=str)
def test_other_healthy_runs_are_silent(ppo, options):
    assert ppo(max_steps=5, **options)[0] == []


def test_one_answer_a_rollout_has_no_spread(ppo):
    """Neither "all scores are equal" nor a standard error can be said of one answer."""
    said, rows = ppo(lambda prompts, responses: [1.0] * len(responses), batch_size=1, minibatch_size=1, max_steps=6)
    assert all(row["kl_se"] is None and row["score_std"] is None for row in rows)
    assert not {"equal_scores", "negative_kl"} & {cause for _, cause in said}


def test_logged_spreads_are_those_of_the_answers(ppo, monkeypatch):
    """kl_se and score_std, recomputed from what the loop itself passes to shaped_rewards; sampling_z gets its log-probs."""
    seen, judged, right, sampling_z = [], [], losses.shaped_rewards, losses.sampling_z

    def spy(scores, logprobs, ref_logprobs, mask, kl_coef):
        kls = [float((a - b)[m].sum()) for a, b, m in zip(logprobs, ref_logprobs, mask)]
        seen.append((scores.numpy().copy(), kls, logprobs))
        return right(scores, logprobs, ref_logprobs, mask, kl_coef)

    def second_spy(logprobs, entropy, variance, mask):
        judged.append((logprobs, sampling_z(logprobs, entropy, variance, mask)))
        return judged[-1][1]

    monkeypatch.setattr(losses, "shaped_rewards", spy)
    monkeypatch.setattr(losses, "sampling_z", second_spy)
    _, rows = ppo(max_steps=3, missing_eos_penalty=0.0, lr=2e-3)
    for row, (scores, kls, logprobs), (judged_logprobs, z) in zip(rows, seen, judged, strict=True):
        assert judged_logprobs is logprobs and row["sampling_z"] == z.item()
        assert row["score_std"] == pytest.approx(np.std(scores), rel=1e-4)
        assert row["kl_se"] == pytest.approx(np.std(kls, ddof=1) / math.sqrt(len(kls)), rel=1e-3, abs=1e-6)
    assert rows[-1]["kl_se"] > 0


# ---- the rules -------------------------------------------------------------------------------

WELL = {"step": 30, "episodes": 7680, "score": 2.0, "score_std": 0.4, "kl": 6.0, "kl_se": 0.2, "entropy": 1.0,
        "ratio_first": 3e-6, "sampling_z": 1.5, "clip_frac": 0.1, "explained_variance": 0.2, "eos_rate": 0.99}
EDGES = [  # cause, how many rows, just ill, just well
    ("ratio", 1, {"ratio_first": 1.01e-3}, {"ratio_first": 0.99e-3}),
    ("sampling", 1, {"sampling_z": 5.01}, {"sampling_z": 4.99}),
    ("sampling", 1, {"sampling_z": -5.01}, {"sampling_z": -4.99}),
    ("negative_kl", 3, {"kl": -0.302, "kl_se": 0.1}, {"kl": -0.3, "kl_se": 0.1}),
    ("negative_kl", 3, {"kl": -0.0011, "kl_se": 0.0}, {"kl": -0.0009, "kl_se": 0.0}),
    ("no_eos", 3, {"eos_rate": 0.0}, {"eos_rate": 0.004}),
    ("cut", 3, {"eos_rate": 0.49}, {"eos_rate": 0.5}),
    ("value", 20, {"explained_variance": -0.051}, {"explained_variance": -0.049}),
    ("entropy", 3, {"entropy": 0.049}, {"entropy": 0.051}),
    ("equal_scores", 5, {"score": 0.1, "score_std": 0.99e-6}, {"score": 0.1, "score_std": 1.01e-6}),
    ("equal_scores", 5, {"score": -1e4, "score_std": 0.9e-2}, {"score": -1e4, "score_std": 1.1e-2}),
    ("far", 3, {"kl": 100.1}, {"kl": 99.9}),
    ("clip", 5, {"clip_frac": 0.51}, {"clip_frac": 0.49}),
]
every_edge = pytest.mark.parametrize("cause, count, ill, well", EDGES, ids=[f"{e[0]}-{i}" for i, e in enumerate(EDGES)])


def causes(rows, dtype="float32"):
    return [cause for cause, _ in findings(rows, dtype)]


def test_every_rule_has_an_edge_and_a_line():
    assert {edge[0] for edge in EDGES} == set(RULES) == set(LINES)
    assert MEMORY == 20


@every_edge
def test_a_rule_holds_beyond_its_limit_and_nowhere_else(cause, count, ill, well):
    assert causes([WELL | ill] * count) == [cause]
    assert cause not in causes([WELL | well] * 30)


@every_edge
def test_a_rule_needs_that_many_rows_in_a_row(cause, count, ill, well):
    sick = WELL | ill
    assert causes([sick] * (count - 1)) == []  # a short log
    assert causes([WELL] * 30 + [sick] * (count - 1)) == []
    assert causes([WELL] * 30 + [sick] * count) == [cause]
    assert causes([sick] * 30 + [WELL]) == []  # it is over
    if count > 1:
        assert causes([sick] * (count - 1) + [WELL | well] + [sick] * (count - 1)) in ([], ["cut"])


@every_edge
@pytest.mark.parametrize("nothing", [None, math.nan, "missing"], ids=str)
def test_a_figure_that_is_not_there_says_nothing(cause, count, ill, well, nothing):
    row = WELL | ill
    for key in RULES[cause].keys:
        without = {k: v for k, v in row.items() if k != key} if nothing == "missing" else row | {key: nothing}
        assert cause not in causes([without] * 30)
        assert cause not in causes([without] + [row] * (count - 1))


def test_healthy_rows_and_none_at_all():
    assert findings([]) == [] and findings([WELL] * 30) == [] and findings([plain(WELL)] * 30, "bfloat16") == []


def test_rounding_in_bfloat16_is_no_fault():
    row = WELL | {"ratio_first": 0.4}
    assert causes([row]) == ["ratio"] and causes([row], "bfloat16") == []
    assert causes([row | {"ratio_first": 0.6}], "bfloat16") == ["ratio"]
    assert causes([WELL | {"sampling_z": 5.1}], "bfloat16") == ["sampling"]  # every other limit stays


def test_a_missing_eos_is_said_once():
    """No eos at all is not also "only 0 % end by themselves"; a few later on are."""
    none, few = WELL | {"eos_rate": 0.0}, WELL | {"eos_rate": 0.1}
    assert causes([none] * 5) == ["no_eos"] and causes([none] * 5 + [few] * 3) == ["cut"]
    assert causes([few, none, few]) == ["cut"]


def test_several_faults_are_all_named():
    row = WELL | {"ratio_first": 1.0, "entropy": 0.01, "clip_frac": 0.9}
    assert set(causes([row] * 5)) == {"ratio", "entropy", "clip"}


def test_the_doctor_repeats_nothing_and_remembers_enough():
    doctor, log = Doctor("float32"), []
    for step in range(1, 41):
        ratio = 0.2 if step in (3, 9) else 0.0
        log += doctor.look(WELL | {"step": step, "explained_variance": -1.0 if step > 5 else 0.1, "ratio_first": ratio})
    assert causes_in("\n".join(log)) == [(3, "ratio"), (25, "value")]
    assert len(doctor.rows) == MEMORY  # a long run takes no more memory
    assert causes_in("\n".join(Doctor("float32").look(WELL | {"ratio_first": 0.2}))) == [(30, "ratio")]


# ---- sampling_z ------------------------------------------------------------------------------


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def test_sampling_z_equals_the_loop():
    """From hidden states, through the functions that step 3 calls."""
    hidden, weight, temperature = normal(3, 4, 8), normal(11, 8, seed=1), 0.7
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    targets = torch.randint(11, (3, 4), generator=torch.Generator().manual_seed(2))
    total = variance = 0.0
    for b, t in np.argwhere(mask.numpy()):
        logits = hidden[b, t].double().numpy() @ weight.double().numpy().T / temperature
        p = np.exp(logits) / np.exp(logits).sum()
        mean = sum(p[v] * -math.log(p[v]) for v in range(11))
        variance += sum(p[v] * (-math.log(p[v]) - mean) ** 2 for v in range(11))
        total += -math.log(p[targets[b, t]]) - mean
    logprobs, entropy, spread = token_stats(hidden, weight, targets, mask, temperature)
    for floor, expected in ((0.0, total / math.sqrt(variance)), (1e4, total / 100)):
        assert losses.sampling_z(logprobs, entropy, spread, mask, floor).item() == pytest.approx(expected, rel=1e-4)
    for garbage in (math.inf, math.nan):
        noisy = [x.masked_fill(~mask, garbage) for x in (logprobs, entropy, spread)]
        assert losses.sampling_z(*noisy, mask, 0.0).item() == pytest.approx(total / math.sqrt(variance), rel=1e-4)


def draws(logits, scored, count, seed=3):
    """sampling_z of `count` rollouts of N tokens drawn from logits (N, V) and scored with `scored` (N, V)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(logits.softmax(-1), count, replacement=True, generator=generator)  # (N, count)
    all_logprobs = log_softmax(scored)
    entropy = -(all_logprobs.exp() * all_logprobs).sum(-1)
    spread = (all_logprobs.exp() * (-all_logprobs - entropy[:, None]) ** 2).sum(-1)
    chosen = all_logprobs.gather(-1, tokens)  # (N, count)
    mask = torch.ones(1, len(logits), dtype=torch.bool)
    assert spread.sum() > 100  # the floor plays no part
    return torch.stack([losses.sampling_z(chosen[None, :, i], entropy[None], spread[None], mask) for i in range(count)])


def test_sampling_z_of_exact_samples_has_mean_0_and_variance_1():
    logits = 1.5 * normal(300, 7, seed=4)
    z = draws(logits, logits, 3000)
    assert abs(z.mean().item()) < 5 / math.sqrt(3000)
    assert abs(z.var().item() - 1) < 5 * math.sqrt(2 / 3000)
    assert z.abs().max() < 5


@pytest.mark.parametrize("temperature, sign", [(0.7, -1), (1.4, 1)])
def test_sampling_z_sees_another_temperature(temperature, sign):
    logits = 1.5 * normal(1000, 7, seed=4)
    assert (sign * draws(logits / temperature, logits, 100)).min() > 5


@pytest.mark.parametrize("rare", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
def test_a_nearly_certain_policy_is_not_accused(rare):
    """Not while its rare token has not been seen, nor when it is drawn as often as can happen by chance."""
    N = 5000
    surprise = torch.tensor([-math.log1p(-rare), -math.log(rare)], dtype=torch.float64)
    p = torch.tensor([1 - rare, rare], dtype=torch.float64)
    entropy = (p * surprise).sum()
    spread = (p * (surprise - entropy) ** 2).sum()
    mask = torch.ones(1, N, dtype=torch.bool)
    chance = math.exp(-N * rare)  # of k rare tokens, Poisson
    for k in range(60):
        logprobs = -surprise[0].expand(1, N).clone()
        logprobs[0, :k] = -surprise[1]
        z = losses.sampling_z(logprobs, entropy.expand(1, N), spread.expand(1, N), mask).item()
        assert abs(z) < 5 or chance < 1e-3, (k, z)
        if k == 1 and rare < 1e-5:  # without the floor one token would be enough
            assert losses.sampling_z(logprobs, entropy.expand(1, N), spread.expand(1, N), mask, floor=0.0) > 5
        chance *= N * rare / (k + 1)


def test_no_chance_at_all_is_zero():
    """A certain token, and a uniform distribution, whose surprise does not vary: only rounding is left."""
    mask = torch.ones(8, 500, dtype=torch.bool)
    targets = torch.zeros(8, 500, dtype=torch.long)
    hidden = torch.ones(8, 500, 1)
    for weight in (torch.zeros(13, 1), torch.tensor([[200.0]] + [[0.0]] * 12)):
        z = losses.sampling_z(*token_stats(hidden, weight, targets, mask), mask)
        assert abs(z.item()) < 1e-2
