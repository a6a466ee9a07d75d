"""Idefics3, SmolVLM and SmolVLM2 for opsin: SigLIP over squares of a picture, in front of a Llama decoder."""
