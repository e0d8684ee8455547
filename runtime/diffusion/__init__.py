"""The mathematics of denoising: model evaluations, guidance and conditioning."""
