"""Modelfiles: a TEMPLATE only where it expands to what the model's own Jinja chat template renders.

The templates here are written for the tests; each renders the text of the published template it is named
after. Go templates are expanded by a small evaluator of `{{ if .X }}...{{ end }}` and `{{ .X }}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import GGUFWriter
from jinja2 import Environment
from small_sources import gaussian

from alphaq_gguf.modelfile import recognise, render_modelfile

BOS, EOS = "<s>", "</s>"

CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are kind.<|im_end|>\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\n\n' ~ m.content | trim ~ '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# The system text goes before the first user text; answers follow a space.
MISTRAL_WITH_SYSTEM = (
    "{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set system = messages[0].content ~ '\n\n' %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ '[INST] ' ~ (system if loop.first else '') ~ m.content ~ ' [/INST]' }}"
    "{%- else %}{{ ' ' ~ m.content ~ eos_token }}{%- endif %}{%- endfor %}"
)
# As first published: no system role at all, answers directly after the bracket.
MISTRAL_V01 = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ m.content ~ eos_token }}"
    "{%- else %}{{ raise_exception('only user and assistant') }}{%- endif %}{%- endfor %}"
)
# As published later for Mixtral: a space before every bracket.
MIXTRAL = MISTRAL_WITH_SYSTEM.replace("'[INST] '", "' [INST] '")
DEEPSEEK_V2 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{ 'User: ' ~ m.content ~ '\n\n' }}"
    "{%- elif m.role == 'assistant' %}{{ 'Assistant: ' ~ m.content ~ eos_token }}"
    "{%- else %}{{ m.content ~ '\n\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# OLMoE's: the last answer is not followed by a line break.
TULU = (
    "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|assistant|>\n' ~ m.content ~ eos_token ~ ('' if loop.last else '\n') }}"
    "{%- else %}{{- '<|' ~ m.role ~ '|>\n' ~ m.content ~ '\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
KNOWN = {
    "chatml": CHATML,
    "chatml with a default system prompt": DEFAULT_SYSTEM + CHATML,
    "llama3": LLAMA_3,
    "mistral": MIXTRAL,
    "deepseek": DEEPSEEK_V2,
    "tulu": TULU,
}
UNKNOWN = {
    "another format": "{% for m in messages %}{{ '<start_of_turn>' ~ m.role ~ '\n' ~ m.content }}{% endfor %}",
    "upper case": CHATML.replace("m.content", "m.content | upper"),
    "first turn only": CHATML.replace("in messages", "in messages[-1:]"),
    "dated system prompt": CHATML.replace("~ m.content", "~ ('today' if m.role == 'system' else '') ~ m.content"),
    "drops the system message": CHATML.replace("in messages", "in messages if m.role != 'system'"),
    "constant": "hello",
    "empty": "",
    "broken syntax": "{% for m in messages %}",
    "asks for an unknown function": "{{ strftime_now('%Y') }}" + CHATML,
    "refuses everything": "{{ raise_exception('no') }}",
    "divides by zero": "{{ 1 // 0 }}",
    "unknown codec": "{{ 'a'.encode('no-such-codec') }}",
    "loops too far": "{% for i in range(10000000) %}x{% endfor %}",
}


def render(template: str, messages: Sequence[dict[str, str]], *, prompt: bool) -> str:
    """Jinja as transformers sets it up."""
    found = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    return found.render(messages=messages, add_generation_prompt=prompt, bos_token=BOS, eos_token=EOS)


def expand(template: str, **values: str) -> str:
    """Expand the Go subset: non-nested or nested ifs on a value, and values."""
    inner = re.compile(r"\{\{ if \.(\w+) \}\}((?:(?!\{\{ if )(?!\{\{ end \}\}).)*)\{\{ end \}\}", re.DOTALL)
    while inner.search(template):
        template = inner.sub(lambda m: m[2] if values[m[1]] else "", template)
    expanded = re.sub(r"\{\{ \.(\w+) \}\}", lambda m: values[m[1]], template)
    assert "{{" not in expanded
    return expanded


def as_ollama(template: str, messages: Sequence[dict[str, str]]) -> str:
    """What Ollama feeds the model: the template once per exchange, the last one up to the response."""
    text, system, prompt = "", "", ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"]
        elif message["role"] == "user":
            prompt = message["content"]
        else:
            text += expand(template, System=system, Prompt=prompt, Response=message["content"])
            system = prompt = ""
    before, _, _ = template.partition("{{ .Response }}")
    return text + expand(before, System=system, Prompt=prompt)


SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = {"role": "user", "content": "What is 6 x 7?"}
SECOND = {"role": "user", "content": "And 6 x 8?"}


@pytest.mark.parametrize("kind", KNOWN)
def test_published_formats_are_recognised_by_name(kind):
    found = recognise(KNOWN[kind], BOS, EOS)
    assert found is not None
    chat_format, default = found
    assert chat_format.name == kind.split()[0]
    assert default == ("You are kind." if "default" in kind else "")


@pytest.mark.parametrize("kind", UNKNOWN)
def test_any_other_template_is_not_recognised(kind):
    assert recognise(UNKNOWN[kind], BOS, EOS) is None


def prompts_agree(jinja: str) -> bool | None:
    """Whether the Go template made for `jinja` prompts the model with the same text; None when there is none."""
    found = recognise(jinja, BOS, EOS)
    if found is None:
        return None
    chat_format, default = found
    lead = [{"role": "system", "content": default}] if default else []
    # Ollama has llama.cpp add BOS, so the Go template leaves it out.
    return all(
        as_ollama(chat_format.go_template(), [*given, FIRST])
        == render(jinja, [*sent, FIRST], prompt=True).removeprefix(BOS)
        for given, sent in ((lead, []), ([SYSTEM], [SYSTEM]))
    )


@pytest.mark.parametrize("kind", KNOWN)
def test_a_recognised_template_prompts_the_model_as_jinja_does(kind):
    assert prompts_agree(KNOWN[kind]) is True


def test_a_near_relative_of_a_format_is_left_to_ollama_unless_its_text_is_the_same():
    assert recognise(MISTRAL_WITH_SYSTEM, BOS, EOS) is None


def test_a_format_without_a_system_role_gets_a_template_without_one():
    found = recognise(MISTRAL_V01, BOS, EOS)
    assert found is not None
    chat_format, default = found
    assert (chat_format.name, default) == ("mistral-without-system", "")
    assert ".System" not in chat_format.go_template()
    assert chat_format.render([FIRST]) == BOS + "[INST] " + FIRST["content"] + " [/INST]"


@pytest.mark.parametrize("kind", KNOWN)
def test_an_exchange_in_the_past_reads_as_jinja_renders_it(kind):
    found = recognise(KNOWN[kind], BOS, EOS)
    assert found is not None
    chat_format, default = found
    system = {"role": "system", "content": default or "Be brief."}
    asked = render(KNOWN[kind], [system, FIRST], prompt=True)
    # The answer as the model generates it: whatever Jinja puts between the prompt and the end of the turn.
    answered = render(KNOWN[kind], [system, FIRST, {"role": "assistant", "content": "42"}], prompt=False)
    generated = answered[len(asked) : answered.index("42") + 2]
    past = [system, FIRST, {"role": "assistant", "content": generated}, SECOND]
    expected = render(KNOWN[kind], [system, FIRST, {"role": "assistant", "content": "42"}, SECOND], prompt=True)
    assert as_ollama(chat_format.go_template(), past) == expected.removeprefix(BOS)


def write_model(path: Path, template: str | None, tokens: Sequence[str] = (BOS, EOS, "a")) -> Path:
    writer = GGUFWriter(path, "testmoe")
    if template is not None:
        writer.add_chat_template(template)
    writer.add_token_list(list(tokens))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("x", gaussian(2, 2))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def instructions(text: str) -> dict[str, list[str]]:
    """Instructions of a Modelfile by name; triple quotes may span lines."""
    found: dict[str, list[str]] = {}
    for match in re.finditer(r'^([A-Z]+) (?:"""((?:.|\n)*?)"""|(.*))$', text, re.MULTILINE):
        found.setdefault(match[1], []).append(match[3] if match[2] is None else match[2])
    return found


@pytest.mark.parametrize("kind", KNOWN)
def test_the_modelfile_names_the_file_the_template_and_the_stops(tmp_path, kind):
    text, remark = render_modelfile(write_model(tmp_path / "my-model.gguf", KNOWN[kind]))
    found = instructions(text)
    chat_format, default = recognise(KNOWN[kind], BOS, EOS) or pytest.fail("not recognised")
    assert remark == ""
    assert found["FROM"] == ["./my-model.gguf"]
    assert found["TEMPLATE"] == [chat_format.go_template()]
    assert found.get("SYSTEM") == ([default] if default else None)
    stops = [json.loads(line.removeprefix("stop ")) for line in found["PARAMETER"]]
    assert len(stops) == len(set(stops))
    assert set(stops) == {*chat_format.stop, EOS}


@pytest.mark.parametrize(("template", "remark"), [(None, "no chat template"), ("hello", "does not know")])
def test_without_a_known_chat_template_ollama_is_left_to_choose(tmp_path, template, remark):
    text, said = render_modelfile(write_model(tmp_path / "m.gguf", template))
    assert text == "FROM ./m.gguf\n"
    assert remark in said


def test_an_odd_template_in_a_file_never_stops_the_modelfile(tmp_path):
    for i, template in enumerate(UNKNOWN.values()):
        if template:
            text, said = render_modelfile(write_model(tmp_path / f"{i}.gguf", template))
            assert "TEMPLATE" not in text
            assert said
