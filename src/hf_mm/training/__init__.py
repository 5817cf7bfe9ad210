"""hf_mm."""
