"""Two recordings judged as answers to one request, and heard together for a comparison.

python examples/judge_sounds.py [MODEL]

Without a model, a tiny one with random weights is made: it shows that everything works, but its verdicts
mean nothing.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from flexjudge_fast import Judge, Response

RATE = 16000


def melody(*notes: float) -> tuple[np.ndarray, int]:
    """Half a second of each note, in hertz."""
    time = np.arange(RATE // 2) / RATE
    samples = np.concatenate([0.3 * np.sin(2 * np.pi * note * time) * np.exp(-3 * time) for note in notes])
    return samples.astype(np.float32), RATE


def judge_both(model: str) -> None:
    judge = Judge.from_pretrained(model)
    rising, falling = melody(262, 330, 392), melody(392, 330, 262)
    verdict = judge.compare(
        "Play a rising melody.",
        [Response(audio=rising), Response(audio=falling)],
        scale=(1.0, 5.0),
        order="both",
        max_think_tokens=64,
    )
    print(verdict)
    verdict = judge.choose(
        "Is it the same melody?", ["Yes.", "No."], audios=[rising, falling], max_think_tokens=64
    )
    print(verdict)
    print(f"{judge.engine.stats().num_encoded_media} recordings encoded")


def main() -> None:
    if len(sys.argv) > 1:
        return judge_both(sys.argv[1])
    sys.path.insert(0, str(Path(__file__).parent))
    from make_tiny_omni import write

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        print("a tiny model with random weights: its verdicts mean nothing\n")
        return judge_both(folder)


if __name__ == "__main__":
    main()
