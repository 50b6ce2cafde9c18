"""DPO: the loss by hand and by enumeration, what the run feeds it, the policy it ends at, and bad input."""

import itertools
import json
import math

import pytest
import torch

import train_ppo
from minirlhf import data, generate, losses
from minirlhf.config import UserError
from minirlhf.lab import dpo
from minirlhf.logprobs import log_softmax
from minirlhf.run import load_lm
from train_rm import make_batches


def normal(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the loss --------------------------------------------------------------------------------


def test_worked_example():
    """β 0.5: chosen gained 0.5 nats on the reference, rejected lost 1: -log σ(0.5 · 1.5); and the other way round."""
    first, second = (-1.0, -1.5), (-2.0, -1.0)  # (policy, reference) each
    chosen, ref_chosen, rejected, ref_rejected = (torch.tensor(x) for x in zip(first + second, second + first))
    loss = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.75)), math.log(1 + math.exp(0.75))], abs=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_at_the_reference_the_loss_is_ln_2(beta):
    chosen, rejected = 10 * normal(6, seed=1), 10 * normal(6, seed=2)
    assert losses.dpo_loss(chosen, rejected, chosen, rejected, beta).tolist() == pytest.approx([math.log(2)] * 6)


def test_gradient_is_that_of_the_paper():
    """-β σ(-margin) (∇log π(chosen) - ∇log π(rejected)), below eq. 7."""
    x = [normal(5, seed=seed).requires_grad_(seed < 2) for seed in range(4)]
    losses.dpo_loss(*x, beta=0.7).sum().backward()
    margin = 0.7 * ((x[0] - x[2]) - (x[1] - x[3])).detach()
    weight = 0.7 * torch.sigmoid(-margin)
    assert torch.allclose(x[0].grad, -weight) and torch.allclose(x[1].grad, weight)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_best_policy_is_the_reference_tilted_by_the_reward(beta):
    """Six answers. The loss in the mean over all pairs and both Bradley-Terry labels has its minimum at
    π_ref exp(r/β) / Z, and there only."""
    reference, rewards = normal(6, seed=1).log_softmax(0), normal(6, seed=2)
    a, b = torch.tensor(list(itertools.permutations(range(6), 2))).unbind(1)
    weight = reference[a].exp() * reference[b].exp() * torch.sigmoid(rewards[a] - rewards[b])  # both drawn, a preferred

    def loss_and_gradient(logits):
        logits = logits.clone().requires_grad_()
        policy = logits.log_softmax(0)
        loss = (weight * losses.dpo_loss(policy[a], policy[b], reference[a], reference[b], beta)).sum()
        return loss.item(), torch.autograd.grad(loss, logits)[0].norm().item()

    best = reference + rewards / beta
    lowest, gradient = loss_and_gradient(best)
    assert gradient < 1e-12
    others = [best + 0.3 * normal(6, seed=seed) for seed in range(5)]
    for other in [reference, reference - rewards / beta, *others]:
        loss, gradient = loss_and_gradient(other)
        assert loss > lowest + 1e-5 and gradient > 1e-4


# ---- what the run feeds it -------------------------------------------------------------------


def answer_logprob(model, tokenizer, prompt, answer, finished):
    """Of one text, by itself: log-prob of the answer's tokens that fit, found by comparing ids."""
    room = model.shape.block_size
    ids, _ = data.encode_answer(tokenizer, prompt, answer, finished, room)
    prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(answer) + [tokenizer.eos] * finished
    fits = [n for n in range(1, len(ids)) if ids[-n:] == answer_ids[:n] and prompt_ids[len(prompt_ids) - len(ids) + 1 + n:]
            == ids[1: len(ids) - n]]
    assert len(fits) == 1
    logprobs = log_softmax(model(torch.tensor([ids[:-1]]))[0] @ model.head_weight.T)
    return sum(logprobs[t - 1, ids[t]].item() for t in range(len(ids) - fits[0], len(ids)))


def test_loss_sees_the_logprobs_of_whole_answers(runs, tmp_path, monkeypatch):
    """Answers only, eos where they finished, and what is left of long prompts and answers; chosen first."""
    reference, tokenizer = load_lm(runs / "lm", "cpu")
    pairs = [
        data.Pair("I had the soup at Luna.", " The soup was good.", " The soup was bad and the waiter was very rude."),
        data.Pair("I had the soup at Luna.", " The soup was good.", " Bad.", finished=(True, False)),
        data.Pair("", " No prompt at all.", " None.", finished=(False, True)),
        data.Pair("Many words before " * 20, " short", " shorter"),
        data.Pair("Other words before " * 20, " long answers go on" * 20, " and on" * 40, finished=(True, False)),
        data.Pair("Short.", " a very long answer" * 30, " brief", finished=(True, True)),
    ]
    seen = []
    original = losses.dpo_loss

    def spy(*arguments):
        seen.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(losses, "dpo_loss", spy)
    config = dpo.Config(out_dir=str(tmp_path / "dpo"), batch_size=3, epochs=2, lr=1e-2, device="cpu", beta=0.7)
    policy, _ = load_lm(runs / "lm", "cpu")
    assert dpo.train(config, policy, pairs, tokenizer) is policy
    batches = make_batches(pairs, 3, 2, config.seed)
    assert len(seen) == len(batches) > 2
    for number, (batch, (chosen, rejected, ref_chosen, ref_rejected, beta)) in enumerate(zip(batches, seen)):
        expected = [[answer_logprob(reference, tokenizer, pair.prompt, text, done) for pair in batch
                     for text, done in [((pair.chosen, pair.rejected)[side], pair.finished[side])]] for side in (0, 1)]
        assert ref_chosen.tolist() == pytest.approx(expected[0], abs=1e-3)
        assert ref_rejected.tolist() == pytest.approx(expected[1], abs=1e-3)
        assert beta == 0.7 and chosen.requires_grad and not ref_chosen.requires_grad
        moved = (chosen - ref_chosen).abs().max().item()
        assert moved < 1e-5 if number == 0 else moved > 1e-2  # the policy starts at the reference; only the policy moves


class Letters:
    """Ids 0, 1, 2 are the letters a, b, c; id 3 is eos."""

    eos, vocab_size = 3, 4

    def encode(self, text):
        return ["abc".index(letter) for letter in text]

    def decode(self, ids):
        return "".join("abc"[i] for i in ids if i < 3)

    def state(self):
        return {"kind": "letters"}


def test_policy_ends_at_the_known_optimum(tiny_gpt, tmp_path):
    """One prompt, twelve answers, labels drawn by Bradley-Terry: towards π_ref exp(r/β) / Z, computed by enumeration."""
    policy, tokenizer, beta = tiny_gpt(vocab_size=4, block_size=8, n_embd=16), Letters(), 0.5
    answers = ["".join(letters) for n in (1, 2) for letters in itertools.product("abc", repeat=n)]
    finished = [True] * 3 + [False] * 9  # two letters are cut at the cap; the empty answer never occurs

    @torch.no_grad()
    def enumerate_answers():
        logprobs = [answer_logprob(policy, tokenizer, "c", *pair) for pair in zip(answers, finished)]
        return torch.tensor(logprobs).log_softmax(0)

    reference, rewards = enumerate_answers(), normal(12, seed=3).float()
    best = (reference + rewards / beta).log_softmax(0)
    generator = torch.Generator().manual_seed(1)
    pairs = []
    for a, b in torch.randint(12, (12000, 2), generator=generator).tolist():  # drawn evenly: any pairs will do
        if a != b:
            if torch.rand((), generator=generator) > torch.sigmoid(rewards[a] - rewards[b]):
                a, b = b, a
            pairs.append(data.Pair("c", answers[a], answers[b], finished=(finished[a], finished[b])))
    before = (reference.exp() * (reference - best)).sum().item()
    config = dpo.Config(out_dir=str(tmp_path / "dpo"), beta=beta, lr=3e-3, epochs=3, batch_size=64, device="cpu")
    dpo.train(config, policy, pairs, tokenizer)
    trained = enumerate_answers()
    assert before > 0.4
    assert (trained.exp() * (trained - best)).sum().item() < 0.1 * before


# ---- the instrument --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    """The folder of a run from the tiny pairs; they are few, so in many passes."""
    folder = tmp_path_factory.mktemp("dpo") / "dpo"
    config = f"--lm {runs}/lm --prefs {runs}/rm/pairs.jsonl --out_dir {folder} --lr 1e-3 --epochs 4 --max_new_tokens 40"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["dpo.py", *config.split(), "--device", "cpu"])
        dpo.main()
    return folder


def test_run_has_the_figures_of_ppo(trained, runs):
    figures, ppo = (json.loads((folder / "eval.json").read_text()) for folder in (trained, runs / "ppo"))
    assert figures.keys() == ppo.keys() and figures["n"] == 1024
    assert figures["policy"].keys() == ppo["policy"].keys()
    assert figures["kl"] > 0.1
    # Of its own reward β log π/π_ref the policy's answers have the mean β KL, the reference's a negative one.
    assert figures["policy"]["score"] == pytest.approx(dpo.Config().beta * figures["kl"], rel=1e-4)
    assert figures["reference"]["score"] < 0 and figures["win_rate_score"] > 0.6


def test_run_learns_from_its_pairs(trained):
    rows = rows_of(trained / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert sum(row["loss"] for row in rows[-4:]) / 4 < math.log(2) - 0.05
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))


def test_held_out_prompts_are_not_trained_on(runs, tmp_path, monkeypatch, cli):
    seen = []
    monkeypatch.setattr(dpo, "train", lambda config, policy, pairs, tokenizer: seen.extend(pairs) or policy)
    monkeypatch.setattr(dpo, "evaluate", lambda *arguments: seen.append(arguments[5]) or ({}, {}, {}))
    (tmp_path / "dpo").mkdir()
    code, _, err = cli(dpo, f"--lm {runs}/lm --prefs {runs}/rm/pairs.jsonl --out_dir {tmp_path}/dpo --device cpu")
    assert code == 0, err
    *pairs, prompts = seen
    assert len(prompts) == 1024 and pairs and not {pair.prompt for pair in pairs} & set(prompts)


def test_ppo_does_not_resume_a_run_of_dpo(trained, cli):
    code, _, err = cli(train_ppo, f"--resume --out_dir {trained}")
    assert code == 2 and "holds a policy trained with DPO" in err and err.count("\n") == 1


def test_generate_talks_to_the_policy(trained, runs, cli):
    code, out, _ = cli(generate, f"--run {trained} --compare {runs}/lm --max_new_tokens 40 --device cpu --num_samples 2")
    assert code == 0 and out.count("- ") >= 4


def test_ties_are_left_out(runs, tmp_path):
    policy, tokenizer = load_lm(runs / "lm", "cpu")
    start = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    ties = [data.Pair("I had the soup at Luna.", " good", " bad", tie=True)] * 3
    config = dpo.Config(out_dir=str(tmp_path / "dpo"), device="cpu")
    with pytest.raises(UserError, match="no pair is left"):
        dpo.train(config, policy, ties, tokenizer)
    assert not (tmp_path / "dpo").exists()
    states = []
    for pairs in ([data.Pair("Luna.", " good", " bad")], [data.Pair("Luna.", " good", " bad"), *ties]):
        policy.load_state_dict(start)
        dpo.train(config, policy, pairs, tokenizer)
        states.append({name: tensor.clone() for name, tensor in policy.state_dict().items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in start)
    assert not all(torch.equal(states[0][name], start[name]) for name in start)


# ---- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ("--prefs {tmp}/none.jsonl", "none.jsonl: no such file"),
    ("--prefs {tmp}/dpo/pairs.jsonl", "--prefs"),
    ("--prefs {tmp}/texts.jsonl", 'texts.jsonl:1: needs "chosen" and "rejected"'),
    ("--prefs {tmp}/ties.jsonl", "ties.jsonl: no pair is left"),
    ("--lm {tmp}/none", "none does not exist"),
    ("--lm {runs}/rm", "holds a reward model"),
    ("--lm {tmp}/dpo", "lies in --out_dir"),
    ("--max_new_tokens 64", "--max_new_tokens 64 leaves no room"),
    ("--beta 0", "--beta"),
    ("--device tpu", "--device tpu"),
], ids=["no file", "inside out_dir", "texts", "ties", "no lm", "reward model", "lm in out_dir", "no room", "beta", "device"])
def test_bad_input_is_one_line(options, message, runs, tmp_path, cli):
    write_rows(tmp_path / "texts.jsonl", [{"text": "The soup was good."}])
    tie = {"chosen": " a", "rejected": " b", "tie": True}
    write_rows(tmp_path / "ties.jsonl", [{"prompt": f"{i}?"} | tie for i in range(9)])
    options = options.format(tmp=tmp_path, runs=runs)
    code, out, err = cli(dpo, f"--lm {runs}/lm --prefs {runs}/rm/pairs.jsonl --out_dir {tmp_path}/dpo {options}")
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out
    assert not (tmp_path / "dpo").exists()


def test_a_learning_rate_that_explodes_is_one_line(runs, tmp_path, cli):
    code, _, err = cli(dpo, f"--lm {runs}/lm --prefs {runs}/rm/pairs.jsonl --out_dir {tmp_path}/dpo --lr 1e20 --device cpu")
    last = err.splitlines()[-1]
    assert code == 2 and "the run stopped; lower --lr" in last and "Traceback" not in err
    assert not (tmp_path / "dpo" / "ckpt.pt").exists()
