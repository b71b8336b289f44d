"""Cross-entropy and linear cross-entropy."""
