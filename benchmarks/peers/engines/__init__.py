"""The engines, each behind `PeerSide`; every module runs in the environment of its own engine."""
