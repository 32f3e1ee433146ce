"""The options of the command line, and what they become in a judgement."""

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer

from flexjudge_fast.errors import InvalidArgumentError

_RESPONSE_MEDIA = {  # of each option the kind of medium
    "response_image": ("image", "an image"),
    "response_video": ("video", "a video"),
    "response_audio": ("audio", "a recording"),
    "response_smiles": ("molecule", "a molecule"),
}
Instruction = Annotated[str, typer.Argument(help="What was asked.")]
Responses = Annotated[list[str] | None, typer.Argument(help="What was answered.")]
_Command = Callable[..., None]
# Of the commands that judge: a parameter's type and default, and how it is written in the shell.
OPTIONS: dict[str, tuple[Any, Any, Any]] = {
    "model": (
        str,
        "",
        typer.Option(
            "--model", "-m", envvar="FLEXJUDGE_MODEL", help="HF folder, hub id or .gguf; default: SmolLM2"
        ),
    ),
    "judge_backbone": (
        str | None,
        None,
        typer.Option(help="Of a Mol-LLaMA: the Llama that judges in place of its own."),
    ),
    "as_json": (bool, False, typer.Option("--json", help="Print JSON, for machines.")),
    "rubric": (str | None, None, typer.Option(help="The criteria.")),
    "scale": (str | None, None, typer.Option(help="For instance 1-5, or 1.0-5.0.")),
    "votes": (int | None, None, typer.Option(help="Sampled runs.")),
    "order": (str | None, None, typer.Option(help="fixed, both or random.")),
    "seed": (int | None, None, typer.Option(help="Seed of the draws.")),
    "temperature": (float | None, None, typer.Option(help="0 is greedy.")),
    "max_think_tokens": (
        int | None,
        None,
        typer.Option(help="Close the reasoning after so many tokens; 0 answers at once."),
    ),
    "image": (list[str] | None, None, typer.Option(help="An image of the question; repeatable.")),
    "video": (list[str] | None, None, typer.Option(help="A video of the question; repeatable.")),
    "audio": (list[str] | None, None, typer.Option(help="A recording of the question; repeatable.")),
    "smiles": (list[str] | None, None, typer.Option(help="A molecule of the question; repeatable.")),
    **{
        name: (
            list[str] | None,
            None,
            typer.Option(help=f"A response that is {what}; once for each response, in order."),
        )
        for name, (_, what) in _RESPONSE_MEDIA.items()
    },
    "use_audio_in_video": (
        bool,
        False,
        typer.Option("--use-audio-in-video", help="Hear the videos' sound tracks, too."),
    ),
    "resize": (str | None, None, typer.Option(help="Of every image and frame: 448x448, to whole patches.")),
    "max_pixels": (int | None, None, typer.Option(help="Most pixels of an image or frame.")),
    "fps": (float | None, None, typer.Option(help="Frames per second taken from a video.")),
    "allow_remote": (bool, False, typer.Option("--allow-remote", help="Fetch http(s) URLs of images.")),
}
OWN_MEDIA = ("image", "video", "audio", "smiles", *_RESPONSE_MEDIA)


def with_options(without: Collection[str] = ()) -> Callable[[_Command], _Command]:
    """Gives a command the options of all that judge, behind its own; they come as keyword arguments.

    typer reads the signature; it is written here once and not in each command.
    """

    def give(command: _Command) -> _Command:
        def called(**given: Any) -> None:
            command(**given)

        own = inspect.signature(command).parameters.values()
        parameters = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
        for name, (kind, default, option) in OPTIONS.items():
            if name not in without:
                parameters.append(
                    inspect.Parameter(
                        name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=default,
                        annotation=Annotated[kind, option],
                    )
                )
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return give


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
    options["response_media"] = {kind: given.get(name) or [] for name, (kind, _) in _RESPONSE_MEDIA.items()}
    return options


def with_media(texts: list[str] | None, media: dict[str, list[str]]) -> list[str | dict[str, str]]:
    """Responses: the i-th text with the i-th medium of each kind.

    Raises:
        InvalidArgumentError: there are both texts and media, but not the same number of them.
    """
    texts = texts or []
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
