"""A decoded request as jobs: one `Generation` per choice, and how their output is to be shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import msgspec

from gateway.openai.errors import invalid, unsupported
from gateway.openai.requests import (
    MAX_CHOICES,
    ChatMessageIn,
    ChatRequest,
    CompletionRequest,
    FormatJsonObject,
    FormatJsonSchema,
    NamedTool,
    RefusalPart,
    SamplingFields,
    TextPart,
)
from gateway.openai.tool_constraint import calls_schema, foreign_reference
from gateway.service import ModelInfo
from protocol.dice import draw_u64
from protocol.instants import seconds_to_ns
from protocol.limits import MAX_CONSTRAINT_CHARS
from protocol.work import (
    ChatMessage,
    ChatPrompt,
    Constraint,
    Generation,
    Prompt,
    Sampling,
    TextPrompt,
    TokenPrompt,
    Tool,
    ToolCall,
)

#: Seeds travel as integers below 2**53 (exact in every JSON and MessagePack implementation).
SEED_MASK: Final = (1 << 53) - 1

#: OpenAI's default in the legacy endpoint.
LEGACY_MAX_TOKENS: Final = 16


@dataclass(frozen=True, slots=True)
class ToolMode:
    """How tool calls come out of the text.

    'auto': the model's own format, among text. 'named': the whole text is the arguments of `name`. 'required':
    the whole text is a JSON array of calls. `parallel`: more than one call may be made.
    """

    kind: Literal["auto", "named", "required"]
    names: frozenset[str]
    name: str = ""
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run and how to answer. `prefixes`: text that `echo` puts before each choice."""

    model: ModelInfo
    works: tuple[Generation, ...]
    deadline_ns: int | None
    stream: bool
    include_usage: bool
    prompt_param: str
    logprobs: bool
    n: int = 1
    tools: ToolMode | None = None
    prefixes: tuple[str, ...] = field(default=())


def plan_chat(request: ChatRequest, model: ModelInfo, *, seed: int, date: str) -> Plan:
    """Raises ApiError (400). `seed` is used if the request has none; `date` is today's, YYYY-MM-DD."""
    _refuse_common(request)
    if request.modalities is not None and any(kind != "text" for kind in request.modalities):
        raise unsupported("modalities", "Only the text modality is supported.")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs' to be true.")
    tools = _tools(request)
    mode = _tool_mode(request, tools)
    prompt = ChatPrompt(
        messages=tuple(_message(message, i) for i, message in enumerate(request.messages)),
        tools=tools if mode is not None else (),
        date=date,
    )
    max_tokens = request.max_completion_tokens
    if max_tokens is None:
        max_tokens = request.max_tokens
    works = _works(
        request,
        [prompt],
        max_tokens=max_tokens,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        constraint=_constraint(request, tools, mode),
        seed=seed,
    )
    return Plan(
        model=model,
        works=works,
        deadline_ns=_deadline_ns(request),
        stream=bool(request.stream),
        include_usage=_include_usage(request),
        prompt_param="messages",
        logprobs=bool(request.logprobs),
        n=request.n or 1,
        tools=mode,
    )


def plan_completion(request: CompletionRequest, model: ModelInfo, *, seed: int) -> Plan:
    """Raises ApiError (400). Choices of the first prompt come first."""
    _refuse_common(request)
    if request.suffix:
        raise unsupported("suffix", "'suffix' (fill in the middle) is not supported.")
    n = request.n or 1
    if request.best_of is not None and request.best_of != n:
        raise unsupported("best_of", f"'best_of' must equal 'n' ({n}) or be left out.")
    prompts = _prompts(request)
    if len(prompts) * n > MAX_CHOICES:
        raise invalid("prompt", f"At most {MAX_CHOICES} choices a request (prompts times 'n').")
    echo = bool(request.echo)
    if echo and request.logprobs is not None:
        raise unsupported("echo", "'echo' with 'logprobs' (log-probabilities of the prompt) is not supported.")
    prefixes: list[str] = []
    for prompt in prompts:
        if echo and not isinstance(prompt, TextPrompt):
            raise unsupported("echo", "'echo' is supported for prompts given as text, not as tokens.")
        prefixes += [prompt.text if echo and isinstance(prompt, TextPrompt) else ""] * n
    constraint = Constraint("gbnf", request.grammar) if request.grammar is not None else None
    works = _works(
        request,
        prompts,
        max_tokens=request.max_tokens or LEGACY_MAX_TOKENS,
        top_logprobs=request.logprobs,
        constraint=constraint,
        seed=seed,
    )
    return Plan(
        model=model,
        works=works,
        deadline_ns=_deadline_ns(request),
        stream=bool(request.stream),
        include_usage=_include_usage(request),
        prompt_param="prompt",
        logprobs=request.logprobs is not None,
        n=n,
        prefixes=tuple(prefixes),
    )


def choice_seed(seed: int, index: int) -> int:
    """Seed of choice `index`: the request's own for the first, so that n = 1 gives the same answer."""
    return (seed if index == 0 else draw_u64(seed, 0, index)) & SEED_MASK


def _refuse_common(request: SamplingFields) -> None:
    refused = (
        ("functions", request.functions, "'functions' is deprecated and not supported; use 'tools'."),
        ("function_call", request.function_call, "'function_call' is deprecated; use 'tool_choice'."),
        ("audio", request.audio, "Audio output is not supported."),
        ("web_search_options", request.web_search_options, "Web search is not supported."),
    )
    for name, value, message in refused:
        if value is not None and bytes(value) != b"null":
            raise unsupported(name, message)
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "'stream_options' is only allowed when 'stream' is true.")


def _works(
    request: SamplingFields,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int | None,
    top_logprobs: int | None,
    constraint: Constraint | None,
    seed: int,
) -> tuple[Generation, ...]:
    if request.seed is not None:
        seed = request.seed
    stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    bias = tuple(sorted((request.logit_bias or {}).items()))

    def work(prompt: Prompt, index: int) -> Generation:
        sampling = Sampling(
            seed=choice_seed(seed, index),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=request.top_k or 0,
            min_p=request.min_p or 0.0,
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            repeat_penalty=1.0 if request.repeat_penalty is None else request.repeat_penalty,
            logit_bias=bias,
        )
        return Generation(
            prompt=prompt,
            sampling=sampling,
            max_tokens=max_tokens,
            stop=stop,
            top_logprobs=top_logprobs,
            constraint=constraint,
            deterministic=request.deterministic,
            ignore_eos=request.ignore_eos,
        )

    n = request.n or 1
    return tuple(work(prompt, p * n + i) for p, prompt in enumerate(prompts) for i in range(n))


def _include_usage(request: SamplingFields) -> bool:
    return request.stream_options is not None and bool(request.stream_options.include_usage)


def _deadline_ns(request: SamplingFields) -> int | None:
    return None if request.timeout_s is None else max(1, seconds_to_ns(request.timeout_s))


# --- messages -----------------------------------------------------------------------------------


def _message(message: ChatMessageIn, index: int) -> ChatMessage:
    where = f"messages[{index}]"
    content = _content(message, where)
    calls: tuple[ToolCall, ...] = ()
    if message.role == "assistant" and message.tool_calls:
        calls = tuple(
            ToolCall(
                id=call.id,
                name=call.function.name,
                arguments=_arguments(call.function.arguments, f"{where}.tool_calls[{i}].function.arguments"),
            )
            for i, call in enumerate(message.tool_calls)
        )
    elif message.tool_calls:
        raise invalid(f"{where}.tool_calls", "Only messages of the assistant have tool calls.")
    if message.role == "tool" and not message.tool_call_id:
        raise invalid(
            f"{where}.tool_call_id",
            f"Missing required parameter: '{where}.tool_call_id'.",
            code="missing_required_parameter",
        )
    if message.content is None and message.role != "assistant":
        raise invalid(
            f"{where}.content",
            f"Missing required parameter: '{where}.content'.",
            code="missing_required_parameter",
        )
    return ChatMessage(
        role=message.role,
        content=content,
        name=message.name,
        tool_calls=calls,
        tool_call_id=message.tool_call_id if message.role == "tool" else None,
    )


def _content(message: ChatMessageIn, where: str) -> str:
    if message.content is None:
        return ""
    if isinstance(message.content, str):
        return message.content
    texts: list[str] = []
    for i, part in enumerate(message.content):
        if isinstance(part, TextPart):
            texts.append(part.text)
        elif isinstance(part, RefusalPart):
            texts.append(part.refusal)
        else:
            kind = part.__struct_config__.tag
            raise unsupported(
                f"{where}.content[{i}]", f"Content of type '{kind}' is not supported, only text is."
            )
    return "\n".join(texts)


def _arguments(text: str, where: str) -> str:
    if not text.strip():
        return "{}"
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise invalid(where, f"'{where}' is not valid JSON.") from None
    return text


def _prompts(request: CompletionRequest) -> list[Prompt]:
    """The four forms: text, list of texts, tokens, list of token lists."""
    prompt = request.prompt
    if prompt is None:
        raise invalid("prompt", "Missing required parameter: 'prompt'.", code="missing_required_parameter")
    if isinstance(prompt, str):
        return [TextPrompt(prompt)]
    if not prompt:
        raise invalid("prompt", "'prompt' must not be an empty list.")
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1:
        raise invalid("prompt", "'prompt' is text, a list of texts, of token ids, or of lists of token ids.")
    if kinds == {int}:
        return [TokenPrompt(tuple(item for item in prompt if isinstance(item, int)))]
    prompts: list[Prompt] = []
    for i, item in enumerate(prompt):
        if isinstance(item, str):
            prompts.append(TextPrompt(item))
        elif isinstance(item, list):
            if not item:
                raise invalid(f"prompt[{i}]", f"'prompt[{i}]' must not be an empty list.")
            prompts.append(TokenPrompt(tuple(item)))
    return prompts


# --- tools and constraints ----------------------------------------------------------------------


def encode_schema(schema: object, where: str) -> str:
    """A JSON schema as text within the protocol's bound, or ApiError."""
    try:
        text = msgspec.json.encode(schema).decode()
        foreign = foreign_reference(schema)
    except RecursionError:
        raise invalid(where, f"'{where}' is nested too deeply.") from None
    if foreign is not None:
        raise invalid(where, f"'$ref' must point into the schema itself (#/...), not to '{foreign[:100]}'.")
    if len(text) > MAX_CONSTRAINT_CHARS:
        raise invalid(where, f"'{where}' exceeds {MAX_CONSTRAINT_CHARS} characters.")
    return text


def _tools(request: ChatRequest) -> tuple[Tool, ...]:
    tools: list[Tool] = []
    names: set[str] = set()
    for i, tool in enumerate(request.tools or ()):
        spec = tool.function
        if spec.name in names:
            raise invalid(f"tools[{i}].function.name", f"There are two tools named '{spec.name}'.")
        names.add(spec.name)
        parameters = encode_schema(spec.parameters or {}, f"tools[{i}].function.parameters")
        tools.append(Tool(name=spec.name, description=spec.description or "", parameters=parameters))
    return tuple(tools)


def _tool_mode(request: ChatRequest, tools: tuple[Tool, ...]) -> ToolMode | None:
    choice = request.tool_choice
    if choice == "none" or (choice is None and not tools):
        return None
    if not tools:
        raise invalid("tool_choice", "'tool_choice' is only allowed when 'tools' are given.")
    names = frozenset(tool.name for tool in tools)
    parallel = request.parallel_tool_calls is not False
    if isinstance(choice, NamedTool):
        name = choice.function.name
        if name not in names:
            raise invalid("tool_choice.function.name", f"There is no tool named '{name[:64]}' in 'tools'.")
        return ToolMode("named", names, name, parallel=False)
    return ToolMode("required" if choice == "required" else "auto", names, parallel=parallel)


def _constraint(request: ChatRequest, tools: tuple[Tool, ...], mode: ToolMode | None) -> Constraint | None:
    """At most one of grammar, response_format and a forced tool call can hold: each fixes the whole text."""
    response_format = request.response_format
    wanted = isinstance(response_format, FormatJsonObject | FormatJsonSchema)
    if request.grammar is not None:
        if wanted or mode is not None:
            raise invalid("grammar", "'grammar' can not be combined with 'response_format' or 'tools'.")
        return Constraint("gbnf", request.grammar)
    if wanted and mode is not None:
        raise invalid(
            "response_format",
            "A JSON 'response_format' can not be combined with 'tools': it would forbid the calls. "
            "Set 'tool_choice' to 'none' for a request that should answer in JSON.",
        )
    if isinstance(response_format, FormatJsonObject):
        return Constraint("json_object")
    if isinstance(response_format, FormatJsonSchema):
        schema = encode_schema(response_format.json_schema.schema, "response_format.json_schema.schema")
        return Constraint("json_schema", schema)
    if mode is None or mode.kind == "auto":
        return None
    if mode.kind == "named":
        source = next(tool.parameters for tool in tools if tool.name == mode.name)
        return Constraint("json_object") if source == "{}" else Constraint("json_schema", source)
    specs = [(tool.name, tool.parameters) for tool in tools]
    return Constraint("json_schema", encode_schema(calls_schema(specs, parallel=mode.parallel), "tools"))
