"""Tool calls: what the request turns into, and what comes back."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.openai.tool_calls import (
    AutoReader,
    CallArguments,
    CallStart,
    Content,
    NamedReader,
    RequiredReader,
)
from gateway.openai.tool_constraint import MAX_FORCED_CALLS, calls_schema
from protocol.work import ChatPrompt, Constraint

NAMES = frozenset({"get_weather", "add"})

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"$ref": "#/$defs/Place"}},
            "required": ["place"],
            "$defs": {"Place": {"type": "string"}},
        },
    },
}
ADD = {"type": "function", "function": {"name": "add"}}

ROME = '{"name": "get_weather", "arguments": {"place": "Rome"}}'
ADDED = '{"name": "add", "arguments": {"a": [1, {"b": "}"}]}}'


def joined(pieces) -> tuple[str, list[tuple[str, str]]]:
    """(content, [(name, arguments)]), checking that the pieces come in order."""
    content = ""
    calls: list[list[str]] = []
    for piece in pieces:
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, CallStart):
            assert piece.index == len(calls)
            assert len(piece.id) == 9
            calls.append([piece.name, ""])
        else:
            assert isinstance(piece, CallArguments)
            assert piece.index == len(calls) - 1
            calls[piece.index][1] += piece.text
    return content, [(name, arguments) for name, arguments in calls]


def read(make, *texts: str):
    reader = make()
    pieces = [piece for text in texts for piece in reader.feed(text)] + reader.close()
    content, calls = joined(pieces)
    assert reader.calls == len(calls)
    return content, calls


def auto(*texts: str):
    return read(lambda: AutoReader(NAMES), *texts)


ROME_CALL = ("get_weather", '{"place":"Rome"}')
ADD_CALL = ("add", '{"a":[1,{"b":"}"}]}')

AUTO = [
    # content only
    ("Hello there.", "Hello there.", []),
    ("", "", []),
    ("  \n", "  \n", []),
    ("a < b and [TOOL", "a < b and [TOOL", []),
    ("\n indented", "\n indented", []),
    # Hermes, Qwen
    (f"<tool_call>\n{ROME}\n</tool_call>", "", [ROME_CALL]),
    (
        f"Let me look.\n<tool_call>{ROME}</tool_call>\n<tool_call>{ADDED}</tool_call>\n",
        "Let me look.",
        [ROME_CALL, ADD_CALL],
    ),
    (f"<tool_call>{ROME}</tool_call>\n\nDone.", "Done.", [ROME_CALL]),
    (f"<tool_call>{ROME}", "", [ROME_CALL]),  # the end tag was a stop token
    (f"<tool_call>{ROME}</tool_c", "", [ROME_CALL]),
    (
        '<tool_call>{"name": "get_weather", "arguments": "{\\"place\\": \\"Rome\\"}"}</tool_call>',
        "",
        [ROME_CALL],
    ),
    ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    # Llama 3
    ('{"name": "get_weather", "parameters": {"place": "Rome"}}', "", [ROME_CALL]),
    ('<|python_tag|>{"type": "function", "name": "add", "parameters": {}}', "", [("add", "{}")]),
    (f"{ROME}; {ADDED}", "", [ROME_CALL, ADD_CALL]),
    (f" {ROME}\n{ADDED}\n", "", [ROME_CALL, ADD_CALL]),
    # Mistral
    (f"[TOOL_CALLS] [{ROME}, {ADDED}]", "", [ROME_CALL, ADD_CALL]),
    (f"[TOOL_CALLS][{ROME}]", "", [ROME_CALL]),
    (f"[{ROME}]", "", [ROME_CALL]),
    ('[TOOL_CALLS]get_weather{"place": "Rome"}', "", [ROME_CALL]),
    ('[TOOL_CALLS]get_weather[ARGS]{"place": "Rome"}[TOOL_CALLS]add[ARGS]{}', "", [ROME_CALL, ("add", "{}")]),
    # what looks like a call and is none
    ('{"name": "unknown", "arguments": {}}', '{"name": "unknown", "arguments": {}}', []),
    ('{"answer": 42} is it', '{"answer": 42} is it', []),
    ("[1, 2] and more", "[1, 2] and more", []),
    ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    ("<tool_call>{'name': 'add'}</tool_call>", "<tool_call>{'name': 'add'}</tool_call>", []),
    (
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
        [],
    ),
    ("x [TOOL_CALLS] nothing of the sort", "x [TOOL_CALLS] nothing of the sort", []),
    ("[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ('<tool_call>{"name": "add", "argu', '<tool_call>{"name": "add", "argu', []),
    (f"[{ROME}, 1]", f"[{ROME}, 1]", []),
    ('{"name": "add", "arguments": {"x": "\\ud800"}}', '{"name": "add", "arguments": {"x": "\\ud800"}}', []),
    ("{" * 3000, "{" * 3000, []),
]


@pytest.mark.parametrize(("text", "content", "calls"), AUTO)
def test_auto(text, content, calls):
    assert auto(text) == (content, calls)
    assert auto(*text) == (content, calls)  # character by character


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", ROME, ADDED),
        *("{", "}", "[", "]", ",", ";", " ", "\n", '"', "\\", "<", "é", "text", "get_weather", "add"),
        *('{"name":', '"add"', '"arguments":', "{}", '{"name":"add","parameters":{}}', f"[{ROME}]"),
        '[{"name": "add", "arguments": ',
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=4), max_size=12).map("".join)
CUTS = st.lists(st.integers(0, 10_000), max_size=12)
READERS = {
    "auto": lambda: AutoReader(NAMES),
    "single": lambda: AutoReader(NAMES, parallel=False),
    "named": lambda: NamedReader("add"),
    "required": lambda: RequiredReader(NAMES),
}


@pytest.mark.parametrize("kind", READERS)
@settings(deadline=None)
@given(text=TEXTS, cuts=CUTS)
def test_any_split_gives_the_same(kind, text, cuts):
    whole = read(READERS[kind], text)
    assert read(READERS[kind], *pieces_of(text, cuts)) == whole
    for name, arguments in whole[1]:
        assert name in NAMES
        if kind in ("auto", "single"):
            assert isinstance(json.loads(arguments), dict)


@settings(deadline=None)
@given(text=TEXTS)
def test_text_without_calls_is_given_back_whole(text):
    content, calls = auto(text)
    if not calls:
        assert content == text


WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(WORDS, JSON, max_size=3)


@settings(deadline=None)
@given(
    calls=st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3),
    cuts=CUTS,
    ascii_only=st.booleans(),
)
def test_calls_of_all_families_survive(calls, cuts, ascii_only):
    def dump(value):
        return json.dumps(value, ensure_ascii=ascii_only)

    texts = {
        "hermes": "".join(
            f"<tool_call>\n{dump({'name': n, 'arguments': a})}\n</tool_call>\n" for n, a in calls
        ),
        "llama": "; ".join(dump({"name": n, "parameters": a}) for n, a in calls),
        "mistral": "[TOOL_CALLS] " + dump([{"name": n, "arguments": a} for n, a in calls]),
        "mistral-new": "".join(f"[TOOL_CALLS]{n}[ARGS]{dump(a)}" for n, a in calls),
    }
    for text in texts.values():
        content, found = auto(*pieces_of(text, cuts))
        assert content == ""
        assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    required = dump([{"name": n, "arguments": a} for n, a in calls])
    content, found = read(READERS["required"], *pieces_of(required, cuts))
    assert content == ""
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


def test_one_call_only_where_one_was_allowed():
    text = f"Sure. <tool_call>{ROME}</tool_call><tool_call>{ADDED}</tool_call> more"
    assert read(READERS["single"], text) == ("Sure.", [ROME_CALL])


def test_required_arguments_come_as_they_are_made():
    reader = RequiredReader(NAMES)
    assert reader.feed('[{"name":"add","argum') == []
    start, first = reader.feed('ents":{"a": "x')
    assert isinstance(start, CallStart)
    assert first == CallArguments(0, '{"a": "x')
    assert reader.feed('y"') == [CallArguments(0, 'y"')]
    assert reader.feed("}}]") == [CallArguments(0, "}")]
    assert reader.close() == []


# --- over HTTP --------------------------------------------------------------------------------------


def streamed(response) -> tuple[str, list[dict], str]:
    """(content, calls put together as a client does, finish reason)."""
    content, calls, finish = "", [], ""
    for event in response.text.split("\n\n"):
        if not event or event == "data: [DONE]":
            continue
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        content += choice["delta"].get("content") or ""
        finish = choice["finish_reason"] or finish
        for call in choice["delta"].get("tool_calls", ()):
            if call["index"] == len(calls):
                calls.append({"id": call["id"], "type": call["type"], "function": {**call["function"]}})
            else:
                calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return content, calls, finish


async def both_ways(gateway, **fields):
    response = await gateway.chat(stream=True, **fields)
    assert response.status_code == 200, response.text
    content, calls, finish = streamed(response)
    (choice,) = (await gateway.chat(**fields)).json()["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == finish
    assert (message["content"] or "") == content
    assert [c["function"] for c in message.get("tool_calls", [])] == [c["function"] for c in calls]
    return message, finish


async def test_model_decides(gateway, service, scripts):
    service.script = scripts.says("Let me see. <tool", "_call>", ROME[:20], ROME[20:], "</tool_call>")
    message, finish = await both_ways(gateway, tools=[WEATHER, ADD])
    assert message["content"] == "Let me see."
    assert finish == "tool_calls"
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"place":"Rome"}'}
    work = service.works[0]
    assert work.constraint is None
    assert isinstance(work.prompt, ChatPrompt)
    assert [tool.name for tool in work.prompt.tools] == ["get_weather", "add"]
    assert json.loads(work.prompt.tools[0].parameters) == WEATHER["function"]["parameters"]
    assert work.prompt.tools[1].parameters == "{}"


async def test_content_is_null_beside_a_call(gateway, service, scripts):
    service.script = scripts.says(f"<tool_call>{ROME}</tool_call>")
    message, _ = await both_ways(gateway, tools=[WEATHER], tool_choice="auto")
    assert message["content"] is None


async def test_no_call(gateway, service, scripts):
    service.script = scripts.says("It is", " sunny.  ")
    message, finish = await both_ways(gateway, tools=[WEATHER])
    assert (message["content"], finish) == ("It is sunny.  ", "stop")
    assert "tool_calls" not in message


async def test_none_hides_the_tools(gateway, service, scripts):
    service.script = scripts.says(f"<tool_call>{ROME}</tool_call>")
    message, finish = await both_ways(gateway, tools=[WEATHER], tool_choice="none")
    assert finish == "stop"
    assert message["content"].startswith("<tool_call>")
    assert service.works[0].prompt.tools == ()


async def test_named(gateway, service, scripts):
    service.script = scripts.says('{"pla', 'ce": "Rome"}')
    choice = {"type": "function", "function": {"name": "get_weather"}}
    message, finish = await both_ways(gateway, tools=[WEATHER, ADD], tool_choice=choice)
    assert finish == "tool_calls"
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"place": "Rome"}'}
    constraint = service.works[0].constraint
    assert constraint.kind == "json_schema"
    assert json.loads(constraint.source) == WEATHER["function"]["parameters"]
    choice["function"]["name"] = "add"
    await both_ways(gateway, tools=[WEATHER, ADD], tool_choice=choice)
    assert service.works[-1].constraint.kind == "json_object"


async def test_required(gateway, service, scripts):
    service.script = scripts.says("[", ROME, ", ", ADDED, "]")
    message, finish = await both_ways(gateway, tools=[WEATHER, ADD], tool_choice="required")
    assert finish == "tool_calls"
    assert [json.loads(c["function"]["arguments"]) for c in message["tool_calls"]] == [
        {"place": "Rome"},
        {"a": [1, {"b": "}"}]},
    ]
    schema = json.loads(service.works[0].constraint.source)
    assert schema["maxItems"] == MAX_FORCED_CALLS
    await both_ways(gateway, tools=[WEATHER, ADD], tool_choice="required", parallel_tool_calls=False)
    assert json.loads(service.works[-1].constraint.source)["maxItems"] == 1


async def test_cut_off_in_a_call(gateway, service, scripts):
    service.script = scripts.says('[{"name": "add", "arguments": {"a": ', finish="length")
    message, finish = await both_ways(gateway, tools=[ADD], tool_choice="required")
    assert finish == "length"
    assert message["tool_calls"][0]["function"]["arguments"] == '{"a": '


async def test_logprobs_beside_tool_calls(gateway, service, scripts):
    texts = ["<tool_call>", ROME, "</tool_call>"]
    service.script = scripts.says(*texts)
    response = await gateway.chat(stream=True, logprobs=True, tools=[WEATHER])
    entries = []
    for event in response.text.split("\n\n")[:-2]:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        entries += (choice["logprobs"] or {"content": []})["content"]
    assert [entry["token"] for entry in entries] == texts


def test_schema_of_forced_calls():
    schema = calls_schema(
        [
            (tool["function"]["name"], json.dumps(tool["function"].get("parameters", {})))
            for tool in (WEATHER, ADD)
        ],
        parallel=True,
    )
    first, second = schema["items"]["anyOf"]
    assert list(first["properties"]) == ["name", "arguments"]
    assert first["properties"]["name"] == {"const": "get_weather"}
    assert schema["$defs"]["tool_0"]["properties"]["place"] == {"$ref": "#/$defs/tool_0_Place"}
    assert schema["$defs"]["tool_0_Place"] == {"type": "string"}
    assert "$defs" not in schema["$defs"]["tool_0"]
    assert second["properties"]["arguments"] == {"$ref": "#/$defs/tool_1"}
    assert schema["$defs"]["tool_1"] == {"type": "object"}


def test_islands_make_a_grammar_of_it():
    from cargos.runtimes.llama.grammar import gbnf_source

    tools = [("get_weather", json.dumps(WEATHER["function"]["parameters"])), ("add", "{}")]
    source = json.dumps(calls_schema(tools, parallel=True))
    grammar = gbnf_source(Constraint("json_schema", source))
    for part in ("get_weather", "add", "place"):
        assert f'\\"{part}\\"' in grammar
    assert "tool-0-place ::= string" in grammar
