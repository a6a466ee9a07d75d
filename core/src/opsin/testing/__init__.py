"""PUBLIC: the contract suites a plugin runs on itself, and the toy model."""
