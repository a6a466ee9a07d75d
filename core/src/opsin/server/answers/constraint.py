"""``response_format``, ``structured_outputs`` and ``guided_*`` -> one `StructuredOutput`."""

from __future__ import annotations

from typing import Any

from opsin.config import StructuredOutput
from opsin.errors import ConfigError
from opsin.server.http.errors import bad_request
from opsin.server.schema.sampling import SamplingRequest


def constraint(request: SamplingRequest) -> StructuredOutput | None:
    """What the answer's text has to be, None if it is free.

    Raises:
        ApiError: two constraints are asked for, or one is empty.
    """
    found: dict[str, dict[str, Any]] = {}
    wanted = request.response_format
    if wanted is not None and wanted.json_schema is not None:
        found["response_format"] = {"json": wanted.json_schema.schema_}
    elif wanted is not None and wanted.type == "json_object":
        found["response_format"] = {"json_object": True}
    for kind in ("json", "regex", "choice", "grammar"):
        value = getattr(request, f"guided_{kind}")
        if value is not None:
            found[f"guided_{kind}"] = {kind: value}
    if request.structured_outputs is not None:
        found["structured_outputs"] = request.structured_outputs.model_dump(by_alias=True, exclude_none=True)
    try:
        constraints = [StructuredOutput(**fields) for fields in found.values()]
    except ConfigError as error:
        raise bad_request(str(error)) from None
    if len(constraints) > 1:
        raise bad_request(f"{' and '.join(found)} constrain the same answer; set only one of them")
    return constraints[0] if constraints else None
