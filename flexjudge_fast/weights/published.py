"""A folder whose weights another library quantised, presented as if each module had one tensor `weight`."""

from collections.abc import Callable, Sequence
from pathlib import Path

from flexjudge_fast.errors import CheckpointError
from flexjudge_fast.weights.awq import Awq
from flexjudge_fast.weights.bitsandbytes import BitsAndBytes
from flexjudge_fast.weights.checkpoint import Checkpoint
from flexjudge_fast.weights.compressed_tensors import CompressedTensors
from flexjudge_fast.weights.gptq import Gptq
from flexjudge_fast.weights.layout import Fields, Layout, Module
from flexjudge_fast.weights.processor_config import ProcessorConfig
from flexjudge_fast.weights.safetensors_folder import SafetensorsCheckpoint
from flexjudge_fast.weights.tensor import DenseTensor, StoredWeight

_FIELD = "quantization_config"
_LAYOUTS: dict[str, Callable[[Fields], Layout]] = {
    "gptq": Gptq,
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
}


def open_published(stored: SafetensorsCheckpoint) -> Checkpoint:
    """`stored` as it is, or a `PublishedCheckpoint` of it where its config.json names a layout we read.

    Raises:
        UnsupportedCheckpointError: a field of `quantization_config` asks for something that is not supported.
    """
    settings = stored.config.get(_FIELD)
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in _LAYOUTS:
        return stored
    fields = Fields(settings, f"{stored.path / 'config.json'}: {_FIELD}")
    return PublishedCheckpoint(stored, _LAYOUTS[method](fields))


class PublishedCheckpoint(Checkpoint):
    """Tensors that the layout does not own (norms, embeddings, modules left dense) are read as stored.

    Raises:
        CheckpointError: a module that config.json leaves dense has the tensors of a quantised one.
    """

    def __init__(self, stored: SafetensorsCheckpoint, layout: Layout) -> None:
        super().__init__()
        self._stored, self._layout = stored, layout
        self.path = stored.path
        self.config = {name: value for name, value in stored.config.items() if name != _FIELD}
        self.tokenizer_config = stored.tokenizer_config
        self.generation_config = stored.generation_config
        self.layout = layout.summary
        self._parts = self._find_modules()
        for module in self._parts:
            if module in layout.ignored:
                raise CheckpointError(
                    f"{self.path}: module {module} is quantised, {_FIELD} says that it is not"
                )

    def tensor_names(self) -> Sequence[str]:
        owned = {f"{module}.{part}" for module, parts in self._parts.items() for part in parts}
        names = (name for name in self._stored.tensor_names() if name not in owned)
        return (*names, *(f"{module}.weight" for module in self._parts))

    def tensor(self, name: str) -> StoredWeight:
        module = name.removesuffix(".weight")
        if module == name or module not in self._parts:
            weight = self._stored.tensor(name)
            if isinstance(weight, DenseTensor) and weight.data.element_size() == 1:
                raise CheckpointError(
                    f"{self.path}: tensor {name} is {weight.data.dtype}, its scale is missing"
                )
            return weight
        return self._layout.weight(Module(self._stored, module, frozenset(self._parts[module])))

    def tokenizer_json(self) -> str:
        return self._stored.tokenizer_json()

    def processor_config(self, kind: str) -> ProcessorConfig:
        return self._stored.processor_config(kind)

    def weight_files(self) -> Sequence[Path]:
        return self._stored.weight_files()

    def _find_modules(self) -> dict[str, set[str]]:
        """The parts of each quantised module."""
        names = frozenset(self._stored.tensor_names())
        found: dict[str, set[str]] = {}
        for part in self._layout.parts:
            if part != "weight":
                for name in names:
                    if name.endswith(f".{part}"):
                        found.setdefault(name.removesuffix(f".{part}"), set()).add(part)
        for module, parts in found.items():
            if f"{module}.weight" in names:
                if "weight" not in self._layout.parts:
                    raise CheckpointError(
                        f"{self.path}: tensor {module}.weight is there beside {module}.{min(parts)}"
                    )
                parts.add("weight")
        return dict(sorted(found.items()))
