"""The run folder: what stands in it, how it is written, what --resume does to it."""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import fields

import numpy as np
import pytest
import torch

import train_lm
import train_ppo
import train_rm
from conftest import ROOT, TINY
from minirlhf.config import parse
from minirlhf.model import GPT, Shape
from minirlhf.run import (KEYS, Run, learning_rate, load_lm, plain, process_seconds, write_atomic, write_json,
                          write_jsonl)
from minirlhf.tokenizer import BPE

SCRIPTS = {"lm": train_lm, "rm": train_rm, "ppo": train_ppo}
STAGES = pytest.mark.parametrize("stage", SCRIPTS)
LM_SMALLER = "--n_layer 1 --n_embd 16 --batch_size 4 --max_steps 12 --eval_every 6 --vocab_size 300"


def no_such_number(name):
    raise AssertionError(f"{name} is not JSON")


def read_json(path):
    """One JSON value as the standard has it: Python's own NaN and Infinity are refused."""
    return json.loads(path.read_text(), parse_constant=no_such_number)


def read_rows(path):
    return [json.loads(line, parse_constant=no_such_number) for line in path.read_text().splitlines()]


def tiny_option(script, name):
    """The number that TINY gives this option."""
    words = TINY[script].split()
    return int(words[words.index(name) + 1])


def steps_of(folder):
    return [row["step"] for row in read_rows(folder / "metrics.jsonl")]


def checkpoint_of(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)


# ---- writing ---------------------------------------------------------------------------------


def test_write_atomic_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    for text in ("old", "new"):
        write_atomic(path, lambda temporary: temporary.write_text(text))
        assert path.read_text() == text
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_write_atomic_leaves_the_old_file_when_writing_fails(error, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary):
        temporary.write_text("ne")
        assert path.read_text() == "old"  # a reader sees the old one while the new one is written
        raise error

    with pytest.raises(type(error)):
        write_atomic(path, half)
    assert path.read_text() == "old"


def test_an_unwritable_value_leaves_the_old_json(tmp_path):
    path = tmp_path / "eval.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 1}, {"a": object()}])
    assert read_json(path) == {"a": 1}


NOT_FINITE = [math.nan, math.inf, -math.inf, np.float64("nan"), np.float32("inf"), torch.tensor(math.nan),
              torch.tensor(-math.inf, dtype=torch.float64), torch.tensor(math.inf, dtype=torch.bfloat16)]


@pytest.mark.parametrize("value", NOT_FINITE, ids=repr)
def test_what_is_no_number_becomes_null_everywhere(value, tmp_path):
    assert plain(value) is None
    nested = {"a": value, "b": [1, value, {"c": (value, 2.5)}], "d": "nan"}
    assert plain(nested) == {"a": None, "b": [1, None, {"c": [None, 2.5]}], "d": "nan"}
    write_json(tmp_path / "x.json", nested)
    assert read_json(tmp_path / "x.json") == {"a": None, "b": [1, None, {"c": [None, 2.5]}], "d": "nan"}
    write_jsonl(tmp_path / "x.jsonl", [nested, {"e": value}])
    assert read_rows(tmp_path / "x.jsonl")[1] == {"e": None}


@pytest.mark.parametrize("value, expected", [
    (3, 3), (2.5, 2.5), (True, True), (None, None), ("é\n", "é\n"), (np.float32(0.5), 0.5), (np.int64(7), 7),
    (np.bool_(True), True), (torch.tensor(0.5), 0.5), (torch.tensor(7), 7), (torch.tensor(True), True),
], ids=repr)
def test_plain_keeps_what_is_a_value(value, expected):
    assert plain(value) == expected and type(plain(value)) is type(expected)


# ---- the pieces of a run ---------------------------------------------------------------------


@pytest.fixture
def bare_run(tmp_path):
    """bare_run(resume=False) -> a Run of the language-model stage in tmp_path/lm, without training."""

    def make(resume=False):
        return Run("lm", train_lm.Config(out_dir=str(tmp_path / "lm"), resume=resume), torch.device("cpu"))

    return make


def test_log_writes_known_keys_strictly_and_refuses_others(bare_run):
    run = bare_run()
    run.log(step=1, loss=math.nan, val_loss=torch.tensor(math.inf))
    (row,) = read_rows(run.folder / "metrics.jsonl")
    assert row.pop("seconds") > 0 and row == {"step": 1, "loss": None, "val_loss": None}
    with pytest.raises(AssertionError, match="surprise"):
        run.log(step=2, surprise=1.0)
    assert steps_of(run.folder) == [1]


def test_a_run_that_must_not_write_leaves_no_trace(tmp_path):
    run = Run("lm", train_lm.Config(out_dir=str(tmp_path / "lm")), torch.device("cpu"), write=False)
    run.log(step=1, loss=1.0)
    run.log_samples([{"step": 1}])
    run.save(1, Shape(300, 8, 1, 1, 8), BPE(), [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", ["", '{"step": 4, "lo', "{", '{"step": 3}\n{"st'])
def test_rows_after_the_checkpoint_and_a_cut_line_are_dropped(cut, tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": step, "loss": step / 7} for step in (1, 2, 2, 3)]
    write_jsonl(path, rows)
    path.write_text(path.read_text() + cut)
    Run.drop_rows_after(path, 2)
    assert read_rows(path) == rows[:3]
    assert path.read_text().endswith("\n")


def test_dropping_rows_needs_no_file(tmp_path):
    Run.drop_rows_after(tmp_path / "metrics.jsonl", 2)
    assert not (tmp_path / "metrics.jsonl").exists() or (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("max_steps, warmup, expected", [
    (4, 0, [1, 0.75, 0.5, 0.25]),
    (6, 2, [0.5, 1, 1, 0.75, 0.5, 0.25]),
    (3, 4, [0.25, 0.5, 0.75]),  # shorter than its warm-up: it just rises
    (1, 0, [1]),
    (2, 2, [0.5, 1]),
])
def test_learning_rate_schedule(max_steps, warmup, expected):
    rates = [learning_rate(0.01, step, max_steps, warmup) for step in range(max_steps)]
    assert rates == pytest.approx([0.01 * share for share in expected])


def test_learning_rate_stays_at_zero_after_the_end():
    assert [learning_rate(1.0, step, 10, 3) for step in (10, 11, 1000)] == [0, 0, 0]


def test_process_seconds_counts_from_the_start_of_the_process():
    """Between what a process has slept at least, and what the one that started it has waited at most."""
    code = "import time; time.sleep(0.3); from minirlhf.run import process_seconds; print(process_seconds())"
    clock = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    waited = time.monotonic() - clock
    if not os.path.exists("/proc/self/stat"):
        pytest.skip("elsewhere than on Linux it counts from the import")
    assert 0.3 - 0.05 <= float(done.stdout) <= waited + 0.05  # the kernel's clock ticks in hundredths


def test_process_seconds_runs_with_the_wall_clock():
    before, clock = process_seconds(), time.monotonic()
    time.sleep(0.1)
    assert process_seconds() - before == pytest.approx(time.monotonic() - clock, abs=0.05)


# ---- what stands in a run folder -------------------------------------------------------------

CHECKPOINT_KEYS = {"format", "stage", "step", "shape", "model", "tokenizer", "config", "optimizers", "rng", "seconds"}


@STAGES
def test_a_run_folder_holds_its_files_and_nothing_else(stage, runs):
    expected = {"run.json", "metrics.jsonl", "samples.jsonl", "ckpt.pt", "eval.json"}
    assert set(os.listdir(runs / stage)) == expected | ({"pairs.jsonl"} if stage == "rm" else set())


@STAGES
def test_run_json_says_how_it_was_made(stage, runs):
    record, script = read_json(runs / stage / "run.json"), SCRIPTS[stage]
    assert record["stage"] == stage
    words = TINY[script].split()
    assert record["argv"][: 1 + len(words)] == [f"train_{stage}.py", *words]
    assert record["argv"][-2:] == ["--out_dir", f"{runs}/{stage}"]
    assert record["config"].keys() == {field.name for field in fields(script.Config)}
    assert record["config"]["out_dir"] == f"{runs}/{stage}" and record["config"]["seed"] == 1
    assert record["versions"] == {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    assert torch.device(record["device"]).type in ("cpu", "cuda", "mps")
    assert record["git_commit"] is None or len(record["git_commit"]) == 40


@STAGES
def test_a_checkpoint_holds_all_that_is_needed_to_go_on(stage, runs):
    checkpoint = checkpoint_of(runs / stage)  # weights_only: no code in it
    assert checkpoint.keys() == CHECKPOINT_KEYS | ({"value_head", "value_trunk", "kl_coef"} if stage == "ppo" else set())
    assert (checkpoint["format"], checkpoint["stage"]) == ("minirlhf", stage)
    assert checkpoint["step"] == steps_of(runs / stage)[-1]
    assert plain(checkpoint["config"]) == read_json(runs / stage / "run.json")["config"]  # JSON has no infinity
    assert checkpoint["rng"]["cpu"].dtype == torch.uint8 and len(checkpoint["rng"]["cpu"]) == len(torch.get_rng_state())
    assert checkpoint["tokenizer"]["kind"] == "bpe"
    assert len(checkpoint["tokenizer"]["merges"]) == checkpoint["shape"]["vocab_size"] - 257
    trunk = "trunk." if stage == "rm" else ""
    weights = {trunk + name: weight.shape for name, weight in GPT(Shape(**checkpoint["shape"])).state_dict().items()}
    others = {"head.linear.weight", "head.linear.bias", "gain", "bias"} if stage == "rm" else set()
    assert {name: weight.shape for name, weight in checkpoint["model"].items() if name not in others} == weights
    assert others <= checkpoint["model"].keys()
    moments = [slot for optimizer in checkpoint["optimizers"] for slot in optimizer["state"].values()]
    assert len(moments) >= len(weights) and all(any(tensor.any() for tensor in slot.values()) for slot in moments)


def test_the_language_models_figures(runs):
    figures = read_json(runs / "lm" / "eval.json")
    assert figures.keys() == {"val_loss", "bits_per_byte", "tokens_per_second"}
    assert all(value > 0 for value in figures.values())
    rows = read_rows(runs / "lm" / "metrics.jsonl")
    evaluations = [row for row in rows if "val_loss" in row]
    every, last = tiny_option(train_lm, "--eval_every"), tiny_option(train_lm, "--max_steps")
    assert [row["step"] for row in evaluations] == list(range(every, last + 1, every))
    assert all(row.keys() >= {"step", "val_loss", "bits_per_byte", "seconds"} for row in evaluations)
    assert all(evaluations[-1][name] == figures[name] for name in ("val_loss", "bits_per_byte"))
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"] < math.log(1024)  # of a uniform guess
    samples = read_rows(runs / "lm" / "samples.jsonl")
    assert {row["step"] for row in samples} == {row["step"] for row in evaluations}
    assert all({"prompt", "response"} <= row.keys() for row in samples)


def test_the_reward_models_figures(runs):
    figures = read_json(runs / "rm" / "eval.json")
    assert figures.keys() == {
        "accuracy", "gold_accuracy", "bayes_accuracy", "log_loss", "bayes_log_loss", "ece", "pairs"}
    assert all(0 <= figures[key] <= 1 for key in ("accuracy", "gold_accuracy", "ece"))
    assert 0.5 < figures["bayes_accuracy"] <= 1 and 0 < figures["bayes_log_loss"] < math.log(2)
    pairs = read_rows(runs / "rm" / "pairs.jsonl")
    assert 0 < figures["pairs"] < len(pairs) <= tiny_option(train_rm, "--num_pairs")
    assert all({"prompt", "chosen", "rejected", "gold"} <= row.keys() for row in pairs)
    samples = read_rows(runs / "rm" / "samples.jsonl")
    assert samples and all({"step", "prompt", "response", "score"} <= row.keys() for row in samples)


def test_ppos_figures(runs):
    figures = read_json(runs / "ppo" / "eval.json")
    win_rates = {"win_rate_score", "win_rate_score_se", "win_rate_gold", "win_rate_gold_se"}
    assert figures.keys() == {"reference", "policy", "kl", "n"} | win_rates
    for name in ("reference", "policy"):
        assert figures[name].keys() == {"score", "gold", "gold_std", "length", "eos_rate"}
        assert 1 <= figures[name]["length"] <= tiny_option(train_ppo, "--max_new_tokens")
        assert 0 <= figures[name]["eos_rate"] <= 1 and figures[name]["gold_std"] > 0
    assert 0 <= figures["win_rate_score"] <= 1 and 0 <= figures["win_rate_gold"] <= 1
    assert figures["n"] == tiny_option(train_ppo, "--eval_answers")
    largest_spread = 0.5  # of numbers in [0, 1]
    assert 0 < figures["win_rate_gold_se"] <= largest_spread / math.sqrt(figures["n"])
    assert train_ppo.Config().eval_answers >= 1024


# What the contract names; `loss` and `train_accuracy` of the reward model are this implementation's.
METRICS = {
    "lm": {"step", "seconds", "lr", "loss", "tokens_per_second", "val_loss", "bits_per_byte"},
    "rm": {"step", "seconds", "lr", "loss", "train_accuracy"},
    "ppo": set("step episodes seconds lr score gold reward kl kl_k3 kl_coef entropy sampler_gap ratio_first approx_kl clip_frac "
               "policy_loss value_loss explained_variance length eos_rate sampling_z kl_se score_std".split()),
}


@STAGES
def test_metrics_have_documented_keys_only(stage, runs):
    rows = read_rows(runs / stage / "metrics.jsonl")
    assert set().union(*rows) == METRICS[stage]
    assert METRICS[stage] <= KEYS[stage].keys() and all(len(meaning) > 5 for meaning in KEYS[stage].values())
    if stage != "lm":  # its evaluations have a cadence of their own
        assert all(row.keys() == METRICS[stage] for row in rows)


@STAGES
def test_metrics_count_steps_and_seconds_upwards(stage, runs):
    rows = read_rows(runs / stage / "metrics.jsonl")
    steps, seconds = [row["step"] for row in rows], [row["seconds"] for row in rows]
    assert steps == sorted(set(steps)) and seconds == sorted(seconds) and seconds[0] > 0
    if stage == "ppo":
        assert steps == list(range(1, tiny_option(train_ppo, "--max_steps") + 1))
        assert [row["episodes"] for row in rows] == [step * tiny_option(train_ppo, "--batch_size") for step in steps]


def test_ppo_samples_show_every_token(runs):
    rows = read_rows(runs / "ppo" / "samples.jsonl")
    lists = ("tokens", "ids", "logprobs", "ref_logprobs", "values", "advantages", "rewards")
    tokenizer = load_lm(runs / "ppo", torch.device("cpu"))[1]
    for row in rows:
        assert row.keys() == {"step", "prompt", "response", "score", "gold", *lists}
        assert len({len(row[name]) for name in lists}) == 1
        assert 1 <= len(row["ids"]) <= tiny_option(train_ppo, "--max_new_tokens")
        assert tokenizer.decode(row["ids"]) == row["response"]
        assert [token == "<eos>" for token in row["tokens"]] == [i == tokenizer.eos for i in row["ids"]]
        assert all(value <= 0 for value in row["logprobs"] + row["ref_logprobs"])


def test_ppos_first_and_last_samples_share_prompts(runs):
    rows = read_rows(runs / "ppo" / "samples.jsonl")
    prompts = {step: [row["prompt"] for row in rows if row["step"] == step] for step in {row["step"] for row in rows}}
    last = tiny_option(train_ppo, "--max_steps")
    assert min(prompts) == 1 and max(prompts) == last
    assert prompts[1] == prompts[last] and len(set(prompts[1])) == 4


# ---- a second run in the same folder ---------------------------------------------------------


@pytest.fixture
def lm_run(cli, tmp_path_factory, runs):
    """The folder of a language-model run that is smaller still; made once a session. Do not write into it."""
    folder = tmp_path_factory.getbasetemp() / "small_lm"
    if not folder.exists():
        text = tmp_path_factory.getbasetemp() / "small.txt"
        text.write_text("".join(f"The {i}th cat sat on the mat, and then it left. " for i in range(200)))
        code, _, err = cli(train_lm, TINY[train_lm], LM_SMALLER, f"--data {text} --out_dir {folder}")
        assert code == 0, err
    return folder


def test_a_fresh_run_replaces_the_logs_of_an_earlier_one(lm_run, cli, tmp_path):
    out = tmp_path / "lm"
    shutil.copytree(lm_run, out)
    (out / "notes.txt").write_text("mine")
    data = read_json(lm_run / "run.json")["config"]["data"][0]
    shorter = f"--max_steps 4 --eval_every 2 --data {data} --out_dir {out}"
    code, _, err = cli(train_lm, TINY[train_lm], LM_SMALLER, shorter)
    assert code == 0, err
    assert steps_of(out) == [2, 4] and checkpoint_of(out)["step"] == 4
    assert {row["step"] for row in read_rows(out / "samples.jsonl")} == {2, 4}
    assert read_json(out / "eval.json")["val_loss"] == read_rows(out / "metrics.jsonl")[-1]["val_loss"]
    assert (out / "notes.txt").read_text() == "mine"  # what is not the run's own stays


@pytest.mark.parametrize("stage, more, end", [
    ("lm", "--max_steps 20", 20), ("rm", "--epochs 3", None), ("ppo", "--max_steps 6", 6)])
def test_resume_extends_a_run_and_drops_later_rows(stage, more, end, lm_run, runs, cli, tmp_path):
    out = tmp_path / stage
    shutil.copytree(lm_run if stage == "lm" else runs / stage, out)
    before = read_rows(out / "metrics.jsonl")
    done = checkpoint_of(out)["step"]
    for name in ("metrics.jsonl", "samples.jsonl"):
        with open(out / name, "a") as file:  # as a run leaves it that was killed some steps after it saved
            file.write(json.dumps({"step": done + 1, "seconds": 99999.0, "prompt": "later", "response": ""}) + "\n")
            file.write('{"step": 1, "pro')
    code, _, err = cli(SCRIPTS[stage], f"--resume --out_dir {out} {more}")
    assert code == 0, err
    rows = read_rows(out / "metrics.jsonl")
    assert rows[: len(before)] == before
    steps = steps_of(out)
    assert steps == sorted(set(steps)) and steps[-1] == checkpoint_of(out)["step"] == (end or done * 3 // 2) > done
    assert all(row["seconds"] < 99999 and row["seconds"] >= before[-1]["seconds"] for row in rows[len(before):])
    assert "later" not in [row["prompt"] for row in read_rows(out / "samples.jsonl")]
    record = read_json(out / "run.json")
    assert record["argv"][1:] == ["--resume", "--out_dir", str(out), *more.split()]


# ---- options on resume -----------------------------------------------------------------------


def test_command_line_beats_checkpoint_beats_default():
    saved = {"lr": 0.5, "max_steps": 7, "data": ["a.txt"], "compile": True, "an_option_of_long_ago": 1}
    asked = []

    def saved_config(folder):
        asked.append(folder)
        return saved

    config = parse(train_lm.Config, "", "--resume --out_dir x --max_steps 9 --no-compile".split(), saved_config)
    assert asked == ["x"]
    assert (config.max_steps, config.compile, config.lr, config.data) == (9, False, 0.5, ("a.txt",))
    assert (config.grad_clip, config.out_dir, config.resume) == (train_lm.Config.grad_clip, "x", True)
    config = parse(train_lm.Config, "", ["--lr", "0.25"], saved_config)  # no --resume: no checkpoint
    assert asked == ["x"] and (config.lr, config.max_steps) == (0.25, train_lm.Config.max_steps)


def test_resume_looks_into_the_default_folder():
    asked = []
    parse(train_rm.Config, "", ["--resume"], lambda folder: asked.append(folder) or {})
    assert asked == ["runs/rm"]


def test_a_resumed_run_records_the_options_it_ran_with(lm_run, cli, tmp_path):
    shutil.copytree(lm_run, tmp_path / "lm")
    code, _, err = cli(train_lm, f"--resume --out_dir {tmp_path}/lm --max_steps 14 --lr 0.004")
    assert code == 0, err
    old, new = (read_json(folder / "run.json")["config"] for folder in (lm_run, tmp_path / "lm"))
    assert new == old | {"out_dir": f"{tmp_path}/lm", "max_steps": 14, "lr": 0.004, "resume": True}
    assert checkpoint_of(tmp_path / "lm")["config"] == new


@pytest.mark.parametrize("change", ["--n_embd 32", "--n_layer 3", "--block_size 32"])
def test_resume_cannot_change_the_network(change, lm_run, cli, tmp_path):
    """It is the checkpoint's; to ignore the option in silence, and to record it, would mislead."""
    shutil.copytree(lm_run, tmp_path / "lm")
    code, _, err = cli(train_lm, f"--resume --out_dir {tmp_path}/lm --max_steps 14 {change}")
    assert code == 2 and change.split()[0] in err
    assert checkpoint_of(tmp_path / "lm")["step"] == 12


# ---- torch.compile ---------------------------------------------------------------------------


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="torch.compile needs a C++ compiler")
def test_a_checkpoint_written_with_compile_is_a_plain_one(lm_run, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")  # a pool of processes starts more slowly than it helps
    data = read_json(lm_run / "run.json")["config"]["data"][0]
    options = f"--data {data} --max_steps 2 --compile --out_dir {tmp_path}/lm"
    code, _, err = cli(train_lm, TINY[train_lm], LM_SMALLER, options)
    assert code == 0, err
    assert checkpoint_of(tmp_path / "lm")["model"].keys() == checkpoint_of(lm_run)["model"].keys()
    model, tokenizer = load_lm(tmp_path / "lm", torch.device("cpu"))
    assert model(torch.tensor([[tokenizer.eos, 65]])).isfinite().all()
    code, _, err = cli(train_lm, f"--resume --no-compile --max_steps 3 --out_dir {tmp_path}/lm")
    assert code == 0, err
    assert checkpoint_of(tmp_path / "lm")["step"] == 3
