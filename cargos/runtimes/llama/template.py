"""Conversations to prompt text, by the model's own Jinja template.

The conversation is hostile: what a message holds must stay text. Where it spells a control token of the
vocabulary (`<|im_end|>` and its like), a mark is put inside that spelling before rendering, and the rendered
prompt is tokenised in pieces between the marks, so that no message can open or close a turn.

The template comes with the Cargo, which its publisher answers for; it still runs in Jinja's sandbox, with
its output and its running time bounded.
"""

from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn, cast

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cargos.runtimes.base import JobRefused
from protocol.codec import excerpt
from protocol.work import ChatMessage, ChatPrompt, Tool

#: A rendering takes under a millisecond per kilobyte of conversation; longer is a runaway template.
_RENDER_LIMIT_S: Final = 5.0

#: Values that a template may make by repetition (`"=" * 80`); real ones draw lines, not pages.
_MAX_REPEAT: Final = 10_000

#: Separates a control token's spelling into harmless parts: a Unicode noncharacter, never in real text.
MARK: Final = "\ufdd0"

#: For models that bring no template: ChatML, the most common one.
CHATML: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class TemplateFailed(Exception):
    """The template itself is no valid Jinja: the Cargo is at fault, not the consumer."""


class _Refusal(Exception):
    """The template's own `raise_exception`: it can not express this conversation."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:  # noqa: ANN401  (Jinja's own signature)
        sizes = [len(cast("str", x)) for x in (left, right) if isinstance(x, str | list | tuple)]
        counts = [abs(x) for x in (left, right) if isinstance(x, int)]
        if operator == "**" and max(counts, default=0) > 64:
            raise jinja2.TemplateRuntimeError("too large a power")
        if sizes and counts and max(sizes) * max(counts) > _MAX_REPEAT:
            raise jinja2.TemplateRuntimeError("too long a repetition")
        return super().call_binop(context, operator, left, right)


def _raise(message: object) -> NoReturn:
    raise _Refusal(str(message))


def _to_json(value: object, indent: int | None = None, **_: object) -> str:
    # Jinja's own filter escapes for HTML; models were trained on plain JSON.
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """One model's template. Raises TemplateFailed if `source` does not compile.

    `control_texts`: spellings of the vocabulary's control tokens.
    """

    def __init__(self, source: str, *, bos: str = "", eos: str = "", control_texts: Sequence[str] = ()) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"]
        )
        environment.filters["tojson"] = _to_json
        cast("dict[str, object]", environment.globals)["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise TemplateFailed(f"the chat template does not compile: {error}") from error
        self._knows_developer = "developer" in source
        self._specials = {"bos_token": bos, "eos_token": eos}
        spellings = sorted((re.escape(t) for t in control_texts if len(t) > 1), key=len, reverse=True)
        self._control = re.compile(f"(?=(?:{'|'.join(spellings)}))") if spellings else None

    def render(self, prompt: ChatPrompt, max_chars: int) -> list[str]:
        """The prompt's text in parts that are to be tokenised one by one, control tokens included.

        Raises JobRefused: 'too-long' beyond `max_chars`, 'invalid' if the template can not express it.
        """
        today = _date(prompt.date)
        context = {
            "messages": [self._message(message) for message in prompt.messages],
            "tools": [self._tool(tool) for tool in prompt.tools] or None,
            "add_generation_prompt": True,
            "strftime_now": today.strftime,
            **self._specials,
        }
        return [part for part in self._run(context, max_chars).split(MARK) if part]

    def _run(self, context: Mapping[str, object], max_chars: int) -> str:
        parts: list[str] = []
        size = 0
        deadline = time.monotonic() + _RENDER_LIMIT_S
        try:
            for part in self._template.generate(context):
                parts.append(part)
                size += len(part)
                if size > max_chars:
                    raise JobRefused(
                        "too-long", f"the conversation renders to more than {max_chars} characters"
                    )
                if time.monotonic() > deadline:
                    raise JobRefused("invalid", "the chat template takes too long on this conversation")
        except _Refusal as refusal:
            raise JobRefused("invalid", f"the model's chat template says: {excerpt(str(refusal))}") from refusal
        except jinja2.TemplateError as error:
            detail = f"the model's chat template fails on this conversation: {excerpt(str(error))}"
            raise JobRefused("invalid", detail) from error
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # Python expressions inside the template, on values of the consumer's choosing.
            detail = f"the model's chat template fails on this conversation: {excerpt(repr(error))}"
            raise JobRefused("invalid", detail) from error
        return "".join(parts)

    def _message(self, message: ChatMessage) -> dict[str, object]:
        role = message.role
        if role == "developer" and not self._knows_developer:
            role = "system"
        known: dict[str, object] = {"role": role, "content": self._plain(message.content)}
        if message.name is not None:
            known["name"] = self._plain(message.name)
        if message.tool_call_id is not None:
            known["tool_call_id"] = self._plain(message.tool_call_id)
        if message.tool_calls:
            known["tool_calls"] = [
                {
                    "id": self._plain(call.id),
                    "type": "function",
                    "function": {
                        "name": self._plain(call.name),
                        "arguments": self._defused(_arguments(call.arguments)),
                    },
                }
                for call in message.tool_calls
            ]
        return known

    def _tool(self, tool: Tool) -> dict[str, object]:
        try:
            parameters: object = json.loads(tool.parameters)
        except (ValueError, RecursionError) as error:
            raise JobRefused("invalid", f"the parameters of tool {excerpt(tool.name)} are not JSON") from error
        return {
            "type": "function",
            "function": {
                "name": self._plain(tool.name),
                "description": self._plain(tool.description),
                "parameters": self._defused(parameters),
            },
        }

    def _plain(self, text: str) -> str:
        text = text.replace(MARK, "\N{REPLACEMENT CHARACTER}")
        if self._control is None:
            return text
        borders = [0, *(match.start() + 1 for match in self._control.finditer(text)), len(text)]
        return MARK.join(text[a:b] for a, b in itertools.pairwise(borders))

    def _defused(self, value: object) -> object:
        """JSON value with all its strings made plain. No deeper than json.loads went."""
        walk: Callable[[object], object] = self._defused
        if isinstance(value, str):
            return self._plain(value)
        if isinstance(value, list):
            return [walk(item) for item in cast("list[object]", value)]
        if isinstance(value, dict):
            return {self._plain(str(k)): walk(v) for k, v in cast("dict[object, object]", value).items()}
        return value


def _arguments(text: str) -> object:
    """A call's arguments as the object that templates expect; as text where they are not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _date(text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d")  # noqa: DTZ007  (a calendar day has no zone)
    except ValueError as error:
        raise JobRefused("invalid", "the prompt's date is not of the form YYYY-MM-DD") from error
