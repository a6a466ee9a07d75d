"""Jobs of many requests: rows from a file or a folder in, a line of JSON for each answer out."""
