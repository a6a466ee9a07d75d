"""A simulated Cambricon MLU370: a torch device ``mlu``, a fake ``torch_mlu`` and a fake ``torch_mlu_ops``.

For tests only, in a process of its own (a torch backend cannot be taken out again):

    python -m tests.mlu_sim -m pytest tests/mlu/simulated
    python -m tests.mlu_sim --ops 1.8.0 -m opsin doctor --device mlu --selftest
    python -m tests.mlu_sim --switch gelu=tanh --switch names=hidden -m opsin doctor --device mlu

Tensors have real strides and real aliasing; every op runs on the CPU over the same bytes. What the card does
not do, or does otherwise, the simulator does not do, or does likewise: see `card` and `dispatch`. It needs
torch >= 2.9 (private constructors) and was written against 2.13. Not simulated: graphs, pinned memory, time,
``copy.deepcopy`` and ``torch.load`` onto the device.
"""

from tests.mlu_sim.card import CARD, Card
from tests.mlu_sim.install import install, installed, use_ops
from tests.mlu_sim.switches import SWITCHES, Switches

__all__ = ["CARD", "SWITCHES", "Card", "Switches", "install", "installed", "use_ops"]
