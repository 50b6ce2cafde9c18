"""The command line: what is read, what is refused and how, and that help, options and code tell one story."""

import ast
import dataclasses
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import minirlhf
import train_lm
import train_ppo
import train_rm
from minirlhf import generate, run
from minirlhf.config import UserError, command, option, parse

ROOT = Path(__file__).parents[1]
PROGRAMS = (train_lm, train_rm, train_ppo, generate)
SCRIPTS = PROGRAMS[:3]
NUMBERS = [pytest.param(program, field, id=f"{program.__name__}-{field.name}") for program in PROGRAMS
           for field in dataclasses.fields(program.Config) if type(field.default) in (int, float)]


@pytest.fixture
def refused(cli, monkeypatch):
    """refused(program, argv) -> the one line on stderr with which parse refuses a command line.

    main() only parses here: an option that is wrongly let through must not start to train.
    """

    def run_it(program, argv):
        monkeypatch.setattr(program, "main", lambda: parse(program.Config, program.__doc__))
        code, out, err = cli(program, argv)
        assert code == 2 and out == ""
        assert err.endswith("\n") and err.count("\n") == 1, err
        assert err.startswith(Path(program.__file__).name + ": error: ")
        return err

    return run_it


# ---- parse -----------------------------------------------------------------------------------


@dataclass
class Small:
    count: int = option(3, "how many", low=1, high=9)
    rate: float = option(0.5, "how fast, 5 % or so", low=0)
    kind: str = option("a", "which", choices=("a", "b"))
    name: str = option("", "who")
    files: tuple = option((), "what to read")
    compile: bool = option(False, "compile")
    safe: bool = option(True, "look twice")
    out_dir: str = option("runs/small", "where")
    resume: bool = option(False, "go on")


def test_defaults_without_options():
    assert parse(Small, "", []) == Small()


def test_typed_options():
    typed = parse(Small, "", "--count 9 --rate 1e-3 --kind b --name x --files p --files q --compile --no-safe".split())
    assert typed == Small(count=9, rate=0.001, kind="b", name="x", files=("p", "q"), compile=True, safe=False)
    assert type(parse(Small, "", ["--rate", "2"]).rate) is float


def test_typed_beats_saved_beats_default():
    """Also where the typed value is the default: what counts is that it was typed."""
    saved = {"count": 7, "rate": 0.25, "kind": "b", "files": ["p", "q"], "compile": True, "safe": False}
    argv = "--resume --count 3 --kind a --no-compile --files z".split()
    config = parse(Small, "", argv, lambda folder: saved)
    assert config == Small(count=3, rate=0.25, kind="a", name="", files=("z",), compile=False, safe=False, resume=True)
    assert parse(Small, "", ["--resume"], lambda folder: saved).files == ("p", "q")  # a tuple, as everywhere


def test_saved_options_are_read_only_on_resume_and_from_the_right_folder():
    asked = []

    def saved_config(folder):
        asked.append(folder)
        return {"count": 7, "an_option_of_last_year": 1}

    assert parse(Small, "", ["--count", "2"], saved_config) == Small(count=2) and asked == []
    assert parse(Small, "", ["--resume"], saved_config).count == 7
    assert parse(Small, "", ["--resume", "--out_dir", "elsewhere"], saved_config).count == 7
    assert asked == ["runs/small", "elsewhere"]


def test_resume_stays_in_the_folder_whose_checkpoint_was_read():
    """A folder that was renamed or copied has its old name in the checkpoint: that one must not be written to."""
    assert parse(Small, "", ["--resume"], lambda folder: {"out_dir": "runs/old_name"}).out_dir == "runs/small"


def test_parse_reads_the_process_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["small.py", "--count", "4"])
    assert parse(Small, "").count == 4


def test_limits_are_allowed():
    """Both ends belong to what is allowed; one step beyond is not."""
    assert [parse(Small, "", ["--count", text]).count for text in ("1", "9")] == [1, 9]
    assert parse(Small, "", ["--rate", "0"]).rate == 0
    for argv in ("--count=0", "--count=10", "--rate=-0.001"):
        with pytest.raises(SystemExit) as stop:
            parse(Small, "", [argv])
        assert stop.value.code == 2


def help_entries(text):
    """{option's name: its entry in a --help text, white space made single}."""
    entries = [" ".join(entry.split()) for entry in re.split(r"\n  (?=-)", text)[1:]]
    return {re.match(r"(?:-h, )?--(\w+)", entry)[1]: entry for entry in entries}


def test_help_shows_meaning_and_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        parse(Small, "What it is for.", ["--help"])
    out = capsys.readouterr().out
    entries = help_entries(out)
    assert stop.value.code == 0 and "\nWhat it is for.\n" in out
    assert entries["count"] == "--count INT how many [3]"
    assert entries["rate"] == "--rate FLOAT how fast, 5 % or so [0.5]"
    assert entries["kind"] == "--kind {a,b} which [a]"
    assert entries["name"] == "--name TEXT who"
    assert entries["files"] == "--files FILE what to read (repeatable)"
    assert entries["compile"] == "--compile, --no-compile compile"
    assert entries["resume"] == "--resume go on"


def test_command_turns_a_user_error_into_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/some/where/train_x.py"])

    def fail():
        raise UserError("mend this")

    with pytest.raises(SystemExit) as stop:
        command(fail)
    assert stop.value.code == 2 and capsys.readouterr() == ("", "train_x.py: error: mend this\n")


def test_command_on_interrupt_and_on_other_errors(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        command(interrupted)
    assert stop.value.code == 130 and "Traceback" not in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):  # a bug of ours is not dressed up as the user's
        command(lambda: 1 / 0)


# ---- the programs' options -------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_option_is_explained_in_help(program, cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")  # no word is broken at its hyphen
    code, out, err = cli(program, "--help")
    entries = help_entries(out)
    assert code == 0 and err == ""
    assert list(entries) == ["help"] + [field.name for field in dataclasses.fields(program.Config)]
    for field in dataclasses.fields(program.Config):
        assert len(field.metadata["help"]) > 5, field.name
        assert field.metadata["help"] in entries[field.name]
        if field.default and not isinstance(field.default, bool):
            assert entries[field.name].endswith(f"[{field.default}]")


COMMON = "seed device dtype compile resume out_dir".split()
CONTRACT = {  # fixed names: users' commands and notebooks rely on them
    train_lm: "data vocab_size n_layer n_head n_embd block_size batch_size max_steps lr eval_every".split(),
    train_rm: ("lm prefs prompts prompt_words labeler policy num_pairs answers_per_prompt max_new_tokens epochs lr "
               "batch_size").split(),
    train_ppo: ("lm rm prompts prompt_words reward max_steps batch_size minibatch_size ppo_epochs max_new_tokens "
                "temperature lr kl_coef kl_target kl_horizon gamma lam clip value_clip vf_coef missing_eos_penalty "
                "explain").split(),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_options_of_the_contract_exist(script):
    assert set(COMMON + CONTRACT[script]) <= {field.name for field in dataclasses.fields(script.Config)}


def test_defaults_of_the_contract():
    lm, rm, ppo = (script.Config() for script in SCRIPTS)
    assert (lm.out_dir, rm.lm, rm.out_dir, ppo.lm, ppo.rm, ppo.out_dir) == (
        "runs/lm", "runs/lm", "runs/rm", "runs/lm", "runs/rm", "runs/ppo")
    assert (rm.prompt_words, ppo.prompt_words, rm.answers_per_prompt) == (4, 4, 4)
    assert (rm.labeler, ppo.reward) == ("gold", "rm")


def test_repeatable_options():
    assert parse(train_lm.Config, "", "--data a.txt --data b.jsonl".split()).data == ("a.txt", "b.jsonl")
    assert parse(train_rm.Config, "", "--prefs a --prefs b".split()).prefs == ("a", "b")
    assert parse(generate.Config, "", ["--prompt", "one two", "--prompt", "three"]).prompt == ("one two", "three")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_compile_and_no_compile(script):
    assert parse(script.Config, "", ["--compile"]).compile is True
    assert parse(script.Config, "", ["--no-compile"]).compile is False
    assert parse(script.Config, "", ["--compile", "--no-compile"]).compile is False


@pytest.mark.parametrize("program, argv, named", [
    (train_lm, "--nonsense 1", "--nonsense"),
    (train_lm, "stray", "stray"),
    (train_lm, "--max_step 3", "--max_step"),  # an abbreviation
    (train_lm, "--max-steps 3", "--max-steps"),
    (train_ppo, "--expl", "--expl"),
    (train_lm, "--max_steps", "--max_steps"),
    (train_lm, "--max_steps ten", "--max_steps"),
    (train_lm, "--max_steps 1.5", "--max_steps"),
    (train_lm, "--max_steps 1e3", "--max_steps"),
    (train_ppo, "--lr fast", "--lr"),
    (train_lm, "--vocab_size 256", "--vocab_size"),
    (train_ppo, "--gamma 1.01", "--gamma"),
    (train_ppo, "--lam=-0.1", "--lam"),
    (train_ppo, "--temperature 0", "--temperature"),
    (train_ppo, "--lr -1", "--lr"),
    (train_lm, "--dtype float16", "--dtype"),
    (train_rm, "--labeler nobody", "--labeler"),
    (train_lm, "--resume=yes", "--resume"),
    (generate, "--num_samples 0", "--num_samples"),
    (generate, "--runs x", "--runs"),
])
def test_a_wrong_command_line_is_refused_in_one_line(refused, program, argv, named):
    assert named in refused(program, argv)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_each_program_itself_refuses_an_unknown_option(program, cli, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = cli(program, "--nonsense 1")
    assert code == 2 and out == "" and "--nonsense" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []  # nothing was begun


@pytest.mark.parametrize("program, field", NUMBERS)
def test_every_number_refuses_what_is_no_number_in_its_range(refused, program, field):
    low, high = field.metadata["low"], field.metadata["high"]
    assert low is not None and low <= field.default <= (field.default if high is None else high)
    wrong = ["nan", "inf", "-inf", "many", "", str(low - 1)] + ([] if high is None else [str(high + 1)])
    for text in wrong:
        assert f"--{field.name}" in refused(program, f"--{field.name}={text}")


def test_a_number_with_400_digits_is_refused(refused):
    assert "--max_steps" in refused(train_lm, "--max_steps=" + "9" * 400)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_seed_that_torch_cannot_take_is_refused(program, capsys):
    for seed in (2**64, 10**30):
        with pytest.raises((RuntimeError, ValueError)):  # why it has to be refused
            torch.Generator().manual_seed(seed)
        with pytest.raises(SystemExit) as stop:
            parse(program.Config, "", [f"--seed={seed}"])
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ---- every option does something -------------------------------------------------------------


def reads_of_config(tree):
    """Names X that a piece of code reads as config.X (assigning to config.X is not reading it)."""
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
            and isinstance(node.value, ast.Name) and node.value.id == "config"}


def tree_of(module):
    return ast.parse(inspect.getsource(module))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_every_option_is_read_and_every_read_is_an_option(program):
    reads = reads_of_config(tree_of(program))
    if program in SCRIPTS:  # the scripts hand their config to run.Run
        calls = [node for node in ast.walk(tree_of(program)) if isinstance(node, ast.Call)]
        assert any(ast.unparse(call).startswith("Run(") and "config" in ast.unparse(call) for call in calls)
        reads |= reads_of_config(tree_of(run))
    assert reads == {field.name for field in dataclasses.fields(program.Config)}


# ---- the reading order -----------------------------------------------------------------------


def reading_order():
    """Names of the modules as the package's docstring lists them, the scripts last."""
    modules, scripts = re.search(r"Read in this order:(.*?);(.*?)\.\s+Imports", minirlhf.__doc__, re.DOTALL).groups()
    return re.findall(r"\w+", modules), re.findall(r"(\w+)\.py", scripts)


def imports_of(path):
    """Dotted names of everything that a file imports: `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(part for part in ("minirlhf" * bool(node.level), node.module) if part)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_the_reading_order_names_every_file():
    modules, scripts = reading_order()
    assert sorted(modules) == sorted(path.stem for path in (ROOT / "minirlhf").glob("*.py") if path.stem != "__init__")
    assert scripts == ["train_lm", "train_rm", "train_ppo"] and all((ROOT / f"{name}.py").exists() for name in scripts)


def test_imports_only_point_back():
    modules, scripts = reading_order()
    found = 0
    for i, name in enumerate(modules):
        for imported in imports_of(ROOT / "minirlhf" / f"{name}.py"):
            top, *rest = imported.split(".")
            assert top not in scripts, f"{name} imports a script"
            if top == "minirlhf":
                found += 1
                assert rest[0] in modules[:i], f"{name} imports {imported}, which is read later"
    for name in scripts:
        assert not {imported.split(".")[0] for imported in imports_of(ROOT / f"{name}.py")} & set(scripts)
    assert found > 10  # the walk does find imports


def test_each_file_names_the_next_one():
    """The docstrings lead from file to file."""
    modules, scripts = reading_order()
    paths = [ROOT / "minirlhf" / f"{name}.py" for name in modules] + [ROOT / f"{name}.py" for name in scripts]
    for path, following in zip(paths, paths[1:]):
        assert f"Next: {following.name}" in ast.get_docstring(ast.parse(path.read_text())), path.name


def test_nothing_imports_the_instruments():
    """Each file of minirlhf/lab can be deleted alone: the core and the scripts do not know them."""
    for path in [*(ROOT / "minirlhf").glob("*.py"), *ROOT.glob("*.py")]:
        assert not any(name.split(".")[:2] == ["minirlhf", "lab"] for name in imports_of(path)), path.name


def test_only_the_required_packages_are_imported():
    """pip install -r requirements.txt is enough."""
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm", "minirlhf"}
    for path in [*(ROOT / "minirlhf").glob("*.py"), *(ROOT / f"{name}.py" for name in reading_order()[1])]:
        assert {name.split(".")[0] for name in imports_of(path)} <= allowed, path.name
