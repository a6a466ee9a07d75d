"""Requests -> steps -> tokens: scheduling, the caches, the device behind its wall, sampling, text."""
