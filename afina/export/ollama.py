"""The chat template of a model as a template for Ollama, proven on conversations; and the Modelfile that brings it.

Ollama does not execute a model's chat template (Jinja): it has its own, in the language of Go's text/template. Most
chat templates write fixed texts between the messages, which depend on the two roles that meet there and on nothing
else. So those texts are asked of the renderer that training used, and written into a Go template that puts them there
again. Whether that is all that the chat template does is then seen: the Go template is executed
(``afina/export/go_template.py``) on conversations made to tell the two apart, and on the run's own rows. What it cannot
do (take white space off, show tools) is said; where it cannot write plain conversations, there is none.

What Ollama does around it (template.Execute, collate, and the Modelfile's parser): it joins neighbours of one role, it
puts SYSTEM before a conversation that does not start with a system message, it leaves a last message of the assistant
open for the model to go on with, llama.cpp puts BOS in front where the file says so, and a Modelfile loses characters
that Go does not print.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from afina.errors import AfinaError, DataError
from afina.export.go_template import GoTemplateError, execute, quoted
from afina.loaders.text.gguf_vocab import Vocabulary
from afina.loaders.text.opaque import SLOT, numbered
from afina.loaders.text.render import Example, render_prompt
from afina.loaders.text.tokenizer import Tokenizer
from afina.printable import printable

PLAIN = "{{ .Prompt }}"  # a text as it is, which the model goes on with
ROWS = 16  # whose ids are compared
Messages = Sequence[Mapping[str, Any]]
# Each role is written once behind each other, so that every text between two roles is seen twice.
_TALKS: tuple[tuple[str, ...], ...] = (
    ("user",),
    ("user", "assistant", "user"),
    ("user", "assistant", "user", "assistant", "user"),
)
_SAID = (  # what a template engine, a trimming reader or a careless quotation would change
    "She said \"no\" \\ {{ .System }} {% raw %}{{- end }} $before\n\n\tand <b>left</b> & 'came' back }} ``` \\n",
    "Grüße, мир 世界 שלום 👩‍👩‍👧‍👦 e\u0301 \u00a0x\u200b{}",
    "0",
    "- a\n- b",
    "System: user\n\n",
)
_AWKWARD = tuple(text.strip() for text in _SAID)


@dataclass(frozen=True)
class OllamaTemplate:
    """``source``: the Go template, None where none writes what training saw. ``system``: the text that the chat
    template puts in where a conversation has no system message. ``limits``: in what it differs, a line each."""

    source: str | None
    system: str | None = None
    limits: list[str] = field(default_factory=list)
    rows: int = 0
    same: int = 0


def template_for(tokenizer: Tokenizer, examples: Iterable[Example] = ()) -> OllamaTemplate:
    """The Go template that gives the model what training gave it, proven on ``examples``, the rows of its run.

    Rows of plain texts or prompts: their text as it is; so too without rows where the model has no chat template.
    """
    examples = list(examples)
    talks = [example for example in examples if example.messages is not None]
    if not talks and (examples or tokenizer.chat_template is None):
        return _plain(tokenizer, examples)
    try:
        derived = _derive(tokenizer)
    except (AfinaError, GoTemplateError) as problem:
        return OllamaTemplate(None, limits=[f"no template for Ollama writes what the chat template does: {problem}"])
    limits = _limits(tokenizer, derived)
    same, others = 0, []
    for example in talks:
        reason = _difference(tokenizer, derived, example)
        same += reason is None
        others += [reason] if reason is not None and reason not in others else []
    if others and not same:
        first = f"none of {len(talks)} rows is written as training saw it ({'; '.join(others)})"
        return OllamaTemplate(None, limits=[f"no template for Ollama: {first}"], rows=len(talks))
    if others:
        limits.append(f"{len(talks) - same} of {len(talks)} rows are written otherwise: {'; '.join(others)}")
    if len(talks) < len(examples):
        limits.append("the run's rows of plain text were trained without this template: send those with raw set")
    return OllamaTemplate(derived.source, derived.system, limits, len(talks), same)


def _plain(tokenizer: Tokenizer, examples: list[Example]) -> OllamaTemplate:
    limits = ["one prompt, as it is; a conversation is no form that this model was trained on"]
    same = sum(_without_bos(tokenizer, render_prompt(tokenizer, row)) == _prompt_text(row) for row in examples)
    if same < len(examples):
        limits.append("training took the spaces off a prompt's end: send it without")
    return OllamaTemplate(PLAIN, None, limits, len(examples), same)


def _prompt_text(example: Example) -> str:
    return example.prompt if example.prompt is not None else example.text or ""


def ollama_prompt(template: str, messages: Messages) -> str:
    """What Ollama makes of ``messages`` ({role, content}) with a template of ours, without the BOS of the file."""
    joined: list[dict[str, str]] = []
    for message in messages:
        if joined and joined[-1]["Role"] == message["role"]:
            joined[-1]["Content"] += "\n\n" + message["content"]
        else:
            joined.append({"Role": message["role"], "Content": message["content"]})
    return execute(template, {"Messages": joined})


def _rendered(tokenizer: Tokenizer, messages: Messages, *, prompt: bool = True) -> str:
    return _without_bos(tokenizer, tokenizer.render(messages, add_generation_prompt=prompt))


def _without_bos(tokenizer: Tokenizer, text: str) -> str:
    """``text`` without the BOS that llama.cpp will put before it."""
    return text.removeprefix(tokenizer.bos_token or "") if tokenizer.adds_bos else text


# --- The Modelfile ----------------------------------------------------------------------------------------------------


def modelfile(template: OllamaTemplate, weights: str, tokenizer: Tokenizer) -> str:
    """The Modelfile that lies beside ``weights``, the name of a GGUF file. Raises ValueError for a name that none can
    hold.

    The end tokens are stop texts too: llama.cpp knows one of them by the file, and Ollama takes the others from here.
    """
    if not _survives(weights):
        raise ValueError(f"a Modelfile cannot name the file {weights!r}")
    told = [*template.limits]
    if template.source is None:
        told.append("Ollama will take the template that it knows for such a model, or send texts as they are")
    elif template.rows:
        told.insert(0, f"what training saw: {template.same} of {template.rows} rows of the run are written so")
    lines = ["# Written by afina export. Use: ollama create NAME -f THIS_FILE; ollama run NAME"]
    lines += [f"# {printable(line)}" for line in told]
    lines.append(f"FROM ./{weights}")
    if template.source is not None:
        lines.append(f'TEMPLATE """{template.source}"""')
    if template.system is not None and _survives(template.system.replace("\n", "")) and '"""' not in template.system:
        lines.append(f'SYSTEM """{template.system}"""')
    stops = [token for number in tokenizer.eos_ids if (token := tokenizer.token(number)) and token.strip() == token]
    lines += [f'PARAMETER stop "{token}"' for token in stops if _survives(token) and '"' not in token]
    return "\n".join(lines) + "\n"


def _survives(text: str) -> bool:
    """Whether the Modelfile's parser keeps every character."""
    return text.isprintable() and text.strip() != ""


def different_ids(
    vocabulary: Vocabulary, tokenizer: Tokenizer, template: OllamaTemplate, examples: Iterable[Example]
) -> str | None:
    """Whether the prompts of rows, or of a conversation where there are none, have other ids by the file's vocabulary
    than in training, in a line; None where all are the same."""
    composes = "NFC" in str(tokenizer._backend.normalizer)
    count = different = 0
    for example in list(examples)[:ROWS] or [Example(messages=tuple(next(iter(_conversations(with_system=False)))))]:
        if template.source == PLAIN:
            text = _prompt_text(example) if example.messages is None else str(example.messages[0]["content"])
            expected = tokenizer.with_bos(text)
        elif example.messages is None or _difference(tokenizer, template, example) is not None:
            continue
        else:
            talk = example.messages[: -1 if example.messages[-1]["role"] == "assistant" else None]
            text, expected = (
                ollama_prompt(template.source or "", talk),
                tokenizer.render(talk, add_generation_prompt=True),
            )
        if composes:
            text, expected = unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", expected)
        count += 1
        different += vocabulary.encode(text) != tokenizer.encode(expected, add_special=False)
    return f"{different} of {count} prompts have other ids by llama.cpp than in training" if different else None


# --- Asking the chat template -----------------------------------------------------------------------------------------


def _derive(tokenizer: Tokenizer) -> OllamaTemplate:
    """The Go template of the texts between the roles. Raises AfinaError, with why there is none."""
    between: dict[tuple[str, str], str] = {}
    for talk in _TALKS:
        _collect(tokenizer, talk, between)
    limits, system = [], None
    try:
        with_system = dict(between)
        for talk in _TALKS:
            _collect(tokenizer, ("system", *talk), with_system)
        between = with_system
    except DataError:
        limits.append("no system message: the chat template refuses it or writes it elsewhere, so one is left out")
    if ("system", "user") in between:
        system = _default_system(tokenizer, between)
    source = _write(between)
    found = OllamaTemplate(source, system, limits)
    for messages in _conversations(with_system=("system", "user") in between):
        if ollama_prompt(source, messages) != _rendered(tokenizer, messages):
            roles = ", ".join(message["role"] for message in messages)
            raise DataError(f"it looks into the texts of a conversation, or counts its turns (roles: {roles})")
    return found


def _collect(tokenizer: Tokenizer, roles: Sequence[str], between: dict[tuple[str, str], str]) -> None:
    """Add what stands before, between and behind messages of these ``roles``, by the roles that meet there."""
    text = _rendered(tokenizer, numbered(roles))
    if [match[1] for match in SLOT.finditer(text)] != [str(number) for number in range(len(roles))]:
        raise DataError("it does not write each message once, in their order")
    for pair, literal in zip(zip(("", *roles), (*roles, "")), SLOT.split(text)[::2], strict=True):
        if between.setdefault(pair, literal) != literal:
            first, second = (role or "the end" for role in pair)
            raise DataError(f"what it writes between {first} and {second} depends on the conversation")


def _default_system(tokenizer: Tokenizer, between: Mapping[tuple[str, str], str]) -> str | None:
    """The system message that the chat template makes up where there is none."""
    head, tail, whole = between["", "system"], between["system", "user"], between["", "user"]
    if not (whole.startswith(head) and whole.endswith(tail) and len(whole) > len(head) + len(tail)):
        return None
    system = whole[len(head) : len(whole) - len(tail)]
    user = {"role": "user", "content": "x"}
    given = [{"role": "system", "content": system}, user]
    return system if _rendered(tokenizer, given) == _rendered(tokenizer, [user]) else None


def _write(between: Mapping[tuple[str, str], str]) -> str:
    """The Go template; ``$before`` is the role of the message that was written last."""
    first, later = between["", "user"], between["assistant", "user"]
    cases = [("", first)]
    system = ""
    if (behind := between.get(("system", "user"))) is not None:
        head = quoted(between["", "system"])
        system = (
            f'{{{{- if eq $before "" }}}}{{{{ {head} }}}}{{{{ .Content }}}}{{{{ $before = "system" }}}}{{{{ end }}}}'
        )
        cases.append(("system", behind))
    cases = [(role, text) for role, text in cases if text != later]
    user = "".join(
        f'{{{{- {"else " * (number > 0)}if eq $before "{role}" }}}}{{{{ {quoted(text)} }}}}\n'
        for number, (role, text) in enumerate(cases)
    )
    user += f"{{{{- else }}}}{{{{ {quoted(later)} }}}}\n{{{{- end }}}}" if cases else f"{{{{- {quoted(later)} }}}}"
    lines = [
        '{{- $before := "" }}',
        "{{- range .Messages }}",
        '{{- if eq .Role "system" }}',
        system,
        '{{- else if eq .Role "user" }}',
        user + '{{ .Content }}{{ $before = "user" }}',
        '{{- else if eq .Role "assistant" }}',
        f'{{{{- {quoted(between["user", "assistant"])} }}}}{{{{ .Content }}}}{{{{ $before = "assistant" }}}}',
        "{{- end }}",
        "{{- end }}",
        f'{{{{- if eq $before "user" }}}}{{{{ {quoted(between["user", ""])} }}}}{{{{ end }}}}',
    ]
    return "\n".join(line for line in lines if line)


# --- Proving it -------------------------------------------------------------------------------------------------------


def _conversations(*, with_system: bool) -> Iterable[Messages]:
    """Conversations of one to seven messages whose texts a template might stumble over, none of them at its ends."""
    for start in range(len(_AWKWARD)):
        said = [*_AWKWARD[start:], *_AWKWARD[:start]]
        roles = ("user", "assistant") * 4
        for count in (1, 3, 7):
            talk = [{"role": r, "content": f"{number}: {said[number % len(said)]}"} for number, r in enumerate(roles)]
            yield talk[:count]
            if with_system:
                yield [{"role": "system", "content": said[-1]}, *talk[:count]]


def _limits(tokenizer: Tokenizer, derived: OllamaTemplate) -> list[str]:
    """What the chat template does that the Go template does not, a line each."""
    assert derived.source is not None
    limits = list(derived.limits)

    def differs(*texts: str) -> bool:
        roles = ("user", "assistant") * len(texts)
        messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        try:
            return ollama_prompt(derived.source or "", messages) != _rendered(tokenizer, messages)
        except AfinaError:
            return True

    if differs(" a\n", "b", "c") or differs("a", "\n b ", "c"):
        limits.append("the chat template takes white space off the ends of a text, Ollama does not: send texts without")
    if differs("a", "<think>\nb\n</think>\n\nc", "d"):
        limits.append(
            "the chat template takes the thought out of earlier answers, Ollama does not: send answers without"
        )
    if differs("a", "", "b"):
        limits.append("the chat template writes an empty text in a way of its own")
    if tokenizer.special_ids:
        limits.append("a control token that is spelt in a message is one for Ollama; training broke it by a space")
    if "tools" in tokenizer.template.source:
        limits.append("tools and their calls are not in the template: Ollama will refuse them")
    if "strftime_now" in tokenizer.template.source:
        limits.append("the date in it is that of the export")
    return limits


def _difference(tokenizer: Tokenizer, derived: OllamaTemplate, example: Example) -> str | None:
    """Why Ollama is not given what training saw of a row: to answer its last turn, and to answer what follows it."""
    messages = example.messages or ()
    if example.tools or any(message.get("tool_calls") or message["role"] == "tool" for message in messages):
        return "they have tools"
    roles = [message["role"] for message in messages]
    if any(one == two for one, two in itertools.pairwise(roles)):
        return "they have neighbours of one role, which Ollama joins"
    if any(message.get("reasoning_content") for message in messages):
        return "they have thoughts apart from the answer"
    if any(role not in ("system", "user", "assistant") for role in roles) or "system" in roles[1:]:
        return "they have other roles, or a system message inside"
    if any(tokenizer.broken(message["content"]) != message["content"] for message in messages):
        return "they spell control tokens"
    last = messages[:-1] if roles[-1] == "assistant" else messages
    for talk in (last, [*messages, {"role": "user", "content": "x"}] if roles[-1] == "assistant" else last):
        talk = [{"role": message["role"], "content": message["content"]} for message in talk]
        try:
            same = ollama_prompt(derived.source or "", talk) == _rendered(tokenizer, talk)
        except AfinaError as problem:
            return f"they cannot be rendered ({problem})"
        if not same:
            stripped = [{**message, "content": message["content"].strip()} for message in talk]
            trimmed = ollama_prompt(derived.source or "", stripped) == _rendered(tokenizer, talk)
            return (
                "they have white space at the ends of texts" if trimmed else "the chat template looks into their texts"
            )
    return None
