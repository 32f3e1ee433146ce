"""Mutated SMILES and SDF texts: each is read, or refused with a MediaError within a second, and alone."""

import os
import random
import time

import pytest
from rdkit import Chem
from rdkit.Chem import rdDistGeom

from flexjudge_fast import Engine, Judge, Judgement, Verdict
from flexjudge_fast.errors import MediaError
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.media.molecule import prepare_molecule
from flexjudge_fast.media.molecule_limits import MoleculeLimits
from flexjudge_fast.media.molecule_pool import MoleculeDecoder
from flexjudge_fast.media.molecule_processor import MoleculeProcessor
from tests.golden_molecules import REDUCED
from tests.test_judge_media import plain

NUM_TEXTS = int(os.environ.get("FLEXJUDGE_FUZZ_MOLECULES", "10000"))
EVERY = int(os.environ.get("FLEXJUDGE_FUZZ_EVERY", "4"))  # of them is judged beside others; 1: all, in 70 s
SMILES = [
    "CC(=O)Oc1ccccc1C(=O)O",
    "CN1C=NC2=C1C(=O)N(C(=O)N2C)C",
    "C/C=C/[C@H]([NH3+])C(=O)[O-]",
    "N[Pt](N)(Cl)Cl",
    "C1CC2CCC1C2",
    "CC(=O)[O-].[Na+]",
    "[13CH3]C#N",
    "OP(=O)(O)OC[C@H]1O[C@H](O)[C@@H](O)[C@@H]1O",
]
PIECES = [*"CNOSPFBI[]()=#$:/\\@+-.%*123456789cnosp"]
PIECES += ["Cl", "Br", "@@", "[nH]", "(C", ")", "%10", "C1CC1"]
NUMBERS = [
    "-1",
    "0",
    "999",
    "1000",
    "99999999999",
    "nan",
    "1e308",
    "V3000",
    "M  END",
    "M  CHG  1   1  15",
    "",
]


def mutate_smiles(rng: random.Random, text: str) -> str:
    chars = list(text)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(chars) + 1)
        match rng.randrange(5):
            case 0:
                del chars[at : at + rng.randrange(1, 4)]
            case 1:
                chars.insert(at, rng.choice(PIECES))
            case 2:
                chars[at : at + 1] = [rng.choice(PIECES)]
            case 3:
                chars[at:at] = chars[max(0, at - 5) : at] * rng.randrange(1, 4)
            case _:
                chars.insert(at, chr(rng.choice([0, 7, 32, 127, 233, 0x4E00, 0x1F600])))
    return "".join(chars)


def mutate_block(rng: random.Random, text: str) -> str:
    lines = text.split("\n")
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(len(lines))
        fields = lines[at].split(" ")
        match rng.randrange(5):
            case 0:
                fields[rng.randrange(len(fields))] = rng.choice(NUMBERS)
                lines[at] = " ".join(fields)
            case 1:
                lines[at] = lines[at][: rng.randrange(len(lines[at]) + 1)]
            case 2:
                lines.insert(at, rng.choice(lines))
            case 3:
                del lines[at]
            case _:
                chars = bytearray(lines[at].encode())
                if chars:
                    chars[rng.randrange(len(chars))] ^= 1 << rng.randrange(7)
                lines[at] = chars.decode("latin-1")
        lines = lines or [""]
    return "\n".join(lines)


def mutated(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    blocks = []
    for smiles in SMILES:
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        rdDistGeom.EmbedMolecule(mol, randomSeed=1)
        blocks += [Chem.MolToMolBlock(mol), Chem.MolToV3KMolBlock(mol)]
    texts = []
    for i in range(count):
        texts.append(
            mutate_smiles(rng, rng.choice(SMILES)) if i % 2 else mutate_block(rng, rng.choice(blocks))
        )
    return texts


def outcome(decoder: MoleculeDecoder, text: str) -> tuple[str, float]:
    started = time.monotonic()
    try:
        prepare_molecule(MediaItem("molecule", text, "molecules[0]"), MoleculeProcessor(8), decoder)
        what = "read"
    except MediaError as error:
        what = str(error)
        assert what.startswith("molecules[0]: ")
    return what, time.monotonic() - started


@pytest.mark.slow
def test_mutated_molecules() -> None:
    texts = mutated(NUM_TEXTS, seed=23)
    with MoleculeDecoder() as decoder:
        outcome(decoder, "C")  # the process starts
        outcomes = [outcome(decoder, text) for text in texts]
        for i, (_, seconds) in enumerate(outcomes):
            if seconds >= 1:  # a busy machine is not slow twice; a hang is
                outcomes[i] = outcome(decoder, texts[i])
        assert outcome(decoder, "CCO")[0] == "read"
    refused = [seconds for what, seconds in outcomes if what != "read"]
    assert max(refused) < 1
    assert not [
        what for what, _ in outcomes if "crashed" in what or "nonsense" in what or "longer than" in what
    ]
    assert (
        NUM_TEXTS / 10 < len(refused) < NUM_TEXTS * 0.95
    )  # the mutations are neither too weak nor too strong


@pytest.mark.slow
def test_other_verdicts_stay() -> None:
    """A good judgement behind every hundred texts: its verdict is, to the bit, that without them."""

    def judgements(texts: list[str]) -> list[Judgement]:
        items = []
        for i, text in enumerate(texts):
            items.append(Judgement("score", "Polar?", ("Yes.",), molecules=(text,), max_think_tokens=0))
            if i % 100 == 0:
                items.append(good(i // 100))
        return items

    def good(i: int) -> Judgement:
        molecule = SMILES[i % len(SMILES)]
        return Judgement(
            "score", f"Is it {i}?", ("Yes.",), molecules=(molecule,), id=str(i), max_think_tokens=4
        )

    def verdicts(items: list[Judgement]) -> list[Verdict]:
        with Engine.from_pretrained(REDUCED / "checkpoint", kv_cache_memory="32MiB") as engine:
            found = list(Judge(engine).run(items))
            engine.check_integrity()
        return found

    texts = mutated(NUM_TEXTS, seed=23)[::EVERY]
    found = verdicts(judgements(texts))
    assert len(found) == len(texts) + (len(texts) + 99) // 100
    errors = [verdict.error or "" for verdict in found if verdict.finish_reason == "error"]
    assert len(errors) > len(texts) / 10 and all(e.startswith("MediaError: molecules[0]: ") for e in errors)
    beside = {verdict.id: plain(verdict) for verdict in found if verdict.id}
    alone = verdicts([good(int(name)) for name in beside])
    assert {verdict.id: plain(verdict) for verdict in alone} == beside


def test_what_could_hang() -> None:
    """Deep, wide and tangled texts."""
    rings = "".join(f"C%{i}" for i in range(10, 100))
    texts = ["C" + "(" * 20_000, "C(" * 5000 + "C" + ")" * 5000, "[" * 10_000, "C" * 512 + "(C" * 3000]
    texts += [rings + rings, "c1" * 3000, "C1" + "C12" * 1000, "c1ccc2" * 400, "." * 1000, "C.C" * 2000]
    with MoleculeDecoder(MoleculeLimits(timeout=1)) as decoder:
        outcome(decoder, "C")
        for text in texts:
            what, seconds = outcome(decoder, text)
            assert what != "read" and seconds < 5, (text[:40], what)  # a second, another of grace, a start
        assert outcome(decoder, "CCO")[0] == "read"
