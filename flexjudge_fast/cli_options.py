"""The options of the command line, and what they become in a judgement."""

from typing import Annotated, Any, Optional

import typer

from flexjudge_fast.errors import InvalidArgumentError

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", envvar="FLEXJUDGE_MODEL", help="HF folder, hub id or .gguf; default: SmolLM2"
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Instruction = Annotated[str, typer.Argument(help="What was asked.")]
Responses = Annotated[Optional[list[str]], typer.Argument(help="What was answered.")]  # noqa: UP045
Rubric = Annotated[Optional[str], typer.Option(help="The criteria.")]  # noqa: UP045 - typer reads it
ScaleText = Annotated[Optional[str], typer.Option("--scale", help="For instance 1-5, or 1.0-5.0.")]  # noqa: UP045
Votes = Annotated[Optional[int], typer.Option(help="Sampled runs.")]  # noqa: UP045
Order = Annotated[Optional[str], typer.Option(help="fixed, both or random.")]  # noqa: UP045
Seed = Annotated[Optional[int], typer.Option(help="Seed of the draws.")]  # noqa: UP045
Temperature = Annotated[Optional[float], typer.Option(help="0 is greedy.")]  # noqa: UP045
ThinkTokens = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option("--max-think-tokens", help="Close the reasoning after so many tokens; 0 answers at once."),
]
Images = Annotated[Optional[list[str]], typer.Option("--image", help="An image of the question; repeatable.")]  # noqa: UP045
Videos = Annotated[Optional[list[str]], typer.Option("--video", help="A video of the question; repeatable.")]  # noqa: UP045
Audios = Annotated[list[str] | None, typer.Option("--audio", help="A recording of the question; repeatable.")]
Smiles = Annotated[list[str] | None, typer.Option("--smiles", help="A molecule of the question; repeatable.")]
Backbone = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--judge-backbone", help="Of a Mol-LLaMA: the Llama that judges in place of its own."),
]
ResponseAudios = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--response-audio", help="A response that is a recording; once for each response, in order."
    ),
]
Hear = Annotated[bool, typer.Option("--use-audio-in-video", help="Hear the videos' sound tracks, too.")]
ResponseImages = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--response-image", help="A response that is an image; once for each response, in order."),
]
ResponseVideos = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--response-video", help="A response that is a video; once for each response, in order."),
]
ResizeText = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--resize", help="Of every image and frame: 448x448, to whole patches."),
]
MaxPixels = Annotated[Optional[int], typer.Option(help="Most pixels of an image or frame.")]  # noqa: UP045
Remote = Annotated[bool, typer.Option("--allow-remote", help="Fetch http(s) URLs of images.")]
Fps = Annotated[Optional[float], typer.Option(help="Frames per second taken from a video.")]  # noqa: UP045

_SAME = ("rubric", "votes", "order", "seed", "temperature", "max_think_tokens", "max_pixels", "fps")


def judgement_options(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `Judgement` from a command's arguments; those not given keep its defaults.

    `response_media` holds the responses' own media, by kind, for `with_media`.
    """
    options = {name: given[name] for name in _SAME if given.get(name) is not None}
    for name in ("image", "video", "audio"):
        if given.get(name):
            options[name + "s"] = given[name]
    if given.get("smiles"):
        options["molecules"] = given["smiles"]
    if given.get("use_audio_in_video"):
        options["use_audio_in_video"] = True
    if given.get("allow_remote"):
        options["allow_remote"] = True
    if given.get("scale") is not None:
        options["scale"] = _scale(given["scale"])
    if given.get("resize") is not None:
        options["resize"] = _resize(given["resize"])
    options["response_media"] = {
        kind: given.get(f"response_{kind}") or [] for kind in ("image", "video", "audio")
    }
    return options


def with_media(texts: list[str], media: dict[str, list[str]]) -> list[str | dict[str, str]]:
    """Responses: the i-th text with the i-th medium of each kind.

    Raises:
        InvalidArgumentError: there are both texts and media, but not the same number of them.
    """
    counts = {name: len(given) for name, given in {"response texts": texts, **media}.items() if given}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InvalidArgumentError(f"responses: {found} are given; give as many of each, or none")
    if not any(media.values()):
        return list(texts)
    fields = {"text": texts, **media}
    count = next(iter(counts.values()))
    return [{name: given[i] for name, given in fields.items() if given} for i in range(count)]


def _scale(text: str) -> tuple[float, float]:
    try:
        low, high = text.split("-")
        return (float(low), float(high)) if "." in text else (int(low), int(high))
    except ValueError:
        raise InvalidArgumentError(f"--scale {text!r}: write it like 1-5 or 1.0-5.0") from None


def _resize(text: str) -> tuple[int, int]:
    try:
        width, height = text.lower().split("x")
        return int(width), int(height)
    except ValueError:
        raise InvalidArgumentError(f"--resize {text!r}: write it like 448x448") from None
