"""Byte-level byte-pair encoding (Sennrich et al. 2016; on bytes as in GPT-2, Radford et al. 2019).

Ids 0 to 255 are the bytes, 256 is eos, and every further id is a merge of two earlier ones. Text is
first cut into words, and no merge crosses a cut, so training and encoding work on distinct words.
eos is not made of bytes: no text encodes to it, not even one that spells its name.
No special-token parsing, no normalisation, no pad token. Next: reviews.py.
"""

import re
from collections import Counter, defaultdict

# A word with the space before it; digits; punctuation; white space. Bytes above 127 count as letters.
WORDS = re.compile(rb" ?[A-Za-z\x80-\xff]+| ?[0-9]+| ?[^\sA-Za-z0-9\x80-\xff]+|\s+(?!\S)|\s")


def merge(ids, pair, new_id):
    """Replace every occurrence of `pair` in `ids`, from the left.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    """
    merged = []
    for i in ids:
        if merged and (merged[-1], i) == pair:
            merged[-1] = new_id
        else:
            merged.append(i)
    return merged


class BPE:
    """Anything with encode, decode, vocab_size, eos and state() can take this class's place.

    merges: list of (left id, right id); the i-th makes id 257 + i.
    """

    eos = 256

    def __init__(self, merges=()):
        self.merges = [tuple(pair) for pair in merges]
        self.vocab_size = 257 + len(self.merges)
        self.rank = {pair: 257 + i for i, pair in enumerate(self.merges)}
        self.bytes_of = [bytes([i]) for i in range(256)] + [b""]
        for left, right in self.merges:
            self.bytes_of.append(self.bytes_of[left] + self.bytes_of[right])
        self.cache = {}  # word -> ids

    @classmethod
    def train(cls, texts, vocab_size):
        """Merge the most frequent pair of neighbours (ties: the smaller ids) until there are
        vocab_size ids, or no pair occurs twice.

        >>> BPE.train(["aab aab"], 259).merges    # "aa" (twice), then "aa" + "b" (twice)
        [(97, 97), (257, 98)]
        """
        counts = Counter(word for text in texts for word in WORDS.findall(text.encode("utf-8", "replace")))
        words = [(list(word), count) for word, count in counts.items()]
        pair_counts, where = Counter(), defaultdict(set)  # where: pair -> indices of words that hold it

        def tally(i, sign):  # count the pairs of word i in (sign 1) or out (sign -1)
            ids, count = words[i]
            for pair in zip(ids, ids[1:]):
                pair_counts[pair] += sign * count
                where[pair].add(i)

        for i in range(len(words)):
            tally(i, 1)
        merges = []
        while 257 + len(merges) < vocab_size:
            most = max(pair_counts.values(), default=0)
            if most < 2:
                break
            best = min(pair for pair, count in pair_counts.items() if count == most)
            for i in where.pop(best):
                tally(i, -1)
                ids, count = words[i]
                words[i] = (merge(ids, best, 257 + len(merges)), count)
                tally(i, 1)
            merges.append(best)
        return cls(merges)

    def encode(self, text):
        """str or bytes -> list of ids below vocab_size, never eos. A str's lone surrogates become "?"."""
        data = text if isinstance(text, bytes) else text.encode("utf-8", "replace")
        ids = []
        for word in WORDS.findall(data):
            if word not in self.cache:
                self.cache[word] = self.encode_word(list(word))
            ids += self.cache[word]
        return ids

    def encode_word(self, ids):
        while len(ids) > 1:
            first = min(zip(ids, ids[1:]), key=lambda pair: self.rank.get(pair, self.vocab_size))
            if first not in self.rank:
                break
            ids = merge(ids, first, self.rank[first])
        return ids

    def decode_bytes(self, ids):
        """ids -> bytes; eos adds nothing. decode_bytes(encode(b)) == b for every byte string b."""
        return b"".join(self.bytes_of[i] for i in ids)

    def decode(self, ids):
        """ids -> str; bytes that are not UTF-8 show as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def state(self):
        """Plain Python for the checkpoint; `kind` says which class reads it back."""
        return {"kind": "bpe", "merges": [list(pair) for pair in self.merges]}

    @classmethod
    def from_state(cls, state):
        return cls(state["merges"])


KINDS = {"bpe": BPE}  # an instrument that brings its own tokenizer adds it here


def load_tokenizer(state):
    """The tokenizer whose state() this is."""
    return KINDS[state["kind"]].from_state(state)
