"""Qwen2.5-VL for opsin: images, videos by absolute time, a tower that attends within windows."""
