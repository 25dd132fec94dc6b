"""Mixed-precision GGUF files for Mixture-of-Experts models, without calibration data."""

__version__ = "0.1.0"
