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


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    if model is None:
        sys.path.insert(0, str(Path(__file__).parent))
        from make_tiny_vl import write

        model = tempfile.mkdtemp()
        write(Path(model))
        print("a tiny model with random weights: its verdict means nothing\n")
    judge = Judge.from_pretrained(model)
    verdict = judge.compare(
        "Draw a red circle.",
        [Response(image=picture("red")), Response(image=picture("blue"))],
        order="both",
        max_think_tokens=64,
    )
    print(verdict)
    print(f"{judge.engine.stats().num_encoded_media} pictures encoded for {len(verdict.votes)} votes")


if __name__ == "__main__":
    main()
