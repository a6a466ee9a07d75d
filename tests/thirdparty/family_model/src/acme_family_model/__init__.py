"""A family as they were written for API 1.0: a vision tower in front of a decoder, whose head may be tied."""
