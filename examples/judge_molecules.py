"""Statements about a molecule: two compared, four scored one by one, and two molecules as candidates.

python examples/judge_molecules.py [MOL_LLAMA [JUDGE_BACKBONE]]

Without a model, the tiny one of the tests is taken, with random weights: it shows that everything works, but
its verdicts mean nothing. Needs RDKit: pip install "flexjudge_fast[molecules]".
"""

import sys
from pathlib import Path

from flexjudge_fast import Judge, Response

TINY = Path(__file__).parents[1] / "tests" / "data" / "mol_llama" / "checkpoint"
ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"


def judge_all(model: str | Path, backbone: str | None = None) -> None:
    judge = Judge.from_pretrained(model, judge_backbone=backbone, kv_cache_memory="512MiB")
    verdict = judge.compare(
        "Is the membrane permeability of <mol> high or low?",  # the molecule stands where the mark is
        ["High: it is small, and largely lipophilic.", "Low: it has two charges."],
        molecules=[ASPIRIN],
        scale=(1.0, 10.0),
        order="both",
        max_think_tokens=64,
    )
    print(verdict)
    answers = ["It has an ester.", "It has an amine.", "It has a carboxylic acid.", "It is inorganic."]
    best = judge.best_of("Describe the molecule.", answers, molecules=[ASPIRIN], max_think_tokens=64)
    print(f"scores {best.scores}, best {[answers[i] for i in best.tied]}")
    verdict = judge.rank(
        "Name a molecule that dissolves in water.",
        [Response(molecule="CCO"), Response(molecule="CCCCCCCC")],
        max_think_tokens=64,
    )
    print(verdict)
    print(f"{judge.engine.stats().num_encoded_media} molecules encoded")
    judge.engine.close()


def main() -> None:
    if len(sys.argv) > 1:
        return judge_all(*sys.argv[1:3])
    print("a tiny model with random weights: its verdicts mean nothing\n")
    return judge_all(TINY)


if __name__ == "__main__":
    main()
