"""What libraries write down of what they send."""

import logging
from collections.abc import Iterator

import pytest

from services.common import logs
from tests.common.backend import settings

TALKATIVE = (
    *("openai", "httpx", "httpcore", "httpx2", "httpcore2"),
    *("azure", "adlfs", "botocore", "aiobotocore", "s3fs", "fsspec"),
)


@pytest.fixture(autouse=True)
def loggers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Those of this process stay as they are."""
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    yield
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.NOTSET)


@pytest.mark.parametrize(("prompts", "level"), [("0", logging.WARNING), ("1", logging.NOTSET)])
def test_questions_are_written_down_only_where_that_is_allowed(prompts: str, level: int) -> None:
    logs.configure(settings(TDB_LOG_LEVEL="debug", TDB_LOG_PROMPTS=prompts))
    assert {logging.getLogger(name).level for name in TALKATIVE} == {level}
