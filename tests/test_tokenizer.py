"""The tokenizer against examples worked by hand, a naive trainer and round trips of arbitrary bytes."""

import json
import random
from collections import Counter

import pytest

from minirlhf.tokenizer import BPE, load_tokenizer

SAMPLE = ["The ramen was very fresh. The bill was steep.\n", "The chef's 42 pies, 42 soups!\n\n  indented été 🍜🍜\n"] * 3
TOKENIZERS = {"untrained": BPE(), "trained": BPE.train(SAMPLE, 400)}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


# ---- training --------------------------------------------------------------------------------


def test_training_example_worked_by_hand():
    """low x 3, lot x 2, new x 2; each text is one word. Bytes: e 101, l 108, n 110, o 111, t 116, w 119.

    1. lo 5, ow 3, ot 2, ne 2, ew 2                          merge l o        -> 257
    2. (257 w) 3, (257 t) 2, ne 2, ew 2                      merge 257 w      -> 258
    3. (257 t) 2, ne 2, ew 2: a tie, the smaller ids first   merge e w        -> 259
    4. (257 t) 2, (n 259) 2: again a tie                     merge n 259      -> 260
    5. (257 t) 2                                             merge 257 t      -> 261
    Then every word is one token.
    """
    merges = [(108, 111), (257, 119), (101, 119), (110, 259), (257, 116)]
    texts = ["new", "lot", "low", "low", "new", "lot", "low"]
    assert BPE.train(texts, 1000).merges == merges
    assert BPE.train(texts, 259).merges == merges[:2]


def test_count_of_a_word_weighs_its_pairs():
    """xy stands in three different words but occurs three times; ab stands in one word, four times."""
    assert BPE.train(["xyp", "xyq", "xyr", "ab", "ab", "ab", "ab"], 258).merges == [(97, 98)]


def naive_merges(words, vocab_size):
    """BPE from its definition: recount every pair each time. A word is a str with one character per id."""
    words, merges = list(words), []
    while 257 + len(merges) < vocab_size:
        counts = Counter(word[i: i + 2] for word in words for i in range(len(word) - 1))
        if not counts or max(counts.values()) < 2:
            break
        pair = min(counts, key=lambda pair: (-counts[pair], ord(pair[0]), ord(pair[1])))
        words = [word.replace(pair, chr(257 + len(merges))) for word in words]
        merges.append((ord(pair[0]), ord(pair[1])))
    return merges


@pytest.mark.parametrize("alphabet, longest", [("ab", 12), ("abcd", 8), ("abcdefghijklmnop", 6)])
def test_training_equals_the_naive_trainer(alphabet, longest):
    """Few letters and long words bring runs such as aaaa, and pairs that vanish and come back."""
    rng = random.Random(len(alphabet))
    words = ["".join(rng.choices(alphabet, k=rng.randint(1, longest))) for _ in range(300)]
    expected = naive_merges(words, 340)
    assert len(expected) > 60
    assert BPE.train(words, 340).merges == expected


def test_training_does_not_depend_on_the_order_of_texts():
    words = ["".join(random.Random(i).choices("abcde", k=6)) for i in range(100)]
    assert BPE.train(words, 330).merges == BPE.train(words[::-1], 330).merges


def test_training_stops_when_no_pair_occurs_twice():
    assert BPE.train(["abcdef"], 1000).vocab_size == 257
    assert BPE.train(["abab"], 1000).merges == [(97, 98)]  # then 257 257, once
    assert BPE.train([], 1000).merges == BPE.train(["", "a"], 1000).merges == []


def test_vocab_size_is_kept():
    words = ["".join(random.Random(i).choices("abcde", k=9)) for i in range(100)]
    for vocab_size in (257, 258, 300):
        tokenizer = BPE.train(words, vocab_size)
        assert tokenizer.vocab_size == vocab_size
        assert max(i for word in words for i in tokenizer.encode(word)) < vocab_size


# ---- encoding --------------------------------------------------------------------------------


def test_encode_applies_merges_in_rank_order():
    """In abc either ab or bc can be merged: the earlier merge wins, not the leftmost pair."""
    a, b, c = b"abc"
    assert BPE([(b, c), (a, b)]).encode("abc") == [a, 257]
    assert BPE([(a, b), (b, c)]).encode("abc") == [257, c]


def test_encode_of_the_hand_worked_example():
    tokenizer = BPE([(108, 111), (257, 119), (101, 119), (110, 259), (257, 116)])
    assert tokenizer.encode("lowt") == [258, 116]  # lo w t -> low t
    assert tokenizer.encode("newlot") == [260, 261]  # n e w lo t -> n ew lo t -> new lo t -> new lot
    assert tokenizer.encode("oloo") == [111, 257, 111]


def test_encode_equals_every_merge_in_turn():
    """Brute force: go through the merges in order and replace each wherever it stands."""
    rng = random.Random(5)
    words = ["".join(rng.choices("abc", k=rng.randint(1, 15))) for _ in range(200)]
    tokenizer = BPE.train(words[:100], 300)
    assert tokenizer.vocab_size == 300
    for word in words:
        expected = word
        for i, (left, right) in enumerate(tokenizer.merges):
            expected = expected.replace(chr(left) + chr(right), chr(257 + i))
        assert tokenizer.encode(word) == [ord(character) for character in expected]


def test_untrained_encode_is_the_bytes():
    assert BPE().encode("aé\n") == [97, 0xC3, 0xA9, 10]


# ---- word cuts -------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [
    ["The", " cat", " sat", "."],
    ["Hello", " ", " world", "!!", " it", "'", "s", " 42", "\n\n", " ok"],
    ["a", "1", "b", "22", " ", " x", " 3", " ?!"],
    ["été", " naïve", " 🍜", ",", " (", "日本", ")"],
    ["\t", "x", "\n", "y", " \n", "\t", "z", "   "],
    ["snake", "_", "case", "=", "3", ".", "14"],
])
def test_words_are_cut_where_the_module_says(words):
    """Trained until every word is one token, encode shows the cuts: no merge can cross them."""
    text = "".join(words)
    tokenizer = BPE.train([text, text], 2000)
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == words


def test_no_merge_crosses_a_cut():
    """Even where the pair over the cut is the most frequent: each token is one kind of byte, plus a space before it."""

    def kind(byte):
        if bytes([byte]).isspace():
            return "white space"
        return "digit" if 48 <= byte <= 57 else "letter" if byte > 127 or bytes([byte]).isalpha() else "punctuation"

    tokenizer = BPE.train(["a.b.c 1a1a1a ,x ,x y\ny\ny  z  z\tq\tq é.é. "] * 50, 1000)
    assert len(tokenizer.merges) > 5
    for token in tokenizer.bytes_of[257:]:
        assert len({kind(byte) for byte in token.removeprefix(b" ")}) <= 1, token
    words = "ab ab ab ab "
    assert BPE.train([words * 9], 1000).encode(words * 2).count(32) == 1  # only the last space stands alone


# ---- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize("data", [
    b"", bytes(range(256)), bytes(range(256))[::-1], b"\xff\xfe\x80", b"\xe2\x82", b"\x00\x00", b" " * 1000,
    b"a" + b" " * 77 + b"b", b"\n\n\n \n\t\r\n x", "🍜🍜 été 日本".encode(), b"The ramen was very fresh. " * 3,
], ids=repr)
def test_bytes_round_trip(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_random_bytes_round_trip(tokenizer):
    rng = random.Random(0)
    for length in range(200):
        data = rng.randbytes(length)
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data
        # Text of few kinds of characters meets the merges and the cuts more often than noise does.
        data = bytes(rng.choices(b"Theramnws .\n42\xc3\xa9", k=length))
        assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


def test_trained_tokenizer_does_merge():
    """The round trips above mean little if nothing is merged."""
    trained = TOKENIZERS["trained"]
    assert len(trained.encode(SAMPLE[0])) < len(SAMPLE[0]) / 2
    assert trained.encode("The ramen") == trained.encode(b"The ramen")


def test_str_round_trip(tokenizer):
    text = "The chef's été cost 42 €.\n\n\t🍜 日本\u2028\x00  end "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_lone_surrogates_become_question_marks(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a?b?"
    assert BPE.train(["\ud800\ud800 \ud800\ud800"], 300).merges == [(63, 63)]


def test_broken_utf8_shows_as_replacement_characters(tokenizer):
    assert tokenizer.decode([0xFF, 97]) == "\ufffda"
    half, rest = [0xC3], [0xA9]  # é in two tokens: whole again when decoded together
    assert tokenizer.decode(half + rest) == "é" and tokenizer.decode(half) == "\ufffd"


# ---- eos -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["<eos>", "<|endoftext|>", "\x00", "</s>", "[EOS]", "\u0100", chr(256) * 3, ""])
def test_no_text_yields_eos(text):
    learned = BPE.train([f"{text} {text}x{text}"] * 20, 300)  # a tokenizer that has seen the name often
    for tokenizer in (*TOKENIZERS.values(), learned):
        ids = tokenizer.encode(text)
        assert tokenizer.eos == 256 and tokenizer.eos not in ids
        assert tokenizer.decode(ids) == text
    assert all(256 not in pair for pair in learned.merges)


def test_eos_adds_nothing_to_the_text(tokenizer):
    assert tokenizer.decode([256, 97, 256, 98, 256]) == "ab"


# ---- state -----------------------------------------------------------------------------------


def test_state_is_plain_json_and_loads_the_same_tokenizer(tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))
    assert state == tokenizer.state()  # a tuple would come back as a list
    loaded = load_tokenizer(state)
    assert (loaded.vocab_size, loaded.eos) == (tokenizer.vocab_size, tokenizer.eos)
    for text in (*SAMPLE, "something else, 1234", bytes(range(256))):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_encoding_twice_gives_the_same(tokenizer):
    """encode keeps a cache of words: neither a caller that changes its list nor a repeat may show."""
    first = tokenizer.encode("was was")
    kept = list(first)
    first.clear()
    assert tokenizer.encode("was was") == kept
