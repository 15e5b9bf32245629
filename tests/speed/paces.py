"""A machine whose every time is written here, and shapes to estimate on it."""

from __future__ import annotations

from hasten.core import Attention, Block, FeedForward, Head, ModelSpec, Rotary
from hasten.speed.fit import Calibration, Curve, Point, Weighing

TOY = ModelSpec(
    "llama",
    1000,
    64,
    4096,
    (Block(Attention(4, 2, 32, rotary=Rotary(32)), FeedForward(128)),) * 3,
    head=Head(tied=True),
)
"""3 layers: q 128 x 64, k and v 64 x 64, o 64 x 128, gate and up 128 x 64, down 64 x 128; head 1000 x 64."""
ROWS = (1, 8, 64, 512)


def curve(fixed_us: float, unit_ns: float, each_ns: float, error: float = 0.02) -> Curve:
    """Lines whose slope is `unit_ns` and `each_ns` a row."""
    return Curve(
        tuple(Point(rows, fixed_us * 1e-6, (unit_ns + each_ns * rows) * 1e-9, error) for rows in ROWS)
    )


def machine(noise: float = 0.0, splits: bool = True) -> Calibration:
    """Formats w4 and bf16; a round figure for everything."""
    curves = {}
    for mode in ("answer", "prompt"):
        for name, unit in (("w4", 0.02), ("bf16", 0.06)):
            curves[f"linear {name} {mode}"] = curve(4, unit, 0.001)
        for kind in ("int", "bf16"):
            curves[f"norm {kind} {mode}"] = curve(1, 0, 1)
            curves[f"gated {kind} {mode}"] = curve(0, 0, 1)
        curves[f"rope {mode}"] = curve(1, 0, 1)
    attentions = {
        f"{kind} {mode} 64": Weighing((5e-6, 1e-9, 1e-11, 4e-12), 0.05)
        for kind in ("bf16", "int8")
        for mode in ("answer", "prompt")
    }
    return Calibration(
        cpu="toy",
        isa="amx",
        threads=2,
        curves=curves,
        attentions=attentions,
        choose_s=1e-10,
        step_s=1e-4,
        answer_s=1e-5,
        noise=noise,
        canary_s=(0.01, 0.002),
        seconds=30.0,
        repeated=0,
        splits=splits,
    )
