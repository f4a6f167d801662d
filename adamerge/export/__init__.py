"""Results as files: the merged model, its heads, its coefficients and where it all came from (floor 6)."""

from adamerge.export.coefficients import (
    SavedCoefficients,
    read_coefficients,
    write_coefficients,
    write_coefficients_csv,
)
from adamerge.export.manifest import write_manifest
from adamerge.export.model_card import loading_snippet, model_card
from adamerge.export.writers import write_heads, write_open_clip_folder

__all__ = [
    "SavedCoefficients",
    "loading_snippet",
    "model_card",
    "read_coefficients",
    "write_coefficients",
    "write_coefficients_csv",
    "write_heads",
    "write_manifest",
    "write_open_clip_folder",
]
