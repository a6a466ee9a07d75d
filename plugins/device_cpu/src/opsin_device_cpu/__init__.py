"""The CPU as a device of opsin."""
