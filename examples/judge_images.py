"""Two pictures judged as answers to one request, in both orders: each is encoded once.

    python examples/judge_images.py [MODEL]

Without a model, a tiny one with random weights is made: it shows that everything works, but its verdict
means nothing.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from flexjudge_fast import Judge, Response


def picture(color: str) -> Image.Image:
    image = Image.new("RGB", (448, 448), "white")
    ImageDraw.Draw(image).ellipse((100, 100, 348, 348), fill=color)
    return image


def judge_two(model: str) -> None:
    judge = Judge.from_pretrained(model)
    verdict = judge.compare(
        "Draw a red circle.",
        [Response(image=picture("red")), Response(image=picture("blue"))],
        order="both",
        max_think_tokens=64,
    )
    print(verdict)
    print(f"{judge.engine.stats().num_encoded_media} pictures encoded for {len(verdict.votes)} votes")


def main() -> None:
    if len(sys.argv) > 1:
        return judge_two(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parent))
    from make_tiny_vl import write

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        print("a tiny model with random weights: its verdict means nothing\n")
        return judge_two(folder)


if __name__ == "__main__":
    main()
