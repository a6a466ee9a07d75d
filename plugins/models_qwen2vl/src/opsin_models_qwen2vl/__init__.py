"""Qwen2-VL for opsin: images, videos, M-RoPE, embeddings as input."""
