"""What a user writes -> what the engine computes: conversations, media, prompts. Safe in any thread."""
