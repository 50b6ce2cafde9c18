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
ASSISTANT = "\n\nAssistant:"  # the last one ends the prompt of a dialogue


# ---- reading ---------------------------------------------------------------------------------


def read_lines(path):
    """Yield (line number, line) of a .txt, .jsonl or .gz file, in UTF-8."""
    opener = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: byte {error.object[error.start]:#04x} "
                        "is not UTF-8; convert the file to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_jsonl(path):
    """Yield (place, row) for every line of a JSONL file that is not blank; place is "file:line"."""
    empty = True
    for number, line in read_lines(path):
        place = f"{path}:{number}"
        if not line.strip():
            continue
        empty = False
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
    if empty:
        raise UserError(f"{path}: the file is empty")


def is_text(path):
    return str(path).removesuffix(".gz").endswith(".txt")


def read_text(path):
    text = "".join(line for _, line in read_lines(path))
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


# ---- splits ----------------------------------------------------------------------------------


def hash_fraction(text):
    """A number in [0, 1) that depends on the text alone.

    >>> 0 <= hash_fraction("anything") == hash_fraction("anything") < 1
    True
    """
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def split(items, key):
    """(train, held out): an item is held out when the hash of key(item) falls below HELD_OUT.

    Items of one key stay together. Where that leaves a side empty, it gets the nearest key.
    """
    fractions = {name: hash_fraction(name) for name in {key(item) for item in items}}
    held = {name for name, fraction in fractions.items() if fraction < HELD_OUT}
    if len(fractions) > 1 and not held:
        held = {min(fractions, key=fractions.get)}
    if held and len(held) == len(fractions):
        held = held - {max(fractions, key=fractions.get)}
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
    if not paths:
        train, held_out = split(reviews.corpus(), key=lambda document: document[0])
        return Corpus(train, held_out)
    corpus, documents = Corpus(), []
    for path in paths:
        if is_text(path):
            data = read_text(path).encode()
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
    sides = (corpus.train, corpus.train_streams), (corpus.held_out, corpus.held_out_streams)
    if not all(documents or any(streams) for documents, streams in sides):
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
        tokens, starts, jitters = [], [], []
        for prompt, text in corpus.train:
            ids = [tokenizer.eos] + tokenizer.encode(prompt) + tokenizer.encode(text)
            starts += range(len(tokens), len(tokens) + len(ids), block_size)
            tokens += ids
        jitters += [1] * len(starts)
        for text in corpus.train_streams:
            ids = [tokenizer.eos] + tokenizer.encode(text)
            chunks = range(len(tokens), len(tokens) + max(1, len(ids) - block_size), block_size)
            starts += chunks
            jitters += [max(1, min(block_size, len(tokens) + len(ids) - block_size - start)) for start in chunks]
            tokens += ids
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
    """Items taken, …, taken + k - 1 of an endless shuffle of range(n): a new permutation each epoch.

    >>> sorted(order(5, seed=1, taken=0, k=5).tolist())
    [0, 1, 2, 3, 4]
    """
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
    texts = [part for stream in corpus.train_streams + corpus.held_out_streams for part in re.split(r"\n\s*\n", stream)]
    found = [prompt or first_words(text, words) for prompt, text in corpus.train + corpus.held_out]
    found += [first_words(text, words) for text in texts]
    return list(dict.fromkeys(prompt for prompt in found if prompt))


def read_prompts(path, words):
    """The prompts of a file, each once: a line of .txt, "prompt" in JSONL, or the first words of "text"."""
    if is_text(path):
        found = [line.strip() for line in read_text(path).splitlines()]
    else:
        found = []
        for place, row in read_jsonl(path):
            if "prompt" not in row and "text" not in row and "chosen" not in row:
                raise UserError(f'{place}: needs "prompt" or "text"; has {sorted(row)}')
            if "chosen" in row and "prompt" not in row:
                found.append(split_dialogue(row["chosen"])[0])
            else:
                found.append(row["prompt"] if "prompt" in row else first_words(row["text"], words))
    found = list(dict.fromkeys(prompt for prompt in found if prompt))
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
        row = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        row |= {"margin": self.margin} if self.margin else {}
        row |= {"tie": True} if self.tie else {}
        return row | ({} if all(self.finished) else {"finished": list(self.finished)})


def split_dialogue(text):
    """(prompt, answer): the prompt runs to the end of the last "Assistant:"; no such mark, no prompt."""
    head, mark, answer = text.rpartition(ASSISTANT)
    return head + mark, answer


def read_pairs(paths):
    """(pairs, number of rows skipped). Rows that teach nothing are skipped: equal answers, an empty
    answer, dialogues with different prompts. More than half of them is an error."""
    pairs, skipped = [], 0
    for path in paths:
        for place, row in read_jsonl(path):
            if "chosen" not in row or "rejected" not in row:
                raise UserError(f'{place}: needs "chosen" and "rejected"; has {sorted(row)}')
            if "prompt" in row:
                prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
                same_prompt = True
            else:
                prompt, chosen = split_dialogue(row["chosen"])
                other, rejected = split_dialogue(row["rejected"])
                same_prompt = prompt == other
            row = {"margin": 0.0, "tie": False, "finished": [True, True]} | {k: v for k, v in row.items() if v is not None}
            margin, tie, finished = row["margin"], row["tie"], row["finished"]
            if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not abs(margin) < 1e300:
                raise UserError(f'{place}: "margin" must be a number')
            if not isinstance(tie, bool):
                raise UserError(f'{place}: "tie" must be true or false')
            if not (isinstance(finished, list) and len(finished) == 2 and all(isinstance(x, bool) for x in finished)):
                raise UserError(f'{place}: "finished" must be two of true and false')
            if same_prompt and chosen.strip() and rejected.strip() and chosen != rejected:
                pairs.append(Pair(prompt, chosen, rejected, float(margin), tie, tuple(finished)))
            else:
                skipped += 1
    if skipped > len(pairs):
        raise UserError(f"{', '.join(map(str, paths))}: {skipped} of {skipped + len(pairs)} pairs are useless (equal "
                        "answers, an empty answer, or different prompts); more than half, so nothing was trained")
    return pairs, skipped


def split_pairs(pairs):
    """(train, held out) by prompt; by the answers where the prompts do not tell pairs apart."""
    one_prompt = len({pair.prompt for pair in pairs}) == 1

    def key(pair):
        return pair.prompt if pair.prompt and not one_prompt else "\n".join(sorted((pair.chosen, pair.rejected)))

    return split(pairs, key)


def groups_of(pairs):
    """Lists of neighbouring pairs that share a prompt and a text: they belong in one batch, where
    each text is run once."""
    groups, texts = [], set()
    for pair in pairs:
        two = {(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)}
        if groups and texts & two:
            groups[-1].append(pair)
            texts |= two
        else:
            groups.append([pair])
            texts = two
    return groups


# ---- rows of ids -----------------------------------------------------------------------------


def encode_answer(tokenizer, prompt, answer, finished, block_size):
    """eos, prompt, answer and, if it finished, eos, as one list of at most block_size ids.

    Prompt and answer are encoded separately. Too long: the prompt is cut from the left, down to
    half of the block; then the answer from the right, and is then unfinished. Returns (ids, cut).
    """
    prompt, answer = tokenizer.encode(prompt), tokenizer.encode(answer) + [tokenizer.eos] * finished
    room = block_size - 1
    cut = len(prompt) + len(answer) > room
    if cut:
        keep = max(room - len(answer), min(len(prompt), room // 2))
        prompt = prompt[len(prompt) - keep:]
        answer = answer[: room - keep]
    return [tokenizer.eos] + prompt + answer, cut


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
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    return ids, torch.tensor([len(row) - 1 for row in rows])
