"""lab/details: its table is true of the code, each change changes what it names and leaves no trace, its sums are right."""

import importlib
import inspect
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_ppo
from conftest import ROOT
from minirlhf import losses
from minirlhf.config import UserError
from minirlhf.generate import generate
from minirlhf.lab import details
from minirlhf.model import RewardModel
from minirlhf.run import learning_rate, load_lm

ROWS = {row.name: row for row in details.DETAILS}
MEASURED = [row for row in details.DETAILS if row.change]
# Two steps: before the first update there is no KL, and the learning rate has not fallen. Tight clips, so that they bind.
TINY = train_ppo.Config(max_steps=2, batch_size=16, minibatch_size=8, max_new_tokens=40, eval_answers=8, device="cpu",
                        clip=0.01, value_clip=0.001, lr=3e-3)


def names(rows):
    return [row.name for row in rows]


def originals():
    """What the swaps replace, as it is now."""
    return [getattr(row.swap[0], row.swap[1]) for row in MEASURED if row.swap]


@pytest.fixture(scope="module")
def tiny_run(runs, tmp_path_factory):
    """tiny_run(row) -> its result, from a folder of its own."""

    def run(row):
        base = replace(TINY, lm=str(runs / "lm"), rm=str(runs / "rm"))
        return details.run_one((row.name, details.config_of(row, base, 1, tmp_path_factory.mktemp("details"), "")))

    return run


@pytest.fixture(scope="module")
def unchanged(tiny_run):
    return tiny_run(details.UNCHANGED)


# ---- the table ---------------------------------------------------------------------------------


def test_table_is_large_enough_and_names_are_unique():
    assert len(ROWS) == len(details.DETAILS) >= 25 and len(MEASURED) >= 12
    assert all(row.name and row.default and row.source and "," not in row.name for row in details.DETAILS)
    assert all(bool(row.change) == bool(row.swap or row.options) for row in details.DETAILS)


@pytest.mark.parametrize("row", details.DETAILS, ids=names(details.DETAILS))
def test_where_is_where_the_code_is(row):
    path, name = row.where.split(":")
    thing = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for part in name.split("."):
        thing = getattr(thing, part)
    assert Path(inspect.getsourcefile(inspect.unwrap(thing))) == ROOT / path


def test_defaults_written_out_are_those_of_the_code():
    source = inspect.getsource(train_ppo.train)
    for name, code in (("Adam's ε", "eps=" + ROWS["Adam's ε"].default), ("value head", "std=0.0")):
        assert code in source, name
    assert "Dropout" not in inspect.getsource(importlib.import_module("minirlhf.model"))
    assert TINY.value == train_ppo.Config.value == "shared" and train_ppo.Config.kl_target == 0
    assert learning_rate(1.0, 15, 30) == 0.5


# ---- the changes -------------------------------------------------------------------------------


@pytest.mark.parametrize("row", MEASURED, ids=names(MEASURED))
def test_change_leads_to_other_weights_and_is_undone(row, tiny_run, unchanged):
    before = originals()
    result = tiny_run(row)
    assert result["stopped"] is None and math.isfinite(result["gold"]) and math.isfinite(result["kl"])
    assert result["weights"] != unchanged["weights"]
    assert all(now is then for now, then in zip(originals(), before))


def test_unchanged_code_gives_the_same_weights_after_a_swap(tiny_run, unchanged):
    tiny_run(ROWS["whitening"])
    again = tiny_run(details.UNCHANGED)
    assert again == unchanged


def test_result_is_that_of_eval_json_and_no_checkpoint_is_left(runs, tmp_path):
    base = replace(TINY, max_steps=1, lm=str(runs / "lm"), rm=str(runs / "rm"))
    config = details.config_of(ROWS["epochs"], base, 7, tmp_path, "")
    assert details.finished(config) is None
    result = details.run_one(("epochs", config))
    assert details.finished(config) == result
    figures = json.loads((Path(config.out_dir) / "eval.json").read_text())
    assert (result["gold"], result["kl"]) == (figures["policy"]["gold"], figures["kl"])
    used = json.loads((Path(config.out_dir) / "run.json").read_text())["config"]
    assert (used["seed"], used["ppo_epochs"], used["max_steps"]) == (7, 4, 1)
    assert not list(tmp_path.rglob("ckpt.pt"))


def test_run_that_stops_is_a_result_and_the_swap_is_undone(runs, tmp_path, monkeypatch):
    before, during = losses.whiten, []

    def diverge(*_):
        during.append(losses.whiten)
        raise UserError("loss is nan at step 3: the run stopped")

    monkeypatch.setattr(train_ppo, "train", diverge)
    row = ROWS["whitening"]
    config = details.config_of(row, replace(TINY, lm=str(runs / "lm"), rm=str(runs / "rm")), 1, tmp_path, "")
    result = details.run_one((row.name, config))
    assert during == [row.swap[2]] and losses.whiten is before
    good = {"gold": 1.0, "kl": 2.0, "stopped": None}
    table_row = details.row_of(row, [result, good], [good, good])
    assert table_row["verdict"] == "1 of 4 runs stopped: loss is nan at step 3"
    assert table_row["gold_difference"] is None and table_row["gold"] == [None, 1.0]


def test_folder_depends_on_all_that_decides_a_result():
    configs = [details.config_of(row, replace(TINY, max_steps=steps), seed, "work", shared)
               for row in [details.UNCHANGED, *MEASURED] for seed in (1, 2) for steps in (2, 3) for shared in ("a", "b")]
    assert len({config.out_dir for config in configs}) == len(configs)
    row = ROWS["whitening"]
    other = replace(row, swap=(*row.swap[:2], lambda x, mask: 2 * x))
    assert details.config_of(row, TINY, 1, "work", "").out_dir != details.config_of(other, TINY, 1, "work", "").out_dir
    # where the models lie decides nothing: their content does
    moved = details.config_of(row, replace(TINY, lm="elsewhere"), 1, "work", "")
    assert moved.out_dir == details.config_of(row, TINY, 1, "work", "").out_dir


def test_fingerprint_follows_the_models(runs, tmp_path):
    for stage in ("lm", "rm"):
        shutil.copytree(runs / stage, tmp_path / stage)
    first = details.fingerprint(details.Config(lm=str(runs / "lm"), rm=str(runs / "rm")))
    copies = details.Config(lm=str(tmp_path / "lm"), rm=str(tmp_path / "rm"))
    assert details.fingerprint(copies) == first
    with open(tmp_path / "rm" / "ckpt.pt", "ab") as file:
        file.write(b"x")
    assert details.fingerprint(copies) != first


def test_k3_in_the_reward():
    logprobs, ref = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-2.0, -1.5, -1.0]])
    mask = torch.tensor([[True, True, False]])
    rewards = ROWS["KL in the reward"].swap[2](torch.tensor([3.0]), logprobs, ref, mask, 0.1)
    expected = [-0.1 * (math.exp(-1) + 1 - 1), 3 - 0.1 * (math.exp(0.5) - 0.5 - 1), 0.0]
    assert rewards[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_whitening_swaps():
    x, mask = torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[True, False], [True, True]])
    assert torch.equal(ROWS["whitening"].swap[2](x, mask), x)
    std = math.sqrt((4 + 1 + 0 + 1) / 4)  # of 3, 0, 1, 0, whose mean is 1
    expected = torch.tensor([[2 / std, 0.0], [0.0, -1 / std]])
    assert torch.allclose(ROWS["whitening mask"].swap[2](x, mask), expected)


def test_optimizer_and_head_swaps():
    rate = ROWS["learning rate"].swap[2]
    assert [rate(0.3, step, 30) for step in (0, 29)] == [0.3, 0.3]
    weight = torch.nn.Parameter(torch.zeros(1))
    group = ROWS["Adam's ε"].swap[2]([weight], lr=0.1, eps=1e-5, fused=True).param_groups[0]
    assert (group["eps"], group["lr"], group["fused"]) == (1e-8, 0.1, True)
    torch.manual_seed(0)
    head = ROWS["value head"].swap[2](9999, std=0.0).linear
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.05) and head.bias.item() == 0


def test_reward_not_normalised(tiny_gpt):
    model = RewardModel(tiny_gpt())
    model.gain.fill_(2.0)
    model.bias.fill_(5.0)
    ids, last = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([2, 1])
    raw = ROWS["reward normalised"].swap[2](model, ids, last, None)
    assert torch.allclose(2 * raw + 5, model.score(ids, last))


def test_temperature_in_sampling_only(tiny_gpt):
    torch.manual_seed(3)
    cold = ROWS["temperature"].swap[2](tiny_gpt(), [[12, 1]] * 8, 10, 12, 2.0)
    torch.manual_seed(3)
    assert torch.equal(cold.ids, generate(tiny_gpt(), [[12, 1]] * 8, 10, 12, 1.4).ids)


def test_eos_outside_the_mask_is_scored_all_the_same(tiny_gpt):
    model, prompts = tiny_gpt(), [[12, 1], [12, 2, 3]] * 64
    torch.manual_seed(0)
    plain = generate(model, prompts, 13, 12, 1.0)
    torch.manual_seed(0)
    hidden = details.hide_eos(model, prompts, 13, 12, 1.0)
    lengths, plain_lengths = hidden.mask.sum(1), plain.mask.sum(1)
    only_eos, ended = plain.finished & (plain_lengths == 1), plain.finished & (plain_lengths > 1)
    assert only_eos.any() and ended.any() and not plain.finished.all()  # all three kinds are looked at
    assert torch.equal(lengths, plain_lengths - ended.long())
    assert not (hidden.answers[hidden.mask & ~only_eos[:, None]] == 12).any()
    assert torch.equal(hidden.ids, plain.ids) and torch.equal(hidden.finished, plain.finished)
    assert torch.equal(hidden.last, plain.last)
    assert hidden.rows(torch.arange(4)).mask.sum(1).tolist() == lengths[:4].tolist()


# ---- statistics --------------------------------------------------------------------------------


def test_paired_difference_by_hand():
    mean, error = details.paired_difference([2.0, 3.0, 7.0], [1.0, 1.0, 1.0])
    assert mean == 3.0 and error == pytest.approx(math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2 / 3))
    assert details.paired_difference([5.0, 9.0], [4.0, 8.0]) == (1.0, 0.0)  # what the seeds share is no error


@pytest.mark.parametrize("freedom", range(1, len(details.T95) + 1))
def test_t_quantiles_hold_95_percent(freedom):
    """Student's density, integrated by the trapezoid rule."""
    t = torch.linspace(-details.T95[freedom - 1], details.T95[freedom - 1], 20001, dtype=torch.float64)
    scale = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    density = scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2)
    assert torch.trapezoid(density, t).item() == pytest.approx(0.95, abs=5e-5)


@pytest.mark.parametrize("mean, seeds, words", [
    (0.44, 3, "gold +0.01 to +0.87"), (-0.44, 3, "gold -0.87 to -0.01"), (0.42, 3, "no effect on gold larger than 0.85"),
    (-0.42, 3, "no effect on gold larger than 0.85"), (1.2, 2, "no effect on gold larger than 2.47"),
    (0.24, 10, "gold +0.01 to +0.47"),
])
def test_verdict_is_the_95_percent_interval(mean, seeds, words):
    assert details.verdict("gold", mean, 0.1, seeds) == words


def test_row_of_pairs_seeds_and_needs_all_runs():
    def results(golds, kls):
        return [{"gold": gold, "kl": kl, "stopped": None} for gold, kl in zip(golds, kls)]

    unchanged = results([1.0, 2.0, 3.0], [5.0, 5.0, 5.0])
    changed = results([0.0, 1.0, 2.0], [5.0, 6.0, 4.0])
    row = details.row_of(ROWS["epochs"], changed, unchanged)
    assert (row["gold_difference"], row["gold_se"], row["kl_difference"]) == (-1.0, 0.0, 0.0)
    assert row["kl_se"] == pytest.approx(1 / math.sqrt(3)) and row["gold"] == [0.0, 1.0, 2.0]
    assert row["verdict"] == "gold -1.00 to -1.00; no effect on KL larger than 2.48"
    for some in ([None, *changed[1:]], changed):
        missing = details.row_of(ROWS["epochs"], some, unchanged if some is not changed else [None, *unchanged[1:]])
        assert missing["verdict"] is missing["gold"] is missing["gold_se"] is None


# ---- the command -------------------------------------------------------------------------------


def test_command_measures_writes_and_goes_on_where_it_was(cli, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(details, "PPO", TINY)
    out, work = tmp_path / "table.json", tmp_path / "work"
    arguments = f"--lm {runs}/lm --rm {runs}/rm --seeds 3,4 --steps 1 --work {work} --out {out} --device cpu".split()
    code, text, err = cli(details, [*arguments, "--only", "epochs"])
    assert code == 0, err
    assert "4 runs of 1 steps" in text and "0 of them there already" in text and "[4/4]" in text and "min left" in text
    table = json.loads(out.read_text())
    assert names(details.DETAILS) == [row["name"] for row in table["rows"]]
    assert table["machine"]["torch"] == torch.__version__ and table["seeds"] == [3, 4]
    row = next(row for row in table["rows"] if row["name"] == "epochs")
    mean, error = details.paired_difference(row["gold"], table["unchanged"]["gold"])
    assert (row["gold_difference"], row["gold_se"]) == (mean, error) and len(row["kl"]) == 2
    assert [row["name"] for row in table["rows"] if row["verdict"]] == ["epochs"]
    written = {path: path.stat().st_mtime_ns for path in work.rglob("*.json")}

    code, text, _ = cli(details, [*arguments, "--only", " epochs"])
    assert code == 0 and "4 of them there already" in text and "min left" not in text and row["verdict"] in text
    assert {path: path.stat().st_mtime_ns for path in work.rglob("*.json")} == written
    assert json.loads(out.read_text())["rows"] == table["rows"]

    code, text, _ = cli(details, f"--markdown --out {out}")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert code == 0 and len(lines) == 2 + len(details.DETAILS) and {line.count("|") for line in lines} == {8}
    assert f" | {row['gold_difference']:+.2f} ± {row['gold_se']:.2f}" in next(x for x in lines if x.startswith("| epochs |"))


def test_markdown_says_for_each_figure_how_large_an_effect_there_can_be():
    changed = [{"gold": gold, "kl": kl, "stopped": None} for gold, kl in ((1.0, 5.0), (2.0, 6.0), (3.0, 9.0))]
    unchanged = [{"gold": gold + 1, "kl": 5.0, "stopped": None} for gold in (1.0, 2.0, 3.0)]
    row = details.row_of(details.DETAILS[0], changed, unchanged)
    assert "no effect on KL larger than 6.84" in row["verdict"]  # 5/3 + 4.303 sqrt(13/3 / 3), by hand
    assert details.markdown([row]).endswith("| -1.00 ± 0.00 | +1.67 ± 1.20 (none > 6.84) |")
    stopped = details.row_of(details.DETAILS[0], [changed[0] | {"stopped": "loss is nan: lower --lr"}, *changed[1:]], unchanged)
    assert details.markdown([stopped]).endswith("| 1 of 6 runs stopped: loss is nan |  |")


@pytest.mark.parametrize("arguments, words", [
    (["--only", "policy clip,nonsense"], "--only nonsense: not a row that is measured"),
    (["--only", "dropout"], "--only dropout: not a row that is measured"),
    (["--seeds", "1"], "--seeds 1: a standard error needs 2 to 10 different seeds"),
    (["--seeds", "1,1"], "different seeds"), (["--seeds", "1,-2"], "none below 0"), (["--seeds", "a,b"], "whole numbers"),
    (["--seeds", ",".join(map(str, range(11)))], "2 to 10"), (["--steps", "0"], "--steps"),
    (["--lm", "nowhere"], "nowhere does not exist"), (["--rm", "nowhere"], "nowhere does not exist"),
    (["--out", "{tmp}/file/table.json"], "cannot be written"), (["--work", "{tmp}/file"], "cannot be written"),
    (["--markdown", "--out", "{tmp}/none.json"], "holds no table"),
    (["--markdown", "--out", "{tmp}/file"], "holds no table"),
    (["--rm", "{tmp}/rm"], "gold is known only in the built-in world"),
])
def test_bad_input_is_one_line(arguments, words, cli, runs, tmp_path):
    (tmp_path / "file").write_text("[]")
    shutil.copytree(runs / "rm", tmp_path / "rm")
    (tmp_path / "rm" / "pairs.jsonl").write_text('{"prompt": "Hello", "chosen": "a", "rejected": "b"}\n')
    usual = ["--lm", f"{runs}/lm", "--rm", f"{runs}/rm", "--work", f"{tmp_path}/work", "--out", f"{tmp_path}/t.json"]
    code, _, err = cli(details, [*usual, *(word.replace("{tmp}", str(tmp_path)) for word in arguments)])
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1
    assert not list((tmp_path).glob("work/*"))


def test_models_with_different_tokenizers_are_refused(cli, runs, tmp_path):
    shutil.copytree(runs / "lm", tmp_path / "lm")
    checkpoint = torch.load(tmp_path / "lm" / "ckpt.pt")
    checkpoint["tokenizer"] = {**checkpoint["tokenizer"], "merges": checkpoint["tokenizer"]["merges"][:-1]}
    torch.save(checkpoint, tmp_path / "lm" / "ckpt.pt")
    assert load_lm(tmp_path / "lm", "cpu")[1].state() != load_lm(runs / "lm", "cpu")[1].state()
    code, _, err = cli(details, f"--lm {tmp_path}/lm --rm {runs}/rm --work {tmp_path}/work --out {tmp_path}/t.json")
    assert code == 2 and "another tokenizer" in err and len(err.strip().splitlines()) == 1
