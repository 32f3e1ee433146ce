"""Makes this folder from the full set: python reduce.py FULL (see README.md)."""

import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
DROPPED = re.compile(
    r".*/(trace/.*|logits|logits_first|logits_argmax|labels|unimol_padded_.*|unimol_src_(distance|edge_type)"
    r"|ogb_(batch|x|edge_attr))|batch6/ogb_.*|(?!batch6/).*/attention_mask"
)
JUDGED = re.compile(r"(resized|fullvocab)/((aspirin|ethanol)/.*|[^/]*)")


def main(full: Path) -> None:
    for name in ("checkpoint", "judge_merge/judge_llm"):
        shutil.rmtree(HERE / name, ignore_errors=True)
        shutil.copytree(full / name, HERE / name, copy_function=shutil.copyfile)
    shutil.rmtree(HERE / "checkpoint" / "unimol")
    tensors = load_file(full / "cases.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not DROPPED.fullmatch(name)}
    save_file(kept, HERE / "cases.safetensors")
    tensors = load_file(full / "judge_merge" / "judge_cases.safetensors")
    judged = {
        name: t for name, t in tensors.items() if JUDGED.fullmatch(name) and not DROPPED.fullmatch(name)
    }
    save_file(judged, HERE / "judge_merge" / "judge_cases.safetensors")
    cases = json.loads((full / "cases.json").read_text())
    fields = ("name", "smiles", "atoms")
    small = {
        part: [{field: case[field] for field in fields} for case in cases[part]]
        for part in ("cases", "extra_cases")
    }
    small["batch6"] = {"order": cases["batch6"]["order"]}
    small["two_mols_multi_turn"] = {"molecules": cases["two_mols_multi_turn"]["molecules"]}
    (HERE / "cases.json").write_text(json.dumps(small, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
