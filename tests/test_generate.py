"""The sampler against the probabilities it claims to draw from, the bookkeeping of a rollout, and the command line."""

import itertools
import math

import numpy as np
import pytest
import torch

import minirlhf.generate as generate_script
from minirlhf.generate import Rollout, columns, generate, generate_all, left_pad, sample
from minirlhf.run import load_lm
from minirlhf.tokenizer import BPE

EOS = 5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_fits(counts, probabilities):
    """Chi-square test of counts (K,) against probabilities (K,); rare outcomes are pooled until 5 are expected."""
    expected = counts.sum() * probabilities
    assert expected.sum() == pytest.approx(counts.sum())
    common = expected >= 5
    observed, expected = ([*x[common], x[~common].sum()] for x in (counts, expected))
    cells = [(o, e) for o, e in zip(observed, expected) if e >= 5]
    chi_square, freedom = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    assert freedom >= 1
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)  # mean and five standard deviations of a chi-square


def softmax64(logits, temperature):
    z = logits.double().numpy() / temperature
    p = np.exp(z - z.max())
    return p / p.sum()


# ---- one token -------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("logits", [[0, 0, 0, 0, 0], [4, 0, 1, 2, -1], [-1, 0, 0, 1, 5]], ids=str)
def test_five_tokens_come_with_their_softmax_probabilities(logits, temperature):
    logits = torch.tensor(logits, dtype=torch.float32)
    tokens = sample(logits.expand(60_000, 5), temperature, seeded())
    assert_fits(np.bincount(tokens, minlength=5), softmax64(logits, temperature))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("shape", ["flat", "random", "peaked"])
def test_two_thousand_tokens_come_with_their_softmax_probabilities(shape, temperature):
    V = 2000
    logits = torch.zeros(V) if shape == "flat" else torch.randn(V, generator=seeded(1))
    if shape == "peaked":
        logits[700] = 8.0
    generator, counts = seeded(2), np.zeros(V)
    for _ in range(10):
        counts += np.bincount(sample(logits.expand(1000, V), temperature, generator), minlength=V)
    # 50 groups of tokens with enough draws each; neighbours fall into different groups, so a shift by one would show.
    p = softmax64(logits, temperature)
    assert_fits(counts.reshape(40, 50).sum(0), p.reshape(40, 50).sum(0))


def test_each_row_is_drawn_from_its_own_logits():
    assert sample(100 * torch.eye(50)[torch.arange(49, -1, -1)], 1.0, seeded()).tolist() == list(range(49, -1, -1))


@pytest.mark.parametrize("alive", [[2], [1, 3], [0, 4], [1, 2, 3]])
def test_a_token_of_probability_0_never_comes_out(alive):
    logits = torch.full((5,), -math.inf)
    logits[alive] = torch.randn(len(alive), generator=seeded(1))
    tokens = sample(logits.expand(200_000, 5), 1.0, seeded())
    assert tokens.unique().tolist() == alive
    logits[logits == -math.inf] = -1e4  # too small for any float: 0 as well
    assert sample(logits.expand(200_000, 5), 1.0, seeded()).unique().tolist() == alive


@pytest.mark.parametrize("u, wanted", [(0.0, 100), (1 - 2**-53, 1899)], ids=["smallest", "largest"])
def test_the_ends_of_the_uniform_draw_give_the_first_and_last_possible_token(monkeypatch, u, wanted):
    """The tails are where a rounded sum would let a token of probability 0 through."""
    monkeypatch.setattr(torch, "rand", lambda *size, dtype, **_: torch.full(size, u, dtype=dtype))
    logits = torch.randn(50, 2000, generator=seeded(3))
    logits[:, :100] = logits[:, 1900:] = -math.inf
    assert sample(logits).tolist() == [wanted] * 50


def test_rare_tokens_behind_a_frequent_one_keep_their_probability(monkeypatch):
    """999 tokens of 1e-8 each behind one of nearly 1: an fp32 running sum would give all of them nothing."""
    u = 1 - torch.linspace(0.1, 0.9, 9, dtype=torch.float64)[:, None] * 999e-8
    monkeypatch.setattr(torch, "rand", lambda *_, dtype, **__: u.to(dtype))
    logits = torch.full((9, 1000), math.log(1e-8))
    logits[:, 0] = 0.0
    assert sample(logits).tolist() == pytest.approx([1000 - 99.9 * i for i in range(1, 10)], abs=2)


# ---- whole answers ---------------------------------------------------------------------------


@pytest.fixture
def model(tiny_gpt):
    """A network whose greedy answers with EOS end after anything from 1 to over 12 tokens."""
    return tiny_gpt(block_size=24, seed=1)


def some_prompts(count, longest=6, seed=5):
    """Prompts of 1 to `longest` + 1 ids, eos first."""
    generator = seeded(seed)
    return [[EOS] + torch.randint(13, (i % (longest + 1),), generator=generator).tolist() for i in range(count)]


def answers_of(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.answers, rollout.mask)]


@torch.no_grad()
def greedy(model, prompt, steps):
    """The likeliest token again and again: one row, no cache, no padding."""
    ids = list(prompt)
    for _ in range(steps):
        ids.append((model(torch.tensor([ids]))[0, -1] @ model.head_weight.T).argmax().item())
        if ids[-1] == EOS:
            break
    return ids[len(prompt):]


def test_answers_stop_at_eos_and_padding_holds_0(model):
    prompts = some_prompts(50)
    rollout = generate(model, prompts, 10, EOS, generator=seeded())
    P, A = 7, rollout.mask.size(1)
    assert A <= 10 and rollout.ids.shape == (50, P + A)
    assert rollout.mask.dtype == rollout.finished.dtype == torch.bool
    for i, prompt in enumerate(prompts):
        answer = rollout.ids[i, P:].tolist()
        n = answer.index(EOS) + 1 if EOS in answer else A
        assert rollout.ids[i, :P].tolist() == [0] * (P - len(prompt)) + prompt
        assert rollout.start[i] == P - len(prompt)
        assert rollout.mask[i].tolist() == [True] * n + [False] * (A - n)  # eos is one of the tokens chosen
        assert answer[n:] == [0] * (A - n)
        assert rollout.finished[i] == (EOS in answer)
    assert 0 < rollout.finished.sum() < 50


def test_answers_are_no_longer_than_the_longest(model):
    """Sampling stops when every row has: no column of padding is left."""
    rollout = generate(model, [[EOS]] * 3, 20, EOS, generator=seeded(1))
    assert rollout.finished.all()
    assert rollout.mask.size(1) == rollout.mask.sum(1).max() < 20


def test_eos_as_the_very_last_token_counts_as_finished(model):
    long_answers = generate(model, some_prompts(30), 12, EOS, generator=seeded())
    n = int(long_answers.mask[long_answers.finished].sum(1).max())
    rollout = generate(model, some_prompts(30), n, EOS, generator=seeded())  # the same draws, cut right behind an eos
    at_the_end = rollout.answers[:, -1] == EOS
    assert at_the_end.any() and rollout.finished[at_the_end].all() and not rollout.finished.all()


@pytest.mark.parametrize("count, same_length", [(32, False), (32, True), (7, False), (1, False)])
def test_rows_that_end_early_do_not_disturb_the_others(model, count, same_length):
    """At a temperature near 0 the batch must walk each row's own greedy path, also once half of the rows have left."""
    prompts = some_prompts(count)
    if same_length:
        prompts = [(prompt + [3, 1, 4, 1, 2, 6])[:7] for prompt in prompts]
    rollout = generate(model, prompts, 12, EOS, temperature=1e-5, generator=seeded())
    assert (rollout.start is None) == (same_length or count == 1)
    alone = [greedy(model, prompt, 12) for prompt in prompts]
    assert answers_of(rollout) == alone
    assert rollout.finished.tolist() == [answer[-1] == EOS for answer in alone]
    if count == 32:
        assert len({len(answer) for answer in alone}) >= 4


def test_rows_that_have_ended_leave_the_batch_once_they_are_half_of_it(model):
    seen = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    lengths = generate(model, some_prompts(32), 12, EOS, generator=seeded()).mask.sum(1)
    going = [int((lengths > t).sum()) for t in range(len(seen))]  # rows that choose a token t
    assert all(n <= rows <= 2 * n for n, rows in zip(going, seen)) and len(set(seen)) > 2


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_answers_come_with_the_product_of_their_tokens_probabilities(tiny_gpt, temperature):
    """Every answer of up to 3 tokens over 4 ids is enumerated; prompts of different lengths share the batch."""
    model, eos = tiny_gpt(vocab_size=4, seed=2), 1
    prompts = [[eos, 3, 2, 0], [eos], [eos, 2]]
    rollout = generate(model, prompts * 3000, 3, eos, temperature, seeded())
    drawn = answers_of(rollout)
    others = (0, 2, 3)
    answers = [(*begin, eos) for n in range(3) for begin in itertools.product(others, repeat=n)]
    answers += list(itertools.product(others, repeat=3))
    for i, prompt in enumerate(prompts):
        probabilities = []
        for answer in answers:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *answer]]))[0] @ model.head_weight.T
            places = range(len(prompt) - 1, len(prompt) - 1 + len(answer))
            probabilities.append(math.prod(softmax64(logits[t], temperature)[y] for t, y in zip(places, answer)))
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        counts = np.array([drawn[i::3].count(list(answer)) for answer in answers])
        assert counts.sum() == 3000
        assert_fits(counts, np.array(probabilities) / sum(probabilities))


def test_the_seed_of_the_generator_decides_the_answers(model):
    one, same, other = (generate(model, some_prompts(20), 10, EOS, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.ids, same.ids) and torch.equal(one.mask, same.mask)
    assert answers_of(one) != answers_of(other)


def test_an_explicit_generator_leaves_the_global_one_untouched(model):
    before = torch.get_rng_state()
    generate(model, some_prompts(5), 10, EOS, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    generate(model, some_prompts(5), 10, EOS)
    assert not torch.equal(torch.get_rng_state(), before)


def test_generate_all_keeps_the_order_of_the_prompts(model):
    prompts = some_prompts(11)
    rollouts = list(generate_all(model, prompts, 6, EOS, 1e-5, seeded(), batch_size=4))
    assert [len(rollout.mask) for rollout in rollouts] == [4, 4, 3]
    assert sum(map(answers_of, rollouts), []) == [greedy(model, prompt, 6) for prompt in prompts]


def test_generate_all_hands_on_generator_and_temperature(model):
    before = torch.get_rng_state()
    one, same, cold = (list(generate_all(model, some_prompts(11), 6, EOS, temperature, seeded(), batch_size=4))
                       for temperature in (1.0, 1.0, 0.2))
    assert torch.equal(torch.get_rng_state(), before)
    assert sum(map(answers_of, one), []) == sum(map(answers_of, same), []) != sum(map(answers_of, cold), [])


def test_left_pad():
    ids, start = left_pad([[5, 1, 2], [5], [5, 9]])
    assert ids.tolist() == [[5, 1, 2], [0, 0, 5], [0, 5, 9]] and start.tolist() == [0, 2, 1]
    ids, start = left_pad([[5, 1], [5, 2]])
    assert ids.tolist() == [[5, 1], [5, 2]] and start is None


# ---- rollouts --------------------------------------------------------------------------------


@pytest.fixture
def rollout():
    """Prompts of 3, 1 and 2 ids with answers of 2 (eos), 4 (cut) and 1 (eos) ids."""
    return Rollout(ids=torch.tensor([[5, 1, 2, 7, 5, 0, 0], [0, 0, 5, 8, 9, 8, 7], [0, 5, 3, 5, 0, 0, 0]]),
                   start=torch.tensor([0, 2, 1]), finished=torch.tensor([True, False, True]),
                   mask=torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool))


def test_rollout_knows_its_prompts_answers_and_last_tokens(rollout):
    assert rollout.prompt_length == 3
    assert rollout.answers.tolist() == [[7, 5, 0, 0], [8, 9, 8, 7], [5, 0, 0, 0]]
    assert rollout.last.tolist() == [4, 6, 3]


def test_rollout_rows_selects_in_order_and_trims_to_the_longest(rollout):
    part = rollout.rows(torch.tensor([2, 0]))
    assert part.ids.tolist() == [[0, 5, 3, 5, 0], [5, 1, 2, 7, 5]]
    assert part.start.tolist() == [1, 0] and part.finished.tolist() == [True, True]
    assert part.mask.tolist() == [[True, False], [True, True]]
    assert part.last.tolist() == [3, 4] and part.prompt_length == 3
    whole = rollout.rows(torch.tensor([1, 2]))
    assert whole.ids.tolist() == rollout.ids[1:].tolist() and whole.finished.tolist() == [False, True]
    rollout.start = None
    assert rollout.rows(torch.tensor([0])).start is None


def test_rollout_hidden_at_t_comes_from_the_position_before_token_t(rollout, tiny_gpt):
    model = tiny_gpt()
    hidden = rollout.hidden(model)
    assert hidden.shape == (3, 4, 8)
    for i, (prompt, answer) in enumerate([([5, 1, 2], [7, 5]), ([5], [8, 9, 8, 7]), ([5, 3], [5])]):
        for t in range(len(answer)):
            seen = model(torch.tensor([prompt + answer[:t]]))[0, -1]  # the network that has not yet seen token t
            torch.testing.assert_close(hidden[i, t], seen, rtol=0, atol=1e-5)


def test_rollout_texts_leave_out_eos_and_padding():
    tokenizer = BPE()
    answers = [[*b"ok!", 256, 0, 0], [*"h\u00e9llo".encode()], [256, 0, 0, 0, 0, 0]]
    rollout = Rollout(torch.tensor([[256, *answer] for answer in answers]), None,
                      torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]], dtype=torch.bool),
                      torch.tensor([True, False, True]))
    assert rollout.texts(tokenizer) == ["ok!", "h\u00e9llo", ""]


# ---- the command line ------------------------------------------------------------------------


def test_columns_by_hand():
    assert columns(["one two", "three"], width=13) == "one   | three\ntwo   |"
    assert columns(["a\n\nb", ""], width=9) == "a   |\n    |\nb   |"
    assert columns(["abcdefgh"], width=3) == "abc\ndef\ngh"


@pytest.mark.parametrize("width", [20, 43, 80])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_columns_keep_every_word_and_the_width(width, count):
    words = [[f"{name}{i}" for i in range(12 * (k + 1))] for k, name in enumerate("abc"[:count])]
    lines = columns([" ".join(cell) for cell in words], width).splitlines()
    assert max(map(len, lines)) <= width
    cells = zip(*([part.strip() for part in (line + " ").split(" | ")] for line in lines))
    assert [" ".join(cell).split() for cell in cells] == words


def test_columns_follow_the_terminal_up_to_120(monkeypatch):
    for terminal, width in (("50", 50), ("300", 120)):
        monkeypatch.setenv("COLUMNS", terminal)
        assert max(map(len, columns(["x" * 999]).splitlines())) == width


def answer_lines(out):
    return [line for line in out.splitlines() if line == "-" or line.startswith("- ")]  # "-": an empty answer


def test_command_line_answers_every_prompt_in_order(runs, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    prompts = ["I had the ramen at Luna.", "Something else", "I had the pie at Rosa."]
    typed = [word for prompt in prompts for word in ("--prompt", prompt)]
    options = f"--run {runs}/lm --max_new_tokens 40 --num_samples 2 --seed 3 --temperature 0.7"
    code, out, err = cli(generate_script, options, typed)
    assert code == 0 and err == ""
    assert [line for line in out.splitlines() if line in prompts] == prompts
    assert len(answer_lines(out)) == 6
    assert len(set(answer_lines(out))) > 3  # samples, not one answer over and over
    model, tokenizer = load_lm(runs / "lm", "cpu")
    torch.manual_seed(3)
    rows = [[tokenizer.eos] + tokenizer.encode(prompt) for prompt in prompts for _ in range(2)]
    rollout = generate(model, rows, 40, tokenizer.eos, 0.7)
    assert rollout.finished.any()
    shown = "".join(out.split())
    for text, done in zip(rollout.texts(tokenizer), rollout.finished.tolist()):
        assert "".join(text.split()) + ("" if done else "…") in shown


def test_command_line_without_a_prompt_shows_the_built_in_world_and_the_seed_decides(runs, cli):
    def run(seed):
        code, out, _ = cli(generate_script, f"--run {runs}/ppo --max_new_tokens 15 --num_samples 1 --seed {seed}")
        assert code == 0 and len(answer_lines(out)) == 2
        return out

    assert run(1) == run(1) != run(2)


def test_command_line_marks_answers_that_were_cut(runs, cli):
    code, out, _ = cli(generate_script, f"--run {runs}/lm --max_new_tokens 1 --num_samples 20")
    assert code == 0 and len(answer_lines(out)) == 40
    assert all(line.endswith("…") or line == "-" for line in answer_lines(out))  # cut, or ended at once
    assert sum(line.endswith("…") for line in answer_lines(out)) >= 20


def test_command_line_compares_two_runs_side_by_side(runs, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.chdir(runs)
    code, out, _ = cli(generate_script, "--run ppo --compare lm --max_new_tokens 15 --num_samples 2",
                       ["--prompt", "I had the ramen at Luna."])
    assert code == 0
    heading = next(line for line in out.splitlines() if "|" in line)
    assert heading.split() == ["ppo", "|", "lm"]
    assert sum(line.startswith("- ") and "| - " in line for line in out.splitlines()) == 2
    assert max(map(len, out.splitlines())) <= 100


def test_command_line_cuts_a_prompt_that_is_too_long_and_says_so(runs, cli):
    code, out, _ = cli(generate_script, f"--run {runs}/lm --num_samples 1 --max_new_tokens 20",
                       ["--prompt", "I had the ramen at Luna. " * 40])
    assert code == 0 and "1 prompts were cut" in out and len(answer_lines(out)) == 1
    code, out, _ = cli(generate_script, f"--run {runs}/lm --num_samples 1 --max_new_tokens 20")
    assert code == 0 and "cut" not in out.split("I had")[0]


@pytest.mark.parametrize("arguments, says", [
    ("--run {runs}/nothing", "does not exist"),
    ("--run {runs}/rm", "reward model"),
    ("--run {runs}", "has no ckpt.pt"),
    ("--run {runs}/lm --compare {runs}/nothing", "does not exist"),
    ("--run {runs}/lm --max_new_tokens 63", "no room"),
    ("--run {runs}/lm --temperature 0", "at least 0.01"),
])
def test_command_line_mistakes_are_one_line_and_exit_2(runs, cli, arguments, says):
    code, out, err = cli(generate_script, arguments.format(runs=runs))
    assert code == 2 and says in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_states_are_those_of_a_forward_over_the_whole_answer(tiny_gpt, temperature):
    """Prompts of different lengths, answers that end early, rows that leave the batch."""
    model = tiny_gpt(vocab_size=5, block_size=40)
    prompts = [[4] + [1, 2, 3, 0][:n] for n in (0, 4, 2, 3)] * 6
    torch.manual_seed(0)
    rollout = generate(model, prompts, 30, eos=4, temperature=temperature)
    assert 1 < rollout.mask.sum(1).min() + 1 < rollout.mask.size(1)
    torch.testing.assert_close(rollout.states[rollout.mask], rollout.hidden(model)[rollout.mask], rtol=0, atol=1e-5)


def test_hidden_in_pieces_equals_hidden_at_once(tiny_gpt):
    model = tiny_gpt(vocab_size=5, block_size=12)
    for prompts in ([[4, 1, 2]] * 600, [[4], [4, 1, 2]] * 300):
        rollout = generate(model, prompts, 6, eos=4)
        with torch.no_grad():
            pieces = rollout.hidden(model)
        assert pieces.shape == rollout.states.shape
        torch.testing.assert_close(pieces[rollout.mask], rollout.hidden(model)[rollout.mask], rtol=0, atol=1e-5)
