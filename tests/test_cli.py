"""The command line as a user meets it: output, files, exit codes, mistakes."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from flexjudge_fast import Verdict
from tests.models import write_checkpoint, write_omni_checkpoint, write_vision_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli-vision")
    write_vision_checkpoint(folder)
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (84, 56), color).save(folder / name)
    return folder


def flexjudge(*args, **env):
    command = [sys.executable, "-c", "from flexjudge_fast.cli import main; main()", *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env={**os.environ, **env}
    )
    assert "Traceback" not in done.stderr
    return done


def test_compare_prints_and_json_reads_back(model):
    args = ("compare", "Q", "A", "B", "--max-think-tokens", 4, "--order", "both")
    shown = flexjudge(*args, "--model", model)
    assert shown.returncode == 0
    assert "confidence" in shown.stdout
    data = flexjudge(*args, "--json", FLEXJUDGE_MODEL=str(model))
    assert Verdict.from_dict(json.loads(data.stdout)).kind == "pair"


@pytest.mark.parametrize(
    "command", [["score", "Q", "A"], ["rank", "Q", "A", "B", "C"], ["choose", "Q", "A", "B"]]
)
def test_the_other_formats(model, command):
    done = flexjudge(*command, "--json", "--model", model, "--max-think-tokens", 0)
    assert json.loads(done.stdout)["finish_reason"] == "answer"


def test_best_of(model):
    args = ("best-of", "Q", "A", "B", "A", "--model", model, "--max-think-tokens", 4, "--temperature", 0)
    found = json.loads(flexjudge(*args, "--json").stdout)
    first, second, third = found["scores"]
    assert first == third and len(found["verdicts"]) == 3
    assert found["tied"] == ([0, 2] if first > second else [1])
    shown = flexjudge(*args)
    assert shown.returncode == 0
    assert ("best of 3: responses 1, 3 tie" if first > second else "response 2 is the best") in shown.stdout


def test_molecules_from_the_shell(tmp_path):
    """The example's checkpoint, its own Llama and a judge's; a broken candidate does not stop the rest."""
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "make_tiny_mol.py"))
    example["write"](tmp_path / "mol")
    example["write_llama"](tmp_path / "llama")
    common = ("--json", "--model", tmp_path / "mol", "--max-think-tokens", 0)
    ask = ("score", "Is <mol> soluble?", "Yes.", "--smiles", "CCO", *common)
    swap = ("--judge-backbone", tmp_path / "llama")
    own, swapped = (json.loads(flexjudge(*ask, *more).stdout) for more in ((), swap))
    assert own["finish_reason"] == "answer" and own["score_probs"] != swapped["score_probs"]
    assert json.loads(flexjudge("info", tmp_path / "mol", "--json").stdout)["reads"] == "text, molecule"
    done = flexjudge("best-of", "Which?", "--response-smiles", "CCX", "--response-smiles", "CCO", *common)
    found = json.loads(done.stdout)
    assert (done.returncode, found["best"], found["scores"][0]) == (1, 1, None)
    assert "'CCX': no SMILES" in found["verdicts"][0]["error"]
    wrong = flexjudge("score", "Polar?", "Yes.", "--smiles", "CCX", *common)
    assert wrong.returncode == 2 and "molecules[0]: 'CCX': no SMILES" in wrong.stderr


def example(name, *args):
    """What an example prints, run as a user runs it."""
    path = Path(__file__).parents[1] / "examples" / name
    command = [sys.executable, str(path), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_sounds_from_the_shell(tmp_path):
    """The commands of the README."""
    assert "melody.wav" in example("make_tiny_omni.py", tmp_path)
    given = ("--response-audio", tmp_path / "melody.wav", "--model", tmp_path, "--max-think-tokens", 4)
    shown = flexjudge("score", "Hum a melody.", *given, "--json")
    assert json.loads(shown.stdout)["finish_reason"] == "answer"
    lines = example("judge_sounds.py").splitlines()  # makes such a model itself
    assert [line.split(":")[0] for line in lines[-3:-1]] == ["<Verdict pair", "<Verdict choice"]
    assert lines[-1] == "2 recordings encoded"


def test_run_keeps_going_and_resumes(model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"instruction": "Q", "responses": ["A", "B"]},
        {"instruction": "Q"},
        {"instruction": "Q2", "response": "A"},
    ]
    source.write_text("\n".join([*map(json.dumps, rows), "{broken"]))
    args = ("run", source, "-o", out, "--model", model, "--max-think-tokens", 0)
    done = flexjudge(*args)
    assert done.returncode == 1
    verdicts = {v["index"]: v for v in map(json.loads, out.read_text().splitlines())}
    assert [verdicts[i]["finish_reason"] for i in range(4)] == ["answer", "error", "answer", "error"]
    assert "responses is missing" in verdicts[1]["error"]
    kept = out.read_text().splitlines()
    out.write_text(
        "\n".join([line for line in kept if json.loads(line)["index"] != 2]) + '\n{"index": 2, "ki'
    )
    assert flexjudge(*args, "--resume").returncode == 0
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(v["index"] for v in again) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["compare", "Q", "A", "--model", "{model}"], "responses"),
        (["compare", "Q", "A", "B", "--scale", "5-1"], "scale"),
        (["score", "Q", "A", "--scale", "wide"], "scale"),
        (["score", "", "A"], "instruction"),
        (["score", "Q", "A", "--model", "/nowhere"], "/nowhere"),
        (["run", "missing.jsonl", "-o", "out.jsonl"], "missing.jsonl"),
        (["info", "/nowhere"], "/nowhere"),
        (["score", "Q", "A", "--votes", "0"], "votes"),
        (["best-of", "Q"], "responses"),
        (["best-of", "Q", "A", "", "--model", "/nowhere"], "it is empty"),
    ],
)
def test_a_mistake_is_one_line(model, args, names):
    done = flexjudge(*[a.format(model=model) for a in args])
    assert done.returncode == 2
    assert names in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_info(model):
    done = flexjudge("info", model, "--json")
    assert json.loads(done.stdout)["architecture"] == "LlamaForCausalLM"


def test_ctrl_c_keeps_what_is_finished(model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"instruction": f"Q{i}", "responses": ["A", "B"], "max_think_tokens": 10 * i} for i in range(200)]
    source.write_text("\n".join(map(json.dumps, rows)))
    code = "from flexjudge_fast.cli import main; main()"
    args = [
        sys.executable,
        "-u",
        "-c",
        code,
        "run",
        str(source),
        "-o",
        str(out),
        "--model",
        str(model),
        "--json",
    ]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline()  # one verdict is there, most are not
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in complaint
    assert "Traceback" not in complaint
    lines = out.read_text().splitlines()
    assert json.loads(first) in [json.loads(line) for line in lines]
    assert len(lines) < len(rows)


def test_quantize_writes_a_model_that_judges(model, tmp_path):
    out = tmp_path / "out"
    done = flexjudge("quantize", model, out)
    assert (done.returncode, "(int4)" in done.stdout) == (0, True)
    again = flexjudge("quantize", model, out)
    assert again.returncode == 2 and "--force" in again.stderr
    assert flexjudge("quantize", model, out, "--to", "int8", "--force").returncode == 0
    assert flexjudge("compare", "Q", "A", "B", "--max-think-tokens", 4, "--model", out).returncode == 0
    kept = flexjudge("quantize", out, tmp_path / "kept", "--to", "keep")
    assert (kept.returncode, "(keep)" in kept.stdout) == (0, True)


def test_quantize_says_what_is_wrong(model, tmp_path):
    wrong = flexjudge("quantize", model, tmp_path / "out", "--to", "int3")
    assert wrong.returncode == 2 and "int4-g128" in wrong.stderr
    missing = flexjudge("quantize", tmp_path / "nowhere", tmp_path / "out")
    assert missing.returncode == 2 and "nowhere" in missing.stderr
    assert not (tmp_path / "out").exists()


def test_quantize_keeps_a_gguf(smollm2_path, tmp_path):
    done = flexjudge("quantize", smollm2_path, tmp_path / "out", "--to", "keep")
    assert done.returncode == 0, done.stderr
    ask = ("score", "Is water wet?", "Yes.", "--max-think-tokens", 4, "--json")
    answers = [json.loads(flexjudge(*ask, "--model", m).stdout) for m in (smollm2_path, tmp_path / "out")]
    assert answers[0]["score_probs"] == answers[1]["score_probs"]
    assert answers[0]["reasoning"] == answers[1]["reasoning"]


def test_images_of_the_question_and_of_the_responses(vision_model):
    a, b = vision_model / "a.png", vision_model / "b.png"
    common = ("--json", "--model", vision_model, "--max-think-tokens", 0)
    done = flexjudge("compare", "--image", a, "--image", b, "Q", "A", "B", *common)
    assert json.loads(done.stdout)["finish_reason"] == "answer"
    media = ("--response-image", a, "--response-image", b, "--resize", "112x112")
    two = json.loads(flexjudge("compare", "Draw.", *media, *common).stdout)
    assert two["usage"]["prompt"] > 2 * 16
    one = json.loads(flexjudge("score", "Draw.", "A caption", "--response-image", a, *common).stdout)
    assert one["kind"] == "score"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("compare", "Q", "A", "B", "--response-image", "a.png"), "2 response texts, 1 image"),
        (("compare", "Q", "A", "B", "--image", "/no/such.png"), "images[0]"),
        (("compare", "Q", "A", "B", "--resize", "big"), "write it like 448x448"),
        (("score", "Q"), "responses"),
    ],
)
def test_mistakes_with_media(vision_model, args, message):
    done = flexjudge(*args, "--model", vision_model)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_quantised_vision_language_model(vision_model, tmp_path):
    """Its layers are quantised, its tower is not; pictures are read as before."""
    assert flexjudge("quantize", vision_model, tmp_path / "q", "--to", "int8").returncode == 0
    done = flexjudge(
        "score", "Q", "A", "--image", vision_model / "a.png", "--json", "--model", tmp_path / "q"
    )
    assert json.loads(done.stdout)["finish_reason"] == "answer"


def test_recordings_from_the_shell(tmp_path):
    """The example's checkpoint, a recording of the question and two that are responses."""
    import numpy as np
    import soundfile

    write_omni_checkpoint(tmp_path)
    for name, hertz in (("a.wav", 300), ("b.wav", 400)):
        soundfile.write(tmp_path / name, 0.3 * np.sin(np.arange(8000) * hertz * 2 * np.pi / 16000), 16000)
    a, b = tmp_path / "a.wav", tmp_path / "b.wav"
    common = ("--json", "--model", tmp_path, "--max-think-tokens", 0)
    done = flexjudge("compare", "Sing.", "--audio", a, "--response-audio", a, "--response-audio", b, *common)
    assert json.loads(done.stdout)["finish_reason"] == "answer"
    facts = json.loads(flexjudge("info", tmp_path, "--json").stdout)
    assert facts["reads"] == "text, image, video, audio"
