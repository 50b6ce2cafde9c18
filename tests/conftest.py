"""Shared pieces of the tests: a small network, a command line in this process, a small trained pipeline."""

import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train_lm
import train_ppo
import train_rm
from minirlhf.config import command
from minirlhf.model import GPT, Shape

# Options that make each stage take seconds.
TINY = {
    train_lm: "--n_layer 2 --n_head 2 --n_embd 48 --batch_size 32 --max_steps 80 --eval_every 40 --save_every 40",
    train_rm: "--num_pairs 480 --epochs 2 --batch_size 48 --max_new_tokens 40 --save_every 10",
    train_ppo: "--max_steps 4 --batch_size 16 --minibatch_size 8 --max_new_tokens 40 --eval_answers 32 --sample_every 2",
}


@pytest.fixture(autouse=True)
def keep_signals_and_path():
    """Scripts take over SIGINT and a reward function adds to sys.path; give both back."""
    handler, path = signal.getsignal(signal.SIGINT), list(sys.path)
    yield
    signal.signal(signal.SIGINT, handler)
    sys.path[:] = path


@pytest.fixture
def tiny_gpt():
    """A function (vocab_size=13, block_size=16, dtype=...) -> a GPT whose outputs are far from uniform."""

    def make(vocab_size=13, block_size=16, n_layer=2, n_head=2, n_embd=8, dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        model = GPT(Shape(vocab_size, block_size, n_layer, n_head, n_embd))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model.to(dtype)

    return make


@pytest.fixture
def cli(monkeypatch, capfd):
    """cli(script, "--lr 1 --seed 2", ...) -> (exit code, stdout, stderr) of the script's main() in this process."""

    def run(script, *arguments):
        argv = [word for argument in arguments for word in (argument.split() if isinstance(argument, str) else argument)]
        monkeypatch.setattr(sys, "argv", [Path(script.__file__).name, *argv])
        capfd.readouterr()
        code = 0
        try:
            command(script.main)
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run


def run_stage(script, arguments, tiny=True):
    """Run a script's main(), with the options of TINY if tiny; UserError passes through."""
    argv, sys.argv = sys.argv, [Path(script.__file__).name, *(TINY[script].split() if tiny else ()), *arguments.split()]
    try:
        script.main()
    finally:
        sys.argv = argv


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with lm, rm and ppo: the three stages, run once with the options of TINY. Do not write into it."""
    folder = tmp_path_factory.mktemp("runs")
    run_stage(train_lm, f"--out_dir {folder}/lm")
    run_stage(train_rm, f"--lm {folder}/lm --out_dir {folder}/rm")
    run_stage(train_ppo, f"--lm {folder}/lm --rm {folder}/rm --out_dir {folder}/ppo")
    return folder
