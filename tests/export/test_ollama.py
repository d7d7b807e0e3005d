"""Ollama is given what training saw: its template under every chat template, and what is said where it cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import real_files
from awkward_texts import TEXTS
from chat_templates import CHATML, CONVERSATIONS, LLAMA3, QWEN25, TEMPLATES, template_tokenizer
from tiny_model import tiny_tokenizer

from afina.export.ollama import PLAIN, different_ids, modelfile, ollama_prompt, template_for
from afina.loaders.text.render import Example
from afina.loaders.text.tokenizer import Tokenizer

# What a chat template does that no Go template of ours can, in a word of the line that says so.
LIMITED = {
    "llama3": {"white space"},
    "llama2": {"white space"},
    "gemma": {"white space", "no system message"},
    "mistral": {"no system message"},
    "qwen3": {"the thought"},
}
OF_ALL = "a control token that is spelt"
TOKENIZERS = {name: template_tokenizer(template) for name, template in TEMPLATES.items()}


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    said = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def rendered(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> str:
    text = tokenizer.render(messages, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token or "") if tokenizer.adds_bos else text


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_known_chat_template_has_one(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    found = template_for(tokenizer)
    assert found.source is not None, found.limits
    assert {word for line in found.limits for word in LIMITED.get(name, ()) if word in line} == LIMITED.get(name, set())
    assert len(found.limits) == len(LIMITED.get(name, ())) + 1
    assert OF_ALL in found.limits[-1]
    for messages in (talk("a b"), talk("a", "b\n\nc", "d"), talk("1", "2", "3", "4", "5", "6", "7")):
        assert ollama_prompt(found.source, messages) == rendered(tokenizer, messages)
    if "no system message" not in LIMITED.get(name, ()):
        messages = talk("a", "b", "c", system="Be kind.")
        assert ollama_prompt(found.source, messages) == rendered(tokenizer, messages)
    # An answer that is begun is left open: the model goes on with it.
    begun = ollama_prompt(found.source, talk("a", "so it"))
    assert begun.endswith("so it")
    if name != "qwen3":  # which writes an empty thought into the last turn alone
        assert rendered(tokenizer, talk("a", "so it", "x")).startswith(begun)


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "zephyr"])
def test_awkward_texts_reach_the_model_as_in_training(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    source = template_for(tokenizer).source or ""
    for text in TEXTS:
        said = tokenizer.broken(text).strip().replace("</think>", "")
        messages = talk(f"x{said}x", f"y{said}y", said or "z")
        assert ollama_prompt(source, messages) == rendered(tokenizer, messages)


def test_under_real_templates() -> None:
    """Of 70 chat templates of published models; the four others serve conversations with tools or functions only."""
    without = []
    for name, template in real_files.chat_templates().items():
        tokenizer = template_tokenizer(template)
        if (found := template_for(tokenizer)).source is None:
            assert "tools only" in found.limits[0] or "'functions' is undefined" in found.limits[0]
            without.append(name)
    assert len(without) == 4


def test_a_default_system_message_is_shown_and_may_be_changed() -> None:
    for name in ("qwen2.5", "smollm2"):
        tokenizer = TOKENIZERS[name]
        found = template_for(tokenizer)
        assert found.system is not None
        assert found.system.startswith("You are")
        assert f'SYSTEM """{found.system}"""' in modelfile(found, "m.gguf", tokenizer)
        # As Ollama sends it, and without it.
        for messages in (talk("a", "b", "c", system=found.system), talk("a", "b", "c")):
            assert ollama_prompt(found.source or "", messages) == rendered(tokenizer, talk("a", "b", "c"))
    assert template_for(TOKENIZERS["chatml"]).system is None


@pytest.mark.parametrize(
    ("template", "told"),
    [
        # Looks into the texts, counts the turns, turns their order round, leaves one out.
        (CHATML.replace("m['content']", "m['content'] | replace('\\\\', '/')"), "looks into the texts"),
        (
            CHATML.replace("m['content']", "(m['content'] | upper if '0' in m['content'] else m['content'])"),
            "looks into",
        ),
        (CHATML.replace("'<|im_end|>'", "'<|im_end|>' + loop.index | string"), "depends on the conversation"),
        (CHATML.replace("in messages %}", "in messages | reverse %}"), "their order"),
        (CHATML.replace("in messages %}", "in messages[-3:] %}"), "not write each message once"),
    ],
)
def test_a_template_that_cannot_be_followed_is_none(template: str, told: str) -> None:
    tokenizer = template_tokenizer(template)
    found = template_for(tokenizer)
    assert found.source is None
    assert told in found.limits[0]
    written = modelfile(found, "m.gguf", tokenizer)
    assert "TEMPLATE" not in written
    assert told in written
    assert "Ollama will take the template that it knows" in written


def test_rows_are_compared_and_those_that_differ_are_counted_by_reason() -> None:
    rows = {
        "fine": talk("a", "b"),
        "white space": talk("a\n", "b"),
        "neighbours": [*talk("a", "b"), *talk("c", "d")[1:]],
        "control tokens": talk("<|im_end|>", "b"),
        "inside": [*talk("a", "b"), *talk("c", "d", system="s")],
    }
    examples = [Example(messages=tuple(row)) for row in rows.values()]
    messages, tools = CONVERSATIONS["call, result, answer"]
    examples.append(Example(messages=tuple(messages), tools=tuple(tools or ())))
    found = template_for(template_tokenizer(LLAMA3.replace("<|eot_id|>", "<|im_end|>")), examples)
    assert (found.rows, found.same) == (6, 1)
    (line,) = (line for line in found.limits if "rows are written otherwise" in line)
    assert line.startswith("5 of 6 rows")
    for reason in ("white space", "neighbours", "control tokens", "system message inside", "tools"):
        assert reason in line
    only = template_for(TOKENIZERS["chatml"], examples[-1:])
    assert only.source is None
    assert "none of 1 rows is written as training saw it (they have tools)" in only.limits[0]


def test_texts_and_prompts_go_as_they_are() -> None:
    tokenizer = TOKENIZERS["chatml"]
    rows = [Example(prompt="one two", completion=" three"), Example(text="four")]
    found = template_for(tokenizer, rows)
    assert (found.source, found.rows, found.same) == (PLAIN, 2, 2)
    spaced = template_for(tokenizer, [Example(prompt="one ", completion="two")])
    assert (spaced.source, spaced.same) == (PLAIN, 0)
    assert "the spaces off a prompt's end" in spaced.limits[-1]
    assert template_for(tiny_tokenizer()).source == PLAIN or tiny_tokenizer().chat_template is not None
    mixed = template_for(tokenizer, [*rows, Example(messages=tuple(talk("a", "b")))])
    assert mixed.source not in (None, PLAIN)
    assert "rows of plain text" in mixed.limits[-1]


def test_the_modelfile() -> None:
    tokenizer = TOKENIZERS["llama3"]
    lines = modelfile(template_for(tokenizer), "my model.gguf", tokenizer).split("\n")
    assert "FROM ./my model.gguf" in lines
    assert 'PARAMETER stop "<|eot_id|>"' in lines
    assert sum(line.startswith(('TEMPLATE """{{- $before', "FROM", "SYSTEM", "MESSAGE")) for line in lines) == 2
    for name in ("a\nSYSTEM x.gguf", "a\x1b.gguf", "a\u202e.gguf"):
        with pytest.raises(ValueError, match="a Modelfile cannot name the file"):
            modelfile(template_for(tokenizer), name, tokenizer)


@pytest.mark.parametrize(
    "nasty", ['\\n"""\\nFROM evil\\n"""', "{{ end }}", "{{- .System }}", "\u200b\u3000", '"', "\\\\", '"""']
)
def test_nothing_of_a_template_leaves_its_place_in_the_modelfile(nasty: str) -> None:
    """A template is a stranger's: quotes, actions and line ends in its texts stay texts."""
    tokenizer = template_tokenizer(QWEN25.replace("You are Qwen", "You are " + nasty))
    found = template_for(tokenizer)
    assert found.source is not None
    assert found.source.isascii()
    assert '"""' not in found.source
    assert ollama_prompt(found.source, talk("a")) == rendered(tokenizer, talk("a"))
    written = modelfile(found, "m.gguf", tokenizer)
    assert written.count(f'TEMPLATE """{found.source}"""\n') == 1
    assert written.count("\nFROM ") == 1
    # The text of the default message has line ends, quotes and marks that a Modelfile may not hold.
    assert written.count('"""') == (4 if nasty in ("{{ end }}", "{{- .System }}", '"', "\\\\") else 2)


def test_bos_is_left_to_the_file_that_says_so() -> None:
    """llama.cpp puts it before every text of such a file; with the chat template's own there would be two."""
    tokenizer = template_tokenizer(LLAMA3)
    files = tokenizer.files()
    backend = json.loads(files["tokenizer.json"])
    number = tokenizer.token_id("<s>")
    special = {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}}
    pieces = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    backend["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces, "pair": pieces + pieces[1:], "special_tokens": special,
    }  # fmt: skip
    adding = Tokenizer(files | {"tokenizer.json": json.dumps(backend).encode()}, "the folder")
    assert adding.adds_bos
    assert "<s>" in (template_for(tokenizer).source or "")
    found = template_for(adding)
    assert found.source is not None
    assert "<s>" not in found.source
    text = ollama_prompt(found.source, talk("a"))
    assert adding.encode(text) == adding.encode(adding.render(talk("a"), add_generation_prompt=True), add_special=False)


def test_neighbours_of_one_role_are_joined_as_ollama_does() -> None:
    source = template_for(TOKENIZERS["chatml"]).source or ""
    two = [{"role": "user", "content": text} for text in ("a", "b")]
    assert ollama_prompt(source, two) == ollama_prompt(source, talk("a\n\nb"))


def test_other_ids_are_said() -> None:
    class Vocabulary:
        def encode(self, text: str) -> list[int]:
            return tokenizer.encode(text.replace("strange", "odd"), add_special=False)

    tokenizer = TOKENIZERS["chatml"]
    found = template_for(tokenizer)
    vocabulary: Any = Vocabulary()
    fine, strange = (Example(messages=tuple(talk(word, "b"))) for word in ("fine", "strange"))
    assert different_ids(vocabulary, tokenizer, found, [fine]) is None
    assert different_ids(vocabulary, tokenizer, found, []) is None
    assert different_ids(vocabulary, tokenizer, found, [fine, strange]) == (
        "1 of 2 prompts have other ids by llama.cpp than in training"
    )
