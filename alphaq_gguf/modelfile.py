"""Ollama Modelfiles. A TEMPLATE is written only for a chat format proven to be the model's own.

Proven means: the model's Jinja chat template, rendered on sample conversations, gives exactly the
text that the format's pieces give. The Go template is then built from the same pieces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .gguf_file import Header, read_header

Message = dict[str, str]


@dataclass(frozen=True)
class ChatFormat:
    """A chat format as the text before and after each role's content; `answer` opens the model's turn.

    `system` is None for a format without a system role; `system_in_user` puts the system text, followed
    by `system[1]`, inside the first user turn. `{bos}` and `{eos}` stand for the model's own tokens.
    """

    name: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str
    stop: tuple[str, ...]
    start: str = ""
    system_in_user: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for `messages`, ready for the model's answer."""
        text, pending = self.start, ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role == "system" and self.system:
                if self.system_in_user:
                    pending = content + self.system[1]
                else:
                    text += self.system[0] + content + self.system[1]
            elif role == "user":
                text += self.user[0] + pending + content + self.user[1]
                pending = ""
            else:
                text += self.assistant[0] + content + self.assistant[1]
        return text + self.answer

    def go_template(self) -> str:
        """Ollama's TEMPLATE for one exchange: .System, .Prompt and .Response (it adds BOS itself)."""
        system = ""
        if self.system:
            system = "{{ if .System }}" + self.system[0] + "{{ .System }}" + self.system[1] + "{{ end }}"
        outside, inside = ("", system) if self.system_in_user else (system, "")
        user = "{{ if .Prompt }}" + self.user[0] + inside + "{{ .Prompt }}" + self.user[1] + "{{ end }}"
        return outside + user + self.answer + "{{ .Response }}" + self.assistant[1]


FORMATS = (
    ChatFormat(
        "chatml",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        answer="<|im_start|>assistant\n",
        stop=("<|im_start|>", "<|im_end|>"),
    ),
    ChatFormat(
        "llama3",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        answer="<|start_header_id|>assistant<|end_header_id|>\n\n",
        stop=("<|start_header_id|>", "<|eot_id|>"),
        start="{bos}",
    ),
    ChatFormat(
        "mistral",
        system=("", "\n\n"),
        user=(" [INST] ", " [/INST]"),
        assistant=(" ", "{eos}"),
        answer="",
        stop=("[INST]", "[/INST]"),
        start="{bos}",
        system_in_user=True,
    ),
    ChatFormat(
        "mistral-without-system",
        system=None,
        user=("[INST] ", " [/INST]"),
        assistant=("", "{eos}"),
        answer="",
        stop=("[INST]", "[/INST]"),
        start="{bos}",
    ),
    ChatFormat(
        "deepseek",
        system=("", "\n\n"),
        user=("User: ", "\n\n"),
        assistant=("Assistant: ", "{eos}"),
        answer="Assistant:",
        stop=("User:",),
        start="{bos}",
    ),
    ChatFormat(
        "tulu",
        system=("<|system|>\n", "\n"),
        user=("<|user|>\n", "\n"),
        assistant=("<|assistant|>\n", "{eos}\n"),
        answer="<|assistant|>\n",
        stop=("<|user|>", "<|assistant|>"),
        start="{bos}",
    ),
)

_USER = {"role": "user", "content": "How tall is K2?"}
_SYSTEM = {"role": "system", "content": "Answer in metres."}
_TURNS = [_USER, {"role": "assistant", "content": "8611"}, {"role": "user", "content": "And Everest?"}]


def recognise(template: str, bos: str, eos: str) -> tuple[ChatFormat, str] | None:
    """(format, system message the template adds by itself) whose text equals the template's, or None."""

    def rendered(messages: Sequence[Message]) -> str | None:
        return _render(template, messages, bos, eos)

    plain = rendered([_USER])
    for found in FORMATS:
        pieces = _fill(found, bos, eos)
        default = _default_system(pieces, plain)
        if default is None:
            continue
        lead = [{"role": "system", "content": default}] if default else []
        with_system = [_SYSTEM, _USER]
        expected = pieces.render(with_system) if pieces.system else None
        if rendered(_TURNS) == pieces.render([*lead, *_TURNS]) and rendered(with_system) == expected:
            return pieces, default
    return None


def _fill(found: ChatFormat, bos: str, eos: str) -> ChatFormat:
    before, after = found.assistant
    return replace(found, assistant=(before, after.replace("{eos}", eos)), start=found.start.replace("{bos}", bos))


def _default_system(pieces: ChatFormat, plain: str | None) -> str | None:
    """The system text in `plain`, a lone user turn: "" when there is none, None when it is another format."""
    if plain is None:
        return None
    if plain == pieces.render([_USER]):
        return ""
    if pieces.system is None:
        return None
    marker = "\0"
    before, _, after = pieces.render([{"role": "system", "content": marker}, _USER]).partition(marker)
    if plain.startswith(before) and plain.endswith(after) and len(plain) > len(before) + len(after):
        return plain[len(before) : len(plain) - len(after)]
    return None


def _render(template: str, messages: Sequence[Message], bos: str, eos: str) -> str | None:
    """The Jinja template on `messages`, None when it refuses them."""

    def refuse(message: str) -> str:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except Exception:  # a template is a program, and may fail in any way
        return None


def render_modelfile(gguf: Path) -> tuple[str, str]:
    """(Modelfile text for `gguf`, a remark when no TEMPLATE could be written)."""
    header = read_header(gguf)
    lines = [f"FROM ./{gguf.name}"]
    remark = ""
    template = header.get("tokenizer.chat_template")
    recognised = None
    if isinstance(template, str):
        recognised = recognise(template, _token(header, "bos"), _token(header, "eos"))
    if recognised:
        found, system = recognised
        lines.append(f'TEMPLATE """{found.go_template()}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
        stops = dict.fromkeys([*found.stop, *filter(None, [_token(header, "eos")])])
        lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    else:
        what = "a chat template of a format this tool does not know" if template else "no chat template"
        remark = f"The model has {what}: the Modelfile leaves TEMPLATE to Ollama"
    return "\n".join(lines) + "\n", remark


def _token(header: Header, kind: str) -> str:
    index = header.get(f"tokenizer.ggml.{kind}_token_id")
    tokens = header.get("tokenizer.ggml.tokens")
    return tokens[index] if tokens and index is not None and index < len(tokens) else ""
