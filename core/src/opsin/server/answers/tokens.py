"""Tokens of texts and chats, and back. Knows nothing of HTTP."""

from __future__ import annotations

from typing import Any

from opsin.server.http.errors import bad_request
from opsin.server.schema.prompts import DetokenizeRequest, TokenizeRequest
from opsin.server.schema.responses import Text, Tokens
from opsin.server.serving import Serving


class Tokenization:
    """The tokenizer of one model."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def tokenize(self, request: TokenizeRequest) -> Tokens:
        """Ids of a text, or of a chat with its pictures expanded.

        Raises:
            ApiError, RequestError: the text is empty, or the chat cannot be rendered or does not fit.
        """
        serving = self._serving
        serving.check(request.model)
        tokenizer: Any = serving.frontend.tokenizer
        if request.prompt is not None:
            special = request.add_special_tokens is not False
            ids = await serving.engine.in_pool(tokenizer.encode, request.prompt, add_special_tokens=special)
        else:
            options = request.options(tools=request.tools or ())
            ids = list((await serving.chat_prompt(request, options, min_new_tokens=0)).token_ids)
        strs = tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
        return Tokens(count=len(ids), max_model_len=serving.info.max_model_len, tokens=ids, token_strs=strs)

    async def detokenize(self, request: DetokenizeRequest) -> Text:
        """Text of ids.

        Raises:
            ApiError: an id is out of vocabulary.
        """
        serving = self._serving
        serving.check(request.model)
        size = serving.info.vocab_size
        if any(not 0 <= token < size for token in request.tokens):
            raise bad_request(f"a token id is out of vocabulary; expected 0 to {size - 1}", "tokens")
        tokenizer = serving.frontend.tokenizer
        text = await serving.engine.in_pool(tokenizer.decode, request.tokens, skip_special_tokens=False)
        return Text(prompt=text)
