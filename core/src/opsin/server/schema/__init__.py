"""What requests and answers look like: pydantic models of the OpenAI API's JSON."""
