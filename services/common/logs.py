"""JSON lines on stderr. Standard output is kept for what other programs read.

Fields beside the message come through `extra={"fields": {...}}`. The text of an exception may
quote a prompt, so it is written only where TDB_LOG_PROMPTS allows it; its type and the places it
passed through always are.
"""

import json
import logging
import sys
import time
import traceback

from services.common.settings import Settings


class JsonLines(logging.Formatter):
    def __init__(self, *, log_prompts: bool) -> None:
        super().__init__()
        self.log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = self._describe(record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)

    def _describe(self, error: BaseException) -> dict[str, object]:
        frames = traceback.extract_tb(error.__traceback__)
        described: dict[str, object] = {
            "type": type(error).__qualname__,
            "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
        }
        if self.log_prompts:
            described["text"] = str(error)
        if (cause := error.__cause__ or error.__context__) is not None:
            described["cause"] = self._describe(cause)
        return described


def _is_news(record: logging.LogRecord) -> bool:
    """gRPC writes an error for every reader of a stream that left while a message was written."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


_TALKATIVE = (
    *("openai", "httpx", "httpcore", "httpx2", "httpcore2"),
    *("azure", "adlfs", "botocore", "aiobotocore", "s3fs", "fsspec"),
)


def configure(settings: Settings) -> None:
    """Sends all logging of this process to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(log_prompts=settings.log_prompts))
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
    if not settings.log_prompts:
        # At debug level they write down what they send, and at info a line for each of many calls.
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler], force=True)
