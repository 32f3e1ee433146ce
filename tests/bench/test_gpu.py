"""The GPU's bench where there is none: it says so, and its table can be read."""

import json

import pytest
import torch

from bench import tune
from bench.gpu import KernelRow, main, show_kernels
from bench.gpu_host import Costs, measure
from flexjudge_fast.kernels.tiles import tiles
from tests.models import write_checkpoint


def test_it_says_that_there_is_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert main([]) == 2
    assert "make kernels" in capsys.readouterr().err


def test_the_table(capsys):
    rows = [
        KernelRow("linear", "qkv, bf16", 1, 20.0, 10.0, {"torch bf16": 30.0}),
        KernelRow("sample", "16 rows", 16, 300.0, 3.0, {}),
    ]
    show_kernels(rows)
    lines = capsys.readouterr().out.strip().splitlines()
    assert "50%" in lines[1] and "torch bf16 1.50x" in lines[1]
    assert lines[2].split()[-2:] == ["3.0", "1%"]


def test_trials_lay_their_sizes_over_the_tables():
    before = tiles("linear", "t16")
    trials = list(tune.product_trials(["linear"]))
    assert len(set(trials)) == len(trials)
    for trial in trials[::17]:
        over = dict(trial.sizes[0][1])
        with tune.laid_over(trial):
            assert over.items() <= tiles("linear", "t16").items()
        assert json.loads(trial.line(1.5))["linear"] == over
    assert tiles("linear", "t16") == before


def test_the_host_beside_a_clock(tmp_path):
    write_checkpoint(tmp_path)
    found = measure(tmp_path, Costs(step=1e-3, token=0.0, launch=1e-4, replay=1e-4), num_pairs=2, num_seqs=8)
    assert found["pairs/s"] > 0 and 0 < found["device busy, %"] <= 100
