"""What a consumer wants done: the body of a job, independent of who does it.

Whatever Island runs the same work with the same Cargo and the same tokens so far goes on in the same way:
the chat template is applied on the Island, sampling is a function of (logits, seed, token index), and
the text that token i releases depends only on tokens 0..i and the stop strings.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from protocol.limits import (
    MAX_CHAT_MESSAGES,
    MAX_CONSTRAINT_CHARS,
    MAX_CONTEXT_TOKENS,
    MAX_LOGIT_BIAS,
    MAX_OFFER_BYTES,
    MAX_STOP_CHARS,
    MAX_STOPS,
    MAX_TOOL_CALLS,
    MAX_TOOLS,
    MAX_TOP_LOGPROBS,
)

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Text = Annotated[str, Meta(max_length=MAX_OFFER_BYTES)]
_Name = Annotated[str, Meta(max_length=256)]


class Part(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=False):
    """Base of the nested values of a message. Frozen, compact, no cycle can arise."""


class ToolCall(Part, frozen=True, gc=False):
    """A call that the assistant made in an earlier turn; `arguments` is JSON text."""

    id: _Name
    name: _Name
    arguments: _Text


class ChatMessage(Part, frozen=True, gc=False):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text = ""
    name: _Name | None = None
    tool_calls: Annotated[tuple[ToolCall, ...], Meta(max_length=MAX_TOOL_CALLS)] = ()
    tool_call_id: _Name | None = None


class Tool(Part, frozen=True, gc=False):
    """A function that the model may call; `parameters` is a JSON schema as JSON text ('{}' if none)."""

    name: _Name
    description: _Text = ""
    parameters: Annotated[str, Meta(max_length=MAX_CONSTRAINT_CHARS)] = "{}"


class ChatPrompt(Part, frozen=True, gc=False, tag="chat"):
    """A conversation; the Island renders it with the Cargo's template.

    `date` (YYYY-MM-DD) stands for "today" in templates that ask for it, fixed at the first dispatch so that a
    resumed job renders the same prompt. `tool_choice` 'required' or a named tool becomes a constraint at
    the gateway; the template only learns which tools there are.
    """

    messages: Annotated[tuple[ChatMessage, ...], Meta(min_length=1, max_length=MAX_CHAT_MESSAGES)]
    tools: Annotated[tuple[Tool, ...], Meta(max_length=MAX_TOOLS)] = ()
    date: Annotated[str, Meta(max_length=10)] = "1970-01-01"


class TextPrompt(Part, frozen=True, gc=False, tag="text"):
    """Raw text (the completions endpoint). Special tokens in it are text, not control."""

    text: _Text


class TokenPrompt(Part, frozen=True, gc=False, tag="tokens"):
    tokens: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_CONTEXT_TOKENS)]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


class Sampling(Part, frozen=True, gc=False):
    """How the next token is drawn. `temperature` 0 is greedy. Neutral values switch a filter off.

    The order is llama.cpp's: logit bias, penalties, top_k, top_p, min_p, temperature, draw.
    """

    seed: Annotated[int, Meta(ge=0, lt=1 << 53)]
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1000)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repeat_penalty: Annotated[float, Meta(gt=0, le=2)] = 1.0
    logit_bias: Annotated[
        tuple[tuple[TokenId, Annotated[float, Meta(ge=-100, le=100)]], ...], Meta(max_length=MAX_LOGIT_BIAS)
    ] = ()


class Constraint(Part, frozen=True, gc=False):
    """The output must be of this form. `json_object`: any JSON object, `source` empty."""

    kind: Literal["json_object", "json_schema", "gbnf"]
    source: Annotated[str, Meta(max_length=MAX_CONSTRAINT_CHARS)] = ""


class Generation(Part, frozen=True, gc=False, tag="generation"):
    """Text generation.

    `max_tokens` None: up to the context length. `top_logprobs` None: no log-probabilities; 0: those of
    the chosen tokens only. `deterministic`: decoded alone, never batched with other sequences nor started
    from another's cached prefix, and on a resume stepped through the same computations, so that the
    whole equals the undisturbed run bit for bit on like machines.
    """

    prompt: Prompt
    sampling: Sampling
    max_tokens: Annotated[int, Meta(ge=1, le=MAX_CONTEXT_TOKENS)] | None = None
    stop: Annotated[
        tuple[Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)], ...], Meta(max_length=MAX_STOPS)
    ] = ()
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    constraint: Constraint | None = None
    deterministic: bool = False
    ignore_eos: bool = False


#: Later kinds of work (classification, image generation, layer shards) join this union.
Work: TypeAlias = Generation
