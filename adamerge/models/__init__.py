"""How a CLIP is loaded and called, and its zero-shot heads (floor 3)."""
