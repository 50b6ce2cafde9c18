"""A run that was killed and resumed is the run that was not: bit for bit on the CPU, and no row twice."""

import json
import shutil

import pytest
import torch

import train_lm
import train_ppo
import train_rm
from conftest import run_stage
from minirlhf.run import Run

NOT_COMPARED = {"seconds", "tokens_per_second"}


def rows_of(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in NOT_COMPARED} for row in rows]


def same(a, b):
    """Equality of nested dicts and lists that hold tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("script, options, save_every, kill_after", [
    (train_lm, "--max_steps 40", 10, 34),
    (train_rm, "", 6, 15),
    (train_ppo, "--max_steps 7 --kl_target 0.5", 3, 5),
], ids=["lm", "rm", "ppo"])
def test_killed_and_resumed_equals_uninterrupted(script, options, save_every, kill_after, runs, tmp_path, monkeypatch):
    stage = {train_lm: "lm", train_rm: "rm", train_ppo: "ppo"}[script]
    inputs = {"lm": "", "rm": f"--lm {runs}/lm", "ppo": f"--lm {runs}/lm --rm {runs}/rm"}[stage]
    options = f"{options} {inputs} --save_every {save_every} --device cpu"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_stage(script, f"{options} --out_dir {whole}")

    class Killed(BaseException):
        pass

    log = Run.log

    def log_and_die(self, **row):
        log(self, **row)
        if row["step"] >= kill_after:  # after rows that are later than the last checkpoint
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log_and_die)
        with pytest.raises(Killed):
            run_stage(script, f"{options} --out_dir {parts}")
    checkpoint = torch.load(parts / "ckpt.pt", weights_only=True)
    assert checkpoint["step"] == kill_after // save_every * save_every < kill_after
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "lo')  # a line that the kill cut short
    torch.manual_seed(12345)  # the resumed process knows nothing of the old one's random state
    run_stage(script, f"--resume --out_dir {parts}", tiny=False)

    a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (whole, parts))
    for key in a.keys() - {"seconds", "config"}:
        assert same(a[key], b[key]), key
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows_of(whole / name) == rows_of(parts / name)
    steps = [row["step"] for row in rows_of(parts / "metrics.jsonl")]
    assert len(steps) == len(set(steps))
    if stage != "lm":  # the LM's holds its speed
        assert json.loads((whole / "eval.json").read_text()) == json.loads((parts / "eval.json").read_text())


def test_a_finished_run_resumes_to_itself(runs, tmp_path):
    shutil.copytree(runs / "ppo", tmp_path / "ppo")
    before = torch.load(tmp_path / "ppo" / "ckpt.pt", weights_only=True)["model"]
    run_stage(train_ppo, f"--resume --out_dir {tmp_path}/ppo", tiny=False)
    assert same(before, torch.load(tmp_path / "ppo" / "ckpt.pt", weights_only=True)["model"])
    assert json.loads((tmp_path / "ppo" / "eval.json").read_text()) == json.loads((runs / "ppo" / "eval.json").read_text())
