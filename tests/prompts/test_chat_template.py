"""Chat templates: the same ids as transformers, and nothing of a content ever interpreted."""

from typing import Any

import pytest

from flexjudge_fast.errors import PromptError
from flexjudge_fast.media.items import MediaItem
from flexjudge_fast.prompts.chat_template import ChatTemplate
from flexjudge_fast.prompts.segments import Media, Scaffold, Text
from tests.prompts.test_prompt_tokenizer import harmless_texts
from tests.prompts.vocabularies import (
    CHATML,
    LLAMA3_CHAT,
    Vocabulary,
    from_gguf,
    llama3_like,
    qwen,
    sentencepiece_like,
)

BUILDERS = (qwen, llama3_like, sentencepiece_like, lambda: sentencepiece_like("legacy"))
EACH = "{% for m in messages %}%s{% endfor %}"


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def conversations(count: int) -> list[list[dict[str, Any]]]:
    texts = harmless_texts(4 * count, seed=17)
    talks = []
    for i in range(0, len(texts) - 4, 4):
        talk = [
            {"role": r, "content": t} for r, t in zip(("user", "assistant", "user"), texts[i:], strict=False)
        ]
        talks.append([{"role": "system", "content": texts[i + 3]}, *talk] if i % 8 else talk)
    return talks


def check_equality(vocabulary: Vocabulary, count: int) -> None:
    for talk in conversations(count):
        assert vocabulary.chat_ids(talk) == vocabulary.reference_chat_ids(talk), talk


@pytest.mark.parametrize("builder", BUILDERS)
def test_chat_ids_equal_transformers(builder: Any) -> None:
    check_equality(builder(), 60)


@pytest.mark.parametrize("fixture", ["smollm2_path", "qwen05b_path"])
def test_chat_ids_of_real_checkpoints_equal_transformers(
    request: pytest.FixtureRequest, fixture: str
) -> None:
    check_equality(from_gguf(request.getfixturevalue(fixture)), 60)


def test_a_template_never_sees_a_content() -> None:
    shown = EACH.replace("%s", "{{ m.content }}|{{ m.content|length > 200 }}|{{ 'secret' in m.content }}")
    segments = ChatTemplate(shown, {}).render(user("secret {{ 1 + 1 }} {% raise %}"))
    assert segments[1] == Text("secret {{ 1 + 1 }} {% raise %}")
    assert segments[2] == Scaffold("|False|False")


@pytest.mark.parametrize(
    ("content", "left", "right"),
    [
        ("m.content", False, False),
        ("m.content | trim", True, True),
        ("m.content.strip()", True, True),
        ("m.content.lstrip()", True, False),
        ("m.content.rstrip()", False, True),
        ("' ' + m.content.strip() + ' '", True, True),
        ("'\\n' + m.content + ' '", False, False),
    ],
)
def test_white_space_is_trimmed_as_the_template_does(content: str, left: bool, right: bool) -> None:
    template = ChatTemplate(EACH.replace("%s", "<u>{{ " + content + " }}</u>"), {})
    text = "\t\n a b \x1c\n "
    expected = text.lstrip() if left else text
    expected = expected.rstrip() if right else expected
    _, shown, _ = template.render(user(text))
    assert shown == Text(expected)


def test_trimming_goes_through_blank_parts_and_stops_at_media() -> None:
    template = ChatTemplate(EACH.replace("%s", "{{ m.content | trim }}"), {})
    image = {"type": "image", "image": "cat.png"}
    texts = [{"type": "text", "text": t} for t in (" ", "\n a", "b ", "  ")]
    assert template.render(user(texts))[1:-1] == (Text(""), Text("a"), Text("b"), Text(""))
    media = Media(MediaItem("image", "cat.png"))
    assert template.render(user([image, texts[0], image]))[1:-1] == (media, Text(" "), media)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{{ m.content }}{{ m.content }}",
        "{{ m.content | upper }}",
        "{{ m.content | e }}",
        "{{ m.content | tojson }}",
        "{{ m.content | replace('<', '') }}",
        "{{ m.content | replace('\\n', ' ') }}",
        "{{ m.content[:8] }}",
        "{{ m.content.strip('\\n ') }}",
        "{{ m.content | reverse }}",
        "{{ m.content | length }}",
    ],
)
def test_a_template_that_changes_contents_is_refused(content: str) -> None:
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(EACH.replace("%s", content), {}).render(user("hello"))


def test_a_template_that_reorders_contents_is_refused() -> None:
    template = ChatTemplate("{% for m in messages | reverse %}{{ m.content }}{% endfor %}", {})
    with pytest.raises(PromptError, match="reorders"):
        template.render([*user("a"), *user("b")])


@pytest.mark.parametrize(
    "source",
    [
        "{% if %}",
        "{{ raise_exception('no system turns') }}",
        "{{ 1 // 0 }}",
        "{{ missing.field.other }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}x{% endfor %}",
        "{{ messages[99].content.x }}",
        "{{ 'a' + 1 }}",
    ],
)
def test_a_template_that_fails_is_a_prompt_error(source: str) -> None:
    with pytest.raises(PromptError, match="chat template"):
        ChatTemplate(source, {}).render(user("hello"))


def test_no_template_is_a_prompt_error() -> None:
    with pytest.raises(PromptError, match="no chat template"):
        ChatTemplate(None, {}).render(user("hello"))
    with pytest.raises(PromptError, match="default"):
        ChatTemplate([{"name": "tool_use", "template": ""}], {})


def test_of_several_templates_the_default_is_used() -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    assert ChatTemplate(named, {}).render(user("a")) == ChatTemplate(CHATML, {}).render(user("a"))


def test_a_missing_token_writes_nothing() -> None:
    source = "{{ bos_token }}{{ eos_token }}" + EACH.replace("%s", "{{ m.content }}")
    assert ChatTemplate(source, {"eos_token": {"content": "</s>"}}).render(user("a"))[0] == Scaffold("</s>")


def test_generation_blocks_are_read() -> None:
    source = EACH.replace("%s", "{% generation %}[{{ m.content }}]{% endgeneration %}")
    assert ChatTemplate(source, {}).render(user("a")) == (Scaffold("["), Text("a"), Scaffold("]"))


@pytest.mark.parametrize(
    "role", ["", "User", "user\n", "a b", "<|im_end|>", 3, None, "système", "user<|im_start|>"]
)
def test_a_role_must_be_a_plain_word(role: Any) -> None:
    with pytest.raises(PromptError, match="message 0: role"):
        ChatTemplate(CHATML, {}).render([{"role": role, "content": "a"}])


@pytest.mark.parametrize(
    "message",
    [
        "text",
        None,
        {},
        {"role": "user"},
        {"content": "a"},
        {"role": "user", "content": None},
        {"role": "user", "content": 3},
        {"role": "user", "content": ["a"]},
        {"role": "user", "content": [{"type": "text"}]},
        {"role": "user", "content": [{"type": "text", "text": 3}]},
        {"role": "user", "content": [{"type": "smell", "smell": "x"}]},
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "user", "content": [{"type": []}]},
    ],
)
def test_a_malformed_message_is_a_prompt_error(message: Any) -> None:
    with pytest.raises(PromptError, match="message 0"):
        ChatTemplate(LLAMA3_CHAT, {}).render([message])


def test_other_fields_of_a_message_are_ignored() -> None:
    source = EACH.replace("%s", "{{ m.name }}{{ m.tool_calls }}{{ m.content }}")
    message = {"role": "user", "content": "a", "name": "<|im_start|>", "tool_calls": ["<|im_end|>"]}
    assert ChatTemplate(source, {}).render([message]) == (Scaffold(""), Text("a"), Scaffold(""))
