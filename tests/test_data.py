"""Readers, splits, windows and rows of ids, on small files worked by hand and on many random lengths."""

import gzip
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from minirlhf import data, reviews
from minirlhf.config import UserError
from minirlhf.data import Corpus, Pair, Windows
from minirlhf.tokenizer import BPE

BYTES = BPE()  # no merges: ids are bytes, so that every row can be written down
EOS = 256


def write(path, content):
    """Write bytes, text, or a list of rows as JSONL (compressed where the name says so); returns the path."""
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def documents_of(corpus):
    return sorted(corpus.train + corpus.held_out)


def error_of(function, *arguments):
    """The text of the UserError that a call must end in: one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def held_out_name(held_out, count=1):
    """Short texts on the wanted side of the split, found by trying."""
    names = (f"w{i}" for i in itertools.count())
    return list(itertools.islice((name for name in names if (data.hash_fraction(name) < 0.15) == held_out), count))


# ---- reading documents -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_documents_are_read_from_jsonl(tmp_path, name):
    rows = [{"text": "one two"}, {"prompt": "ask", "completion": " answer"}, {"completion": "alone"},
            {"text": "été 🍜", "label": 3}, {"text": "  \n"}, {"prompt": "", "completion": ""}]
    corpus = data.read_corpus([write(tmp_path / name, rows)])
    assert documents_of(corpus) == [("", "alone"), ("", "one two"), ("", "été 🍜"), ("ask", " answer")]
    assert corpus.train_streams == corpus.held_out_streams == []


def test_blank_lines_crlf_and_a_byte_order_mark_are_no_content(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "two"}')
    assert documents_of(data.read_corpus([path])) == [("", "one"), ("", "two")]
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf0123456789")
    assert data.read_corpus([path]).train_streams == ["012345678"]


def test_several_files_make_one_corpus(tmp_path):
    texts = [f"document {i}" for i in range(20)]
    rows = [{"text": text} for text in texts]
    paths = [write(tmp_path / "a.jsonl", rows[:9]), write(tmp_path / "b.txt", "x" * 10),
             write(tmp_path / "c.jsonl.gz", rows[9:]), write(tmp_path / "d.txt.gz", "y" * 20)]
    corpus = data.read_corpus(paths)
    assert documents_of(corpus) == sorted(("", text) for text in texts)
    assert corpus.train_streams == ["x" * 9, "y" * 18] and corpus.held_out_streams == ["x", "yy"]


def test_without_files_the_corpus_is_the_built_in_world():
    corpus = data.read_corpus()
    assert documents_of(corpus) == sorted(reviews.corpus())
    assert not {prompt for prompt, _ in corpus.train} & {prompt for prompt, _ in corpus.held_out}
    assert 0.10 < len({prompt for prompt, _ in corpus.held_out}) / len(reviews.prompts()) < 0.20


def test_training_texts_are_the_training_side_only():
    corpus = Corpus([("ask", " yes")], [("other", " no")], ["stream"], ["rest"])
    assert corpus.training_texts() == ["ask yes", "stream"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_txt_is_cut_at_nine_tenths_of_its_bytes(tmp_path, name):
    text = "".join(random.Random(0).choices("ab \n", k=1003))
    corpus = data.read_corpus([write(tmp_path / name, text)])
    assert corpus.train_streams == [text[:902]] and corpus.held_out_streams == [text[902:]]  # 902 = floor(902.7)
    assert corpus.train == corpus.held_out == []


def test_a_txt_is_never_cut_inside_a_character(tmp_path):
    """Shift characters of 1 to 4 bytes over the cut, byte by byte."""
    for shift in range(24):
        text = "x" * shift + "aé日🍜" * 12
        corpus = data.read_corpus([write(tmp_path / "a.txt", text)])
        first, rest = corpus.train_streams[0], corpus.held_out_streams[0]
        assert first + rest == text  # lost or broken bytes would show
        assert 0 <= len(first.encode()) - 0.9 * len(text.encode()) + 1 < 5  # at most 3 bytes late


# ---- errors ----------------------------------------------------------------------------------


ROW = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("content, place, words", [
    (b'{"text": "a"}\n\nnot json\n', ":3", "not JSON"),
    (b'{"text": "a"}\n{"text": "b"\n', ":2", "not JSON"),
    (b"\n[1, 2]\n", ":2", "object"),
    (b'{"text": "a"}\n"text"\n', ":2", "object"),
    (b"{}\n", ":1", "needs"),
    (b'{"text": "a"}\n{"prompt": "p"}\n', ":2", "needs"),
    (b'{"text": "a"}\n{"text": 7}\n', ":2", '"text" must be a string'),
    (b'{"text": null}\n', ":1", '"text" must be a string'),
    (b'{"prompt": ["p"], "completion": "c"}\n', ":1", '"prompt" must be a string'),
    (b'{"prompt": "p", "completion": {}}\n', ":1", '"completion" must be a string'),
    (b'{"text": "a"}\n{"text": "\xff"}\n', ":2", "0xff"),
    (b"", "", "empty"),
    (b"\n  \n\t\n", "", "empty"),
    (b"[" * 100_000, ":1", "not JSON"),
], ids=lambda value: repr(value)[:40])
def test_bad_jsonl_is_told_with_file_and_line(tmp_path, content, place, words):
    path = write(tmp_path / "bad.jsonl", content)
    message = error_of(data.read_corpus, [path])
    assert f"{path}{place}:" in message and words in message


@pytest.mark.parametrize("content, place, words", [
    (b"first\nsecond \xe9t\xe9\n", ":2", "0xe9"),
    ("text".encode("utf-16"), ":1", "UTF-8"),
    (b"", "", "empty"),
    (b" \n\n", "", "empty"),
])
def test_bad_txt_is_told_with_file_and_line(tmp_path, content, place, words):
    path = write(tmp_path / "bad.txt", content)
    for read in (lambda: data.read_corpus([path]), lambda: data.read_prompts(path, 4)):
        message = error_of(read)
        assert f"{path}{place}:" in message and words in message


@pytest.mark.parametrize("name", ["no.txt", "no.jsonl", "no.jsonl.gz"])
def test_a_missing_file_is_named(tmp_path, name):
    path = tmp_path / name
    for read in (lambda: data.read_corpus([path]), lambda: data.read_prompts(path, 4), lambda: data.read_pairs([path])):
        assert str(path) in error_of(read)


def test_a_folder_in_place_of_a_file_is_told(tmp_path):
    assert str(tmp_path) in error_of(data.read_corpus, [tmp_path])


def gzip_of_many_rows():
    rng = random.Random(0)
    return gzip.compress("".join(json.dumps({"text": str(rng.random())}) + "\n" for _ in range(500)).encode())


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "changed inside"])
def test_a_damaged_gz_is_told(tmp_path, damage):
    whole = gzip_of_many_rows()
    middle = bytes(byte ^ 0x55 for byte in whole[200:240])
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes({"truncated": whole[: len(whole) // 2], "not gzip": b'{"text": "a"}\n',
                      "changed inside": whole[:200] + middle + whole[240:]}[damage])
    assert str(path) in error_of(data.read_corpus, [path])


@pytest.mark.parametrize("rows", [[{"text": " "}, {"completion": "\n"}], [{"text": ""}]])
def test_documents_without_text_are_no_corpus(tmp_path, rows):
    assert "too little" in error_of(data.read_corpus, [write(tmp_path / "a.jsonl", rows)])


@pytest.mark.parametrize("held_out", [False, True])
def test_one_document_is_too_little(tmp_path, held_out):
    """One text cannot be trained on and held out, whichever side its hash puts it on."""
    text, = held_out_name(held_out)
    assert "too little" in error_of(data.read_corpus, [write(tmp_path / "a.jsonl", [{"text": text}])])


@pytest.mark.parametrize("text", ["a", "é", "🍜"])
def test_one_character_is_too_little(tmp_path, text):
    assert "too little" in error_of(data.read_corpus, [write(tmp_path / "a.txt", text)])


def test_lone_surrogates_of_json_do_not_reach_the_corpus(tmp_path):
    """JSON may spell half of a surrogate pair; such a str can neither be printed nor counted in bytes."""
    path = write(tmp_path / "a.jsonl", b'{"text": "a \\ud800 b"}\n{"prompt": "\\udfff", "completion": "c"}\n')
    for document in documents_of(data.read_corpus([path])):
        "".join(document).encode()


# ---- splits ----------------------------------------------------------------------------------


def test_hash_fraction_is_blake2b_of_the_text():
    """The digests of `printf ramen | b2sum -l 64` and so on: no salt, no seed, the same on every machine."""
    assert data.hash_fraction("anything") == pytest.approx(0x0061511F4D1F05F4 / 2**64, abs=1e-12)
    assert data.hash_fraction("ramen") == pytest.approx(0x646A73D89715A60E / 2**64, abs=1e-12)


def test_split_holds_out_15_percent_and_ignores_order():
    items = [f"item {i}" for i in range(4000)]
    train, held_out = data.split(items, key=str)
    assert sorted(train + held_out) == sorted(items)
    assert 0.13 < len(held_out) / len(items) < 0.17
    assert train == sorted(train, key=items.index) and held_out == sorted(held_out, key=items.index)
    shuffled = random.Random(1).sample(items, len(items))
    assert [set(side) for side in data.split(shuffled, key=str)] == [set(train), set(held_out)]
    # A text keeps its side when others join.
    assert set(data.split(items[:100], key=str)[1]) == set(held_out) & set(items[:100])


def test_split_ignores_global_seeds():
    items = [f"item {i}" for i in range(200)]
    first = data.split(items, key=str)
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    assert data.split(items, key=str) == first


def test_items_of_one_key_stay_together():
    items = [(f"key {i % 50}", i) for i in range(500)]
    train, held_out = data.split(items, key=lambda item: item[0])
    assert train and held_out and not {key for key, _ in train} & {key for key, _ in held_out}


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_split_leaves_no_side_empty(held_out, count):
    """All hashes on one side: exactly one key, the nearest to the border, changes over."""
    names = held_out_name(held_out, count)
    nearest = (max if held_out else min)(names, key=data.hash_fraction)
    train, kept = data.split(names * 2, key=str)
    assert set(train if held_out else kept) == {nearest}
    assert sorted(train + kept) == sorted(names * 2)


@pytest.mark.parametrize("held_out", [False, True])
def test_a_single_key_is_trained_on(held_out):
    """Nothing can be held out; callers then evaluate on the training side, which must not be empty."""
    name, = held_out_name(held_out)
    assert data.split([name, name], key=str) == ([name, name], [])
    assert data.split([], key=str) == ([], [])


def test_documents_that_share_one_prompt_are_split_by_their_text(tmp_path):
    """As split_pairs does: a file of answers to one instruction is not "too little text"."""
    rows = [{"prompt": "Tell a joke.", "completion": f" joke {i}"} for i in range(100)]
    corpus = data.read_corpus([write(tmp_path / "a.jsonl", rows)])
    assert corpus.train and corpus.held_out and len(corpus.train + corpus.held_out) == 100


# ---- windows ---------------------------------------------------------------------------------


def all_windows(windows, epochs=1):
    """The windows of whole epochs, as lists of ids with the last target on the end."""
    inputs, targets = windows.batch(seed=3, step=0, batch_size=len(windows.starts) * epochs)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])  # targets are the inputs one token on
    return [row + [last] for row, last in zip(inputs.tolist(), targets[:, -1].tolist())]


def test_windows_of_two_documents_by_hand():
    """The row of tokens is  eos a b c eos d;  what comes after its end is its start."""
    windows = Windows(Corpus([("a", "bc"), ("", "d")]), BYTES, block_size=4)
    a, b, c, d = b"abcd"
    assert sorted(all_windows(windows)) == sorted([[EOS, a, b, c, EOS], [EOS, d, EOS, a, b]])
    assert windows.num_tokens == 6


def test_a_long_document_has_inner_windows():
    """eos and 10 letters at block size 4: windows at tokens 0, 4 and 8."""
    windows = Windows(Corpus([("abc", "defghij")]), BYTES, block_size=4)
    row = [EOS, *b"abcdefghij"]
    assert sorted(all_windows(windows)) == sorted([row[0:5], row[4:9], row[8:11] + row[:2]])


def test_a_block_longer_than_all_text_wraps_round():
    windows = Windows(Corpus([("", "ab")]), BYTES, block_size=8)
    assert all_windows(windows) == [([EOS, *b"ab"] * 3)]


def test_every_document_start_is_visited_once_an_epoch():
    """Whatever the batch size, also where it does not divide the number of documents."""
    corpus = Corpus([("", f"{i:03}") for i in range(30)])
    windows = Windows(corpus, BYTES, block_size=4)
    for batch_size in (1, 7, 16, 45):
        batches = [windows.batch(5, step, batch_size)[0].tolist() for step in range(math.ceil(60 / batch_size))]
        rows = [tuple(row) for batch in batches for row in batch]
        expected = sorted((EOS, *f"{i:03}".encode()) for i in range(30))
        assert sorted(rows[:30]) == sorted(rows[30:60]) == expected
        assert rows[:30] != rows[30:60]  # the next epoch has another order


def test_batch_is_a_pure_function_of_seed_and_step():
    corpus = Corpus([("", f"document {i}") for i in range(20)], train_streams=["some words " * 30])
    one, two = Windows(corpus, BYTES, 8), Windows(corpus, BYTES, 8)
    forward = [one.batch(1, step, 6) for step in range(9)]
    torch.manual_seed(99)
    np.random.seed(99)
    backward = [two.batch(1, step, 6) for step in reversed(range(9))][::-1]  # as a resumed run would ask
    for (inputs, targets), (inputs_again, targets_again) in zip(forward, backward):
        assert torch.equal(inputs, inputs_again) and torch.equal(targets, targets_again)
    assert not torch.equal(one.batch(2, 0, 6)[0], forward[0][0])


def test_stream_windows_begin_anywhere_and_stay_inside():
    """26 different letters: a window tells where it began. All 27 - 4 begins come up, none runs over the end."""
    text = "abcdefghijklmnopqrstuvwxyz"
    windows = Windows(Corpus(train_streams=[text]), BYTES, block_size=4)
    row = [EOS, *text.encode()]
    possible = {tuple(row[i: i + 5]) for i in range(len(row) - 4)}
    assert {tuple(window) for window in all_windows(windows, epochs=60)} == possible
    assert len({tuple(windows.batch(0, step, 1)[0][0].tolist()) for step in range(40)}) > 10  # anew in each step


def test_stream_windows_cover_each_part_once_an_epoch():
    """One window begins in each block of the stream, so that no part of a long text is left to luck."""
    text = "".join(chr(33 + i) for i in range(81))
    windows = Windows(Corpus(train_streams=[text]), BYTES, block_size=8)
    row = [EOS, *text.encode()]
    begins = sorted(row.index(window[0]) for window in all_windows(windows))
    assert [begin // 8 for begin in begins] == list(range(len(begins))) and len(begins) >= 9


def test_a_stream_shorter_than_the_block_still_makes_a_window():
    windows = Windows(Corpus(train_streams=["ab"]), BYTES, block_size=6)
    assert all_windows(windows) == [[EOS, *b"ab", EOS, *b"ab", EOS]]


def test_windows_hold_nothing_of_the_held_out_side():
    corpus = Corpus([("a", "a")], [("X", "X")], ["aaaaaaaaaa"], ["XXXXXX"])
    assert {i for window in all_windows(Windows(corpus, BYTES, 4)) for i in window} <= {EOS, ord("a")}


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_order_covers_each_epoch_once_however_it_is_sliced(n):
    rng = random.Random(n)
    whole = data.order(n, 4, 0, 5 * n).tolist()
    for epoch in range(5):
        assert sorted(whole[epoch * n: epoch * n + n]) == list(range(n))
    pieces, taken = [], 0
    while taken < 5 * n:
        k = min(rng.randint(1, 2 * n), 5 * n - taken)
        pieces += data.order(n, 4, taken, k).tolist()
        taken += k
    assert pieces == whole
    if n == 30:  # shuffled, anew in each epoch, otherwise with another seed
        assert whole[:n] != list(range(n)) and whole[:n] != whole[n: 2 * n]
        assert data.order(n, 5, 0, n).tolist() != whole[:n]


# ---- prompts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text, count, expected", [
    ("a good  film , they say", 3, "a good  film"),
    ("a good film", 2, "a good"),
    ("a good film", 1, "a"),
    ("a good film", 3, None),  # nothing would be left to write
    ("a good film  \n", 3, None),
    ("a good film", 4, None),
    ("", 1, None),
    ("   ", 1, None),
    (" \n one\ttwo\nthree four", 3, " \n one\ttwo\nthree"),
    ("été 🍜 soup of", 3, "été 🍜 soup"),
])
def test_first_words(text, count, expected):
    assert data.first_words(text, count) == expected


def test_corpus_prompts_are_the_documents_own_or_their_first_words():
    corpus = Corpus(
        train=[("own prompt", " text"), ("", "one two three four"), ("own prompt", " again")],
        held_out=[("other prompt", " x"), ("", "too short"), ("", "one two three five")],
        train_streams=["First paragraph is long.\nStill the first.\n \nThe second one here.\n\n\n"],
        held_out_streams=["Held out words too."],
    )
    prompts = data.corpus_prompts(corpus, 3)
    assert sorted(prompts) == sorted(["own prompt", "one two three", "other prompt", "First paragraph is",
                                      "The second one", "Held out words"])


def test_read_prompts_of_txt(tmp_path):
    path = write(tmp_path / "p.txt", "  I had the ramen. \r\n\nsecond\nsecond\n  ")
    assert data.read_prompts(path, 4) == ["I had the ramen.", "second"]


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_read_prompts_of_jsonl(tmp_path, name):
    dialogue = "\n\nHuman: hi\n\nAssistant:"
    rows = [{"prompt": " as it is "}, {"prompt": "q", "completion": "a"}, {"text": "one two three four"},
            {"prompt": ""}, {"text": "short text"}, {"chosen": dialogue + " yes", "rejected": dialogue + " no"},
            {"prompt": "q"},
            {"prompt": "both", "text": "one two three four"}, {"prompt": "pair", "chosen": "x", "rejected": "y"}]
    assert data.read_prompts(write(tmp_path / name, rows), 3) == [
        " as it is ", "q", "one two three", dialogue, "both", "pair"]


def test_read_prompts_errors(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"completion": "b"}])
    assert f"{path}:2:" in error_of(data.read_prompts, path, 4)
    path = write(tmp_path / "q.jsonl", [{"text": "one two three four"}, {"prompt": ""}])
    message = error_of(data.read_prompts, path, 4)
    assert str(path) in message and "--prompt_words" in message


# ---- preference pairs ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_pairs_are_read_with_all_their_keys(tmp_path, name):
    rows = [ROW, ROW | {"margin": 2}, ROW | {"margin": -0.5, "tie": True}, ROW | {"finished": [True, False]},
            ROW | {"margin": None, "tie": False, "finished": [False, True], "annotator": 7}, ROW | {"prompt": ""}]
    pairs, skipped = data.read_pairs([write(tmp_path / name, rows)])
    assert skipped == 0
    assert pairs == [
        Pair("p", "a", "b"), Pair("p", "a", "b", 2.0), Pair("p", "a", "b", -0.5, True),
        Pair("p", "a", "b", finished=(True, False)), Pair("p", "a", "b", finished=(False, True)), Pair("", "a", "b")]
    assert isinstance(pairs[1].margin, float)


def test_dialogues_are_split_at_the_last_assistant_turn(tmp_path):
    head = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant:"
    rows = [{"chosen": head + " because", "rejected": head + " no\n\nHuman: oh"},
            {"chosen": "no turns at all", "rejected": "really none"},
            {"prompt": "x", "chosen": head + " because", "rejected": "z"}]  # told its prompt: nothing to split
    assert data.read_pairs([write(tmp_path / "p.jsonl", rows)])[0] == [
        Pair(head, " because", " no\n\nHuman: oh"), Pair("", "no turns at all", "really none"),
        Pair("x", head + " because", "z")]


def test_a_pair_survives_row_and_read(tmp_path):
    pairs = [Pair("p", "a", "b"), Pair("", " a\n", "\u2028b"), Pair("p", "a", "b", 1.5, True, (False, True)),
             Pair("p", "a", "b", finished=(False, False)), Pair("\n\nAssistant:", "x\n\nAssistant: y", "z")]
    path = write(tmp_path / "p.jsonl", [pair.row() for pair in pairs])
    assert data.read_pairs([path]) == (pairs, 0)
    assert set(pairs[0].row()) == {"prompt", "chosen", "rejected"}  # defaults left out


def test_useless_rows_are_skipped_and_counted(tmp_path):
    one, other = ("\n\nHuman: 1\n\nAssistant:", "\n\nHuman: 2\n\nAssistant:")
    useless = [ROW | {"rejected": "a"}, ROW | {"chosen": " \n"}, ROW | {"rejected": ""},
               {"chosen": one + " a", "rejected": other + " b"}, {"chosen": one + " a", "rejected": one}]
    useful = [ROW | {"prompt": f"p{i}"} for i in range(5)]
    paths = [write(tmp_path / "a.jsonl", useless), write(tmp_path / "b.jsonl", useful)]
    pairs, skipped = data.read_pairs(paths)  # exactly half: still read
    assert [pair.prompt for pair in pairs] == ["p0", "p1", "p2", "p3", "p4"] and skipped == 5
    write(paths[1], useful[:4])
    message = error_of(data.read_pairs, paths)
    assert "5 of 9" in message and all(str(path) in message for path in paths)


def test_no_files_give_no_pairs():
    assert data.read_pairs(()) == ([], 0)


@pytest.mark.parametrize("change", [
    {"margin": "1"}, {"margin": True}, {"margin": False}, {"margin": float("nan")}, {"margin": float("inf")},
    {"margin": [1]}, {"margin": []}, {"margin": ""}, {"margin": 10**400}, {"tie": 1}, {"tie": "yes"}, {"tie": []},
    {"finished": True}, {"finished": [True]}, {"finished": [1, 0]}, {"finished": [True, False, True]},
    {"finished": "ab"}, {"finished": {"a": True, "b": False}}, {"chosen": 3}, {"rejected": None}, {"prompt": {}},
], ids=lambda change: str(change)[:30])
def test_wrong_types_in_a_pair_are_told_with_file_and_line(tmp_path, change):
    path = write(tmp_path / "p.jsonl", [ROW, ROW | change])
    message = error_of(data.read_pairs, [path])
    assert f"{path}:2:" in message and f'"{next(iter(change))}"' in message


@pytest.mark.parametrize("missing", ["chosen", "rejected"])
def test_missing_keys_of_a_pair_are_told_with_file_and_line(tmp_path, missing):
    path = write(tmp_path / "p.jsonl", [ROW, {key: value for key, value in ROW.items() if key != missing}])
    message = error_of(data.read_pairs, [path])
    assert f"{path}:2:" in message and f'"{missing}"' in message


def texts_of(pairs):
    return {frozenset((pair.chosen, pair.rejected)) for pair in pairs}


def test_split_pairs_keeps_a_prompt_on_one_side():
    pairs = [Pair(f"prompt {i % 40}", f"a{i}", f"b{i}") for i in range(200)]
    train, held_out = data.split_pairs(pairs)
    assert len(train) + len(held_out) == 200 and train and held_out
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    # The side does not depend on which other prompts there are.
    some = [pair for pair in pairs if int(pair.prompt.split()[1]) < 30]
    assert {pair.prompt for pair in data.split_pairs(some)[1]} == {pair.prompt for pair in held_out if pair in some}


@pytest.mark.parametrize("prompt", ["", "always the same"])
def test_split_pairs_by_answers_where_prompts_do_not_tell_pairs_apart(prompt):
    """The same two answers, either way round, stay together."""
    pairs = [Pair(prompt, f"a{i}", f"b{i}") for i in range(100)] + [Pair(prompt, f"b{i}", f"a{i}") for i in range(100)]
    train, held_out = data.split_pairs(pairs)
    assert 10 <= len(held_out) <= 60 and len(train) + len(held_out) == 200
    assert not texts_of(train) & texts_of(held_out)


def test_split_pairs_spreads_empty_prompts_among_others():
    pairs = [Pair("", f"a{i}", f"b{i}") for i in range(100)] + [Pair("one prompt", f"c{i}", f"d{i}") for i in range(5)]
    train, held_out = data.split_pairs(pairs)
    assert any(not pair.prompt for pair in train) and any(not pair.prompt for pair in held_out)
    assert len({pair in train for pair in pairs if pair.prompt}) == 1


def test_groups_of_by_hand():
    ab, bc, cd, ef = (Pair("p", *two) for two in ("ab", "bc", "cd", "ef"))
    other = Pair("q", "a", "b")
    assert data.groups_of([ab, bc, cd, ef]) == [[ab, bc, cd], [ef]]  # c d shares its text with b c only
    assert data.groups_of([ab, other, bc]) == [[ab], [other], [bc]]  # another prompt; and no neighbour any more
    assert data.groups_of([]) == []


def test_all_pairs_of_a_prompts_answers_are_one_group():
    """Of ab ac ad bc bd cd, bc shares nothing with ad before it, but both of its texts with the group."""
    pairs = [Pair(prompt, *two) for prompt in "pq" for two in itertools.combinations("abcd", 2)]
    assert data.groups_of(pairs) == [pairs[:6], pairs[6:]]


# ---- rows of ids -----------------------------------------------------------------------------


def test_encode_answer_by_hand():
    eos, p, q, r, x, y, z = EOS, *b"pqrxyz"
    assert data.encode_answer(BYTES, "pq", "x", True, 5) == ([eos, p, q, x, eos], False)
    assert data.encode_answer(BYTES, "pq", "x", False, 5) == ([eos, p, q, x], False)
    assert data.encode_answer(BYTES, "pqr", "x", True, 5) == ([eos, q, r, x, eos], True)  # the prompt from the left
    assert data.encode_answer(BYTES, "pqr", "xyz", True, 5) == ([eos, q, r, x, y], True)  # half is prompt; no eos
    assert data.encode_answer(BYTES, "", "xyz", True, 4) == ([eos, x, y, z], True)  # only eos did not fit


def test_encode_answer_cuts_the_prompt_first_then_the_answer():
    """Brute force from the rules: of all ways to keep k ids of the prompt's end and m of the answer's start that
    fit, k not under half of the block (or the whole prompt), the one that keeps most of the answer, then most
    of the prompt."""
    rng = random.Random(0)
    cuts = 0
    for _ in range(1500):
        block_size, finished = rng.randint(4, 30), rng.random() < 0.5
        # No id of the prompt stands in the answer, and none twice: where a row was cut is plain to see.
        prompt, answer = bytes(range(rng.randint(0, 50))), bytes(range(100, 100 + rng.randint(0, 50)))
        full = [*answer] + [EOS] * finished
        half = min(len(prompt), (block_size - 1) // 2)
        fits = [(m, k) for k in range(half, len(prompt) + 1) for m in range(len(full) + 1) if 1 + k + m <= block_size]
        m, k = max(fits)
        expected = [EOS, *prompt[len(prompt) - k:], *full[:m]]
        ids, cut = data.encode_answer(BYTES, prompt, answer, finished, block_size)
        assert ids == expected and cut == ((m, k) != (len(full), len(prompt)))
        assert len(ids) <= block_size and ids[0] == EOS
        assert (EOS in ids[1:]) == (finished and m == len(full))
        cuts += cut
    assert 300 < cuts < 1400


def test_prompt_and_answer_are_encoded_separately():
    """As in a rollout: a merge may not join the prompt's end to the answer's start."""
    tokenizer = BPE([(ord("a"), ord("b"))])
    assert tokenizer.encode("ab") == [257]
    assert data.encode_answer(tokenizer, "a", "b", False, 8)[0] == [EOS, ord("a"), ord("b")]


def test_encode_prompts():
    a, b, c, d = b"abcd"
    rows, cut = data.encode_prompts(BYTES, ["", "a", "abc", "abcd", "abcda"], room=4)
    assert rows == [[EOS], [EOS, a], [EOS, a, b, c], [EOS, b, c, d], [EOS, c, d, a]] and cut == 2
    assert data.encode_prompts(BYTES, ["abc"], room=2) == ([[EOS, c]], 1)


def test_right_pad():
    ids, last = data.right_pad([[5, 6, 7], [8], [9, 0]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0], [9, 0, 0]] and last.tolist() == [2, 0, 1]
    assert ids.dtype == last.dtype == torch.int64
