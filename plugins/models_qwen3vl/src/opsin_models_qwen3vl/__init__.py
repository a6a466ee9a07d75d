"""Qwen3-VL for opsin: images, videos with times in the text, features for the first layers."""
