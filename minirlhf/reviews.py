"""The built-in world: short restaurant reviews, and the *gold* score of any text as a review.

    prompt   I had the ramen at Luna.
    answer    The ramen was very fresh. The waiter was not rude. The bill was steep.

A small grammar writes the reviews, so gold can read any text with the same grammar and say exactly
how good it is: the judgement that a reward model only sees through preferences. The world is
fixed; no seed changes the words, the weights or which prompts exist. Next: data.py.
"""

import random
import re

DISHES = ("ramen pizza curry lasagna paella risotto burger salad steak sushi stew pasta "
          "omelette kebab falafel burrito goulash couscous salmon chowder dumpling pancake pie soup").split()
PLACES = ("Luna Rosa Milo Otto Iris Juno Nero Olive Saffron Harbor "
          "Maple Cedar Ember Willow Aurora Bella Felix Hugo Stella Tivoli").split()

# kind -> (subjects, good adjectives, bad adjectives). A dish is a further subject of kind food.
KINDS = {
    "food": ("food dessert bread", "fresh tasty delicious juicy superb", "bland stale soggy greasy burnt"),
    "staff": ("staff waiter chef owner", "friendly polite warm helpful cheerful", "rude slow grumpy careless bored"),
    "room": ("room music garden table", "cozy lovely charming bright pretty", "dirty noisy cramped gloomy dull"),
    "price": ("price bill cost menu", "fair modest honest decent sensible", "steep absurd silly outrageous shady"),
}
KINDS = {kind: tuple(words.split() for words in lists) for kind, lists in KINDS.items()}
KIND_OF = {subject: kind for kind, (subjects, _, _) in KINDS.items() for subject in subjects}
KIND_OF |= dict.fromkeys(DISHES, "food")
SENTIMENT = {(kind, word): sign for kind, (_, good, bad) in KINDS.items()
             for sign, words in ((1, good), (-1, bad)) for word in words}

DISH_OF = {f"I had the {dish} at {place}.": dish for dish in DISHES for place in PLACES}
SENTENCE = re.compile(r"The (\w+) was( not)?( very| really)? (\w+)")


def prompts():
    """All 480 prompts of the world, each naming a dish and a place."""
    return list(DISH_OF)


def dish_of(prompt):
    """The dish that a prompt of this world asks about; None for any other text."""
    return DISH_OF.get(prompt)


def write_answer(prompt, rng):
    """A review of the prompt's dish and place, in one mood. rng: random.Random.

    Two to five sentences. One writer in five is in a good mood and finds nine things in ten good;
    for the others it is one in ten. Hasty as they are, a tenth of their subjects repeat an earlier one.
    """
    goodness = rng.choice((0.9, 0.1, 0.1, 0.1, 0.1))
    kinds = rng.sample(sorted(KINDS), 4) + [rng.choice(sorted(KINDS))]
    subjects, sentences = [], []
    for kind in kinds[: rng.randint(2, 5)]:
        subject = rng.choice(KINDS[kind][0] + [dish_of(prompt)] * 3 if kind == "food" else KINDS[kind][0])
        if subjects and rng.random() < 0.1:
            subject = rng.choice(subjects)
        subjects.append(subject)
        _, good, bad = KINDS[KIND_OF[subject]]
        negated = rng.random() < 0.25
        intense = rng.choice(("", "", "", " very", " really"))
        adjective = rng.choice(good if (rng.random() < goodness) != negated else bad)
        sentences.append(f" The {subject} was{' not' if negated else ''}{intense} {adjective}.")
    return "".join(sentences)


def gold(prompt, answer):
    """The true score of an answer: a sum over its sentences (split at full stops), plus the dish.

    +1 or -1 by the sentiment of the adjective; "not" flips the sign; "very" and "really" make it
    1.5. Instead, -1 for a subject that an earlier sentence had, for a sentence that the grammar
    cannot write, and for an unfinished last sentence. +1 once if the prompt's dish is mentioned.

    >>> gold("I had the ramen at Luna.", " The ramen was very fresh. The bill was not steep.")
    3.5
    >>> gold("I had the ramen at Luna.", " The chef was warm. The chef was not warm. The staff")
    -1.0
    """
    *sentences, unfinished = answer.split(".")
    score = -1.0 if unfinished.strip() else 0.0
    seen = set()
    for sentence in sentences:
        match = SENTENCE.fullmatch(sentence.strip())
        subject, negated, intense, adjective = match.groups() if match else (None,) * 4
        sentiment = SENTIMENT.get((KIND_OF.get(subject), adjective))
        if sentiment is None or subject in seen:
            score -= 1.0
        else:
            score += sentiment * (-1 if negated else 1) * (1.5 if intense else 1)
        seen.add(subject)
    if dish_of(prompt) in re.findall(r"\w+", answer):
        score += 1.0
    return score


def corpus(size=12_000):
    """`size` (prompt, answer) documents, always the same ones."""
    rng, all_prompts = random.Random(0), prompts()
    chosen = [rng.choice(all_prompts) for _ in range(size)]
    return [(prompt, write_answer(prompt, rng)) for prompt in chosen]
