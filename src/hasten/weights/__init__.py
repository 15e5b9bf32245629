"""How numbers are stored: formats, tensors, artifacts, the store of packed weights. No device, no method."""
