"""Gold against scores worked by hand, and the world against a small reader that knows only the grammar."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from minirlhf import reviews
from minirlhf.reviews import gold

ROOT = Path(__file__).parents[1]
RAMEN = "I had the ramen at Luna."


@pytest.mark.parametrize("answer, score", [
    # one sentence: sentiment, "not", intensity
    (" The chef was warm.", 1),
    (" The chef was rude.", -1),
    (" The chef was not warm.", -1),
    (" The chef was not rude.", 1),
    (" The chef was very warm.", 1.5),
    (" The chef was really warm.", 1.5),
    (" The chef was very rude.", -1.5),
    (" The chef was not very warm.", -1.5),
    (" The chef was not really rude.", 1.5),
    # the dish of the prompt: +1, once
    (" The ramen was fresh.", 1 + 1),
    (" The ramen was not really stale.", 1.5 + 1),
    (" The ramen was fresh. The ramen was tasty.", 1 - 1 + 1),
    (" The pizza was fresh.", 1),  # a dish, but of another prompt
    (" The ramens was fresh.", -1),  # not the word itself
    # sums
    (" The bill was fair. The music was dull. The bread was very tasty.", 1 - 1 + 1.5),
    (" The room was cozy. The garden was not noisy.", 1 + 1),  # two subjects of one kind are no repeat
    # a repeated subject: -1 instead of its sentiment, whatever that is
    (" The chef was warm. The chef was very warm.", 1 - 1),
    (" The chef was rude. The chef was very rude.", -1 - 1),
    (" The chef was warm. The bill was fair. The chef was warm.", 1 + 1 - 1),
    (" The chef was warm. The chef was warm. The chef was warm.", 1 - 1 - 1),
    # sentences that the grammar cannot write
    (" The chef was tasty.", -1),  # the adjective of another kind
    (" The ramen was rude.", -1 + 1),
    (" The chef was very.", -1),
    (" The chef was very not warm.", -1),
    (" The chef was very really warm.", -1),
    (" The chef was warm and polite.", -1),
    (" The dog was warm.", -1),
    (" The chef is warm.", -1),
    (" the chef was warm.", -1),
    (" A chef was warm.", -1),
    (" ramen ramen ramen.", -1 + 1),
    (" \x00\ufffd 🍜.", -1),
    (" The chef was warm!", -1),  # and so unfinished
    (" The chef was\nwarm.", -1),
    (" The chef was warm..", 1 - 1),
    # unfinished, empty
    (" The chef was warm", -1),
    (" The chef was warm. The bill was", 1 - 1),
    (" The chef was warm. The ramen", 1 - 1 + 1),
    ("", 0),
    ("  \n", 0),
    (" The chef was warm. ", 1),
])
def test_gold_of_hand_scored_answers(answer, score):
    assert gold(RAMEN, answer) == score


@pytest.mark.parametrize("prompt", [
    "", "ramen", "Tell me about the ramen.", "I had the ramen at Luna", "I had the ramen at Luna. ", "Yes. " + RAMEN,
    "i had the ramen at luna.", "I had the chef at Luna.",
])
def test_a_foreign_prompt_gives_no_bonus(prompt):
    assert reviews.dish_of(prompt) is None
    assert gold(prompt, " The ramen was fresh. The chef was very rude.") == 1 - 1.5


def test_a_place_of_another_world_makes_a_foreign_prompt():
    assert reviews.dish_of("I had the ramen at Nowhere.") is None


def test_gold_is_symmetric_in_the_sentiments():
    """Every adjective of every kind, on every subject of that kind: all good ones +1, all bad ones -1."""
    for kind, (subjects, good, bad) in reviews.KINDS.items():
        for subject in subjects + (reviews.DISHES if kind == "food" else []):
            for sign, adjectives in ((1, good), (-1, bad)):
                for adjective in adjectives:
                    assert gold("", f" The {subject} was {adjective}.") == sign
                    assert gold("", f" The {subject} was not very {adjective}.") == -1.5 * sign


def test_words_mean_one_thing():
    """No subject has two kinds, no adjective two sentiments, no name stands twice."""
    subjects = reviews.DISHES + [word for lists in reviews.KINDS.values() for word in lists[0]]
    adjectives = [word for lists in reviews.KINDS.values() for words in lists[1:] for word in words]
    for words in (subjects, adjectives, reviews.PLACES):
        assert max(Counter(words).values()) == 1


# ---- the corpus ------------------------------------------------------------------------------


def read(answer):
    """[(subject, its kind, adjective is good, negated, intense)] of a grammatical answer; fails on any other."""
    assert answer.startswith(" The ") and answer.endswith(".")
    sentences = []
    for sentence in answer[1:-1].split(". "):
        the, subject, was, *middle, adjective = sentence.split(" ")
        assert (the, was) == ("The", "was")
        assert middle in ([], ["not"], ["very"], ["really"], ["not", "very"], ["not", "really"])
        kind, = [kind for kind, (subjects, _, _) in reviews.KINDS.items()
                 if subject in subjects or (kind == "food" and subject in reviews.DISHES)]
        _, good, bad = reviews.KINDS[kind]
        assert (adjective in good) != (adjective in bad)
        sentences.append((subject, kind, adjective in good, "not" in middle, middle[-1:] in (["very"], ["really"])))
    return sentences


def test_prompts():
    prompts = reviews.prompts()
    assert len(set(prompts)) == len(prompts) >= 400
    for prompt in prompts:
        dish = reviews.dish_of(prompt)
        assert dish in reviews.DISHES and f" {dish} " in prompt


def test_corpus_is_grammatical_and_gold_agrees_with_an_independent_reader():
    documents = reviews.corpus(3000)
    assert len(documents) == 3000
    for prompt, answer in documents:
        score, seen = 0, set()
        sentences = read(answer)
        assert 2 <= len(sentences) <= 5
        for subject, _, good, negated, intense in sentences:
            assert subject not in reviews.DISHES or f"the {subject} at" in prompt  # no dish but the one eaten
            score += -1 if subject in seen else (1 if good != negated else -1) * (1.5 if intense else 1)
            seen.add(subject)
        score += any(f"the {subject} at" in prompt for subject in seen)
        assert gold(prompt, answer) == score


def test_corpus_names_every_prompt_and_uses_the_whole_grammar():
    documents = reviews.corpus()
    assert {prompt for prompt, _ in documents} == set(reviews.prompts())
    sentences = [sentence for _, answer in documents[:3000] for sentence in read(answer)]
    assert {kind for _, kind, *_ in sentences} == set(reviews.KINDS)
    assert len({(good, negated, intense) for _, _, good, negated, intense in sentences}) == 8
    # Up to four sentences have four different kinds, but for the writers who repeat a subject.
    short = [[subject for subject, *_ in read(answer)] for _, answer in documents[:3000] if answer.count(".") <= 4]
    assert 0.05 < np.mean([len(set(subjects)) < len(subjects) for subjects in short]) < 0.5


def test_both_moods_are_plain_to_see():
    """Writers agree with themselves: long reviews that praise or blame throughout are far more common
    than if each sentence were drawn alone with the same average."""
    tones = [[good != negated for _, _, good, negated, _ in read(answer)] for _, answer in reviews.corpus(4000)]
    tones = [tone for tone in tones if len(tone) >= 4]
    average = np.mean([np.mean(tone) for tone in tones])
    praise, blame = (np.mean([set(tone) == {mood} for tone in tones]) for mood in (True, False))
    assert praise > 0.08 and praise > 5 * average**4
    assert blame > 0.3 and blame > 1.3 * (1 - average) ** 4
    assert 0.15 < average < 0.4  # the corpus grumbles: it leaves PPO something to gain


def test_corpus_does_not_depend_on_global_seeds():
    random.seed(1)
    np.random.seed(1)
    state = random.getstate()
    first = reviews.corpus(300)
    assert random.getstate() == state  # nor does it disturb them
    random.seed(2)
    np.random.seed(2)
    assert reviews.corpus(300) == first


def test_corpus_is_the_same_in_every_process():
    """Python salts its string hashes anew in each process: the order of a set must not reach the corpus."""
    code = "from minirlhf import reviews; print(reviews.corpus(50))"
    outputs = {subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": salt}, cwd=ROOT,
                              capture_output=True, text=True, check=True).stdout for salt in ("1", "2")}
    assert outputs == {f"{reviews.corpus(50)}\n"}
