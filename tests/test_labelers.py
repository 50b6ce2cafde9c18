"""Who prefers what: the gold rule against Bradley-Terry's formula, and a person who is scripted here."""

import io
import json
import math
import re

import pytest

import train_rm
from conftest import TINY
from minirlhf.labelers import Question, label_by_gold, label_by_person, questions_of, read_journal

PROMPT = "I had the ramen at Luna."


def squeeze(text):
    """A text without its white space, as wrapping moves that."""
    return "".join(text.split())


def shown_questions(out):
    """(prompt, answer 1, answer 2) for each question on the screen, white space squeezed out of the answers."""
    parts = out.split("1 2 = s u q > ")
    blocks = [re.search(r"\[\d+ of \d+\]  (.*)\n  1  (.*)\n  2  (.*)", part, re.S) for part in parts]
    return [(block[1], *(squeeze(text).removesuffix("…") for text in block.group(2, 3))) for block in blocks if block]


class Person:
    """Takes input()'s place: presses the keys in turn, then holds that nothing more is asked.

    keys: list of keys, or a function (answer 1, answer 2) -> key. Notes what the screen showed and
    what stood in the journal when each question was asked.
    """

    def __init__(self, keys, journal, capsys):
        self.keys, self.journal, self.capsys = keys, journal, capsys
        self.shown, self.on_disk = [], []

    def __call__(self, prompt):
        self.shown += shown_questions(self.capsys.readouterr().out) or self.shown[-1:]  # asked again: the same one
        self.on_disk.append(len(self.journal.read_text().splitlines()) if self.journal.exists() else 0)
        if callable(self.keys):
            return self.keys(*self.shown[-1][1:])
        assert self.keys, "one question too many"
        return self.keys.pop(0)


@pytest.fixture
def person(tmp_path, capsys):
    """person(keys, questions, count=...) -> (pairs, Person): one sitting; the journal stays between sittings."""
    journal = tmp_path / "labels.jsonl"

    def sit(keys, questions, count=100):
        someone = Person(keys, journal, capsys)
        return label_by_person(questions, count, journal, seed=1, ask=someone), someone

    sit.journal = journal
    return sit


def good_and_bad(n, start=0):
    """n questions with a good and a bad answer, the good one first in every other question."""
    two = [(f" good{i}", f" bad{i}") for i in range(start, start + n)]
    return [Question(f"Question {i}?", answers if i % 2 else answers[::-1], (True, True))
            for i, answers in enumerate(two, start)]


def as_tuples(pairs):
    return [(pair.prompt, pair.chosen, pair.rejected, pair.tie) for pair in pairs]


# ---- questions -------------------------------------------------------------------------------


def test_questions_are_all_pairs_within_a_prompt():
    questions = questions_of(["p", "q"], list("abcdef"), [True, False, True, True, True, True], 3)
    assert [(q.prompt, *q.answers) for q in questions] == [
        ("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("q", "d", "e"), ("q", "d", "f"), ("q", "e", "f")]
    assert [q.finished for q in questions[:3]] == [(True, False), (True, True), (False, True)]


def test_equal_and_empty_answers_make_no_question():
    questions = questions_of(["p"], ["a", "a", "", " \n", "b"], [True] * 5, 5)
    assert [q.answers for q in questions] == [("a", "b"), ("a", "b")]


def test_a_pair_keeps_each_answers_ending_with_it():
    question = Question("p", ("a", "b"), (True, False))
    assert (question.pair(0).chosen, question.pair(0).rejected, question.pair(0).finished) == ("a", "b", (True, False))
    assert (question.pair(1).chosen, question.pair(1).rejected, question.pair(1).finished) == ("b", "a", (False, True))


# ---- the gold rule ---------------------------------------------------------------------------


@pytest.mark.parametrize("first, second, difference", [
    (" The chef was warm.", " The chef was rude.", 2.0),
    (" The chef was rude.", " The chef was warm.", -2.0),
    (" The chef was very warm.", " The chef was warm.", 0.5),
    (" The menu was steep. The chef was warm.", " The chef was rude.", 1.0),
    (" The chef was warm.", " The ramen was not fresh. The chef was rude. The bill was fair.", 1.0),
    (" The chef was warm.", " The music was lovely.", 0.0),
], ids=lambda value: str(value) if isinstance(value, float) else "")
def test_gold_labels_follow_bradley_terry(first, second, difference):
    n = 8000
    pairs = label_by_gold([Question(PROMPT, (first, second), (True, True))] * n, seed=3)
    p = 1 / (1 + math.exp(-difference / 0.5))
    wins = sum(pair.chosen == first for pair in pairs)
    assert abs(wins - n * p) < 4.5 * math.sqrt(n * p * (1 - p))
    assert {(pair.chosen, pair.rejected) for pair in pairs} <= {(first, second), (second, first)}
    assert not any(pair.tie for pair in pairs)


def test_gold_labels_depend_on_the_seed_alone():
    questions = [Question(PROMPT, (" The chef was warm.", " The music was lovely."), (True, True))] * 200
    assert as_tuples(label_by_gold(questions, 1)) == as_tuples(label_by_gold(questions, 1))
    assert as_tuples(label_by_gold(questions, 1)) != as_tuples(label_by_gold(questions, 2))
    assert label_by_gold([], 1) == []


# ---- a person --------------------------------------------------------------------------------


def test_both_orders_are_shown_and_the_label_means_what_was_shown(person):
    questions = good_and_bad(40)
    pairs, someone = person(lambda first, second: "1" if first.startswith("good") else "2", questions)
    assert as_tuples(pairs) == [(f"Question {i}?", f" good{i}", f" bad{i}", False) for i in range(40)]
    good_first = [first.startswith("good") for _, first, _ in someone.shown]
    assert 8 <= sum(good_first) <= 32  # 40 tosses of a coin: outside by one chance in 20,000
    as_sampled = [first == squeeze(q.answers[0]) for (_, first, _), q in zip(someone.shown, questions)]
    assert 8 <= sum(as_sampled) <= 32


def test_every_key(person):
    pairs, someone = person(["1", "2", "=", "s", "1", "u", "2", "q"], good_and_bad(9))
    shown = someone.shown
    assert [prompt for prompt, _, _ in shown] == [f"Question {i}?" for i in (0, 1, 2, 3, 4, 5, 4, 5)]
    assert shown[4] == shown[6]  # undone: the same question in the same order
    expected = [("Question 0?", shown[0][1], shown[0][2], False), ("Question 1?", shown[1][2], shown[1][1], False),
                ("Question 2?", shown[2][1], shown[2][2], True), ("Question 4?", shown[4][2], shown[4][1], False)]
    assert [(pair.prompt, squeeze(pair.chosen), squeeze(pair.rejected), pair.tie) for pair in pairs] == expected


def test_an_unfinished_answer_is_shown_with_dots_and_stays_unfinished(person, capsys):
    questions = [Question(f"p{i}", (" whole.", " broken"), (True, False)) for i in range(12)]  # in both orders
    keys = []

    def ask(_):
        screen = capsys.readouterr().out
        assert "broken …\n" in screen and "whole.\n" in screen
        keys.append("1" if "1  whole." in screen else "2")
        return keys[-1]

    pairs = label_by_person(questions, 12, person.journal, 1, ask)
    assert set(keys) == {"1", "2"}
    assert {(pair.chosen, pair.rejected, pair.finished) for pair in pairs} == {(" whole.", " broken", (True, False))}


@pytest.mark.parametrize("nonsense", ["", "x", "3", "12", "1 2", "é", "\x1b[A"])
def test_a_nonsense_key_asks_again_and_leaves_no_trace(nonsense, person):
    pairs, someone = person([nonsense, nonsense, "1", "q"], good_and_bad(3))
    assert [prompt for prompt, _, _ in someone.shown] == ["Question 0?"] * 3 + ["Question 1?"]
    assert someone.on_disk == [0, 0, 0, 1]
    assert len(pairs) == 1


def test_keys_may_be_capital_and_have_spaces_round_them(person):
    pairs, _ = person([" 1 ", "S", " Q\t"], good_and_bad(3))
    assert len(pairs) == 1


def test_every_answer_is_on_disk_before_the_next_question(person):
    _, someone = person(["1", "=", "s", "u", "2", "2"], good_and_bad(4))
    assert someone.on_disk == [0, 1, 2, 3, 4, 5]
    assert len(person.journal.read_text().splitlines()) == 6


def test_starting_again_goes_on_and_asks_nothing_twice(person):
    questions = good_and_bad(6)
    first, _ = person(["1", "s", "2", "q"], questions)
    second, someone = person(["1", "=", "2"], questions)
    assert [prompt for prompt, _, _ in someone.shown] == ["Question 3?", "Question 4?", "Question 5?"]
    assert as_tuples(second[:2]) == as_tuples(first)
    third, someone = person([], questions)
    assert someone.shown == [] and as_tuples(third) == as_tuples(second)


def test_a_question_that_comes_back_turned_round_is_not_asked_again(person):
    questions = good_and_bad(2)
    person(["1", "1"], questions)
    turned = [Question(q.prompt, q.answers[::-1], q.finished) for q in questions]
    assert person([], turned)[1].shown == []


def test_it_stops_at_count_and_skips_do_not_count(person):
    pairs, someone = person(["s", "1", "=", "1"], good_and_bad(9), count=3)
    assert len(pairs) == 3 and len(someone.shown) == 4


def test_undo_reaches_into_an_earlier_sitting_and_skips_too(person):
    questions = good_and_bad(4)
    person(["1", "s", "q"], questions)
    pairs, someone = person(["u", "u", "2", "q"], questions)
    assert [prompt for prompt, _, _ in someone.shown] == [f"Question {i}?" for i in (2, 1, 0, 1)]
    assert [(pair.prompt, squeeze(pair.chosen)) for pair in pairs] == [("Question 0?", someone.shown[2][2])]


def test_undo_with_nothing_to_undo_asks_again(person):
    pairs, someone = person(["u", "u", "1", "q"], good_and_bad(2))
    assert [prompt for prompt, _, _ in someone.shown] == ["Question 0?"] * 3 + ["Question 1?"]
    assert len(pairs) == 1


def test_the_end_of_input_quits_and_keeps_the_labels(person):
    keys = ["1", "2"]

    def ask(_):
        if not keys:
            raise EOFError
        return keys.pop(0)

    pairs = label_by_person(good_and_bad(5), 5, person.journal, 1, ask)
    assert len(pairs) == 2 and len(person.journal.read_text().splitlines()) == 2


def test_a_journal_cut_anywhere_loses_at_most_the_cut_line(person):
    """As a kill in the middle of a write leaves it; checked at every byte, with accents in the texts."""
    questions = [Question(f"Où {i}?", (f" bon{i} ☕", f" mauvais{i}"), (True, False)) for i in range(4)]
    person(["1", "2", "=", "q"], questions)
    whole = person.journal.read_bytes()
    lines = whole.splitlines(keepends=True)
    rows = read_journal(person.journal)
    assert len(rows) == len(lines) == 3
    ends = [sum(len(line) for line in lines[: i + 1]) - 1 for i in range(3)]  # where each line's JSON is complete
    for cut in range(len(whole) + 1):
        person.journal.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        assert read_journal(person.journal) == rows[:kept], cut
        pairs, someone = person(["1", "q"], questions)  # and labelling goes on behind the cut
        assert [prompt for prompt, _, _ in someone.shown][0] == f"Où {kept}?"
        assert len(pairs) == len(read_journal(person.journal)) == kept + 1


# ---- through the script ----------------------------------------------------------------------


class Keyboard(io.StringIO):
    """A standard input on which Ctrl-C is pressed after the last line."""

    def readline(self, *_):
        line = super().readline()
        if not line:
            raise KeyboardInterrupt
        return line


@pytest.fixture
def label(cli, runs, tmp_path, monkeypatch):
    """label(keys) -> cli's result of train_rm.py --labeler human with these keys typed at the terminal."""

    def run(keys, terminal=io.StringIO):
        monkeypatch.setattr("sys.stdin", terminal("".join(key + "\n" for key in keys)))
        return cli(train_rm, TINY[train_rm], "--labeler human --num_pairs 18 --batch_size 4 --epochs 1",
                   f"--lm {runs}/lm --out_dir {tmp_path}/rm")

    return run


def pairs_on_disk(folder):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return [(row["prompt"], squeeze(row["chosen"]), squeeze(row["rejected"]), row.get("tie", False)) for row in rows]


def test_ten_labels_typed_at_the_terminal_train_a_reward_model(label, tmp_path):
    keys = ["1", "2", "=", "1", "2", "2", "1", "=", "1", "2"]
    code, out, err = label([*keys, "q"])
    assert code == 0, err
    shown = shown_questions(out)[:10]  # the 11th was answered with q
    expected = [(prompt, *((second, first) if key == "2" else (first, second)), key == "=")
                for key, (prompt, first, second) in zip(keys, shown, strict=True)]
    assert pairs_on_disk(tmp_path / "rm") == expected
    assert (tmp_path / "rm" / "ckpt.pt").is_file() and (tmp_path / "rm" / "eval.json").is_file()

    labels = (tmp_path / "rm" / "labels.jsonl").read_bytes()
    code, out, err = label([])  # again, without --resume, and nobody at the terminal: the labels stay
    assert code == 0, err
    assert not set(shown_questions(out)) & set(shown)
    assert pairs_on_disk(tmp_path / "rm") == expected
    assert (tmp_path / "rm" / "labels.jsonl").read_bytes() == labels


def test_too_few_labels_are_kept_for_the_next_time(label, tmp_path):
    code, _, err = label(["1", "2", "q"])
    assert code == 2 and "2 preference pairs" in err.splitlines()[-1]
    assert len((tmp_path / "rm" / "labels.jsonl").read_text().splitlines()) == 2
    code, _, err = label(["1"] * 8)
    assert code == 0, err
    assert len(pairs_on_disk(tmp_path / "rm")) == 10


def test_ctrl_c_while_labelling_keeps_the_labels_and_says_so(label, tmp_path):
    code, _, err = label(["1", "2", "="], terminal=Keyboard)
    assert code == 130
    assert len((tmp_path / "rm" / "labels.jsonl").read_text().splitlines()) == 3
    assert "labels" in err  # not only "stopped before the first checkpoint": the person's work is safe
