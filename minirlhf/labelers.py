"""Who prefers which answer: the gold rule with noise, or a person in the terminal.

(Preferences from a file are read by data.read_pairs.) Both labelers turn questions, two answers to
one prompt, into data.Pair. Next: losses.py.
"""

import itertools
import json
import os
import random
import sys
import textwrap
from dataclasses import dataclass

import numpy as np

from minirlhf import reviews
from minirlhf.data import Pair
from minirlhf.generate import printable
from minirlhf.run import read_rows

TAU = 0.5  # temperature of the gold labeler: the smaller, the fewer wrong labels


@dataclass
class Question:
    """Two answers to a prompt; finished: did each end by itself?"""

    prompt: str
    answers: tuple
    finished: tuple

    def pair(self, better, tie=False):
        """The pair in which answer `better` (0 or 1) was chosen."""
        turn = -1 if better else 1
        return Pair(self.prompt, *self.answers[::turn], tie=tie, finished=self.finished[::turn])


def questions_of(prompts, answers, finished, answers_per_prompt):
    """Every pair of different answers to one prompt.

    prompts: str each; answers, finished: flat, answers_per_prompt of them for each prompt in turn.
    """
    questions = []
    for i, prompt in enumerate(prompts):
        group = range(i * answers_per_prompt, (i + 1) * answers_per_prompt)
        for a, b in itertools.combinations(group, 2):
            if answers[a] != answers[b] and answers[a].strip() and answers[b].strip():
                questions.append(Question(prompt, (answers[a], answers[b]), (finished[a], finished[b])))
    return questions


def prefer_probability(gold_a, gold_b):
    """P(a preferred over b) = sigmoid((gold_a - gold_b) / TAU) (Bradley and Terry 1952)."""
    return 1 / (1 + np.exp((gold_b - gold_a) / TAU))


def label_by_gold(questions, seed):
    """Prefer by the gold score with Bradley-Terry noise; list of Pair."""
    rng = np.random.default_rng((seed, 2))
    golds = np.array([[reviews.gold(q.prompt, answer) for answer in q.answers] for q in questions]).reshape(-1, 2)
    first_wins = rng.random(len(questions)) < prefer_probability(golds[:, 0], golds[:, 1])
    return [q.pair(0 if first else 1) for q, first in zip(questions, first_wins)]


# ---- a person --------------------------------------------------------------------------------


def read_journal(path):
    """The answers in a journal, which holds a row for each key pressed, with the undos applied: a list of dicts."""
    answers = []
    for row in read_rows(path):
        answers = answers[:-1] if row["choice"] == "u" else [*answers, row]
    return answers


def write_journal(path, row):
    """Append one line, and return once it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
    with open(path, "a") as file:
        file.write(("" if whole else "\n") + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def label_by_person(questions, count, path, seed, ask=input):
    """Ask for up to `count` preferences in the terminal; list of Pair.

    path: the journal. Every answer is in it before the next question is asked, so starting again goes on there.
    """
    print("Which answer is better?  1 or 2,  = equally good,  s skip,  u undo the last,  q quit (labels are kept)")
    while True:
        answered = read_journal(path)
        seen = {(row["prompt"], *sorted(row["answers"])) for row in answered}
        labels = [row for row in answered if row["choice"] != "s"]
        question = next((q for q in questions if (q.prompt, *sorted(q.answers)) not in seen), None)
        if len(labels) >= count or question is None:
            break
        shown = list(zip(question.answers, question.finished))
        random.Random(f"{seed} {question.prompt} {question.answers}").shuffle(shown)
        print(f"\n[{len(labels) + 1} of {count}]  {printable(question.prompt)}")
        for number, (answer, done) in enumerate(shown, 1):
            print(textwrap.fill(printable(answer).strip() + ("" if done else " …"), 100,
                                initial_indent=f"  {number}  ", subsequent_indent="     "))
        choice = ""
        while choice not in ("1", "2", "=", "s", "u", "q"):
            try:
                choice = ask("1 2 = s u q > ").strip().lower()
            except EOFError:
                choice = "q"
            except KeyboardInterrupt:
                print(f"\nall labels are in {path}; start again to go on", file=sys.stderr)
                raise
        if choice == "q":
            break
        answers, finished = zip(*shown)
        write_journal(path, {"choice": "u"} if choice == "u" else {
            "choice": choice, "prompt": question.prompt, "answers": answers, "finished": finished})
    return [Question(row["prompt"], tuple(row["answers"]), tuple(row["finished"]))
            .pair(better=int(row["choice"] == "2"), tie=row["choice"] == "=") for row in labels]
