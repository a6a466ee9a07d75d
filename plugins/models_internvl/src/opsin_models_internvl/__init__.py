"""InternVL 2.5, 3 and 3.5 for opsin: InternViT over tiles, in front of a Qwen or Llama decoder."""
