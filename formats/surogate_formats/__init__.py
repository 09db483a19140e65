"""What the bytes of a quantized weight mean: formats, layouts, checkpoints and artifacts. numpy only, no torch."""
