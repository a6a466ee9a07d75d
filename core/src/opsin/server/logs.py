"""Log lines: text for people, or an object a line for programs."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from typing import Any, Literal

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"asctime", "message", "color_message"}
"""What every record has; anything else was said with ``extra=``."""


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, what was said beside it, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: value for name, value in vars(record).items() if name not in _PLAIN}
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str, ensure_ascii=False)


def set_up(level: str, form: Literal["text", "json"]) -> None:
    """Send the log lines of this process to stderr, in a form."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
