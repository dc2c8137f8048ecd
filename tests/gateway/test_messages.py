"""JSON to messages: each refusal names its field in proto names; nothing passes silently."""

import json
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from tdb.inference.v1 import attribute_pb2, model_pb2, run_pb2

from gateway import messages
from services.common.errors import InvalidArgument

WHOLE = {
    "model": "m",
    "run": {
        "prompt": {"text": "a b é"},
        "interventions": [
            {"target": "head.2.3~13", "zero": {}},
            {
                "target": "head.0.1",
                "set": {"value": 0.5},
                "positions": {"list": {"positions": [1]}},
            },
            {
                "target": "head.0.2",
                "set": {
                    "vector": {"dataType": "DATA_TYPE_FLOAT32", "shape": ["1"], "data": "AACA"}
                },
            },
        ],
    },
    "objective": {"logitDiff": {"targets": [{"text": " Mary"}], "distractors": [{"id": 5}]}},
    "topK": 50,
    "norm_mode": "NORM_MODE_LIVE",
    "rankBy": 4,
    "verify": False,
}


def parse(tree: Any, kind: type[Message] = attribute_pb2.AttributeRequest) -> Message:
    body = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return messages.parse(body, kind)


def refusal(tree: Any, kind: type[Message] = attribute_pb2.AttributeRequest) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        parse(tree, kind)
    return caught.value


def test_a_whole_request_reads_as_protobuf_reads_it() -> None:
    expected = json_format.Parse(json.dumps(WHOLE), attribute_pb2.AttributeRequest())
    assert parse(WHOLE) == expected
    assert parse(expected_text(expected)) == expected


def expected_text(message: Message) -> bytes:
    return json_format.MessageToJson(message).encode()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is not JSON"),
        (b"{", "the body is not JSON"),
        (b'{"topK": 1} x', "the body is not JSON"),
        (b"\xff\xfe{}", "the body is not"),
        (b'{"model": "\xff"}', "the body is not UTF-8"),
        (b"[]", "the body must be an object, not a list"),
        (b"null", "the body must be an object, not null"),
        (b'{"topK": NaN}', "NaN is not a JSON number"),
        (b'{"topK": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"run":' * 50_000, "the JSON is nested too deeply"),
    ],
)
def test_a_body_that_is_no_json_object(body: bytes, says: str) -> None:
    error = refusal(body)
    assert says in error.message
    assert error.field == ""


@pytest.mark.parametrize(
    ("tree", "field", "says"),
    [
        ({"bogus": 1}, "bogus", "tdb.inference.v1.AttributeRequest has no field 'bogus'"),
        ({"run": {"promt": {}}}, "run.promt", "has no field 'promt'"),
        ({"run": 5}, "run", "must be an object, not 5"),
        ({"run": {"interventions": {}}}, "run.interventions", "must be a list, not an object"),
        ({"run": {"interventions": [3]}}, "run.interventions[0]", "must be an object, not 3"),
        ({"run": {"interventions": [None]}}, "run.interventions[0]", "not null"),
        (
            {"run": {"interventions": [{}, {"zero": {"at": 1}}]}},
            "run.interventions[1].zero.at",
            "has no field 'at'",
        ),
        ({"model": 5}, "model", "must be a string, not 5"),
        ({"model": "\ud800"}, "model", "half a surrogate pair"),
        ({"topK": "ten"}, "top_k", "must be a whole number, not a string"),
        ({"topK": 1.5}, "top_k", "must be a whole number, not 1.5"),
        ({"topK": True}, "top_k", "must be a whole number, not a boolean"),
        ({"topK": 2**31}, "top_k", "must be a whole number from -2147483648 to 2147483647"),
        ({"verify": "yes"}, "verify", "must be true or false, not a string"),
        ({"verify": 1}, "verify", "must be true or false, not 1"),
        ({"normMode": "LIVE"}, "norm_mode", "must be one of NORM_MODE_UNSPECIFIED, NORM_MODE_FI"),
        ({"normMode": 99}, "norm_mode", "is 99, which tdb.inference.v1.NormMode does not define"),
        ({"normMode": 2**31}, "norm_mode", "must be a whole number from"),
        ({"normMode": True}, "norm_mode", "must be one of"),
        ({"normMode": []}, "norm_mode", "must be one of"),
        ({"topK": 1, "top_k": 2}, "top_k", "top_k is given twice"),
    ],
)
def test_what_does_not_fit_is_named(tree: Any, field: str, says: str) -> None:
    error = refusal(tree)
    assert error.field == field
    assert says in error.message


def of_value(value: Any) -> dict[str, Any]:
    return {"run": {"interventions": [{"target": "head.0.0", "set": {"value": value}}]}}


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", 10**400])
def test_non_finite_numbers_are_refused_in_any_spelling(value: Any) -> None:
    error = refusal(of_value(value))
    assert error.field == "run.interventions[0].set.value"
    assert error.reason == "NON_FINITE"


def test_a_literal_beyond_double_is_refused() -> None:
    body = json.dumps(of_value(12345)).replace("12345", "1e999").encode()
    assert refusal(body).field == "run.interventions[0].set.value"
    assert parse(body.replace(b"1e999", b"1e99"))  # the control


@pytest.mark.parametrize("value", ["x", True, [], {}])
def test_a_number_must_be_one(value: Any) -> None:
    assert refusal(of_value(value)).field == "run.interventions[0].set.value"


def test_a_key_twice_is_refused_with_its_path() -> None:
    error = refusal(b'{"run": {"prompt": {"text": "a", "text": "b"}}}')
    assert (error.field, error.reason) == ("run.prompt.text", "REPEATED_KEY")


def test_two_branches_of_a_oneof_are_refused() -> None:
    error = refusal({"run": {"prompt": {"text": "a", "tokenIds": {"ids": [1]}}}})
    assert error.field == "run.prompt.token_ids"
    assert "run.prompt.text exclude each other" in error.message
    # null is absent: then there is only one.
    assert parse({"run": {"prompt": {"text": "a", "tokenIds": None}}})


def test_bytes_must_be_base64() -> None:
    def vector(data: Any) -> Any:
        return {"run": {"interventions": [{"set": {"vector": {"data": data}}}]}}

    for good in ("", "AACAPw==", "AACAPw", "__-_"):
        assert parse(vector(good))
    for bad in ("A", "a b", "é", "====", 5):
        assert refusal(vector(bad)).field == "run.interventions[0].set.vector.data"


def test_zeros_are_written_and_absent_optionals_are_not() -> None:
    answer = run_pb2.RunResponse()
    answer.next_tokens.add().top.add(logit=0.0)
    answer.receipts.add(applied=0)
    tree = json.loads(messages.write(answer))
    assert tree["nextTokens"][0]["position"] == 0
    assert tree["nextTokens"][0]["top"][0]["logit"] == 0
    assert tree["receipts"][0]["applied"] == 0
    assert "before" not in tree["receipts"][0]


def test_an_empty_request_is_an_empty_object() -> None:
    assert parse(b"{}", model_pb2.ListModelsRequest) == model_pb2.ListModelsRequest()
