"""Readers, splits and batches.

Files are told apart by their keys (see FORMATS). A split depends on a hash of the text and a batch
on (seed, step), so nothing here has a state to save: a resumed run asks for the same batches.
Every sequence starts with one eos; there is no pad token, padded slots hold id 0. Next: model.py.
"""

import gzip
import hashlib
import json
import re
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch

from minirlhf import reviews
from minirlhf.config import UserError

FORMATS = '{"text"}, {"prompt"}, {"prompt","completion"}, {"prompt","chosen","rejected"} or {"chosen","rejected"}'
HELD_OUT = 0.15
TEXT = (".txt", ".txt.gz")  # one stream of text each; all else is JSONL
ASSISTANT = "\n\nAssistant:"  # the last one ends the prompt of a dialogue


# ---- reading ---------------------------------------------------------------------------------


def read_lines(path):
    """Yield (place, line) of a .txt, .jsonl or .gz file, in UTF-8; place is "file:line"."""
    opener = gzip.open if str(path).endswith(".gz") else open
    empty = True
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
                empty = empty and not line.strip()
                yield place, line
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.object[error.start]:#04x} is not UTF-8; convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if empty:
        raise UserError(f"{path}: the file is empty")


def read_jsonl(path):
    """Yield (place, row) for every line of a JSONL file that is not blank."""
    for place, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: a JSON object is needed, one of {FORMATS}")
        for key in {"text", "prompt", "completion", "chosen", "rejected"} & set(row):
            if not isinstance(row[key], str):
                raise UserError(f'{place}: "{key}" must be a string, not {json.dumps(row[key])[:40]}')
            row[key] = row[key].encode("utf-8", "replace").decode()  # JSON may hold half a character, "\\ud800"
        yield place, row


# ---- splits ----------------------------------------------------------------------------------


def hash_fraction(text):
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(items, key):
    """(train, held out): an item is held out when the hash of key(item) falls below HELD_OUT.

    Items of one key stay together. Where that leaves a side empty, it gets the nearest key.
    """
    names = sorted({key(item) for item in items}, key=hash_fraction)
    count = sum(hash_fraction(name) < HELD_OUT for name in names)
    held = set(names[: min(max(count, 1), len(names) - 1)])
    return [item for item in items if key(item) not in held], [item for item in items if key(item) in held]


# ---- text for the language model -------------------------------------------------------------


@dataclass
class Corpus:
    """Text, split. Documents are (prompt, text) pairs; a .txt file is one stream of text."""

    train: list = field(default_factory=list)
    held_out: list = field(default_factory=list)
    train_streams: list = field(default_factory=list)
    held_out_streams: list = field(default_factory=list)

    def training_texts(self):
        return [prompt + text for prompt, text in self.train] + self.train_streams


def read_corpus(paths=()):
    """The corpus in these files; the built-in reviews if there are none."""
    corpus = Corpus()
    documents = [] if paths else reviews.corpus()
    for path in paths:
        if str(path).endswith(TEXT):
            data = "".join(line for _, line in read_lines(path)).encode()
            cut = len(data) * 9 // 10
            while cut < len(data) and data[cut] & 0xC0 == 0x80:  # not inside a UTF-8 character
                cut += 1
            corpus.train_streams.append(data[:cut].decode())
            corpus.held_out_streams.append(data[cut:].decode())
        else:
            for place, row in read_jsonl(path):
                if "text" in row:
                    documents.append(("", row["text"]))
                elif "completion" in row:
                    documents.append((row.get("prompt", ""), row["completion"]))
                else:
                    raise UserError(f'{place}: needs "text", or "prompt" and "completion"; has {sorted(row)}')
    documents = [document for document in documents if "".join(document).strip()]
    by_text = len({prompt for prompt, _ in documents}) == 1
    corpus.train, corpus.held_out = split(documents, key=lambda document: document[by_text] or document[1])
    if not any(corpus.train + corpus.train_streams) or not any(corpus.held_out + corpus.held_out_streams):
        raise UserError(f"{', '.join(map(str, paths))}: too little text to train on and hold some out")
    return corpus


class Windows:
    """Training windows over one long row of tokens: eos, text, eos, text, …

    A window begins at the eos before a document (at every block_size-th token too, where a
    document is longer than that) and runs on into the documents that follow; in a stream it
    begins anywhere.
    """

    def __init__(self, corpus, tokenizer, block_size):
        self.block_size = block_size
        tokens, starts = [], []
        for prompt, text in corpus.train:
            first = len(tokens)
            tokens += [tokenizer.eos] + tokenizer.encode(prompt) + tokenizer.encode(text)
            starts += range(first, len(tokens), block_size)
        jitters = [1] * len(starts)
        for text in corpus.train_streams:
            first = len(tokens)
            tokens += [tokenizer.eos] + tokenizer.encode(text)
            stop = max(first + 1, len(tokens) - block_size)
            starts += range(first, stop, block_size)
            jitters += [min(block_size, stop - start) for start in range(first, stop, block_size)]
        self.starts, self.jitters = np.array(starts), np.array(jitters)
        self.num_tokens = len(tokens)
        self.tokens = np.resize(np.array(tokens), len(tokens) + block_size + 1)  # the end runs on into the start

    def batch(self, seed, step, batch_size):
        """Inputs and targets, int64 (B, T): the batch of this step."""
        chosen = order(len(self.starts), seed, step * batch_size, batch_size)
        jitter = np.random.default_rng((seed, step, 1)).integers(self.jitters[chosen])
        rows = (self.starts[chosen] + jitter)[:, None] + np.arange(self.block_size + 1)  # (B, T + 1)
        window = torch.from_numpy(self.tokens[rows])
        return window[:, :-1], window[:, 1:]


def order(n, seed, taken, k):
    """Items taken, …, taken + k - 1 of an endless shuffle of range(n): a new permutation each epoch."""
    places = np.arange(taken, taken + k)
    epochs = {epoch: np.random.default_rng((seed, epoch)).permutation(n) for epoch in np.unique(places // n)}
    return np.array([epochs[place // n][place % n] for place in places])


# ---- prompts ---------------------------------------------------------------------------------


def first_words(text, count):
    """The first `count` words with the white space between them; None where no text would be left.

    >>> first_words("a good  film , they say", 3)
    'a good  film'
    """
    match = re.match(r"\s*" + r"\S+\s+" * (count - 1) + r"\S+(?=\s+\S)", text)
    return match[0] if match else None


def corpus_prompts(corpus, words):
    """The documents' own prompts, or where they have none their first words; each once."""
    streams = corpus.train_streams + corpus.held_out_streams
    paragraphs = [("", text) for stream in streams for text in re.split(r"\n\s*\n", stream)]
    found = [prompt or first_words(text, words) for prompt, text in corpus.train + corpus.held_out + paragraphs]
    return list(dict.fromkeys(filter(None, found)))


def read_prompts(path, words):
    """The prompts of a file, each once: a line of .txt, "prompt" in JSONL, or the first words of "text"."""
    if str(path).endswith(TEXT):
        found = [part.strip() for _, line in read_lines(path) for part in line.splitlines()]
    else:
        found = []
        for place, row in read_jsonl(path):
            if "prompt" in row:
                found.append(row["prompt"])
            elif "chosen" in row:
                found.append(split_dialogue(row, "chosen")[0])
            elif "text" in row:
                found.append(first_words(row["text"], words))
            else:
                raise UserError(f'{place}: needs "prompt" or "text"; has {sorted(row)}')
    found = list(dict.fromkeys(filter(None, found)))
    if not found:
        raise UserError(f"{path}: no prompt in this file (texts need more than {words} words: --prompt_words)")
    return found


# ---- preference pairs ------------------------------------------------------------------------


@dataclass
class Pair:
    """Two answers to one prompt; `chosen` was preferred by `margin`, or they tie.

    finished: did (chosen, rejected) end by themselves? An unfinished answer gets no eos.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float = 0.0
    tie: bool = False
    finished: tuple = (True, True)

    def row(self):
        """The pair as a JSON object, defaults left out."""
        return {key: value for key, value in vars(self).items() if value != getattr(Pair, key, None)}


def split_dialogue(row, key):
    """(prompt, answer) of a row; without "prompt", row[key] is a dialogue: its prompt ends with the last "Assistant:"."""
    if "prompt" in row:
        return row["prompt"], row[key]
    head, mark, answer = row[key].rpartition(ASSISTANT)
    return head + mark, answer


def read_pairs(paths):
    """(pairs, number of rows skipped). Rows that teach nothing are skipped: equal answers, an empty
    answer, dialogues with different prompts. More than half of them is an error."""
    pairs, skipped = [], 0
    for path in paths:
        for place, row in read_jsonl(path):
            if "chosen" not in row or "rejected" not in row:
                raise UserError(f'{place}: needs "chosen" and "rejected"; has {sorted(row)}')
            prompt, chosen = split_dialogue(row, "chosen")
            other, rejected = split_dialogue(row, "rejected")
            row = {"margin": 0.0, "tie": False, "finished": [True, True]} | {k: v for k, v in row.items() if v is not None}
            margin, tie, finished = row["margin"], row["tie"], row["finished"]
            if type(margin) not in (int, float) or not abs(margin) < 1e300:
                raise UserError(f'{place}: "margin" must be a number')
            if not isinstance(tie, bool):
                raise UserError(f'{place}: "tie" must be true or false')
            if not isinstance(finished, list) or [type(done) for done in finished] != [bool, bool]:
                raise UserError(f'{place}: "finished" must be two of true and false')
            if prompt == other and chosen.strip() and rejected.strip() and chosen != rejected:
                pairs.append(Pair(prompt, chosen, rejected, float(margin), tie, tuple(finished)))
            else:
                skipped += 1
    if skipped > len(pairs):
        raise UserError(f"{', '.join(map(str, paths))}: {skipped} of {skipped + len(pairs)} pairs are useless (equal "
                        "answers, an empty answer, or different prompts); more than half, so nothing was trained")
    return pairs, skipped


def split_pairs(pairs):
    """(train, held out) by prompt; by the answers where the prompts do not tell pairs apart."""
    by_prompt = len({pair.prompt for pair in pairs}) > 1
    return split(pairs, key=lambda pair: (by_prompt and pair.prompt) or "\n".join(sorted((pair.chosen, pair.rejected))))


def groups_of(pairs):
    """Lists of neighbouring pairs that share a prompt and a text: they belong in one batch, where
    each text is run once."""
    groups, texts = [], set()
    for pair in pairs:
        two = {(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)}
        if not texts & two:
            groups.append([])
            texts = set()
        groups[-1].append(pair)
        texts |= two
    return groups


# ---- rows of ids -----------------------------------------------------------------------------


def encode_answer(tokenizer, prompt, answer, finished, block_size):
    """eos, prompt, answer and, if it finished, eos, as one list of at most block_size ids.

    Prompt and answer are encoded separately. Too long: the prompt is cut from the left, down to
    half of the block; then the answer from the right, and is then unfinished. Returns (ids, cut).
    """
    prompt, answer = tokenizer.encode(prompt), tokenizer.encode(answer) + [tokenizer.eos] * finished
    room = block_size - 1
    keep = min(len(prompt), max(room - len(answer), room // 2))
    ids = [tokenizer.eos] + prompt[len(prompt) - keep:] + answer[: room - keep]
    return ids, len(prompt) + len(answer) > room


def prompt_room(block_size, max_new_tokens, run_dir):
    """Positions left for the prompt and its eos when the answer gets max_new_tokens of the block."""
    if block_size - max_new_tokens < 2:
        raise UserError(f"--max_new_tokens {max_new_tokens} leaves no room for a prompt: {run_dir} reads {block_size} tokens")
    return block_size - max_new_tokens


def encode_prompts(tokenizer, prompts, room):
    """(lists of ids, each eos and at most `room` - 1 ids of the prompt's end; how many were cut)."""
    rows = [tokenizer.encode(prompt) for prompt in prompts]
    cut = sum(len(row) > room - 1 for row in rows)
    return [[tokenizer.eos] + row[max(0, len(row) - room + 1):] for row in rows], cut


def right_pad(rows):
    """Lists of ids -> int64 ids (B, T) padded with id 0, and the index of each row's last id (B,)."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return ids, torch.tensor([len(row) - 1 for row in rows])
