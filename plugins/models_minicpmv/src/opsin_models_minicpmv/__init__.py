"""MiniCPM-V 2.0, 2.5 and 2.6 for opsin: sliced pictures, video frames, embeddings as input."""
