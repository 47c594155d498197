"""What settings say of models, by name. Imports nothing: settings are read before torch is."""

from typing import Literal

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
Tune = Literal["lora", "full"]
ValueTrunk = Literal["shared", "own"]
HeadKind = Literal["single", "ensemble", "posterior", "brme"]
HEAD_KINDS: tuple[HeadKind, ...] = ("single", "ensemble", "posterior", "brme")
