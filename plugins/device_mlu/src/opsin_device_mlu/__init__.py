"""Cambricon MLU370 cards as a device of opsin."""
