"""The interpreter of Go templates writes what Go writes, and refuses what it does not know."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES, template_tokenizer

from afina.export.go_template import GoTemplateError, execute, quoted
from afina.export.ollama import _AWKWARD, template_for

# What Ollama does around a template: neighbours of one role are joined, and the values have these names.
GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type message struct { Role, Content string }

func main() {
    var jobs []struct { Template string; Talks [][]message }
    if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
    written := [][]string{}
    for _, job := range jobs {
        parsed := template.Must(template.New("").Option("missingkey=zero").Parse(job.Template))
        texts := []string{}
        for _, talk := range job.Talks {
            messages := []*message{}
            for i := range talk { messages = append(messages, &talk[i]) }
            var text strings.Builder
            values := map[string]any{"System": "", "Messages": messages, "Response": ""}
            if err := parsed.Execute(&text, values); err != nil { panic(err) }
            texts = append(texts, text.String())
        }
        written = append(written, texts)
    }
    json.NewEncoder(os.Stdout).Encode(written)
}
"""


def talks() -> list[list[dict[str, str]]]:
    said = [*_AWKWARD, "", " \n a \t", "\x1b[31m", "{{ .Content }}", "é\u202e𐐷", "<|im_end|>"]
    rows = [[("user", text)] for text in said]
    rows += [[("system", "s"), ("user", text), ("assistant", text), ("user", "x")] for text in said]
    rows += [[("user", "a"), ("assistant", text)] for text in said]
    rows += [[], [("assistant", "a")], [("user", "a"), ("system", "b"), ("user", "c")], [("tool", "a"), ("user", "b")]]
    return [[{"Role": role, "Content": text} for role, text in row] for row in rows]


def test_go_itself_writes_the_same(tmp_path: Path) -> None:
    """Go's text/template, where there is a Go, on every template that is written for the known chat templates."""
    if (go := shutil.which("go")) is None:
        pytest.skip("no Go on this machine")
    sources = [template_for(template_tokenizer(template)).source for template in TEMPLATES.values()]
    sources.append('a {{- "\\u00e9\\U0001f600\\"}}{{" -}}  b{{ if eq "x" "x" -}} c {{- else if eq "y" "y" }}d{{ end }}')
    (tmp_path / "main.go").write_text(GO)
    jobs: list[dict[str, Any]] = [{"Template": source, "Talks": talks()} for source in sources]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "GOFLAGS": "-p=1", "GO111MODULE": "off"}
    done = subprocess.run(
        [go, "run", "main.go"],
        input=json.dumps(jobs).encode(), capture_output=True, cwd=tmp_path, env=environment, timeout=300, check=True,
    )  # fmt: skip
    for job, written in zip(jobs, json.loads(done.stdout), strict=True):
        assert written == [execute(job["Template"], {"Messages": talk}) for talk in job["Talks"]]


def test_what_is_read_and_written() -> None:
    source = """ a {{- " b\\n" -}}
      c {{ $x := "1" }}{{ range .Rows }}{{ if eq .A $x }}[{{ .A }}]{{ else }}({{ .A }}{{ $x }}){{ end }}{{ $x = .A }}
      {{- end }} {{ $x }}"""
    rows = [{"A": value} for value in ("1", "2", "2", "}}")]
    assert execute(source, {"Rows": rows}) == " a b\nc [1](21)[2](}}2) }}"


def test_a_literal_is_ascii_and_comes_back() -> None:
    texts = ["", '"', "\\n", '\n\r\t\\"', "<|im_end|>\n", "｜▁\u3000\u202e\x00\x1b𐐷", "{{ }}", '"""']
    for text in texts:
        literal = quoted(text)
        assert literal.isascii()
        assert literal.isprintable()
        assert '"""' not in f" {{{{ {literal} }}}} "
        assert execute(f"{{{{ {literal} }}}}", {}) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ .Missing }}",
        "{{ $x }}",
        "{{ $x = .P }}",
        "{{ if eq .P }}a{{ end }}",
        "{{ if .P }}a{{ end }}",
        "{{ if eq .P .P }}a",
        "{{ range .P }}{{ end }}",
        "{{ range .P }}",
        "{{ end }}",
        "{{ else }}",
        "{{ .P | html }}",
        "{{ len .P }}",
        "{{ .P",
        "{{}}",
        "{{/* c */}}",
    ],
)
def test_what_is_not_known_is_refused(source: str) -> None:
    with pytest.raises(GoTemplateError):
        execute(source, {"P": "p"})
