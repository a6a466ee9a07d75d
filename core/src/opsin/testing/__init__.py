"""PUBLIC: the contract suites a plugin runs on itself."""
