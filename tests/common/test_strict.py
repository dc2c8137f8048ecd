"""What no request may hold, wherever in it."""

from collections.abc import Callable

import pytest
from google.protobuf.message import Message
from tdb.inference.v1 import attribute_pb2, intervention_pb2, run_pb2

from services.common import strict
from services.common.errors import InvalidArgument


def whole_request() -> attribute_pb2.AttributeRequest:
    """A request with nothing wrong in it: the control of every test here."""
    request = attribute_pb2.AttributeRequest(model="m", top_k=5)
    request.norm_mode = attribute_pb2.NORM_MODE_LIVE
    request.run.prompt.text = "a b"
    request.run.interventions.add(target="head.0.1").zero.SetInParent()
    request.run.interventions.add(target="head.0.2").set.value = 0.5
    request.objective.logit_diff.targets.add(text=" Mary")
    return request


def refusal(message: Message) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        strict.check(message)
    return caught.value


def test_an_ordinary_request_passes() -> None:
    strict.check(whole_request())
    strict.check(attribute_pb2.AttributeRequest())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_must_be_finite(value: float) -> None:
    request = whole_request()
    request.run.interventions[1].set.value = value
    error = refusal(request)
    assert error.field == "run.interventions[1].set.value"
    assert error.reason == "NON_FINITE"
    assert str(value) in error.message


def test_enum_numbers_must_have_a_name() -> None:
    request = whole_request()
    request.norm_mode = 99  # type: ignore[assignment]
    error = refusal(request)
    assert (error.field, error.reason) == ("norm_mode", "UNKNOWN_ENUM_VALUE")
    assert "tdb.inference.v1.NormMode" in error.message


def test_fields_must_be_known_at_every_depth() -> None:
    unknown = b"\xa0\x3f\x01"  # field 1012, a varint
    parts: dict[str, Callable[[attribute_pb2.AttributeRequest], Message]] = {
        "": lambda request: request,
        "run": lambda request: request.run,
        "run.interventions[1]": lambda request: request.run.interventions[1],
        "run.interventions[0].zero": lambda request: request.run.interventions[0].zero,
    }
    for path, part in parts.items():
        request = whole_request()
        part(request).MergeFromString(unknown)
        error = refusal(request)
        assert (error.field, error.reason) == (path, "UNKNOWN_FIELD")
        assert "1012" in error.message


def test_paths_of_repeated_messages_inside_other_messages() -> None:
    request = run_pb2.RunRequest()
    intervention = intervention_pb2.Intervention(target="head.0.0")
    intervention.patch.source.interventions.add().scale.factor = float("inf")
    request.run.interventions.append(intervention)
    assert refusal(request).field == (
        "run.interventions[0].patch.source.interventions[0].scale.factor"
    )


def test_more_messages_than_can_be_answered_are_refused_without_looking_at_each() -> None:
    request = attribute_pb2.AttributeRequest()
    patch = request.run.interventions.add().patch  # request, run, intervention and patch: 4
    for _ in range(strict.MAX_MESSAGES - 4):
        patch.alignment.add()
    strict.check(request)
    patch.alignment.add()
    with pytest.raises(InvalidArgument, match="more than 250,000 messages"):
        strict.check(request)
