"""How quantised checkpoints store weights: GPTQ, AWQ, AutoRound, compressed-tensors, bitsandbytes, FP8."""
