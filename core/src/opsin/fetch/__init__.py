"""Media that requests name by URL -> bytes, guarded against misuse."""
