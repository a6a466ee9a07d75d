"""``opsin bench``: how fast a model or a running server is, with drawn pictures or one's own.

`settings` has what a user may set, `prompts` makes the requests, `offline` measures a model in this process,
`serving` a server, and `summary` makes figures, tables and files of what they saw.
"""
