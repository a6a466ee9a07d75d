"""The CPU as an opsin device."""
