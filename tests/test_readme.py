"""The README is a promise: its options exist, its line counts are true, its code runs."""

import dataclasses
import re
import subprocess
import sys

import pytest

import train_lm
import train_ppo
import train_rm
from conftest import ROOT
from minirlhf import generate
from minirlhf.lab import bench, details, dpo, exact, overopt

README = (ROOT / "README.md").read_text()
CONFIGS = {"train_lm.py": train_lm.Config, "train_rm.py": train_rm.Config, "train_ppo.py": train_ppo.Config,
           "minirlhf.generate": generate.Config, "minirlhf.lab.exact": exact.Config,
           "minirlhf.lab.overopt": overopt.Config, "minirlhf.lab.dpo": dpo.Config, "minirlhf.lab.details": details.Config,
           "minirlhf.lab.bench": bench.Config}


def commands():
    """(script, options) of every command in the README's shell blocks."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for part in re.split(r"&&|\n", block):
            match = re.search(r"python (?:-m )?(train_\w+\.py|minirlhf\.[\w.]+)([^#]*)", part)
            if match:
                yield match[1], re.findall(r"--(\w[\w-]*)", match[2])


def test_commands_use_options_that_exist():
    found = list(commands())
    assert {script for script, _ in found} == set(CONFIGS)
    for script, options in found:
        names = {field.name for field in dataclasses.fields(CONFIGS[script])}
        assert set(options) <= names, script


def test_options_named_in_the_text_exist():
    names = {field.name for config in CONFIGS.values() for field in dataclasses.fields(config)}
    named = set(re.findall(r"`[^`]*?--(?:no-)?(\w+)", README)) - {"help"}
    assert named and named <= names


def test_line_counts_and_files():
    rows = re.findall(r"^\| `([\w/.]+\.py)` \| (\d+) \|", README, re.M)
    shipped = [*ROOT.glob("train_*.py"), *(ROOT / "minirlhf").glob("*.py")]
    assert {name for name, _ in rows} == {str(path.relative_to(ROOT)) for path in shipped} - {"minirlhf/__init__.py"}
    for name, lines in rows:
        assert len((ROOT / name).read_text().splitlines()) == int(lines), name


def test_reward_functions_do_what_they_say(tmp_path):
    code = re.search(r"```python\n(import ast.*?)```", README, re.S)[1]
    rewards = {}
    exec(code, rewards)
    prompts = ["I had the soup at Luna."] * 2
    assert rewards["creative"](prompts, [" a b a b", ""]) == [0.5, 0.0]
    assert rewards["truthful"](prompts, [" The soup was hot.", " The soups were hot."]) == [1.0, 0.0]
    assert rewards["executable"](prompts, [" x = 1", " The soup was hot."]) == [1.0, 0.0]


def test_a_reward_function_in_the_current_folder_is_found(runs, tmp_path):
    (tmp_path / "my_rewards.py").write_text(re.search(r"```python\n(import ast.*?)```", README, re.S)[1])
    done = subprocess.run(
        [sys.executable, ROOT / "train_ppo.py", "--lm", runs / "lm", "--reward", "my_rewards:creative", "--max_steps", "1",
         "--batch_size", "8", "--minibatch_size", "8", "--max_new_tokens", "40", "--eval_answers", "8", "--out_dir", "ppo"],
        cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ppo" / "eval.json").exists()


def test_readme_has_no_placeholder():
    assert "@@" not in README and "TODO" not in README


@pytest.mark.parametrize("script", ["train_lm.py", "train_rm.py", "train_ppo.py"])
def test_docstrings_name_options_that_exist(script):
    names = {field.name for name in (script, "minirlhf.generate") for field in dataclasses.fields(CONFIGS[name])}
    docstring = sys.modules[script[:-3]].__doc__
    assert set(re.findall(r"--(\w+)", docstring)) <= names
