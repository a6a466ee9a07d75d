"""What a user writes -> what the engine computes: conversations, media, placeholders, prompts. Usable from any thread."""
