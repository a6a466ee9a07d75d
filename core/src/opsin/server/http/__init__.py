"""HTTP itself: the body in, events and errors out, API keys, admission, clients that leave."""
