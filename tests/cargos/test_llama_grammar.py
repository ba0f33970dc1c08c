"""Constraints to GBNF: what is converted, what is refused before native code sees it."""

from __future__ import annotations

import json

import pytest

from cargos.runtimes.base import JobRefused
from cargos.runtimes.llama.grammar import gbnf_source
from protocol.work import Constraint


def schema(value: object) -> Constraint:
    return Constraint("json_schema", json.dumps(value))


def test_kinds():
    assert gbnf_source(Constraint("gbnf", 'root ::= "a"')) == 'root ::= "a"'
    assert "root" in gbnf_source(Constraint("json_object"))
    assert "root" in gbnf_source(schema({"type": "object", "properties": {"a": {"type": "integer"}}}))
    assert gbnf_source(schema({})) == gbnf_source(Constraint("json_object"))


def test_literals_with_backslashes_and_quotes_are_escaped():
    text = gbnf_source(schema({"enum": ['a\\b"c\n']}))
    # JSON text is "a\\b\"c\n" (with its quotes); GBNF escapes each backslash and quote of it again.
    assert r'"\"a\\\\b\\\"c\\n\""' in text


def test_strings_hold_no_control_characters():
    text = gbnf_source(schema({"type": "string"}))
    assert r'char ::= [^"\\\x7F\x00-\x1F]' in text


@pytest.mark.parametrize(
    "bad",
    [
        Constraint("gbnf", "  "),
        Constraint("gbnf", "root ::= \0"),
        Constraint("gbnf", "root ::= " + "(" * 2000 + '"a"' + ")" * 2000),
        Constraint("json_schema", "{"),
        Constraint("json_schema", "[]"),
        Constraint("json_schema", '"x"'),
        schema({"type": "array", "minItems": 10**9, "items": {"type": "string"}}),
        schema({"type": "string", "maxLength": 10**9}),
        schema({"type": "string", "pattern": "^(((a{999}){999}){999})$"}),
        schema({"type": "string", "pattern": "^a{99999999999999999999}$"}),
        schema({"type": "string", "pattern": "a"}),
        schema({"type": "no such type"}),
        schema({"$ref": "https://example.com/schema.json"}),
        schema({"$ref": "#/nowhere"}),
        schema({"properties": 5}),
        schema({"enum": 5}),
        Constraint("json_schema", '{"a":' * 900 + "1" + "}" * 900),
    ],
)
def test_what_can_not_be_used_is_refused_with_a_reason(bad: Constraint):
    with pytest.raises(JobRefused) as caught:
        gbnf_source(bad)
    assert caught.value.code == "invalid"
    assert caught.value.detail


def test_brackets_in_literals_and_classes_do_not_count_as_nesting():
    source = "root ::= " + '"(" [(] ' * 1500 + "# " + "(" * 2000
    assert gbnf_source(Constraint("gbnf", source)) == source
