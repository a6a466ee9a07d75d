"""One module for each kind of answer: request in, answer out. They know nothing of HTTP."""
