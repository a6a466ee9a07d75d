"""LLaVA-1.5 and LLaVA-NeXT for opsin: CLIP or SigLIP in front of a Llama-like decoder."""
