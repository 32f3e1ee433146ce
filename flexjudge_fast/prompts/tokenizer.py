"""Text to token ids and back; untrusted text never becomes a control token."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from flexjudge_fast.errors import CheckpointError, PromptError, UnsupportedMediaError
from flexjudge_fast.media.prepared import MediaRun
from flexjudge_fast.models.mrope import PositionSpan
from flexjudge_fast.prompts.segments import Media, Placeholder, Prompt, Scaffold, Seam, Segment

# What Unicode calls white space; str.strip() alone would also take the separators U+001C to U+001F.
_WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class Tokenizer:
    """A checkpoint's tokenizer in two forms: whole, and without its added tokens.

    Args:
        tokenizer_json: the text of `tokenizer.json`.
        config: `tokenizer_config.json`; `eos_token` and `bos_token` are read.

    Raises:
        CheckpointError: the JSON is not a tokenizer.
    """

    def __init__(self, tokenizer_json: str, config: Mapping[str, Any]) -> None:
        try:
            spec = json.loads(tokenizer_json)
            self._whole = HFTokenizer.from_str(tokenizer_json)
            added = {t["content"]: t for t in spec.get("added_tokens") or () if t["content"]}
            plain = json.dumps(_without_added_tokens(spec, frozenset(added)))
            self._plain = HFTokenizer.from_str(plain)
            # A tokenizer may set a space before a text's first word only: not behind a control token.
            behind = plain.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
            self._behind = self._plain if behind == plain else HFTokenizer.from_str(behind)
        except BaseException as error:
            # The library raises bare Exception; where its Rust code panics, a BaseException of its own.
            if isinstance(error, Exception) or type(error).__name__ == "PanicException":
                raise CheckpointError(f"tokenizer.json: {error}") from error
            raise
        for tokenizer in (self._whole, self._plain, self._behind):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self._added = added
        self.control_tokens = frozenset(added)
        self.control_ids = frozenset(int(token["id"]) for token in added.values())
        self._cut = re.compile(
            "|".join(re.escape(t) for t in sorted(added, key=len, reverse=True)) or r"(?!)"
        )
        self._bytes: dict[int, bytes] = {}  # of ids that were asked for
        self._special_ids = frozenset(int(t["id"]) for t in added.values() if t.get("special"))
        self.vocab_size = self._whole.get_vocab_size(with_added_tokens=True)
        self.eos_ids = self._named_ids(config, "eos_token")
        self._byte_level = '"ByteLevel"' in json.dumps(spec.get("decoder"))
        self._bytes_of_char = _byte_alphabet() if self._byte_level else {}

    def _named_ids(self, config: Mapping[str, Any], name: str) -> frozenset[int]:
        token = config.get(name)
        content = token.get("content") if isinstance(token, Mapping) else token
        token_id = self._whole.token_to_id(content) if isinstance(content, str) else None
        return frozenset() if token_id is None else frozenset({token_id})

    def encode_raw(self, text: str) -> list[int]:
        """The ordinary way: control tokens count, and the tokenizer's own begin-of-text is added."""
        _check_text(text)
        ids: list[int] = self._whole.encode(text).ids
        return ids

    def encode_text(self, text: str, *, continued: bool = False) -> list[int]:
        """Ids of untrusted text, alone; `continued`: other tokens stand before it.

        Raises:
            PromptError: the text would yield a control id all the same, or cannot be encoded.
        """
        _check_text(text)
        tokenizer = self._behind if continued else self._plain
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        for token_id in ids:
            if token_id in self.control_ids:
                raise PromptError(f"text yields the control token {self._whole.id_to_token(token_id)!r}")
        return ids

    def encode_prompt(self, segments: Iterable[Segment]) -> Prompt:
        """A prompt's ids, equal to the ordinary way on harmless text, and where its media stand.

        Control tokens are found in `Scaffold` only. The ordinary text between two of them, whoever wrote
        it, is encoded as one string, because the tokenizer may merge over a segment's edge.

        Raises:
            PromptError: see `encode_text`. UnsupportedMediaError: a segment is a medium.
        """
        ids: list[int] = []
        media: list[MediaRun] = []
        spans: list[PositionSpan] = []
        plain: list[str] = []
        strip_left = False

        def flush(strip_right: bool = False) -> None:
            text = "".join(plain)
            plain.clear()
            text = text.lstrip(_WHITESPACE) if strip_left else text
            text = text.rstrip(_WHITESPACE) if strip_right else text
            if text:
                ids.extend(self.encode_text(text, continued=bool(ids)))

        for segment in segments:
            if isinstance(segment, Media):
                raise UnsupportedMediaError(f"the loaded model reads text only, not {segment.item.kind}")
            if isinstance(segment, Placeholder):
                flush()
                strip_left = False
                media += [replace(run, start=len(ids) + run.start) for run in segment.runs]
                if segment.span is not None:
                    spans.append(replace(segment.span, start=len(ids)))
                ids += segment.token_ids
                continue
            if isinstance(segment, Seam):
                flush()
                strip_left = False
                continue
            if not isinstance(segment, Scaffold):
                plain.append(segment.text)
                continue
            at = 0
            for match in self._cut.finditer(segment.text):
                token = self._added[match[0]]
                plain.append(segment.text[at : match.start()])
                flush(strip_right=bool(token.get("lstrip")))
                ids.append(int(token["id"]))
                strip_left = bool(token.get("rstrip"))
                at = match.end()
            plain.append(segment.text[at:])
        flush()
        return Prompt(tuple(ids), tuple(media), tuple(spans))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; nothing for special tokens and unknown ids."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._read_bytes(token_id)
        return known

    def _read_bytes(self, token_id: int) -> bytes:
        token = self._whole.id_to_token(token_id)
        if token is None or token_id in self._special_ids:
            return b""
        if token_id in self.control_ids:
            return bytes(token, "utf-8")
        if self._byte_level:
            return b"".join(self._bytes_of_char.get(char, char.encode()) for char in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return bytes(token.replace("▁", " "), "utf-8")

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out, broken UTF-8 replaced."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"text cannot be encoded: {error.reason} at character {error.start}") from error


def _without_added_tokens(spec: dict[str, Any], added: frozenset[str]) -> dict[str, Any]:
    """The same tokenizer, in which no text leads to an added token.

    It is not enough to drop the list of added tokens: a vocabulary may hold them too, where merges or a
    look-up of whole words would find them. There they keep their ids under names that nothing leads to.
    """
    model = dict(spec["model"])

    def hidden(piece: str) -> str:
        return f"\ufdd0{piece}\ufdd1" if piece in added else piece

    if isinstance(model["vocab"], dict):
        model["vocab"] = vocab = dict(model["vocab"])
        for piece in added & vocab.keys():
            vocab[hidden(piece)] = vocab.pop(piece)
    else:
        model["vocab"] = [[hidden(piece), score] for piece, score in model["vocab"]]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = hidden(model["unk_token"])
    if "merges" in model:
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [a, b] for a, b in pairs if a not in added and b not in added and a + b not in added
        ]
    return {**spec, "model": model, "added_tokens": [], "post_processor": None}


def _byte_alphabet() -> dict[str, bytes]:
    """The printable character that GPT-2's byte-level BPE writes for each byte, the other way round."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): bytes([b]) for b in printable}
    table.update({chr(256 + i): bytes([b]) for i, b in enumerate(others)})
    return table
