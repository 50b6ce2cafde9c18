"""The benchmark's rows: what they hold, and that its yardsticks measure what they say. No speed is asserted."""

import json

import pytest
import torch

from minirlhf.lab import bench
from minirlhf.model import Shape

KEYS = {"bench", "variant", "shape", "dtype", "device", "ms", "ms_fastest", "ms_slowest", "tokens_per_second", "peak_mb",
        "max_error", "limit_share"}


@pytest.fixture
def little(monkeypatch):
    """Shapes and limits that take no time."""
    monkeypatch.setattr(bench, "SHAPES", [(40, 30, 8)])
    monkeypatch.setattr(bench, "SMALL", Shape(30, 64, 1, 2, 8))
    monkeypatch.setattr(bench, "MIDDLE", Shape(30, 256, 1, 2, 8))
    monkeypatch.setattr(bench, "limits", lambda *_: {"float32": 0.1, "bfloat16": 0.2, "copy_gb_per_s": 10.0})


@pytest.mark.parametrize("what, variants", [
    ("logprobs", {"plain", "chunked", "F.cross_entropy"}), ("sample", {"generate", "no cache"}), ("lm", {"step"}),
    ("ppo", {"value shared", "value lm"}),
])
def test_each_bench_writes_its_rows(little, cli, tmp_path, monkeypatch, what, variants):
    out = tmp_path / "deep" / "bench.json"
    monkeypatch.setattr("sys.argv", ["bench.py"])
    code, printed, err = cli(bench, f"--what {what} --no-compile --device cpu --out {out}")
    assert code == 0, err
    written = json.loads(out.read_text())
    assert set(written["machine"]) >= {"limits_before", "limits_after", "torch", "cpus"}
    rows = written["rows"]
    assert variants <= {row["variant"] for row in rows} and {row["bench"] for row in rows} == {what}
    for row in rows:
        assert set(row) == KEYS and row["ms_fastest"] <= row["ms"] <= row["ms_slowest"] and row["limit_share"] > 0
        assert row["variant"] in printed and f"{row['ms']:.2f}" in printed
        if what == "logprobs" and row["dtype"] == "float32":
            assert 0 < row["max_error"] < 1e-5


def test_a_word_names_the_bench(little, cli, tmp_path):
    code, _, err = cli(bench, f"sample --device cpu --out {tmp_path}/x.json")
    assert code == 0, err
    assert {row["bench"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]} == {"sample"}


def test_the_yardstick_of_errors_is_float64_autograd():
    hidden, weight, targets = torch.randn(300, 8), torch.randn(11, 8), torch.randint(11, (300,))
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    chosen = (h @ w.T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    chosen.sum().backward()
    for ours, theirs in zip(bench.exact(hidden, weight, targets), (chosen.detach(), h.grad, w.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_products_counts_the_matrix_products():
    """Against torch's own count, attention's (a part of the past) aside."""
    from torch.utils.flop_counter import FlopCounterMode

    shape = Shape(30, 64, 2, 2, 8)
    model = bench.GPT(shape)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(3, 5, dtype=torch.long)) @ model.head_weight.T
    counts = counter.get_flop_counts()["Global"]
    assert sum(n for op, n in counts.items() if "attention" not in str(op)) == 3 * 5 * bench.products(shape)


def test_peak_memory_is_what_a_call_adds():
    peak = bench.peak_mb(lambda: torch.ones(2**25).sum(), torch.device("cpu"))
    assert peak is None or 120 < peak < 200  # 128 MB, where the system tells


@pytest.mark.parametrize("arguments, words", [
    ("lunch", "invalid choice: 'lunch'"), ("lm --rounds 1", "--rounds"), ("--out /dev/null/x.json", "cannot be written"),
    ("sample --device cuda", "cuda"),
])
def test_bad_input_is_one_line(cli, arguments, words, tmp_path):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x.json")]
    code, _, err = cli(bench, arguments, out)
    assert code == 2 and words in err and err.count("\n") == 1
