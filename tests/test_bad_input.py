"""What a person can get wrong: one line that says what and where, exit code 2, and nothing written.

And what only looks wrong: useless rows, long texts, few pairs, a run that was stopped. Those go on.
"""

import gzip
import io
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

import train_lm
import train_ppo
import train_rm
from conftest import ROOT, TINY
from minirlhf import data, generate, reviews, run
from minirlhf.run import Run
from minirlhf.tokenizer import BPE

SCRIPTS = {"lm": train_lm, "rm": train_rm, "ppo": train_ppo}
STAGES = pytest.mark.parametrize("stage", SCRIPTS)
# Names that a run writes into its folder; the tests fill them with bytes of their own.
RUN_FILES = ("ckpt.pt", "metrics.jsonl", "samples.jsonl", "eval.json", "run.json", "pairs.jsonl", "labels.jsonl")


def lines_beside_bars(err):
    """The lines of stderr that are no tqdm bar. A bar that shares its line with a message counts as one."""
    last_states = [line.split("\r")[-1].strip() for line in err.split("\n")]
    return [line for line in last_states if line and not re.fullmatch(r"(lm|rm|ppo|sampling): +\d+%\|.*\]", line)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def some_pairs(n):
    return [{"prompt": f"Question {i}?", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(n)]


@pytest.fixture(scope="session")
def small_text(tmp_path_factory):
    rows = [{"prompt": prompt, "completion": text} for prompt, text in reviews.corpus(200)]
    return write_rows(tmp_path_factory.mktemp("text") / "reviews.jsonl", rows)


@pytest.fixture
def tiny(cli, runs, small_text):
    """tiny(stage, options, ...) -> cli's result, with the options of TINY, or less, and the trained runs as input.

    24 steps of "lm", 4 of "ppo"; 96 pairs in batches of 24 for "rm".
    """

    def run(stage, *options):
        less = {"lm": "--n_layer 1 --n_embd 16 --batch_size 8 --max_steps 24 --eval_every 12",
                "rm": f"--lm {runs}/lm --num_pairs 96 --batch_size 24 --epochs 2",
                "ppo": f"--lm {runs}/lm --rm {runs}/rm"}[stage]
        if stage == "lm" and "--data" not in str(options):
            less += f" --data {small_text}"
        return cli(SCRIPTS[stage], TINY[SCRIPTS[stage]], less, *options)

    return run


@pytest.fixture
def refused(tiny, tmp_path):
    """refused(stage, options, names): both in a folder with an earlier run and in a fresh one, the
    script exits with 2, prints one line that holds all `names`, and writes nothing. Returns the line."""

    def check(stage, options, *names):
        used, fresh = tmp_path / "used", tmp_path / "fresh"
        used.mkdir(exist_ok=True)
        for name in RUN_FILES:
            (used / name).write_bytes(f"{name} of an earlier run".encode())
        before = contents(used)
        for out_dir in (fresh, used):
            code, _, err = tiny(stage, options, ["--out_dir", str(out_dir)])
            assert_one_line(err, f"train_{stage}.py", *names)
            assert code == 2
        assert contents(used) == before, "the earlier run was touched"
        assert not fresh.exists(), "the new folder was created"
        return err

    return check


def assert_one_line(err, program, *names):
    lines = lines_beside_bars(err)
    assert len(lines) == 1, err
    assert lines[0].startswith(f"{program}: error: ")
    without_paths = re.sub(r"/\S+", "", lines[0])  # as those hold the name of the test, and so any word
    for name in map(str, names):
        assert name in (lines[0] if "/" in name else without_paths), f"{name!r} missing in {lines[0]!r}"


# ---- files that cannot be read ---------------------------------------------------------------

FILE_OPTIONS = pytest.mark.parametrize("stage, option", [
    ("lm", "--data"), ("rm", "--prefs"), ("rm", "--prompts"), ("ppo", "--prompts")])
TEXT_OPTIONS = pytest.mark.parametrize("stage, option", [  # those that read .txt too
    ("lm", "--data"), ("rm", "--prompts"), ("ppo", "--prompts")])
GOOD_LINE = b'{"text": "Once upon a time.", "prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"}\n'


@FILE_OPTIONS
def test_missing_file(stage, option, refused, tmp_path):
    refused(stage, f"{option} {tmp_path}/nowhere.jsonl", f"{tmp_path}/nowhere.jsonl", "no such file")


EMPTY = pytest.mark.parametrize("content", [b"", b"\n  \n\n"], ids=["no bytes", "blank lines"])


@EMPTY
@FILE_OPTIONS
def test_empty_file(stage, option, content, refused, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    refused(stage, f"{option} {path}", path, "empty")


@EMPTY
@TEXT_OPTIONS
def test_empty_text_file(stage, option, content, refused, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_bytes(content)
    refused(stage, f"{option} {path}", path, "empty")


@FILE_OPTIONS
@pytest.mark.parametrize("line", [
    b'{"text": "cut sho', b"just words", b'["a", "list"]', b"7", b"null", b'{"other": "key"}',
    b'{"text": 5, "prompt": 5, "chosen": 5, "rejected": "x"}',
    b'{"text": ["a"], "prompt": ["a"], "chosen": ["a"], "rejected": "x"}',
    b'{"text": null, "prompt": null, "chosen": null, "rejected": null}',
    b'{"text": "\xff", "prompt": "", "chosen": "", "rejected": ""}',
], ids=["cut", "words", "list", "number", "null", "no key", "number inside", "list inside", "null inside", "bytes"])
def test_bad_line_is_named_by_file_and_number(stage, option, line, refused, tmp_path):
    path = tmp_path / "some rows.jsonl"
    path.write_bytes(GOOD_LINE + b"\n" + line + b"\n" + GOOD_LINE)  # line 2 is blank, which is fine
    refused(stage, [option, str(path)], f"{path}:3:")


@pytest.mark.parametrize("line, name", [
    ('{"prompt": "p", "chosen": "a"}', "rejected"),
    ('{"prompt": "p", "rejected": "a"}', "chosen"),
    ('{"prompt": "p", "completion": "a"}', "chosen"),
    ('{"chosen": "a", "rejected": "b", "margin": "much"}', "margin"),
    ('{"chosen": "a", "rejected": "b", "margin": NaN}', "margin"),
    ('{"chosen": "a", "rejected": "b", "margin": true}', "margin"),
    ('{"chosen": "a", "rejected": "b", "margin": 1e999}', "margin"),
    ('{"chosen": "a", "rejected": "b", "tie": "yes"}', "tie"),
    ('{"chosen": "a", "rejected": "b", "finished": true}', "finished"),
    ('{"chosen": "a", "rejected": "b", "finished": [true]}', "finished"),
])
def test_bad_preference_row_names_the_key(line, name, refused, tmp_path):
    path = tmp_path / "prefs.jsonl"
    path.write_bytes(GOOD_LINE * 20 + line.encode())
    refused("rm", f"--prefs {path}", f"{path}:21:", f'"{name}"')


@TEXT_OPTIONS
def test_text_in_another_encoding(stage, option, refused, tmp_path):
    path = tmp_path / "latin.txt"
    path.write_bytes("One line.\nUn café crème.\n".encode("latin-1"))
    refused(stage, f"{option} {path}", f"{path}:2:", "UTF-8")


def broken_gzip(how):
    whole = gzip.compress(GOOD_LINE * 99)
    return {
        "truncated": whole[: len(whole) // 2],
        "not gzip": GOOD_LINE,
        "damaged": whole[:10] + b"\xff" + whole[11:],  # behind the header: a kind of block that deflate does not have
        "wrong checksum": whole[:-8] + b"\0\0\0\0" + whole[-4:],
    }[how]


@FILE_OPTIONS
@pytest.mark.parametrize("how", ["truncated", "not gzip", "damaged", "wrong checksum"])
def test_broken_gzip_file(stage, option, how, refused, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(broken_gzip(how))
    refused(stage, f"{option} {path}", path)


@FILE_OPTIONS
def test_folder_in_the_place_of_a_file(stage, option, refused, tmp_path):
    (tmp_path / "folder").mkdir()
    refused(stage, f"{option} {tmp_path}/folder", f"{tmp_path}/folder")


def test_bad_prefs_beside_good_prompts(refused, tmp_path):
    """With --prompts the pairs are read at another place of the script."""
    prompts, prefs = tmp_path / "prompts.txt", tmp_path / "prefs.jsonl"
    prompts.write_text("Hello?\n")
    prefs.write_text("oops\n")
    refused("rm", f"--prompts {prompts} --prefs {prefs}", f"{prefs}:1:")


@pytest.mark.parametrize("rows", [[{"text": "a lonely document"}], [{"text": ""}, {"text": " "}]], ids=["one", "blank"])
def test_too_little_text(rows, refused, tmp_path):
    path = write_rows(tmp_path / "data.jsonl", rows)
    refused("lm", f"--data {path}", path, "too little")


def test_no_prompt_in_a_prompt_file(refused, tmp_path):
    path = write_rows(tmp_path / "texts.jsonl", [{"text": "only three words"}, {"prompt": ""}])
    refused("ppo", f"--prompts {path}", path, "--prompt_words")


# ---- run folders that cannot be used ---------------------------------------------------------

RUN_OPTIONS = pytest.mark.parametrize("stage, option", [
    ("rm", "--lm"), ("rm", "--policy"), ("ppo", "--lm"), ("ppo", "--rm")])


class RunsCode:
    """Unpickled without care, this writes the file `touched`."""

    def __init__(self, touched):
        self.touched = touched

    def __reduce__(self):
        return (os.mkdir, (str(self.touched),))


def torch_bytes(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zip_bytes(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


FOREIGN = {
    "nothing": b"",
    "text": b"These are not the weights.\n" * 20,
    "zeros": bytes(1000),
    **{f"random bytes {seed}": random.Random(seed).randbytes(500) for seed in range(12)},
    "zip header": b"PK\x03\x04" + random.Random(0).randbytes(500),
    "empty zip": zip_bytes({}),
    "word processor": zip_bytes({"word/document.xml": "<xml/>", "mimetype": "x"}),
    "pickled dict": pickle.dumps({"format": "minirlhf"}, protocol=2),
    "list": torch_bytes([1, 2, 3]),
    "tensor": torch_bytes(torch.zeros(3)),
    "state dict": torch_bytes(torch.nn.Linear(2, 2).state_dict()),
    "whole module": torch_bytes(torch.nn.Linear(2, 2)),
    "old format": torch_bytes({"model": torch.zeros(2)}, _use_new_zipfile_serialization=False),
    "other program's checkpoint": torch_bytes({"format": 3, "stage": "lm", "model": {}}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_checkpoint(kind, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(FOREIGN[kind])
    refused("rm", f"--lm {tmp_path}/run", f"{tmp_path}/run/ckpt.pt", "not a checkpoint of minirlhf")


def test_a_checkpoint_of_an_unknown_stage(runs, refused, tmp_path):
    checkpoint = torch.load(runs / "lm" / "ckpt.pt", weights_only=True) | {"stage": "world"}
    (tmp_path / "run").mkdir()
    torch.save(checkpoint, tmp_path / "run" / "ckpt.pt")
    refused("rm", f"--lm {tmp_path}/run", f"{tmp_path}/run/ckpt.pt", "unknown stage 'world'; needed: a language model")


@RUN_OPTIONS
def test_foreign_checkpoint_of_every_option(stage, option, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(FOREIGN["text"])
    refused(stage, f"{option} {tmp_path}/run", f"{tmp_path}/run/ckpt.pt", "not a checkpoint of minirlhf")


@pytest.mark.parametrize("stage, option", [("rm", "--lm"), ("ppo", "--rm")])
@pytest.mark.parametrize("save", [
    lambda value: pickle.dumps(value, protocol=2),
    torch_bytes,
    lambda value: torch_bytes({"format": "minirlhf", "model": value}),
    lambda value: torch_bytes(value, _use_new_zipfile_serialization=False),
], ids=["pickle", "torch", "inside a dict", "torch, old format"])
def test_a_checkpoint_that_would_run_code_does_not(stage, option, save, refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(save(RunsCode(tmp_path / "touched")))
    refused(stage, f"{option} {tmp_path}/run", f"{tmp_path}/run/ckpt.pt")
    assert not (tmp_path / "touched").exists()


def test_the_code_of_that_checkpoint_is_live(tmp_path):
    """So that the test above proves something: plain pickle does run it."""
    pickle.loads(pickle.dumps(RunsCode(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


@RUN_OPTIONS
@pytest.mark.parametrize("part", [0.001, 0.5, 0.9999])
def test_truncated_checkpoint(stage, option, part, runs, refused, tmp_path):
    whole = (runs / ("rm" if option == "--rm" else "lm") / "ckpt.pt").read_bytes()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ckpt.pt").write_bytes(whole[: int(part * len(whole))])
    refused(stage, f"{option} {tmp_path}/run", f"{tmp_path}/run/ckpt.pt", "truncated")


@RUN_OPTIONS
def test_missing_run_folder(stage, option, refused, tmp_path):
    refused(stage, f"{option} {tmp_path}/nowhere", f"{tmp_path}/nowhere", "does not exist")


@RUN_OPTIONS
def test_run_folder_without_checkpoint(stage, option, refused, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text("")
    refused(stage, f"{option} {tmp_path}/bare", f"{tmp_path}/bare", "no ckpt.pt")


@pytest.mark.parametrize("stage, option, wrong, says", [
    ("rm", "--lm", "rm", "a reward model"), ("rm", "--policy", "rm", "a reward model"),
    ("ppo", "--lm", "rm", "a reward model"),
    ("ppo", "--rm", "lm", "a language model"), ("ppo", "--rm", "ppo", "a policy"),
])
def test_a_run_of_the_wrong_stage(stage, option, wrong, says, runs, refused):
    refused(stage, f"{option} {runs}/{wrong}", f"{runs}/{wrong}/ckpt.pt", says)


def test_talking_to_a_reward_model(runs, cli):
    code, _, err = cli(generate, f"--run {runs}/rm")
    assert code == 2
    assert_one_line(err, "generate.py", f"{runs}/rm/ckpt.pt", "a reward model")


def changed_copy(run, folder, change):
    """A copy of a run in `folder` whose checkpoint went through change(checkpoint)."""
    folder.mkdir()
    checkpoint = torch.load(run / "ckpt.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "ckpt.pt")
    for name in ("pairs.jsonl",):
        if (run / name).exists():
            shutil.copy(run / name, folder)
    return folder


def other_tokenizer(checkpoint):
    merges = checkpoint["tokenizer"]["merges"]
    merges[-1] = [0, 0]  # as many tokens, one of them another


def half_the_block(checkpoint):
    """The same tokenizer, but the model reads half as many tokens."""
    shape = checkpoint["shape"]
    shape["block_size"] //= 2
    for name, weight in checkpoint["model"].items():
        if name.endswith("position_embedding.weight"):
            checkpoint["model"][name] = weight[: shape["block_size"]].clone()


@pytest.mark.parametrize("stage, option", [("rm", "--policy"), ("ppo", "--rm")])
def test_two_runs_with_different_tokenizers(stage, option, runs, refused, tmp_path):
    other = changed_copy(runs / option.replace("--policy", "lm").strip("-"), tmp_path / "other", other_tokenizer)
    refused(stage, f"{option} {other}", option, other, runs / "lm", "tokenizer")


@pytest.mark.parametrize("stage, option", [("rm", "--policy"), ("ppo", "--rm")])
def test_a_run_whose_model_reads_fewer_tokens(stage, option, runs, refused, tmp_path):
    """--max_new_tokens fits into --lm's block, but not into this one's."""
    other = changed_copy(runs / option.replace("--policy", "lm").strip("-"), tmp_path / "other", half_the_block)
    refused(stage, f"{option} {other} --max_new_tokens 40", other, "tokens")


def test_a_tokenizer_that_only_an_instrument_knows(runs, refused, tmp_path):
    def morse(checkpoint):
        checkpoint["tokenizer"]["kind"] = "morse"

    other = changed_copy(runs / "lm", tmp_path / "other", morse)
    refused("rm", f"--lm {other}", other, "morse")


# ---- reward functions ------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder is an empty one; modules that the test imports are forgotten afterwards."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = set(sys.modules)
    yield tmp_path / "here"
    for name in set(sys.modules) - before:
        if name.startswith("my_reward"):
            del sys.modules[name]


@pytest.mark.parametrize("name, says", [
    ("no_such_module:score", "no_such_module"),
    ("my_reward:no_such_function", "no_such_function"),
    ("my_reward:number", "not a function"),
    ("my_reward_broken:score", "SyntaxError"),
    ("my_reward_needs:score", "no_such_package"),
    ("my_reward:", "MODULE:FUNCTION"),
    (":score", "MODULE:FUNCTION"),
    ("nonsense", "MODULE:FUNCTION"),
])
def test_reward_function_that_cannot_be_found(name, says, here, refused):
    (here / "my_reward.py").write_text("number = 3\n")
    (here / "my_reward_broken.py").write_text("def score(:\n")
    (here / "my_reward_needs.py").write_text("import no_such_package\n")
    refused("ppo", f"--reward {name}", f"--reward {name}", says)


@pytest.mark.parametrize("body, says", [
    ("raise ValueError('no network today')", "ValueError: no network today"),
    ("raise ValueError('first line\\nsecond line')", "first line"),
    ("assert False", "AssertionError"),
    ("return [1.0] * (len(responses) + 1)", "scores"),
    ("return []", "0 scores"),
    ("return 1.0", "my_reward:score"),
    ("return [float('nan')] * len(responses)", "nan"),
    ("return [float('inf')] * len(responses)", "inf"),
    ("return [None] * len(responses)", "None"),
    ("return ['good'] * len(responses)", "good"),
    ("return '7' * len(responses)", "my_reward:score"),  # a string is no list of numbers, even one of digits
    ("pass", "None"),
])
def test_reward_function_that_fails(body, says, here, refused):
    (here / "my_reward.py").write_text(f"def score(prompts, responses):\n    {body}\n")
    refused("ppo", "--reward my_reward:score", "--reward my_reward:score", says)


def test_reward_function_that_fails_later_leaves_a_good_checkpoint(here, tiny, tmp_path):
    (here / "my_reward.py").write_text(
        "calls = []\n"
        "def score(prompts, responses):\n"
        "    calls.append(1)\n"
        "    return [len(calls)] * len(responses) if len(calls) < 4 else 1 / 0\n")
    code, _, err = tiny("ppo", f"--reward my_reward:score --save_every 1 --out_dir {tmp_path}/ppo")
    assert code == 2
    assert_one_line(err, "train_ppo.py", "my_reward:score", "ZeroDivisionError")
    assert 0 < torch.load(tmp_path / "ppo" / "ckpt.pt", weights_only=True)["step"] < 4


# ---- options ---------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize("options, name", [
    ("--learning_rate 1", "--learning_rate"),
    ("--max_new_token 3 --n_layers 3", "--n_layers"),
    ("--devic cpu", "--devic"),  # no abbreviations
    ("word", "word"),
    ("--lr", "--lr"),
    ("--lr fast", "--lr"),
    ("--lr nan", "--lr"),
    ("--lr inf", "--lr"),
    ("--lr -1", "--lr"),
    ("--batch_size 0", "--batch_size"),
    ("--batch_size 1.5", "--batch_size"),
    ("--batch_size 1e3", "--batch_size"),
    ("--dtype float16", "--dtype"),
    ("--seed -1", "--seed"),
    ("--seed 18446744073709551616", "--seed"),  # 2**64: torch's seeds end before it
    ("--device tpu", "--device"),
    ("--device gpu", "--device"),
    ("--device cuda:99", "--device"),
    ("--device meta", "--device"),  # torch knows this one, but nothing can be computed on it
    ("--device -1", "--device"),
])
def test_bad_option(stage, options, name, refused):
    refused(stage, options, name)


@STAGES
def test_cuda_on_a_machine_without_it(stage, refused):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused(stage, "--device cuda", "--device cuda", "--device cpu")


@STAGES
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has\nmore"), MemoryError("Unable to allocate 7 TiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
])
def test_out_of_memory_names_what_to_lower(stage, error, tiny, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
    code, _, err = tiny(stage, f"--out_dir {tmp_path}/out")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", "out of memory", "lower --batch_size")


@STAGES
def test_compile_without_a_compiler(stage, refused, monkeypatch):
    monkeypatch.setattr(run, "can_compile", lambda device: False)
    refused(stage, "--compile", "--compile", "no working compiler for cpu")
    if stage != "rm":
        refused(stage, "--logprobs compiled", "--logprobs compiled", "no working compiler for cpu")


@pytest.mark.parametrize("stage, options, names", [
    ("lm", "--vocab_size 256", ["--vocab_size", "257"]),
    ("lm", "--n_embd 30 --n_head 4", ["--n_embd 30", "--n_head 4"]),
    ("rm", "--labeler robot", ["--labeler", "gold", "human"]),
    ("rm", "--answers_per_prompt 1", ["--answers_per_prompt"]),
    ("rm", "--max_new_tokens 64", ["--max_new_tokens 64", "64 tokens"]),
    ("rm", "--max_new_tokens 1000", ["--max_new_tokens 1000", "64 tokens"]),
    ("ppo", "--max_new_tokens 64", ["--max_new_tokens 64", "64 tokens"]),
    ("ppo", "--max_new_tokens 1000", ["--max_new_tokens 1000", "64 tokens"]),
    ("ppo", "--batch_size 16 --minibatch_size 5", ["--batch_size 16", "--minibatch_size 5"]),
    ("ppo", "--batch_size 16 --minibatch_size 32", ["--batch_size 16", "--minibatch_size 32"]),
    ("ppo", "--temperature 0", ["--temperature"]),
    ("ppo", "--gamma 1.5", ["--gamma", "between 0 and 1"]),
])
def test_option_that_does_not_fit(stage, options, names, refused):
    refused(stage, options, *names)


def test_the_gold_labeler_knows_one_world(refused, tmp_path):
    (tmp_path / "prompts.txt").write_text("To be, or not to be\n")
    refused("rm", f"--prompts {tmp_path}/prompts.txt", "--labeler gold", "'To be, or not to be'", "--prefs", "--labeler human")


def test_few_pairs(refused, tmp_path):
    refused("rm", f"--prefs {write_rows(tmp_path / 'few.jsonl', some_pairs(7))}", "7 preference pairs", "8")


def test_few_pairs_beside_prompts(refused, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello?\n")
    path = write_rows(tmp_path / "few.jsonl", some_pairs(7))
    refused("rm", f"--prefs {path} --prompts {tmp_path}/prompts.txt", "7 preference pairs", "8")


USELESS = [
    {"prompt": "p", "chosen": " same", "rejected": " same"},
    {"prompt": "p", "chosen": " ", "rejected": " something"},
    {"prompt": "p", "chosen": " something", "rejected": ""},
    {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: y"},
]


@pytest.mark.parametrize("beside_prompts", [False, True])
def test_more_than_half_of_the_pairs_useless(beside_prompts, refused, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hello?\n")
    path = write_rows(tmp_path / "bad.jsonl", some_pairs(11) + USELESS * 3)
    options = f"--prefs {path}" + f" --prompts {tmp_path}/prompts.txt" * beside_prompts
    refused("rm", options, path, "12 of 23")


@STAGES
def test_resume_without_a_run(stage, tiny, tmp_path):
    code, _, err = tiny(stage, f"--resume --out_dir {tmp_path}/nowhere")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", f"{tmp_path}/nowhere", "does not exist")
    assert not (tmp_path / "nowhere").exists()


@STAGES
@pytest.mark.parametrize("checkpoint", [None, b"", b"damaged"])
def test_resume_without_a_checkpoint(stage, checkpoint, tiny, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss"')
    if checkpoint is not None:
        (tmp_path / "ckpt.pt").write_bytes(checkpoint)
    before = contents(tmp_path)
    code, _, err = tiny(stage, f"--resume --out_dir {tmp_path}")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", tmp_path, "has no ckpt.pt" if checkpoint is None else "truncated")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stage, other", [("lm", "rm"), ("rm", "ppo"), ("ppo", "lm"), ("rm", "lm")])
def test_resume_of_another_stage(stage, other, tiny, runs, tmp_path):
    shutil.copytree(runs / other, tmp_path / "out")
    before = contents(tmp_path)
    code, _, err = tiny(stage, f"--resume --out_dir {tmp_path}/out")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", f"{tmp_path}/out/ckpt.pt")
    assert contents(tmp_path) == before


# ---- out_dir ---------------------------------------------------------------------------------


@STAGES
@pytest.mark.parametrize("inside", ["", "/deeper"])
def test_a_file_in_the_place_of_out_dir(stage, inside, tiny, tmp_path):
    (tmp_path / "notes").write_text("mine")
    code, _, err = tiny(stage, f"--out_dir {tmp_path}/notes{inside}")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", f"--out_dir {tmp_path}/notes{inside}")
    assert contents(tmp_path) == {(tmp_path / "notes").relative_to(tmp_path): b"mine"}


@pytest.mark.parametrize("stage, option, name", [
    ("lm", "--data", "pairs.jsonl"), ("rm", "--prefs", "pairs.jsonl"), ("rm", "--prompts", "pairs.jsonl"),
    ("ppo", "--prompts", "samples.jsonl"),
])
@pytest.mark.parametrize("spelling", ["{out}/{name}", "{out}/../out/./{name}", "{link}/{name}"])
def test_a_file_inside_out_dir_is_not_read(stage, option, name, spelling, tiny, tmp_path):
    """The contract: this run rewrites what lies there."""
    out, link = tmp_path / "out", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    rows = [{"text": f"Once upon a time there were {i}.", **row} for i, row in enumerate(some_pairs(40))]
    write_rows(out / name, rows)
    before = contents(out)
    path = spelling.format(out=out, link=link, name=name)
    code, _, err = tiny(stage, f"{option} {path} --out_dir {out}")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", f"{option} {path}", f"--out_dir {out}")
    assert contents(out) == before


@RUN_OPTIONS
def test_out_dir_is_not_a_run_that_is_read(stage, option, runs, tiny, tmp_path):
    """A slip like --out_dir runs/lm must not replace the language model it starts from."""
    run = tmp_path / "run"
    shutil.copytree(runs / ("rm" if option == "--rm" else "lm"), run)
    before = contents(tmp_path)
    code, _, err = tiny(stage, f"{option} {run} --out_dir {run}")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", f"--out_dir {run}", option)
    assert contents(tmp_path) == before


# ---- odd input that is fine ------------------------------------------------------------------


def test_useless_pairs_are_skipped_and_counted_in_one_line(tiny, tmp_path):
    path = write_rows(tmp_path / "prefs.jsonl", some_pairs(12) + USELESS)
    code, out, err = tiny("rm", f"--prefs {path} --out_dir {tmp_path}/rm")
    assert code == 0, err
    assert len([line for line in out.splitlines() if line.startswith("4 pairs skipped")]) == 1
    assert not lines_beside_bars(err)
    rows = [json.loads(line) for line in (tmp_path / "rm" / "pairs.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in rows] == [f" good {i}" for i in range(12)]


def test_eight_pairs_train_though_a_batch_is_larger(tiny, tmp_path):
    path = write_rows(tmp_path / "prefs.jsonl", some_pairs(8))
    code, _, err = tiny("rm", f"--prefs {path} --batch_size 384 --out_dir {tmp_path}/rm")
    assert code == 0, err
    assert 1 <= json.loads((tmp_path / "rm" / "eval.json").read_text())["pairs"] < 8


def test_long_prompts_and_answers_are_cut_from_their_ends():
    tokenizer = BPE()  # a byte is a token
    eos = tokenizer.eos
    assert data.encode_prompts(tokenizer, ["0123456789", "789"], 6) == ([[eos, *b"56789"], [eos, *b"789"]], 1)
    # A block of 11: eos and 10 more. The prompt gives way first, down to 5; then the answer.
    for prompt, answer, expected, cut in [
        ("012345", "abc", b"012345abc", False),
        ("0123456789", "abc", b"456789abc", True),
        ("0123456789", "abcdefghij", b"56789abcde", True),
        ("01", "abcdefghijkl", b"01abcdefgh", True),
    ]:
        ids, was_cut = data.encode_answer(tokenizer, prompt, answer, True, 11)
        whole = len(prompt + answer) < 10
        assert was_cut == cut
        assert bytes(i for i in ids[1:] if i != eos) == expected
        assert (ids[0], ids[-1] == eos, len(ids) <= 11) == (eos, whole or answer == "abc", True)


def test_long_texts_are_counted_in_one_line_and_training_goes_on(tiny, tmp_path):
    long = " endless" * 60
    rows = some_pairs(10)
    rows += [{"prompt": f"{i}{long}", "chosen": f" good {i}", "rejected": f" bad{long}"} for i in range(3)]
    code, out, err = tiny("rm", f"--prefs {write_rows(tmp_path / 'prefs.jsonl', rows)} --out_dir {tmp_path}/rm")
    assert code == 0, err
    assert [line.split(" were cut ")[0] for line in out.splitlines() if " were cut " in line] == ["6 of 26 texts"]
    assert not lines_beside_bars(err)


def test_long_prompts_are_counted_in_one_line_and_ppo_goes_on(tiny, tmp_path):
    prompts = [f"prompt number {i}" + " endless" * 60 * (i < 5) for i in range(40)]
    train_prompts, _ = data.split(prompts, key=str)
    long = sum(len(prompt) > 100 for prompt in train_prompts)
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    code, out, err = tiny("ppo", f"--prompts {path} --max_steps 1 --out_dir {tmp_path}/ppo")
    assert code == 0, err
    cut_lines = [line for line in out.splitlines() if "were cut" in line]
    assert len(cut_lines) == 1
    assert cut_lines[0].startswith(f"{long} of {len(train_prompts)} prompts were cut from the left")
    assert not lines_beside_bars(err)


@pytest.mark.parametrize("stage", ["rm", "ppo"])
def test_one_prompt_is_enough(stage, tiny, tmp_path):
    (tmp_path / "prompts.txt").write_text("I had the ramen at Luna.\n")
    code, _, err = tiny(stage, f"--prompts {tmp_path}/prompts.txt --out_dir {tmp_path}/out")
    assert code == 0, err
    assert (tmp_path / "out" / "eval.json").is_file()


LONE = "Once \ud83d upon"  # half of an emoji, as JSON files that were cut at a length hold; it stands for "?"


def with_a_strict_terminal(monkeypatch):
    """A stdout that refuses what is no UTF-8, as a terminal's does (pytest's own puts up with it)."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))


def test_half_an_emoji_in_a_text(tiny, tmp_path, monkeypatch):
    with_a_strict_terminal(monkeypatch)
    path = write_rows(tmp_path / "data.jsonl", [{"text": f"{LONE} a time {i}."} for i in range(60)])
    code, _, err = tiny("lm", f"--data {path} --max_steps 2 --out_dir {tmp_path}/lm")
    assert code == 0, err


def test_half_an_emoji_in_a_prompt(tiny, tmp_path, monkeypatch):
    with_a_strict_terminal(monkeypatch)
    path = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"{LONE} {i}"} for i in range(30)])
    code, _, err = tiny("ppo", f"--prompts {path} --max_steps 1 --out_dir {tmp_path}/ppo")
    assert code == 0, err


def test_half_an_emoji_in_a_pair(tiny, tmp_path, monkeypatch):
    with_a_strict_terminal(monkeypatch)
    rows = [{"prompt": f"{LONE} {i}", "chosen": " good \ude00", "rejected": " bad"} for i in range(30)]
    code, _, err = tiny("rm", f"--prefs {write_rows(tmp_path / 'prefs.jsonl', rows)} --out_dir {tmp_path}/rm")
    assert code == 0, err


# ---- a loss that is no number ----------------------------------------------------------------


def weights_are_finite(checkpoint):
    return all(weight.isfinite().all() for weight in checkpoint["model"].values())


@STAGES
def test_a_learning_rate_that_blows_up_stops_the_run(stage, tiny, tmp_path):
    code, _, err = tiny(stage, f"--lr 1e30 --out_dir {tmp_path}/out")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", "nan", f"{tmp_path}/out/ckpt.pt", "(step 0)", "--resume")
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 0 and weights_are_finite(checkpoint)
    # The line says: --resume and a lower --lr.
    code, _, err = tiny(stage, f"--resume --lr 1e-4 --out_dir {tmp_path}/out")
    assert code == 0, err
    assert weights_are_finite(torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True))


@pytest.mark.parametrize("stage, module, name", [
    ("lm", train_lm, "cross_entropy"), ("rm", train_rm.losses, "pair_loss"), ("ppo", train_ppo.losses, "policy_loss")])
def test_a_loss_that_turns_nan_leaves_the_last_checkpoint(stage, module, name, tiny, tmp_path, monkeypatch):
    steps = {"lm": 11, "rm": 4, "ppo": 2}[stage]
    loss, save, saves = getattr(module, name), Run.save, []

    def save_and_keep(self, *args, **kwargs):
        save(self, *args, **kwargs)
        saves.append((self.folder / "ckpt.pt").read_bytes())

    def loss_or_nan(*args, **kwargs):
        return loss(*args, **kwargs) * (float("nan") if len(saves) > steps else 1)

    monkeypatch.setattr(Run, "save", save_and_keep)
    monkeypatch.setattr(module, name, loss_or_nan)
    code, _, err = tiny(stage, f"--save_every 1 --out_dir {tmp_path}/out")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", "nan", f"{tmp_path}/out/ckpt.pt", f"(step {steps})")
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == saves[-1]
    checkpoint = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == steps and weights_are_finite(checkpoint)
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["step"] <= steps for row in rows)


@STAGES
def test_a_last_step_that_blows_up_is_seen_too(stage, tiny, tmp_path):
    """Nothing is computed after it but the evaluation, which must not pass null off as a result."""
    one_step = {"lm": "--max_steps 1", "rm": "--epochs 1 --batch_size 1000 --warmup 0",
                "ppo": "--max_steps 1 --ppo_epochs 1 --minibatch_size 16"}[stage]
    code, _, err = tiny(stage, f"--lr 1e38 {one_step} --out_dir {tmp_path}/out")
    assert code == 2
    assert_one_line(err, f"train_{stage}.py", f"{tmp_path}/out/ckpt.pt")
    assert weights_are_finite(torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True))


# ---- Ctrl-C ----------------------------------------------------------------------------------


def resume_command(err):
    """(script, options) of the command that goes on, as the last of two lines on stderr says it."""
    first, line = lines_beside_bars(err)
    assert "finishing this step" in first
    python, script, *words = shlex.split(line[line.index("python "):])
    assert python == "python" and (ROOT / script).is_file()
    return script, words


def press_ctrl_c(monkeypatch, step, times=1):
    """Ctrl-C arrives while the row of `step` is logged."""
    log = Run.log

    def log_and_press(self, **row):
        log(self, **row)
        if row["step"] == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background may have set it to ignore
    monkeypatch.setattr(Run, "log", log_and_press)


@pytest.mark.parametrize("stage, step, last", [("lm", 10, 24), ("rm", 3, 8), ("ppo", 2, 4)])
def test_ctrl_c_saves_the_step_and_resume_completes(stage, step, last, tiny, cli, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, step)
        code, _, err = tiny(stage, f"--out_dir {tmp_path}/out")
    assert code == 130
    script, words = resume_command(err)
    assert script == f"train_{stage}.py"
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == step
    assert not (tmp_path / "out" / "eval.json").exists()
    code, _, err = cli(SCRIPTS[stage], words)
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == last
    assert (tmp_path / "out" / "eval.json").is_file()


@pytest.mark.parametrize("stage, last", [("lm", 24), ("rm", 8), ("ppo", 4)])
def test_ctrl_c_in_the_last_step_loses_nothing(stage, last, tiny, cli, runs, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        press_ctrl_c(patch, last)
        code, _, err = tiny(stage, f"--out_dir {tmp_path}/out")
    if code == 130:  # to finish instead is as good
        code, _, err = cli(SCRIPTS[stage], resume_command(err)[1])
    assert code == 0, err
    expected, figures = (json.loads((folder / "eval.json").read_text()) for folder in (runs / stage, tmp_path / "out"))
    assert figures.keys() == expected.keys()


@STAGES
def test_a_second_ctrl_c_stops_at_once_and_does_not_deny_the_checkpoint(stage, tiny, tmp_path, monkeypatch):
    step = {"lm": 10, "rm": 3, "ppo": 2}[stage]
    press_ctrl_c(monkeypatch, step, times=2)
    code, _, err = tiny(stage, f"--save_every 1 --out_dir {tmp_path}/out")
    assert code == 130
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["step"] == step - 1
    assert len(lines_beside_bars(err)) == 2, err
    assert "before the first checkpoint" not in err  # there is one, of the step before


def test_the_command_that_goes_on_survives_a_space_in_the_folders_name(tiny, tmp_path, monkeypatch):
    press_ctrl_c(monkeypatch, 10)
    code, _, err = tiny("lm", ["--out_dir", str(tmp_path / "my runs" / "lm")])
    assert code == 130
    assert resume_command(err)[1] == ["--resume", "--out_dir", str(tmp_path / "my runs" / "lm")]


def test_ctrl_c_before_the_first_step_says_so(tiny, tmp_path, monkeypatch):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_rm, "generate_all", pressed)  # while answers are sampled
    code, _, err = tiny("rm", f"--out_dir {tmp_path}/out")
    assert code == 130
    assert len(lines_beside_bars(err)) == 1, err
    assert not (tmp_path / "out" / "ckpt.pt").exists()


def test_sigint_to_a_process_of_its_own(cli, small_text, tmp_path):
    """The signal as a shell sends it. Every wait below ends by an event or a generous deadline."""
    folder = tmp_path / "lm"
    options = ("--n_layer 1 --n_head 1 --n_embd 8 --batch_size 2 --vocab_size 300 --block_size 16 "
               "--max_steps 1000000 --eval_every 1000000 --save_every 1000000").split()
    argv = [sys.executable, str(ROOT / "train_lm.py"), "--out_dir", str(folder), "--data", str(small_text), *options]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    step = torch.load(folder / "ckpt.pt", weights_only=True)["step"]
    assert step >= 10  # the first row of metrics.jsonl is step 10's
    _, words = resume_command(err)
    code, _, err = cli(train_lm, [*words, "--max_steps", str(step + 3)])
    assert code == 0, err
    assert torch.load(folder / "ckpt.pt", weights_only=True)["step"] == step + 3
