"""GPU models as catalogs, markets and drivers spell them, brought to one name.

``H100`` alone is three cards that differ by a third in speed, so the form factor is part of the
name. Where a provider does not tell it, the card is unknown rather than guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tessera.model.datasheet import bf16_flops


@dataclass(frozen=True)
class Card:
    """A GPU model.

    ``family`` is what SkyPilot's accelerator names and vast.ai's GPU names begin with; ``reported``
    is a part of the name by which ``nvidia-smi`` tells it from its relatives.
    """

    name: str
    family: str
    architecture: str
    reported: str

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s of the data sheet."""
        found = bf16_flops(self.reported)
        assert found is not None, f"{self.name} has no figure in tessera.model.datasheet"
        return found[1]


# In order: the first whose pattern is found in a name is meant.
_KNOWN = (
    (Card("B200", "B200", "Blackwell", "B200"), r"\bB200"),
    (Card("H200 NVL", "H200", "Hopper", "H200 NVL"), r"\bH200[ _-]?NVL"),
    (Card("H200", "H200", "Hopper", "H200"), r"\bH200"),
    (Card("H100 PCIe", "H100", "Hopper", "H100 PCIe"), r"\bH100[ _-]?PCI"),
    (Card("H100 NVL", "H100", "Hopper", "H100 NVL"), r"\bH100[ _-]?NVL"),
    (Card("H100 SXM", "H100", "Hopper", "H100 80GB HBM3"), r"\bH100([ _-]?SXM|[ _-]80GB[ _-]HBM3)"),
    (Card("A100", "A100", "Ampere", "A100"), r"\bA100"),
    (Card("L40S", "L40S", "Ada", "L40S"), r"\bL40S"),
    (Card("RTX 5090", "RTX", "Blackwell", "RTX 5090"), r"\bRTX[ _-]?5090"),
    (Card("RTX 4090", "RTX", "Ada", "RTX 4090"), r"\bRTX[ _-]?4090"),
)
CARDS = tuple(card for card, _ in _KNOWN)


def card_named(text: str) -> Card | None:
    """The card that a driver, a market or a person calls so; None if it could be several or none.

    >>> card_named("NVIDIA H100 80GB HBM3").name, card_named("1x-H100_SXM-32-65536").name
    ('H100 SXM', 'H100 SXM')
    """
    # An underscore is a letter to a regular expression; here it parts words.
    plain = text.replace("_", " ")
    return next((card for card, name in _KNOWN if re.search(name, plain, re.IGNORECASE)), None)


def card_of_offer(provider: str, instance_type: str, accelerator: str) -> Card | None:
    """The card of a SkyPilot catalog row.

    The instance type tells more than the accelerator (Lambda's H100 is ``gpu_1x_h100_sxm5`` or
    ``gpu_1x_h100_pcie``, vast.ai's ``1x-H100_SXM-...``); RunPod calls the PCIe card H100 alone.
    """
    found = card_named(instance_type) or card_named(accelerator)
    if found is None and provider.lower() == "runpod" and accelerator == "H100":
        return card_named("H100 PCIe")
    return found
