"""The benchmark's own arithmetic: turns, bars, rooflines, files. Speeds themselves are not tested."""

import shutil

import gguf
import numpy as np
import pytest
from rich.console import Console

from bench.bars import all_bars
from bench.ceilings import Ceilings
from bench.engines import MissingError
from bench.judge_work import Request, _common, as_requests
from bench.models import ModelCost, model_cost
from bench.ops.rooflines import OpRow
from bench.pairs import make_pairs
from bench.plot import shares, write_plot
from bench.report import as_json, show_rows, write_json
from bench.rounds import Row, Task, in_turns, open_all
from bench.seven_b import Shape, seven_b
from flexjudge_fast import Engine, SamplingParams

ONE = "decode, batch 1"


class FakePeer:
    """Takes a fixed time for a step, and writes down when it was asked."""

    def __init__(self, name, seconds, log):
        self.name, self._seconds, self._log = name, seconds, log

    def prefill(self, num_tokens):
        self._log.append((self.name, 0, num_tokens))
        return self._seconds * num_tokens

    def decode(self, batch, num_tokens):
        self._log.append((self.name, batch, num_tokens))
        return self._seconds * num_tokens

    def close(self):
        self._log.append((self.name, "closed"))


def row(part, engine, task, *samples):
    return Row(part, engine, task, samples=samples)


def found(bars, name, setting="int16"):
    (bar,) = [b for b in bars if b.name == name and b.setting == setting]
    return bar


def test_peers_take_turns():
    log = []
    peers = [FakePeer("a", 0.001, log), FakePeer("b", 0.5, log)]
    probes = {"reads GB/s": lambda: log.append("probe") or 30.0}
    rows = in_turns("part", peers, [Task(4, 100)], 2, probes, most_seconds=5)
    warm_up = [("a", 4, 8), ("b", 4, 8)]
    one_round = ["probe", ("a", 4, 100), ("b", 4, 10)]  # ten steps of b fit in five seconds
    assert log == warm_up + 2 * one_round
    assert rows[0] == Row("part", "reads GB/s", "decode, batch 4", "GB/s", (30.0, 30.0))
    assert rows[1].samples == pytest.approx([4000, 4000]) and rows[1].note == ""
    assert rows[2].samples == pytest.approx([8, 8]) and rows[2].note == "10 steps"


def test_a_peer_that_cannot_load_is_a_row():
    def fails():
        raise MissingError("it is not installed")

    peers, rows = open_all([("a", fails), ("b", lambda: FakePeer("b", 1, []))], "part")
    assert [peer.name for peer in peers] == ["b"]
    assert rows == [Row("part", "a", "all", missing="it is not installed")]
    console = Console(record=True, width=100)
    show_rows(console, rows)
    assert "part: a: missing: it is not installed" in console.export_text()


def test_bars_are_ratios_of_medians():
    rows = [
        row("smollm2", "ceiling: reads GB/s", ONE, 30.0),  # not the roofline, though its name begins alike
        row("smollm2", "roofline", ONE, 400.0),
        row("smollm2", "ours, int16", ONE, 100.0, 300.0, 320.0),
        row("smollm2", "llama.cpp, the same file (flash attention on)", ONE, 150.0),
        row("smollm2", "ours, int16", "prefill 512", 1000.0),
        row("smollm2", "OpenVINO GenAI, Q4_0", "prefill 512", 1600.0),
        row("smollm2", "transformers bf16", "prefill 512", 800.0),
        row("smollm2", "roofline", "prefill 512", 4000.0),
    ]
    bars = all_bars(rows)
    share = found(bars, "SmolLM2 decode: share of the read roofline")
    assert share.found == 0.75 and share.met
    assert found(bars, "SmolLM2 decode: llama.cpp, the same file").found == 2.0
    fastest = found(bars, "SmolLM2 prefill: the fastest peer")
    assert fastest.found == 0.625 and not fastest.met
    unmeasured = found(bars, "SmolLM2 decode: share of the read roofline", "int8")
    assert unmeasured.found is None and unmeasured.met is None


def test_each_setting_of_the_7b_has_its_own_rival():
    rows = [
        row("7b", "ours, int8", ONE, 8.0),
        row("7b", "llama.cpp, beside ours, int16 (x)", ONE, 5.0),
        row("7b", "llama.cpp, beside ours, int8 (x)", ONE, 10.0),
        row("7b", "roofline (beside ours, int16)", ONE, 9.0),
        row("7b", "roofline (beside ours, int8)", ONE, 16.0),
    ]
    assert found(all_bars(rows), "7B decode: llama.cpp", "int8").found == 0.8
    assert found(all_bars(rows), "7B decode: share of the read roofline", "int8").found == 0.5
    assert ("7b: decode, batch 1", "ours, int8", 0.5) in shares(rows)
    assert ("7b: decode, batch 1", "llama.cpp", 10 / 16) in shares(rows)
    assert len(shares(rows)) == 3


def test_roofline_is_the_slower_of_reads_and_arithmetic():
    cost = ModelCost(read_bytes=10**9, layer_weights=4 * 10**8, head_weights=10**8)
    assert cost.seconds(1, 64, read=50, int8=1000) == pytest.approx(0.02)  # reads
    assert cost.seconds(32, 64, read=50, int8=1000) == pytest.approx(0.032)  # 32 tokens, 2 * 5e8 each
    assert cost.seconds(0, 100, read=50, int8=1000) == pytest.approx(0.0802)  # the head once


@pytest.mark.parametrize("tied", [True, False])
def test_model_cost_of_a_file(tmp_path, tied):
    """An embedding table that is not the head too is not read as a whole."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((10, 32), np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((64, 32), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(32, np.float32))
    if not tied:
        writer.add_tensor("output.weight", np.zeros((10, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    cost = model_cost(tmp_path / "m.gguf")
    assert cost == ModelCost(4 * 64 * 32 + 4 * 32 + (4 if tied else 2) * 320, 64 * 32, 320)


def test_seven_b_file_runs(smollm2_path, tmp_path):
    """The writer, at a small size: our engine loads the file and its logits are finite and not all alike."""
    shape = Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, head_dim=16)
    path = seven_b(smollm2_path, shape, tmp_path / "small.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["small.gguf"]
    engine = Engine.from_pretrained(path, max_model_len=64, kv_cache_memory="64MiB")
    (completion,) = engine.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert len(completion.token_ids) == 4
    logits = engine.logits([1, 2, 3])
    assert logits.isfinite().all() and 0.1 < float(logits.std()) < 10


def test_requests_keep_prompts_and_lengths(smollm2_path):
    assert [_common(a, b) for a, b in (("abc", "abd"), ("ab", "abc"), ("", "a"))] == [2, 2, 0]
    assert Request((1, 2), (9,), (3, 4)).generated == 7
    engine = Engine.from_pretrained(smollm2_path, max_model_len=64, kv_cache_memory="64MiB")
    params = SamplingParams(n=2, max_tokens=3, ignore_eos=True)
    outputs = [tuple(engine.generate([[7, i]], params)) for i in (2, 1)]
    assert as_requests(outputs, (9,)) == [Request((7, 1), (9,), (3, 3)), Request((7, 2), (9,), (3, 3))]


def test_pairs_are_different():
    pairs = make_pairs(32)
    assert len({question for question, _ in pairs}) == 32
    assert all(a != b for _, (a, b) in pairs)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_ceilings_program_answers():
    with Ceilings(4 << 20) as machine:
        assert 0.1 < machine.measure("read", 2) < 10_000
        with pytest.raises(MissingError, match="no instruction for int3"):
            machine.measure("int3", 1)


def test_no_compiler_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingError, match=r"no g\+\+"):
        Ceilings(4 << 20)


def test_results_are_written(tmp_path):
    rows = [row("smollm2", "roofline", ONE, 400.0), row("smollm2", "ours, int16", ONE, 300.0)]
    ops = [OpRow("op", (1.0, 3.0, 2.0), 1.0, "reads", {"fp32": 4.0}), OpRow("other", missing="no library")]
    results = as_json(rows, ops, all_bars(rows), {})
    assert results["rows"][1]["median"] == 300.0
    write_json(tmp_path / "new" / "r.json", results)
    assert '"no library"' in (tmp_path / "new" / "r.json").read_text()
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra")
    write_plot(tmp_path / "r.png", rows, ops)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MissingError, match="nothing was measured"):
        write_plot(tmp_path / "r.png", [], [])
