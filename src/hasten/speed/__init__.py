"""What a model costs to run, and how fast it should be: `hasten estimate`, and the predictions of others."""

from hasten.speed.cost import (
    Cost,
    Load,
    Product,
    cost,
    kv_read_bytes,
    load_of,
    on_gpu,
    page_bytes,
    prompt_flops,
    read_bytes,
    stored_bytes,
)
from hasten.speed.forecast import Forecast, Range, estimate, forecast
from hasten.speed.pace import Ceilings, Efficiency, Pace, Piece, Spent, Step

__all__ = [
    "Ceilings",
    "Cost",
    "Efficiency",
    "Forecast",
    "Load",
    "Pace",
    "Piece",
    "Product",
    "Range",
    "Spent",
    "Step",
    "cost",
    "estimate",
    "forecast",
    "kv_read_bytes",
    "load_of",
    "on_gpu",
    "page_bytes",
    "prompt_flops",
    "read_bytes",
    "stored_bytes",
]
