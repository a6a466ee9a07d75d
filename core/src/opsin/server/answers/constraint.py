"""``response_format``, ``structured_outputs`` and ``guided_*`` -> one `StructuredOutput`."""

from __future__ import annotations

from opsin.config import StructuredOutput
from opsin.errors import ConfigError
from opsin.server.http.errors import bad_request
from opsin.server.schema.sampling import SamplingRequest


def constraint(request: SamplingRequest) -> StructuredOutput | None:
    """What the answer's text has to be, None if it is free.

    Raises:
        ApiError: two constraints are asked for, or one is empty.
    """
    found: dict[str, StructuredOutput] = {}
    try:
        wanted = request.response_format
        if wanted is not None and wanted.type == "json_object":
            found["response_format"] = StructuredOutput(json_object=True)
        if wanted is not None and wanted.json_schema is not None:
            found["response_format"] = StructuredOutput(json=wanted.json_schema.schema_)
        if request.guided_json is not None:
            found["guided_json"] = StructuredOutput(json=request.guided_json)
        if request.guided_regex is not None:
            found["guided_regex"] = StructuredOutput(regex=request.guided_regex)
        if request.guided_choice is not None:
            found["guided_choice"] = StructuredOutput(choice=request.guided_choice)
        if request.guided_grammar is not None:
            found["guided_grammar"] = StructuredOutput(grammar=request.guided_grammar)
        if request.structured_outputs is not None:
            given = request.structured_outputs
            found["structured_outputs"] = StructuredOutput(
                json=given.json_,
                json_object=bool(given.json_object),
                regex=given.regex,
                choice=given.choice,
                grammar=given.grammar,
            )
    except ConfigError as error:
        raise bad_request(str(error)) from None
    if len(found) > 1:
        raise bad_request(f"{' and '.join(found)} constrain the same answer; set only one of them")
    return next(iter(found.values()), None)
