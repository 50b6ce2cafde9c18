"""Over-optimization: the estimator of best-of-n, the fits, what is run again and what is not, the rows."""

import functools
import itertools
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

import train_lm
import train_ppo
from conftest import TINY, run_stage
from minirlhf.lab import overopt

SMALL = ("--sizes 48,96 --seeds 1 --betas 0.5 --steps 3 --beta_steps 1 --best_prompts 2 --best_answers 16 "
         "--no-dpo --workers 1 --device cpu")


def brute_force(proxy, gold, n):
    """Over all subsets of n answers, the mean proxy and gold of the best; equally good ones are drawn with equal odds."""
    found = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        found.append((top, np.mean([gold[i] for i in subset if proxy[i] == top])))
    return np.mean(found, axis=0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_best_of_n_is_the_mean_over_all_subsets(n, ties):
    rng = np.random.default_rng(n)
    proxy = rng.integers(0, 3, 8).astype(float) if ties else rng.standard_normal(8)
    gold = rng.standard_normal(8)
    assert np.allclose(overopt.best_of_n(proxy, gold, n), brute_force(proxy, gold, n), atol=1e-12)


def test_best_of_n_of_many_answers():
    rng = np.random.default_rng(0)
    proxy, gold = rng.standard_normal((2, 1024))
    assert overopt.best_of_n(proxy, np.ones(1024), 300)[1] == pytest.approx(1, abs=1e-9)
    assert overopt.best_of_n(proxy, gold, 1) == pytest.approx((proxy.mean(), gold.mean()))
    assert overopt.best_of_n(proxy, gold, 1024) == pytest.approx((proxy.max(), gold[proxy.argmax()]))


def test_best_of_n_kl():
    assert overopt.best_of_n_kl(1) == 0
    assert overopt.best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


def test_fits_recover_their_coefficients_and_the_peak():
    d = np.linspace(0, 8, 50)
    curves = {"rl": 3 * d - 1.5 * np.where(d > 0, d * np.log(np.maximum(d, 1e-9)), 0), "best_of_n": 3 * d - 0.25 * d**2}
    peaks = {"rl": math.exp(3 / 1.5 - 1), "best_of_n": 3 / (2 * 0.25)}
    for form, b in (("rl", 1.5), ("best_of_n", 0.25)):
        found = overopt.fit(d, curves[form], form)
        assert (found["a"], found["b"], found["r2"]) == pytest.approx((3, b, 1))
        assert found["peak_kl"] == pytest.approx(peaks[form] ** 2) and found["peak_inside"] and found["points"] == 50
        assert d[curves[form].argmax()] == pytest.approx(peaks[form], abs=0.2)
        assert overopt.fit(d, curves["rl" if form == "best_of_n" else "best_of_n"], form)["r2"] < 0.999


def test_r2_is_the_share_of_the_variance_explained():
    d, gain = np.linspace(0.5, 4, 30), np.random.default_rng(0).standard_normal(30)
    found = overopt.fit(d, gain, "best_of_n")
    missed = gain - (found["a"] * d - found["b"] * d**2)
    assert found["r2"] == pytest.approx(1 - np.mean(missed**2) / np.var(gain))


def test_a_fit_without_a_peak_says_so():
    d = np.linspace(0, 3, 20)
    assert overopt.fit(d, d + d**2, "best_of_n")["peak_kl"] is None
    assert overopt.fit(d, 5 * d - 0.5 * d**2, "best_of_n")["peak_inside"] is False  # at d = 5


def curve(golds, kls, proxies, pairs=8, seed=1):
    same = {"method": "ppo", "rm_pairs": pairs, "seed": seed}
    return [same | overopt.point(kl, proxy, gold, 0.1, step=step, held_out=False)
            for step, (gold, kl, proxy) in enumerate(zip(golds, kls, proxies), 1)]


def test_ppo_is_fitted_whole_and_up_to_its_lowest_point():
    """The lowest point after the peak counts, even where gold was lower before; what follows it spoils the whole fit."""
    d = np.arange(8.0)
    gain = 3 * d - 1.5 * np.where(d > 0, d * np.log(np.maximum(d, 1e-9)), 0)  # 0, 3, 3.9, ... 0.6
    golds, kls, proxies = [*(gain - 9), -6.5], [*d**2, 64.0], np.arange(9.0)
    golds[0], kls[0] = -9.5, -0.01  # lower than all that comes after the peak; the estimate of a KL of 0 may be negative
    fits = {figures["part"]: figures for figures in overopt.make_fits(curve(golds, kls, proxies), -9)}
    assert fits["to_lowest"]["points"] == 8 and fits["to_lowest"]["r2"] > 0.97
    assert fits["all"]["points"] == 9 and fits["all"]["r2"] < 0.8
    assert fits["to_lowest"]["r2_other_form"] < fits["to_lowest"]["r2"] and fits["all"]["rm_pairs"] == 8


def test_summary_and_bar():
    healthy = overopt.summarise(curve([-2, 1, 3, -4, -1], [0, 2, 4, 20, 30], [0, 1, 2, 3, 4]), gold_std=2.0)
    assert (healthy["peak_gold"], healthy["peak_kl"], healthy["peak_at"]) == (3, 4, 3)
    assert (healthy["end_gold"], healthy["lowest_gold"], healthy["proxy_rise"], healthy["gold_fall"]) == (-1, -4, 2, 2)
    late = overopt.summarise(curve([-2, 1, 3, 2], [0, 2, 6, 20], [0, 1, 2, 3], pairs=80), gold_std=2.0)
    no_rise = overopt.summarise(curve([-2, 3, -4], [0, 6, 20], [0, 2, 1], pairs=80, seed=2), gold_std=2.0)
    first, second, third, last = overopt.judge([healthy, late, no_rise])
    assert first.startswith("met: 8 pairs, seed 1") and "gold -2.00 gold_std" in first
    assert second.startswith("NOT MET: 80 pairs") and third.startswith("NOT MET: 80 pairs, seed 2")
    assert last == "gold peaks latest with 80 pairs: at 4.0 nats with 8, 6.0 nats with 80"


# ---- the whole, tiny -------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(overopt.train_ppo, "Config", functools.partial(
        train_ppo.Config, batch_size=16, minibatch_size=8, eval_answers=32))


def test_end_to_end_and_resume(runs, tmp_path, tiny, cli, monkeypatch):
    folder, out = tmp_path / "work", tmp_path / "deep" / "overopt.json"
    files = f"--lm {runs}/lm --work {folder} --out {out}"
    calls, gold_reward = [], train_ppo.gold_reward

    def recorded(prompts, responses):
        calls.append(gold_reward(prompts, responses))
        return calls[-1]

    monkeypatch.setattr(train_ppo, "gold_reward", recorded)
    code, text, err = cli(overopt, files, SMALL)
    assert code == 0, err
    assert train_ppo.gold_reward is recorded
    assert "9 parts, 0 finished before" in text and "[9/9]" in text and "minutes to go" in text
    saved = json.loads(out.read_text())
    assert {"machine", "options", "reference", "rows", "fits", "curves", "bars", "seconds"} <= set(saved)
    rows = saved["rows"]
    for row in rows:
        assert {"method", "rm_pairs", "seed", "beta", "n", "step", "kl", "proxy", "gold", "gold_se"} <= set(row)
    assert {(row["method"], row["rm_pairs"], row["beta"]) for row in rows} == {
        (method, pairs, beta) for pairs in (48, 96) for method, beta in (("ppo", 0.0), ("ppo", 0.5), ("best_of_n", None))}

    best = [row for row in rows if row["method"] == "best_of_n" and row["rm_pairs"] == 48]
    assert [(row["n"], row["solid"]) for row in best] == [(1, True), (2, True), (4, True), (8, False), (16, False)]
    assert best[0]["gold"] == pytest.approx(saved["reference"]["gold"]) and best[0]["gold_se"] > 0
    assert best[4]["proxy"] > best[0]["proxy"] and {row["kl_kind"] for row in best} == {"upper bound"}

    steps = [row for row in rows if row["method"] == "ppo" and row["rm_pairs"] == 48 and row["beta"] == 0]
    assert [(row["step"], row["held_out"]) for row in steps] == [(1, False), (2, False), (3, False), (3, True)]
    assert abs(steps[0]["kl"]) < 1e-5 < steps[2]["kl"]
    batches = {(round(np.mean(golds), 6), round(np.std(golds) / 4, 6)) for golds in calls if len(golds) == 16}
    assert {(round(row["gold"], 6), round(row["gold_se"], 6)) for row in steps[:3]} <= batches
    name = next(name for name in saved["seconds"] if name.startswith("ppo-48-s1-b0-"))
    eval_json = json.loads((folder / name / "eval.json").read_text())
    assert steps[3]["gold"] == eval_json["policy"]["gold"] and steps[3]["kl"] == eval_json["kl"]
    assert {(f["method"], f["part"]) for f in saved["fits"]} == {
        ("ppo", "to_lowest"), ("ppo", "all"), ("best_of_n", "solid")}

    # Again: nothing is left to do, whatever the trainers are.
    ran = []
    for kind in overopt.RUN:
        monkeypatch.setitem(overopt.RUN, kind, lambda *args, kind=kind: ran.append(kind) or {"rows": []})
    code, text, err = cli(overopt, files, SMALL)
    assert code == 0 and "9 finished before" in text and not ran, err
    assert json.loads(out.read_text())["rows"] == rows

    # A part with other options is run, and a part that was cut short; the rest is not.
    (folder / name / "part.json").unlink()
    config = overopt.Config(**saved["options"] | {"betas": "0.5,1"})
    overopt.run_all(overopt.plan(config), config, 1)
    assert ran == ["ppo"] * 3


def test_another_language_model_leaves_nothing_finished(runs, tmp_path):
    shutil.copytree(runs / "lm", tmp_path / "lm")
    config = overopt.Config(lm=str(tmp_path / "lm"))
    before = {part.name for wave in overopt.plan(config) for part in wave}
    with open(tmp_path / "lm" / "ckpt.pt", "ab") as file:
        file.write(b"x")
    assert not before & {part.name for wave in overopt.plan(config) for part in wave}
    assert len(before) == 1 + 6 + 6 * (4 + 1 + 2)


def test_another_option_leaves_the_parts_finished_that_it_does_not_touch(runs):
    def names(**options):
        return {part.name for wave in overopt.plan(overopt.Config(lm=str(runs / "lm"), **options)) for part in wave}

    def kinds(some):
        return {name.split("-")[0] for name in some}

    assert kinds(names() - names(lr=1e-3)) == {"ppo"} and len(names() - names(lr=1e-3)) == 24
    assert len(names() - names(steps=61)) == 6 and len(names() - names(beta_steps=41)) == 18
    assert kinds(names() - names(best_prompts=32, best_answers=2048)) == {"samples", "best_of_n"}
    assert names() == names(work="elsewhere", out="elsewhere.json", workers=3)


def test_dpo_is_a_point_with_the_reward_models_proxy(runs, tmp_path, tiny, monkeypatch):
    """In place of DPO stands the PPO run of the fixture: its policy must come out as eval.json says."""
    dpo = pytest.importorskip("minirlhf.lab.dpo")
    (tmp_path / "rm-x").symlink_to(runs / "rm")
    (tmp_path / "prompts.txt").write_text("\n".join(overopt.lm_prompts(str(runs / "lm"), 4)))
    words = {}

    def run(command, **kwargs):
        words.update(word.removeprefix("--").split("=", 1) for word in command[3:])
        shutil.copytree(runs / "ppo", words["out_dir"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(overopt.subprocess, "run", run)
    config = overopt.Config(lm=str(runs / "lm"), work=str(tmp_path), device="cpu")
    options = {"rm_pairs": 48, "seed": 5, "rm": "rm-x", "beta": 0.1}
    row, = overopt.train_dpo(options, tmp_path / "dpo", config, "cpu")["rows"]
    assert set(words) <= {*dpo.Config.__dataclass_fields__} and words["seed"] == "5"
    assert words["prefs"] == f"{tmp_path}/rm-x/pairs.jsonl"
    policy = json.loads((runs / "ppo" / "eval.json").read_text())["policy"]
    assert row["held_out"] and row["n"] is None and abs(row["proxy"] - policy["score"]) < 1.0
    assert abs(row["gold"] - policy["gold"]) < 2.0 and row["kl"] >= -0.5


def test_dpo_that_fails_gives_its_last_line(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "a warning\ndpo.py: error: no pairs\n")
    monkeypatch.setattr(overopt.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(overopt.UserError, match=r"^dpo.py: error: no pairs \(--no-dpo"):
        overopt.train_dpo({"rm": "rm", "beta": 0.1, "seed": 1}, tmp_path, overopt.Config(), "cpu")


def test_without_dpo_one_line_and_no_rows(runs, tmp_path, cli, monkeypatch):
    monkeypatch.setattr(overopt.importlib.util, "find_spec", lambda name: None)
    plans = []
    monkeypatch.setattr(overopt, "run_all", lambda waves, *args: plans.append(waves) or sys.exit(0))
    code, text, _ = cli(overopt, f"--lm {runs}/lm --work {tmp_path}/w --out {tmp_path}/o.json")
    assert code == 0 and text.count("\n") == 1 and "dpo.py is missing" in text
    assert {part.kind for part in plans[0][1]} == {"ppo", "best_of_n"}
    assert not (tmp_path / "o.json").exists()


def test_failed_parts_are_named_and_the_others_kept(runs, tmp_path, cli, monkeypatch):
    def fails_on_96(options, *args):
        if options["rm_pairs"] == 96:
            raise overopt.UserError("no luck")
        return {}

    monkeypatch.setitem(overopt.RUN, "rm", fails_on_96)
    monkeypatch.setitem(overopt.RUN, "samples", lambda *args: {})
    code, text, err = cli(overopt, f"--lm {runs}/lm --work {tmp_path}/w --out {tmp_path}/o.json", SMALL)
    assert code == 2 and err.count("\n") == 1 and "1 parts failed" in err and "rm-96-s1-" in err and "no luck" in err
    assert text.count("minutes to go") == 3 and len(list(tmp_path.glob("w/*/part.json"))) == 2


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(overopt, "run_all", lambda *args: pytest.fail("the input was taken"))


@pytest.mark.parametrize("options, message", [
    ("--lm nowhere", "nowhere does not exist"),
    ("--out {tmp}/file/o.json", "--out {tmp}/file/o.json: cannot be written"),
    ("--out {tmp}", "--out {tmp}: cannot be written"),
    ("--work {tmp}/file/w", "--work {tmp}/file/w: cannot be written"),
    ("--sizes 2048,many", "--sizes '2048,many': must be whole numbers from 8"),
    ("--sizes 4", "--sizes '4'"),
    ("--seeds 1.5", "--seeds '1.5'"),
    ("--seeds ,", "--seeds ','"),
    ("--betas 0,0.1", "--betas '0,0.1'"),
    ("--betas nan", "--betas 'nan'"),
])
def test_bad_input_is_one_line(runs, tmp_path, cli, no_training, options, message):
    (tmp_path / "file").write_text("")
    files = {"lm": runs / "lm", "work": tmp_path / "work", "out": tmp_path / "o.json"}
    typed = " ".join(f"--{name} {path}" for name, path in files.items())
    code, _, err = cli(overopt, typed, options.format(tmp=tmp_path))
    assert code == 2 and err.count("\n") == 1 and message.format(tmp=tmp_path) in err


def test_a_language_model_of_other_text_has_no_gold(tmp_path, cli, no_training):
    text = "\n\n".join(f"the quick brown fox number {i} jumps over a lazy dog" for i in range(200))
    (tmp_path / "my.txt").write_text(text)
    run_stage(train_lm, f"{TINY[train_lm]} --max_steps 1 --data {tmp_path}/my.txt --out_dir {tmp_path}/lm", tiny=False)
    code, _, err = cli(overopt, f"--lm {tmp_path}/lm --work {tmp_path}/w --out {tmp_path}/o.json")
    assert code == 2 and err.count("\n") == 1 and "did not learn the built-in world" in err
